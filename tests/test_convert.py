"""convert/: conversion in both directions, refused inputs, --overwrite, signals and uploads."""

import functools
import io
import json
import os
import pickle
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType

import huggingface_hub
import numpy as np
import pytest
import torch
import transformers
import yaml
from huggingface_hub import ModelCard, constants
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForImageClassification

import convert_focal_to_hf
import convert_hf_to_focal
import golden_cases
import model_card
import original
import output_files
from conftest import ROOT
from focal_hf import FocalBackbone, FocalConfig, FocalForImageClassification, FocalForMaskedImageModeling
from focal_hf.compatibility_focal import AutoImageProcessor
from forked_scripts import ForkedScript
from hub_server import serve
from messages import ConversionError
from original import RELEASED
from settings_files import read_settings

CHECKPOINTS = {
    name: golden_cases.FOLDER / name
    for name in (
        "base_released.pth",
        "base_bare.pth",
        "base_training.pth",
        "base_paddle.pdparams",
        "base_paddle2021.pdparams",
    )
}
RELEASED_PTH = CHECKPOINTS["base_released.pth"]
MODEL_FILES = ["README.md", "config.json", "conversion.json", "model.safetensors", "preprocessor_config.json"]
CONVERT_TO_HF = [sys.executable, str(ROOT / "convert" / "convert_focal_to_hf.py")]


def write_settings(path: Path, settings: dict) -> str:
    path.write_text(yaml.safe_dump(settings))
    return str(path)


def equal_bitwise(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        tensor.dtype == second[name].dtype
        and tensor.shape == second[name].shape
        and tensor.contiguous().numpy().tobytes() == second[name].contiguous().numpy().tobytes()
        for name, tensor in first.items()
    )


def assert_logits(folder: Path, case: golden_cases.Golden) -> None:
    model = AutoModelForImageClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        logits = model(case.pixel_values).logits
    expected = case.answers["logits"]
    assert (logits - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.fixture(scope="session")
def case() -> golden_cases.Golden:
    return golden_cases.case("base")


@pytest.fixture(scope="session")
def config(case, tmp_path_factory) -> str:
    """A YAML file with the settings of `base`, some of them in another file that it names under BASE."""
    folder = tmp_path_factory.mktemp("config")
    model = dict(case.config["MODEL"])
    write_settings(folder / "network.yaml", {"MODEL": {"FOCAL": model.pop("FOCAL"), "NUM_CLASSES": 1}})
    return write_settings(folder / "base.yaml", {"BASE": ["network.yaml"], "DATA": case.config["DATA"], "MODEL": model})


@pytest.fixture(scope="session")
def conversions(config, tmp_path_factory) -> dict[str, tuple[Path, int, str, str]]:
    """Converts every checkpoint by the command line. Holds the folder, exit code, stdout and stderr of each."""
    folder = tmp_path_factory.mktemp("converted")
    # Without a network, yacs and Paddle.
    results = {}
    for name, file in CHECKPOINTS.items():
        options = ("--checkpoint", file, "--config", config, "--output", folder / name)
        ended = ForkedScript(CONVERT_TO_HF[1], *options, folder=folder).wait()
        results[name] = (folder / name, ended.returncode, ended.stdout, ended.stderr)
    return results


@pytest.fixture(scope="session")
def converted(conversions) -> Path:
    return conversions["base_released.pth"][0]


@pytest.fixture
def convert(config, tmp_path) -> Callable:
    """A function that converts a checkpoint, given as a file or a state dict, in this process."""

    def convert(checkpoint: Path | dict, *options: str, config: str = config, output: Path = tmp_path / "out") -> Path:
        if isinstance(checkpoint, dict):
            checkpoint, state = tmp_path / "given.pth", checkpoint
            torch.save({"model": state}, checkpoint)
        convert_focal_to_hf.main(
            ["--checkpoint", str(checkpoint), "--config", config, "--output", str(output), *options]
        )
        return output

    return convert


# --- Converted models -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_every_checkpoint_gives_the_logits_of_the_original(conversions, case, name):
    folder, code, stdout, stderr = conversions[name]
    assert (code, stderr) == (0, "")
    assert sorted(file.name for file in folder.iterdir()) == MODEL_FILES
    assert_logits(folder, case)
    assert "Converted all 88 tensors" in stdout
    assert [path.name for path in folder.parent.iterdir() if path.name.startswith(".")] == []


def test_all_checkpoints_give_the_same_weights(conversions):
    files = {(folder / "model.safetensors").read_bytes() for folder, *_ in conversions.values()}
    assert len(files) == 1


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_dtype_in_both_directions(convert, converted, dtype):
    folder = convert(RELEASED_PTH, "--dtype", dtype)
    exact = load_file(converted / "model.safetensors")
    for name, tensor in load_file(folder / "model.safetensors").items():
        assert torch.equal(tensor, exact[name].to(getattr(torch, dtype)))
    assert json.loads((folder / "config.json").read_text())["dtype"] == dtype
    convert_hf_to_focal.main(["--model", str(folder), "--output", str(folder / "back.pth")])
    back = torch.load(folder / "back.pth")["model"]
    assert back["head.weight"].dtype == getattr(torch, dtype)


def test_overflow_in_float16_is_refused(convert, case, tmp_path):
    state = dict(case.state_dict)
    state["head.weight"] = state["head.weight"] * 1e6
    with pytest.raises(ConversionError, match=r"not finite in torch\.float16"):
        convert(state, "--dtype", "float16")
    assert not (tmp_path / "out").exists()


def test_image_processor_crops_seven_eighths(converted):
    processor = AutoImageProcessor.from_pretrained(converted)
    assert (processor.size["shortest_edge"], processor.crop_size["height"]) == (37, 32)
    processor = convert_focal_to_hf.image_processor(FocalConfig())
    assert processor.size["shortest_edge"] == 256
    assert (processor.crop_size["height"], processor.crop_size["width"]) == (224, 224)
    assert (processor.image_mean, processor.image_std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert (processor.resample, processor.do_center_crop) == (Image.Resampling.BICUBIC, True)


@pytest.mark.parametrize("name", ["grey", "rectangle", "focalv2_ties"])
def test_image_processor_fits_channels_and_shape_of_the_model(convert, tmp_path, name):
    case = golden_cases.case(name)
    settings = write_settings(tmp_path / f"{name}.yaml", case.config)
    folder = convert(case.state_dict, config=settings)
    assert_logits(folder, case)
    white = 255 if name == "grey" else (255, 255, 255)
    image = Image.new("L" if name == "grey" else "RGB", (200, 300), white)
    pixel_values = AutoImageProcessor.from_pretrained(folder)(image, return_tensors="pt")["pixel_values"]
    assert pixel_values.shape[1:] == case.pixel_values.shape[1:]
    assert (pixel_values > 2).all()  # all pixels are white, so the crop is inside the image
    assert f'.convert("{image.mode}")' in (folder / "README.md").read_text()


def test_topk_indices_come_from_the_checkpoint(convert, tmp_path):
    case = golden_cases.case("focalv2_ties")
    state = dict(case.state_dict)
    folder = convert(state, config=write_settings(tmp_path / "ties.yaml", case.config))
    written = load_file(folder / "model.safetensors")
    computed = FocalForImageClassification(FocalConfig.from_pretrained(folder)).state_dict()
    ours = {
        name: f"focal.encoder.{name}".replace("attn.topk_cloest_indice", "attention.neighborhood.nearest_index")
        for name in state
        if "topk_cloest_indice" in name
    }
    assert all(torch.equal(written[ours[name]], state[name]) for name in ours)
    assert any(not torch.equal(computed[ours[name]], state[name]) for name in ours)
    convert_hf_to_focal.main(["--model", str(folder), "--output", str(tmp_path / "back.pth")])
    assert equal_bitwise(torch.load(tmp_path / "back.pth")["model"], state)


def test_image_size_option_overrides_the_settings(convert, tmp_path):
    case = golden_cases.case("rectangle")
    settings = write_settings(tmp_path / "square.yaml", {"DATA": {"IMG_SIZE": 64}, "MODEL": case.config["MODEL"]})
    folder = convert(case.state_dict, "--image-size", *map(str, case.config["DATA"]["IMG_SIZE"]), config=settings)
    assert_logits(folder, case)


def test_compared_models_have_aligned_tensors(convert, case, monkeypatch):
    """Kernels may round by alignment, which safetensors does not keep. Logits near zero would differ."""
    compute_outputs, aligned = convert_focal_to_hf.compute_outputs, []

    def recorded(model):
        aligned.append(all(parameter.data_ptr() % 64 == 0 for parameter in model.parameters()))
        return compute_outputs(model)

    monkeypatch.setattr(convert_focal_to_hf, "compute_outputs", recorded)
    convert(case.state_dict)
    assert aligned == [True] * 3


@pytest.mark.parametrize(
    ("name", "drops"), [("odd_map", False), ("odd_map_twice", True), ("conv_embed_remainder", True)]
)
def test_drop_remainder_is_set_if_the_image_size_leaves_a_remainder(convert, tmp_path, name, drops):
    case = golden_cases.case(name)
    folder = convert(case.state_dict, config=write_settings(tmp_path / "odd.yaml", case.config))
    assert_logits(folder, case)
    assert FocalConfig.from_pretrained(folder).drop_remainder == drops
    convert_hf_to_focal.main(["--model", str(folder), "--output", str(tmp_path / "back.pth")])
    assert equal_bitwise(torch.load(tmp_path / "back.pth")["model"], case.state_dict)


def test_image_sizes_that_the_original_cannot_run_are_refused(convert, tmp_path):
    case = golden_cases.case("conv_embed")
    settings = write_settings(tmp_path / "conv.yaml", case.config)
    with pytest.raises(ConversionError, match=r"must have even sides, .*Give the image size .* with --image-size"):
        convert(case.state_dict, "--image-size", "76", config=settings)


def test_imagenet_labels(case, convert, tmp_path):
    labels = json.loads(convert_focal_to_hf.LABEL_FILES["imagenet"].read_text())
    assert len(set(labels)) == 1000
    assert (labels[0], labels[134], labels[517]) == ("tench, Tinca tinca", "crane (bird)", "crane (machine)")
    state, model = dict(case.state_dict), case.config["MODEL"] | {"NUM_CLASSES": 1000}
    state["head.weight"], state["head.bias"] = torch.randn(1000, 32), torch.randn(1000)
    settings = write_settings(tmp_path / "thousand.yaml", case.config | {"MODEL": model})
    written = FocalConfig.from_pretrained(convert(state, "--labels", "imagenet", config=settings))
    assert written.id2label == dict(enumerate(labels))
    assert written.label2id == {label: number for number, label in enumerate(labels)}
    # Without --labels, a model with 1000 classes does not get the names of ImageNet.
    written = FocalConfig.from_pretrained(convert(state, config=settings, output=tmp_path / "unnamed"))
    assert written.id2label == {number: f"LABEL_{number}" for number in range(1000)}


def test_labels_of_another_model_are_refused(convert, case):
    with pytest.raises(ConversionError, match="--labels imagenet has names for 1000 classes; this model has 5"):
        convert(RELEASED_PTH, "--labels", "imagenet")
    with pytest.raises(ConversionError, match="--labels needs a classifier"):
        convert(backbone_state(case, (0, 1)), "--labels", "imagenet")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["focal_tiny_patch4_window7_224", "focalv2_tiny_useconv_patch4_window7_224"])
def test_released_model_by_name(convert, name):
    case = golden_cases.case(name)
    folder = convert(case.state_dict, config=name)
    assert_logits(folder, case)
    assert FocalConfig.from_pretrained(folder).id2label[999] == "toilet tissue, toilet paper, bathroom tissue"
    assert len(ModelCard.load(folder / "README.md").data.eval_results) == 2


# --- The model card ---------------------------------------------------------------------------------------------------


def accuracies(card: ModelCard) -> list[float]:
    return [result.metric_value for result in card.data.eval_results or []]


def source(file: str) -> dict[str, str | int]:
    return {"source": "local file", "file": file, "size": 12345, "sha256": "0" * 64}


@pytest.mark.parametrize("name", RELEASED)
def test_card_of_a_released_model(name):
    card = model_card.model_card(name, FocalConfig(), released=True, source=source("a.pth"), model_id="me/focal")
    assert (card.data.license, card.data.pipeline_tag) == ("mit", "image-classification")
    assert accuracies(card) == list(model_card.PUBLISHED_ACCURACIES[name])
    assert "not measured again" in card.text
    assert "Copyright (c) Microsoft Corporation" in card.text
    assert 'from_pretrained("me/focal")' in card.text
    assert "yang2021focal" in card.text
    assert "Paddle" not in card.text
    assert f"converted from `a.pth`: 12,345 bytes, SHA-256 `{'0' * 64}`" in card.text


def test_card_of_a_released_model_from_paddle():
    name = "focal_base_useconv_patch4_window7_224"
    card = model_card.model_card(name, FocalConfig(), released=True, source=source("a.pdparams"), model_id="x")
    assert accuracies(card) == [84.2, 97.1, 84.18, 96.61]
    assert "| PaddleViT's evaluation of its copy | 84.18 | 96.61 |" in card.text
    assert "The authors' figure is probably a mistake." in card.text
    assert card.data.license == "mit"
    assert "Apache License 2.0" in card.text


def test_card_of_a_model_with_settings_from_a_file(converted, case, convert):
    card = ModelCard.load(converted / "README.md")
    assert accuracies(card) == []
    assert "Evaluation" not in card.text
    assert "whoever trained them decides on the licence" in card.text
    assert "Apache" not in card.text
    assert "Apache" in (convert(CHECKPOINTS["base_paddle.pdparams"]) / "README.md").read_text()


# --- Conversion to the original ---------------------------------------------------------------------------------------


def test_round_trip_gives_the_same_bytes(converted, case, tmp_path):
    back = tmp_path / "back.pth"
    convert_hf_to_focal.main(["--model", str(converted), "--output", str(back)])
    assert equal_bitwise(torch.load(back)["model"], torch.load(RELEASED_PTH)["model"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back.pth", "back.yaml"]

    again = tmp_path / "again"
    settings = str(tmp_path / "back.yaml")
    convert_focal_to_hf.main(["--checkpoint", str(back), "--config", settings, "--output", str(again)])
    for name in ("model.safetensors", "config.json", "preprocessor_config.json"):
        assert (again / name).read_bytes() == (converted / name).read_bytes()


def test_checkpoint_is_replaced_only_with_overwrite(converted, tmp_path):
    arguments = ["--model", str(converted), "--output", str(tmp_path / "back.pth")]
    (tmp_path / "back.yaml").write_text("mine")
    with pytest.raises(ConversionError, match=r"back\.yaml exists\. Add --overwrite"):
        convert_hf_to_focal.main(arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["back.yaml"]
    convert_hf_to_focal.main([*arguments, "--overwrite"])
    assert len(torch.load(tmp_path / "back.pth")["model"]) == 88


# Changes to a model with maps of 18 x 18 and 9 x 9 tokens and windows of 4 x 4.
UNSUPPORTED_BY_ORIGINAL = {
    "remainder": {"image_size": 76},
    "remainder and positions": {"image_size": 74, "use_absolute_embeddings": True},
    "conv embed": {"image_size": 76, "use_conv_embed": True, "drop_remainder": True},
    "conv embed, 4n + 3": {"image_size": 75, "use_conv_embed": True, "drop_remainder": True},
    "shift": {"use_shift": True, "depths": (2, 1)},
    "topk": {"attention_type": "topk"},
    "size": {"image_size": 60_000},
}


def write_unconvertible_model(folder: Path, kind: str, converted: Path) -> None:
    config = FocalConfig.from_pretrained(converted)
    if kind == "masked":
        FocalForMaskedImageModeling(config).save_pretrained(folder)
    elif kind == "resnet":
        folder.mkdir()
        (folder / "config.json").write_text('{"model_type": "resnet"}')
    elif kind == "activation":
        config.hidden_act = "relu"
        FocalForImageClassification(config).save_pretrained(folder)
    elif kind == "dropout":
        config.attention_probs_dropout_prob = 0.1
        FocalForImageClassification(config).save_pretrained(folder)
    elif kind == "stem":
        config.out_features = ["stem", "stage2"]
        FocalBackbone(config).save_pretrained(folder)
    elif kind in UNSUPPORTED_BY_ORIGINAL:
        changes = {"image_size": 72, "window_size": 4, "expand_sizes": (1, 1)} | UNSUPPORTED_BY_ORIGINAL[kind]
        FocalForImageClassification(FocalConfig(**config.to_dict() | changes)).save_pretrained(folder)
    elif kind == "remainder in a backbone":
        config.drop_remainder = True
        FocalBackbone(config).save_pretrained(folder)
    elif kind == "topk in a backbone":
        changes = {"attention_type": "topk", "image_size": 72, "window_size": 4}
        FocalBackbone(FocalConfig(**config.to_dict() | changes)).save_pretrained(folder)
    elif kind == "contradiction":
        config.save_pretrained(folder)
        settings = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(settings | {"num_heads": [1]}))
    elif kind == "pipe":
        folder.mkdir()
        os.mkfifo(folder / "config.json")
    elif kind == "pickle":
        config.save_pretrained(folder)
        torch.save(FocalForImageClassification(config).state_dict(), folder / "pytorch_model.bin")
    elif kind == "truncated":
        FocalForImageClassification(config).save_pretrained(folder)
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:50000])


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("masked", "must be an image classifier or a backbone with all its weights.* shape: classifier.bias"),
        ("resnet", "is a resnet model"),
        ("activation", "supports only hidden_act = gelu; this model has hidden_act = relu"),
        (
            "dropout",
            "supports only attention_probs_dropout_prob = 0; this model has .* = 0.1",
        ),
        ("stem", "returns the map of the stem, for which the original has no norm"),
        ("remainder", "pads images of its image_size, 76 pixels, where the original drops"),
        ("remainder and positions", "pads images of its image_size, 74 pixels, where the original drops"),
        (
            "remainder in a backbone",
            "has drop_remainder=True, but the original backbones .* pad",
        ),
        (
            "conv embed",
            "with use_conv_embed, all maps that are downsampled .* the maps are 19 x 19, 9 x 9",
        ),
        ("conv embed, 4n + 3", r"no side of the image may be 4n \+ 3 pixels; image_size is 75"),
        ("shift", "with use_shift, maps must divide into windows; .* stage 1 has 18 x 18 tokens for windows of 4"),
        ("topk", "with focalv2, maps must divide into windows; .* stage 1 has 18 x 18 tokens for windows of 4"),
        (
            "topk in a backbone",
            "with focalv2, maps must divide into windows; .* stage 1 has 18 x 18 tokens for windows of 4",
        ),
        ("size", "needs tensors of 10,800,000,000 elements for one image; .* smaller image size than 60000"),
        ("contradiction", r"num_heads must hold one value for each of the 2 stages"),
        ("pickle", "no file named model.safetensors"),
        ("pipe", r"holds config\.json, which is neither a file nor a folder"),
        ("truncated", "cannot be loaded. Give a folder"),
        ("absent", "cannot be loaded. Give a folder"),
    ],
)
def test_unconvertible_models_are_refused(converted, tmp_path, kind, message, monkeypatch, capsys):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    write_unconvertible_model(tmp_path / "model", kind, converted)
    with pytest.raises(ConversionError, match=message):
        convert_hf_to_focal.main(["--model", str(tmp_path / "model"), "--output", str(tmp_path / "back.pth")])
    assert not list(tmp_path.glob("*back*"))
    assert "Writing" not in capsys.readouterr().out


def test_blocks_with_the_same_buffers_are_converted(tmp_path):
    """As in all released models: the buffers of their blocks are larger together than the rest of the file."""
    settings = {"embed_dim": 4, "depths": (6,), "num_heads": (1,), "image_size": 56, "encoder_stride": 4}
    settings |= {"focal_levels": (2,), "focal_windows": (7,), "expand_sizes": (3,)}
    FocalForImageClassification(FocalConfig(**settings)).save_pretrained(tmp_path / "model")
    convert_hf_to_focal.main(["--model", str(tmp_path / "model"), "--output", str(tmp_path / "back.pth")])
    state = torch.load(tmp_path / "back.pth")["model"]
    assert len({tensor.data_ptr() for tensor in state.values()}) == len(state)


def test_code_beside_a_model_is_not_executed(tmp_path, monkeypatch, capsys):
    """transformers would ask the user whether to execute it."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))
    config = {"model_type": "other", "auto_map": {"AutoConfig": "code.OtherConfig"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "code.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')")
    with pytest.raises(ConversionError, match="cannot be loaded"):
        convert_hf_to_focal.main(["--model", str(tmp_path), "--output", str(tmp_path / "back.pth")])
    assert "[y/N]" not in capsys.readouterr().out
    assert not (tmp_path / "executed").exists()


def test_checkpoint_name_must_end_in_pth(converted, tmp_path):
    with pytest.raises(ConversionError, match=r"must end in \.pth"):
        convert_hf_to_focal.main(["--model", str(converted), "--output", str(tmp_path / "back.yaml")])


# --- Backbones of detectors and segmenters ----------------------------------------------------------------------------


def backbone_state(case: golden_cases.Golden, stages: Sequence[int]) -> dict[str, torch.Tensor]:
    """Returns the weights of a case without its head, with output norms for `stages`, counted from 0."""
    state = {name: value for name, value in case.state_dict.items() if name.partition(".")[0] not in ("norm", "head")}
    for stage in stages:
        channels = case.answers[f"stage{stage + 1}"].shape[-1:]
        for name in (f"norm{stage}.weight", f"norm{stage}.bias"):
            state[name] = golden_cases.weight(name, channels, "dense")
    return state


def assert_feature_maps(
    folder: Path, case: golden_cases.Golden, state: dict[str, torch.Tensor], stages: Sequence[int]
) -> None:
    """Compares the feature maps with the original's maps, normalised."""
    model = FocalBackbone.from_pretrained(folder).eval()
    with torch.no_grad():
        maps = model(case.pixel_values).feature_maps
    assert model.out_features == [f"stage{stage + 1}" for stage in stages]
    for stage, ours in zip(stages, maps, strict=True):
        theirs = case.answers[f"stage{stage + 1}"]
        norm = state[f"norm{stage}.weight"], state[f"norm{stage}.bias"]
        theirs = nn.functional.layer_norm(theirs, theirs.shape[-1:], *norm).permute(0, 3, 1, 2)
        assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()


@pytest.fixture
def training_log(monkeypatch) -> dict:
    """Entries that mmengine and mmcv save beside the weights, with objects of their own classes and of NumPy."""

    class HistoryBuffer:
        def mean(self):
            pass

    HistoryBuffer.__module__ = module = "mmengine.logging.history_buffer"
    HistoryBuffer.__qualname__, HistoryBuffer.mean.__qualname__ = "HistoryBuffer", "HistoryBuffer.mean"
    HistoryBuffer.mean.__module__ = module
    for name in ("mmengine", module):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules[module].HistoryBuffer = HistoryBuffer
    log = HistoryBuffer()
    log.history, log.methods = np.arange(3.0), {"mean": HistoryBuffer.mean}
    return {
        "meta": {"CLASSES": ("cat", "dog"), "hook_msgs": {"best_score": np.float64(0.4)}},
        "message_hub": {"log_scalars": {"loss": log}},
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 1e-4, "params": [0]}]},
    }


@pytest.mark.parametrize(
    ("heads", "stages"),
    [(("neck", "rpn_head", "roi_head"), (0, 1)), (("decode_head", "auxiliary_head"), (1,)), ((), (0, 1))],
)
def test_backbone_round_trip(convert, case, training_log, tmp_path, monkeypatch, capsys, heads, stages):
    """The checkpoints are a detector, a segmenter that uses only the last map, and a bare backbone."""
    state = backbone_state(case, stages)
    checkpoint = tmp_path / "dense.pth"
    if heads:
        whole = {f"{head}.{name}": torch.ones(2) for head in heads for name in ("conv.weight", "norm.num_batches")}
        whole |= {f"backbone.{name}": tensor for name, tensor in state.items()}
        torch.save(training_log | {"state_dict": whole}, checkpoint)
    else:
        torch.save(state, checkpoint)

    folder = convert(checkpoint)
    assert_feature_maps(folder, case, state, stages)
    assert sorted(file.name for file in folder.iterdir()) == MODEL_FILES[:-1]
    assert "id2label" not in (folder / "config.json").read_text()
    card = ModelCard.load(folder / "README.md")
    assert card.data.pipeline_tag == "image-feature-extraction"
    monkeypatch.chdir(tmp_path)
    exec(card.text.split("```python")[1].split("```")[0], found := {})
    assert len(found["feature_maps"]) == len(stages)
    progress = capsys.readouterr().out
    assert f"Converted all {len(state)} tensors" in progress
    if heads:
        assert f"Ignored {2 * len(heads)} tensors outside the backbone, of {', '.join(sorted(heads))}\n" in progress

    convert_hf_to_focal.main(["--model", str(folder), "--output", str(tmp_path / "back.pth")])
    assert equal_bitwise(torch.load(tmp_path / "back.pth")["model"], state)


def test_topk_backbone_keeps_its_indices(convert, tmp_path):
    case = golden_cases.case("focalv2_ties")
    state = backbone_state(case, (0, 1))
    folder = convert(state, config=write_settings(tmp_path / "ties.yaml", case.config))
    assert_feature_maps(folder, case, state, (0, 1))


def test_backbone_with_a_remainder_of_the_image_size(convert, tmp_path):
    """It is padded: the absolute positions are 14 x 14, and 13 x 13 without the remainder."""
    config = FocalConfig(image_size=53, embed_dim=4, depths=(1,), num_heads=(1,), focal_levels=(1,), focal_windows=(1,),
                         expand_sizes=(3,), use_absolute_embeddings=True, encoder_stride=4)  # fmt: skip
    FocalBackbone(config).save_pretrained(tmp_path / "model")
    convert_hf_to_focal.main(["--model", str(tmp_path / "model"), "--output", str(tmp_path / "back.pth")])
    again = convert(tmp_path / "back.pth", config=str(tmp_path / "back.yaml"))
    assert equal_bitwise(load_file(again / "model.safetensors"), load_file(tmp_path / "model" / "model.safetensors"))


def damage_backbone(state: dict[str, torch.Tensor], kind: str) -> dict[str, torch.Tensor]:
    if kind == "norm":
        del state["norm0.bias"]
    elif kind == "no norms":
        return {name: value for name, value in state.items() if not name.startswith("norm")}
    elif kind == "stage":
        state["norm2.weight"] = torch.ones(64)
    elif kind == "unknown":
        state["layers.1.extra.weight"] = torch.ones(2)
    elif kind == "weight":
        del state["layers.0.blocks.0.mlp.fc1.bias"]
    elif kind == "nan":
        state["norm1.weight"][0] = torch.nan
    elif kind == "swin":
        return {
            name.replace("downsample.proj", "downsample.reduction"): value
            for name, value in state.items()
            if "pool_layers" not in name and "_to_" not in name
        }
    elif kind == "resnet":
        return {"conv1.weight": torch.ones(2), "layer1.0.bn1.weight": torch.ones(2)}
    elif kind == "converted":
        return {"focal.embeddings.norm.weight": torch.ones(2)}
    elif kind == "none":
        return {}
    return state


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("norm", r"lacks norm0\.bias, which a model"),
        ("no norms", r"must have an output norm for each map that it returns, such as norm1\.weight"),
        ("stage", r"holds norm2\.weight, which a model of these settings does not have"),
        ("unknown", r"holds layers\.1\.extra\.weight, which a model of these settings does not have"),
        ("weight", r"lacks layers\.0\.blocks\.0\.mlp\.fc1\.bias, which a model"),
        ("nan", r"norm1\.weight holds values that are not finite"),
        ("swin", r"holds a Swin Transformer: only Swin has layers\.0\.downsample\.reduction\.weight"),
        ("resnet", r"names begin with conv1, layer1\. Check that it is a Focal Transformer"),
        ("converted", "converted already"),
        ("none", "no tensor of a Focal Transformer: its tensor names begin with bbox_head, neck"),
    ],
)
def test_damaged_backbones_are_refused(convert, case, tmp_path, kind, message):
    state = {"neck.conv.weight": torch.ones(2), "bbox_head.conv.weight": torch.ones(2)}
    state |= {
        f"backbone.{name}": tensor for name, tensor in damage_backbone(backbone_state(case, (0, 1)), kind).items()
    }
    torch.save({"state_dict": state, "meta": {}}, tmp_path / "dense.pth")
    with pytest.raises(ConversionError, match=message):
        convert(tmp_path / "dense.pth")
    assert [path.name for path in tmp_path.iterdir()] == ["dense.pth"]


# --- Refused inputs ---------------------------------------------------------------------------------------------------


class CreatesFileWhenUnpickled:
    """An object that creates a file if it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def test_unpickling_creates_the_file(tmp_path):
    pickle.loads(pickle.dumps(CreatesFileWhenUnpickled(tmp_path / "ran")))
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["trap.pth", "dense.pth", "legacy.pth", "plain.pth", "trap.pdparams", "old.pdparams"])
def test_checkpoints_run_no_code(convert, tmp_path, name):
    marker, file = tmp_path / "ran", tmp_path / name
    content = {"norm.weight": torch.zeros(2) if name.endswith(".pth") else 0, "trap": CreatesFileWhenUnpickled(marker)}
    if name == "dense.pth":
        content = {"state_dict": {"backbone.norm0.weight": torch.zeros(2)}, "meta": CreatesFileWhenUnpickled(marker)}
    if name in ("trap.pth", "dense.pth", "legacy.pth"):
        torch.save(content, file, _use_new_zipfile_serialization=name != "legacy.pth")
    else:
        file.write_bytes(pickle.dumps(content, protocol=4 if name == "trap.pdparams" else 2))
    with pytest.raises(ConversionError) as caught:
        convert(file)
    assert "Nothing in the file was run" in str(caught.value) or name == "plain.pth"
    assert not marker.exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "pickled",
    [
        b"cnumpy\ndtype\n(S'O'\ntR.",  # an array of objects
        b"c_codecs\nencode\n(Vx\nVrot13\ntR.",  # an encoding other than pickle's own
        b"cbuiltins\neval\n(V1\ntR.",
        b"cnumpy\nload\n(Vx\ntR.",
        b"Pname\n.",  # a persistent id
    ],
)
def test_paddle_files_with_other_objects_are_refused(convert, tmp_path, pickled):
    (tmp_path / "file.pdparams").write_bytes(pickled)
    with pytest.raises(ConversionError, match=r"numpy\.dtype|_codecs\.encode|builtins\.eval|numpy\.load|persistent"):
        convert(tmp_path / "file.pdparams")


def damage_state_dict(state: dict, kind: str) -> dict:
    if kind == "missing":
        del state["layers.1.blocks.0.mlp.fc1.bias"]
    elif kind == "surplus":
        state["layers.0.blocks.0.attn.extra"] = torch.zeros(1)
    elif kind == "shape":
        state["head.weight"] = state["head.weight"].T.contiguous()
    elif kind == "nan":
        state["norm.weight"] = torch.full_like(state["norm.weight"], torch.nan)
    elif kind == "index":
        name = "layers.0.blocks.0.attn.relative_position_index"
        state[name] = state[name] + 1  # not in place, since tests share the tensors
    elif kind == "number":
        state["norm.weight"] = 3
    elif kind == "sparse":
        state["head.weight"] = state["head.weight"].to_sparse()
    return state


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", r"lacks layers\.1\.blocks\.0\.mlp\.fc1\.bias, which a model"),
        ("surplus", r"holds layers\.0\.blocks\.0\.attn\.extra, which a model of these settings does not have"),
        ("shape", r"head\.weight has shape \(32, 5\) in the checkpoint and shape \(5, 32\)"),
        ("nan", r"norm\.weight holds values that are not finite"),
        ("index", r"layers\.0\.blocks\.0\.attn\.relative_position_index has other values than"),
        ("number", r"type int under 'norm\.weight'"),
        ("sparse", r"made by torch\._utils\._rebuild_sparse_tensor under 'head\.weight'"),
    ],
)
def test_damaged_state_dicts_are_refused(convert, case, tmp_path, kind, message):
    with pytest.raises(ConversionError, match=message):
        convert(damage_state_dict(dict(case.state_dict), kind))
    assert [path.name for path in tmp_path.iterdir()] == ["given.pth"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"DEPTHS": [2, 1]}, "which a model of these settings does not have"),
        ({"DEPTHS": [2, 4]}, "lacks layers.1.blocks.2"),
        ({"USE_CONV_EMBED": True}, "patch_embed.proj.weight has shape"),
        ({"NUM_HEADS": [4, 4]}, "in a model of these settings. Check that --config"),
        ({"EMBED_DIM": 10, "NUM_HEADS": [3, 4]}, "must divide among its heads"),
        ({"DEPTHS": 2}, r"MODEL.FOCAL.DEPTHS must be a list of integers, such as \[2, 2, 6, 2\]; got 2"),
        ({"DEPTHS": []}, "The settings do not describe a model: depths must name at least one stage"),
        ({"FOCAL_STAGES": None}, "MODEL.FOCAL.FOCAL_STAGES must be a list of integers"),
        ({"FOCAL_LEVELS": [2, -1]}, r"every value of focal_levels must be at least 0 .*; got \(2, -1\)"),
        ({"QK_SCALE": "auto"}, "MODEL.FOCAL.QK_SCALE must be a number from 0 to 10000, such as 0.125; got 'auto'"),
        ({"USE_SHIFT": 1}, "MODEL.FOCAL.USE_SHIFT must be True or False, such as False; got 1"),
        ({"EMBED_DIM": "wide"}, "MODEL.FOCAL.EMBED_DIM must be an integer, such as 96; got 'wide'"),
        ({"FOCAL_POOL": "sum"}, "focal_pool must be one of"),
        ({"WINDOWS": 7}, "MODEL.FOCAL has no WINDOWS"),
        ({8: 9}, "The names of settings must be strings; got 8"),
    ],
)
def test_settings_of_another_model_are_refused(convert, case, tmp_path, changes, message):
    model = case.config["MODEL"] | {"FOCAL": case.config["MODEL"]["FOCAL"] | changes}
    settings = write_settings(tmp_path / "other.yaml", case.config | {"MODEL": model})
    with pytest.raises(ConversionError, match=message):
        convert(RELEASED_PTH, config=settings)
    assert not (tmp_path / "out").exists()


def test_settings_are_parsed_like_yacs(tmp_path):
    """Strings are parsed as Python literals, and lists may have more values than stages."""
    (tmp_path / "yacs.yaml").write_text("""
        DATA: {IMG_SIZE: "(64, 96)"}
        MODEL:
            NUM_CLASSES: "5"
            DROP_PATH_RATE: 1e-1
            FOCAL:
                DEPTHS: (2, 1)
                FOCAL_STAGES: "[5, 1, 1]"
                QK_SCALE: "0.5"
                EMBED_DIM: "0x30"
                USE_SHIFT: "True"
                FOCAL_POOL: "'fc'"
    """)
    assert original.config_from_settings(read_settings(str(tmp_path / "yacs.yaml"))) == FocalConfig(
        image_size=(64, 96),
        num_labels=5,
        drop_path_rate=0.1,
        depths=(2, 1),
        num_heads=[3, 6],
        qk_scale=0.5,
        embed_dim=48,
        use_shift=True,
        focal_levels=[1, 1],
        focal_windows=[7, 5],
        expand_sizes=[3, 3],
        focal_stages=[1],
        encoder_stride=8,
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("MODEL: [1", "cannot be read as YAML"),
        ("just words", "must hold settings such as"),
        ("MODEL: 3", "MODEL in the settings must hold further settings; it holds 3"),
        ("MODEL: {TYPE: [focal]}", r"MODEL.TYPE must be focal or focalv2; got \['focal'\]"),
        ("BASE: 3", "must list YAML files; it holds 3"),
        ("MODEL: {NUM_CLASSES: ten}", "NUM_CLASSES must be an integer of at least 1; got 'ten'"),
        ("MODEL: {NUM_CLASSES: 0}", "NUM_CLASSES must be an integer of at least 1; got 0"),
        ("BASE: nowhere.yaml", "nowhere.yaml under BASE, but that file does not exist"),
        ("BASE: ['settings.yaml']", "form a cycle"),
        (None, "is neither a file nor the name of a released model"),
    ],
)
def test_unreadable_settings_are_refused(convert, tmp_path, text, message):
    if text is not None:
        (tmp_path / "settings.yaml").write_text(text)
    with pytest.raises(ConversionError, match=message):
        convert(RELEASED_PTH, config=str(tmp_path / "settings.yaml"))


def write_other_file(folder: Path, kind: str) -> Path:
    """Writes a file that is not a checkpoint, and that a user could give by mistake."""
    if kind == "folder":
        return folder
    suffix = ".pdparams" if kind.startswith("paddle") else ".pth"
    file = folder / f"file{suffix}"
    if kind.endswith("truncated"):
        whole = CHECKPOINTS[f"base_{'paddle' if suffix == '.pdparams' else 'released'}{suffix}"]
        file.write_bytes(whole.read_bytes()[:60000])
    elif kind.endswith("text"):
        file.write_text("hello")
    elif kind == "empty":
        file.touch()
    elif kind == "safetensors":
        save_file({"focal.layernorm.weight": torch.zeros(2)}, file)
    elif kind == "converted":
        torch.save({"focal.layernorm.weight": torch.zeros(2)}, file)
    elif kind == "tensor":
        torch.save(torch.zeros(2), file)
    return file


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("truncated", "is not a PyTorch checkpoint, or is damaged or incomplete"),
        ("paddle truncated", "is not a Paddle checkpoint, or is damaged or incomplete"),
        ("text", "is not a PyTorch checkpoint"),
        ("paddle text", "is not a Paddle checkpoint"),
        ("empty", "is not a PyTorch checkpoint"),
        ("safetensors", "use convert_hf_to_focal.py"),
        ("folder", "use convert_hf_to_focal.py"),
        ("converted", "use convert_hf_to_focal.py"),
        ("tensor", r"an object made by torch\._utils\._rebuild_tensor_v2; expected a state dict"),
        ("absent", "does not exist, or is not a file"),
    ],
)
def test_other_files_are_refused(convert, tmp_path, kind, message):
    with pytest.raises(ConversionError, match=message):
        convert(write_other_file(tmp_path, kind))
    assert not (tmp_path / "out").exists()


@pytest.fixture
def process_state() -> Iterator[None]:
    """Restores what `run_script` changes in the process, which other tests would notice."""
    handlers = {number: signal.getsignal(number) for number in output_files._SIGNALS}
    loggers = transformers.utils.logging, huggingface_hub.utils.logging
    levels = [logger.get_verbosity() for logger in loggers]
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    for logger, level in zip(loggers, levels, strict=True):
        logger.set_verbosity(level)


def test_errors_are_one_line_without_a_traceback(process_state):
    def fail():
        raise ConversionError("first\n  second \x1b[2J")

    with pytest.raises(SystemExit) as caught:
        output_files.run_script(fail)
    assert caught.value.code == r"error: first second \x1b[2J"


def test_full_disk_leaves_no_files(convert, converted, tmp_path):
    """In its place, a limit of the size of a file, at which writing fails in the same way."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(ConversionError, match=r"Writing .*out failed: .*File too large"):
            convert(RELEASED_PTH)
        with pytest.raises(ConversionError, match=r"Writing .*back\.pth failed: .* Check the free space of"):
            convert_hf_to_focal.main(["--model", str(converted), "--output", str(tmp_path / "back.pth")])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("attribute", ["weight", "bias"])
def test_wrongly_written_weights_are_refused(convert, tmp_path, monkeypatch, attribute):
    save = FocalForImageClassification.save_pretrained

    def save_wrongly(model, folder):
        # The bias of the key adds the same to all scores of a query, so the logits do not change.
        changed = (
            model.classifier.weight
            if attribute == "weight"
            else (model.focal.encoder.layers[1].blocks[0].attention.k_proj.bias)
        )
        with torch.no_grad():
            changed.add_(0.01)
            save(model, folder)
            changed.sub_(0.01)

    monkeypatch.setattr(FocalForImageClassification, "save_pretrained", save_wrongly)
    message = (
        "gives other logits"
        if attribute == "weight"
        else r"differs from the checkpoint in layers\.1\.blocks\.0\.attn\.qkv"
    )
    with pytest.raises(ConversionError, match=message):
        convert(RELEASED_PTH)
    assert list(tmp_path.iterdir()) == []


def test_wrongly_written_backbone_is_refused(convert, case, tmp_path, monkeypatch):
    save = FocalBackbone.save_pretrained

    def save_wrongly(model, folder):
        with torch.no_grad():
            model.hidden_states_norms["stage1"].weight.add_(0.01)
            save(model, folder)
            model.hidden_states_norms["stage1"].weight.sub_(0.01)

    monkeypatch.setattr(FocalBackbone, "save_pretrained", save_wrongly)
    with pytest.raises(ConversionError, match="gives other feature maps than the checkpoint"):
        convert(backbone_state(case, (0, 1)))
    assert [path.name for path in tmp_path.iterdir()] == ["given.pth"]


# --- Existing outputs -------------------------------------------------------------------------------------------------


def write_old_model(folder: Path) -> Path:
    """Writes a folder that --overwrite may replace."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "swin"}')
    (folder / "modeling_focal.py").write_text("old")
    return folder


def test_overwrite_replaces_a_model_behind_a_link(convert, tmp_path):
    folder, link = write_old_model(tmp_path / "models" / "old"), tmp_path / "link"
    link.symlink_to(folder)
    with pytest.raises(ConversionError, match="add --overwrite"):
        convert(RELEASED_PTH, output=link)
    assert (folder / "modeling_focal.py").read_text() == "old"
    convert(RELEASED_PTH, "--overwrite", output=link)
    assert sorted(file.name for file in folder.iterdir()) == MODEL_FILES
    assert link.is_symlink()
    assert sorted(path.name for path in tmp_path.rglob("*") if path.name not in MODEL_FILES) == [
        "link",
        "models",
        "old",
    ]


def test_overwrite_fills_an_empty_folder_and_makes_parents(convert, tmp_path):
    (tmp_path / "empty").mkdir()
    convert(RELEASED_PTH, "--overwrite", output=tmp_path / "empty")
    convert(RELEASED_PTH, output=tmp_path / "new" / "folder")
    assert sorted(path.name for path in tmp_path.rglob("model.safetensors")) == ["model.safetensors"] * 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "new"]


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ({"letter.txt": ""}, "holds no model"),
        ({"config.json": '{"port": 8080}'}, "holds no model"),
        ({"config.json": '["model_type"]'}, "holds no model"),
        ({"config.json": '{"model_type": ["focal"]}'}, "holds no model"),
        ({"config.json": '{"model_type": "server"}'}, "holds no model"),
        ({"config.json": "[" * 10_000}, "holds no model"),
        ({"config.json/config.json": ""}, "holds no model"),
        (
            {"config.json": '{"model_type": "focal"}', ".env": "", "a.txt": ""},
            r"holds \.env, which",
        ),
        ({"config.json": '{"model_type": "focal"}', "README.md/cat.png": ""}, r"holds README\.md, which"),
        ({"config.json": '{"model_type": "focal"}', "model.safetensors": "link"}, r"holds model\.safetensors, which"),
        ({"config.json": '{"model_type": "focal"}', "given.pth": "given"}, r"holds the input .*given\.pth"),
        ("file", "is a file"),
        ("file above", r"cannot be written: \S+home is not a folder, or is write-protected"),
        ("working folder", "is the working folder"),
    ],
    ids=str,
)
def test_overwrite_keeps_folders_with_other_files(convert, tmp_path, contents, message, monkeypatch):
    folder, checkpoint = tmp_path / "home", RELEASED_PTH
    if contents in ("file", "file above"):
        folder.write_text("mine")
        folder = folder / "out" / "folder" if contents == "file above" else folder
    elif contents == "working folder":
        monkeypatch.chdir(write_old_model(folder))
    else:
        for name, text in contents.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).symlink_to(RELEASED_PTH) if text == "link" else (folder / name).write_text(text)
            checkpoint = folder / name if text == "given" else checkpoint
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ConversionError, match=message):
        convert(checkpoint, "--overwrite", output=folder)
    assert sorted(tmp_path.rglob("*")) == before


def test_failed_move_restores_the_old_folder(convert, tmp_path, monkeypatch):
    folder = write_old_model(tmp_path / "out")
    rename = Path.rename

    def fail(path, target):
        if path.parent.name == "new":
            raise OSError("no")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="no"):
        convert(RELEASED_PTH, "--overwrite")
    assert (folder / "modeling_focal.py").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("there", [("back.pth", "back.yaml"), ("back.pth",), ("back.yaml",), ()])
@pytest.mark.parametrize("stopped_at", range(5))
def test_checkpoint_and_settings_are_replaced_together(tmp_path, monkeypatch, there, stopped_at):
    """After an interruption before any rename, a checkpoint never lies beside the settings of the other one."""
    outputs = [tmp_path / "back.pth", tmp_path / "back.yaml"]
    for name in there:
        (tmp_path / name).write_text("old")
    old = dict.fromkeys(there, "old")
    rename, calls = Path.rename, []

    def found() -> dict[str, str]:
        return {output.name: output.read_text() for output in outputs if output.exists()}

    def rename_or_stop(path, target):
        assert found() == old or "back.pth" not in found()
        if len(calls) == stopped_at:
            raise KeyboardInterrupt
        calls.append(path)
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", rename_or_stop)
    stopped = False
    try:
        with output_files.staging_folder(*outputs) as staging:
            for output in outputs:
                (staging / output.name).write_text("new")
            output_files.move_into_place(staging, *outputs)
    except KeyboardInterrupt:
        stopped = True
    assert stopped == (stopped_at < len(there) + 2)
    assert found() == (old if stopped else {"back.pth": "new", "back.yaml": "new"})
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(found())


@pytest.mark.parametrize("stopped_at", range(5))
def test_interrupted_clean_up_is_repeated(tmp_path, monkeypatch, stopped_at):
    """A signal comes while the staging folder of a failed run is deleted, and its handler cleans up again."""
    outputs = tmp_path / "back.pth", tmp_path / "back.yaml"
    for output in outputs:
        output.write_text("old")
    unlink, rmdir, calls = os.unlink, os.rmdir, []

    def stop_or(function, *arguments, **options):
        if len(calls) == stopped_at:
            raise KeyboardInterrupt
        calls.append(function)
        return function(*arguments, **options)

    folder = tmp_path / ".back.pth.partial"
    for name in ("new", "old"):
        (folder / name).mkdir(parents=True)
    for output in outputs:
        (folder / "new" / output.name).write_text("new")
    outputs[0].rename(folder / "old" / outputs[0].name)  # after which the second output could not be moved
    monkeypatch.setattr(os, "unlink", functools.partial(stop_or, unlink))
    monkeypatch.setattr(os, "rmdir", functools.partial(stop_or, rmdir))
    with pytest.raises(KeyboardInterrupt):
        output_files._clean_up(folder, outputs)
    monkeypatch.undo()
    output_files._clean_up(folder, outputs)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"back.pth": "old", "back.yaml": "old"}


def test_linked_settings_are_not_replaced(converted, tmp_path):
    (tmp_path / "mine.yaml").write_text("mine")
    (tmp_path / "back.yaml").symlink_to(tmp_path / "mine.yaml")
    with pytest.raises(ConversionError, match=r"back\.yaml is a symbolic link"):
        convert_hf_to_focal.main(["--model", str(converted), "--output", str(tmp_path / "back.pth"), "--overwrite"])
    assert (tmp_path / "mine.yaml").read_text() == "mine"


def signal_when_exists(seen: str, number: int, *arguments: object, parent: Path) -> int:
    """Runs the converter and sends a signal when `seen` exists in its staging folder. Returns the exit code."""
    run = ForkedScript(CONVERT_TO_HF[1], *arguments, folder=parent)
    deadline = time.monotonic() + 120
    while run.poll() is None and time.monotonic() < deadline:
        if any((folder / seen).exists() for folder in parent.glob(".out.*.partial")):
            os.kill(run.processes[0].pid, number)
            break
        time.sleep(0.001)
    ended = run.wait(timeout=60)
    assert "Traceback" not in ended.stderr
    return ended.returncode


@pytest.mark.parametrize(
    ("seen", "numbers"),
    [
        (".", (signal.SIGKILL, signal.SIGKILL)),
        ("new/out/model.safetensors", (signal.SIGKILL, signal.SIGKILL)),
        ("new/out/README.md", (signal.SIGKILL, signal.SIGKILL)),
        ("new/out/config.json", (signal.SIGTERM, signal.SIGHUP)),
        ("new/out/model.safetensors", (signal.SIGINT, signal.SIGQUIT)),
    ],
)
def test_signals_leave_no_incomplete_output(config, tmp_path, seen, numbers):
    """The first conversion is to a new folder, the second to a folder that is overwritten."""
    codes = []
    for name, number in zip(("new", "old"), numbers, strict=True):
        output = tmp_path / name / "out"
        write_old_model(output) if name == "old" else output.parent.mkdir()
        options = ("--checkpoint", RELEASED_PTH, "--config", config, "--output", output, "--overwrite")
        codes.append(signal_when_exists(seen, number, *options, parent=output.parent))

    killed = signal.SIGKILL in numbers
    assert codes == [-number if killed else 128 + number for number in numbers]
    assert not (tmp_path / "new" / "out").exists()
    assert sorted(file.name for file in (tmp_path / "old" / "out").iterdir()) == ["config.json", "modeling_focal.py"]
    if not killed:
        assert list(tmp_path.glob("*/.*")) == []


def test_ignored_signals_stay_ignored(process_state):
    """nohup ignores SIGHUP."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    output_files.run_script(lambda: None)
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    assert signal.getsignal(signal.SIGTERM) == output_files._exit_on_signal


# --- The Hub ----------------------------------------------------------------------------------------------------------


def push(config: str, output: Path, repository: str) -> subprocess.CompletedProcess:
    arguments = ["--checkpoint", RELEASED_PTH, "--config", config, "--output", output, "--push-to-hub", repository]
    return ForkedScript(CONVERT_TO_HF[1], *arguments, folder=output.parent, online=True).wait()


def test_push_to_hub(config, tmp_path):
    with serve(tmp_path / "hub", "me/focal", uploads=(uploads := [])):
        result = push(config, tmp_path / "out", "focal")  # the user's name is added
    assert result.returncode == 0, result.stderr
    written = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    assert {file.name: file.read_bytes() for file in (tmp_path / "hub").iterdir()} == written
    assert sorted(written) == MODEL_FILES
    assert [upload.split()[0] for upload in uploads] == ["create", "lfs", "commit"]


def test_failed_push_keeps_the_folder(config, tmp_path):
    with serve(tmp_path / "hub", "me/focal"):
        result = push(config, tmp_path / "out", "org/forbidden")
    assert result.returncode == 1
    assert len(result.stderr.splitlines()) == 1
    assert "403" in result.stderr
    assert "hf upload org/forbidden" in result.stderr
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == MODEL_FILES


def test_push_to_hub_is_checked_before_the_conversion(convert, tmp_path, monkeypatch, capsys):
    for name in ("a/b/c", ""):
        with pytest.raises(SystemExit):
            convert(RELEASED_PTH, "--push-to-hub", name)
        message = f"argument --push-to-hub: expected a repository name such as me/focal-tiny; got {name!r}"
        assert message in capsys.readouterr().err
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("hub.get_token", lambda: None)
    with pytest.raises(ConversionError, match="hf auth login"):
        convert(RELEASED_PTH, "--push-to-hub", "me/focal")
    assert list(tmp_path.iterdir()) == []
