"""`load_backbone_weights`: a checkpoint of Focal into the backbone of a head."""

import re

import pytest
import torch
import transformers
from packaging.version import Version
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import load_file, save_file
from transformers import DetrConfig, DetrForObjectDetection, SwinConfig, SwinForImageClassification

from focal_hf import (
    FocalBackbone,
    FocalConfig,
    FocalForImageClassification,
    FocalForMaskedImageModeling,
    FocalModel,
    load_backbone_weights,
)
from heads import (
    DETR,
    HEADS,
    PAGE,
    SMALL,
    STAGES,
    backbone_of,
    build,
    committed_table,
    installed_heads,
    small_config,
    small_detr,
    train_step,
)
from hub_server import REVISION, serve
from small_models import BOTH, randomized

IN_DETR = "model.backbone.model."


def saved(model, folder):
    """With other weights than those of `detr`."""
    with torch.no_grad():
        for parameter in randomized(model).parameters():
            parameter.neg_()
    model.save_pretrained(folder)
    return folder


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@BOTH
@pytest.mark.parametrize(
    "model_class", [FocalForImageClassification, FocalForMaskedImageModeling, FocalModel, FocalBackbone]
)
def test_the_backbone_of_any_model_is_loaded_and_the_rest_stays(model_class, attention_type, tmp_path):
    checkpoint = saved(model_class(small_config(attention_type)), tmp_path)
    stages = {"out_features": ["stage2", "stage4"]}
    model = small_detr(attention_type, **stages).to(torch.bfloat16).train()
    before, modules, parameters = state(model), list(model.modules()), list(model.parameters())
    assert load_backbone_weights(model, checkpoint) is model

    expected = FocalBackbone.from_pretrained(checkpoint, dtype=torch.bfloat16, **stages).state_dict()
    if model_class is not FocalBackbone:
        expected = {name: tensor for name, tensor in expected.items() if not name.startswith("hidden_states_norms.")}
    expected = before | {f"{IN_DETR}{name}": tensor for name, tensor in expected.items()}
    assert expected.keys() == before.keys()
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == before[name].dtype, name
        assert torch.equal(tensor, expected[name]), name
    assert all(one is other for one, other in zip(model.modules(), modules, strict=True))
    assert all(one is other for one, other in zip(model.parameters(), parameters, strict=True))
    assert model.training


@BOTH
@pytest.mark.parametrize(
    "sizes",
    [
        {"window_size": 4, "expand_sizes": (2, 2, 2, 2)},
        {"image_size": 128},
        {"image_size": 32},
        {"image_size": 90, "drop_remainder": True},
    ],
)
def test_other_sizes_are_fitted_as_by_from_pretrained(attention_type, sizes, tmp_path):
    checkpoint = saved(FocalForImageClassification(small_config(attention_type)), tmp_path)
    backbone = backbone_of(load_backbone_weights(small_detr(attention_type, **sizes), checkpoint))
    expected = FocalBackbone.from_pretrained(checkpoint, **sizes)
    for name, tensor in expected.focal.state_dict().items():
        assert torch.equal(backbone.focal.state_dict()[name], tensor), name


REJECTED_BY_5_4 = ("DabDetrForObjectDetection", "GroundingDinoForObjectDetection", "OmDetTurboForObjectDetection")


@pytest.mark.parametrize("name", re.findall(r"`(\w+)` \| works", committed_table()))
def test_heads_are_trained_from_a_classifier(name, tmp_path):
    if name not in installed_heads():
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    if name in REJECTED_BY_5_4 and Version(transformers.__version__) < Version("5.5"):
        pytest.skip("transformers 5.4 rejects the default settings of this model")
    model = build(name, FocalConfig)
    settings = model.config.backbone_config.to_dict()
    classifier = FocalForImageClassification(FocalConfig(**settings))
    load_backbone_weights(model, saved(classifier, tmp_path))
    for path, tensor in backbone_of(model).focal.state_dict().items():
        assert torch.equal(tensor, classifier.focal.state_dict()[path]), path
    train_step(model, HEADS[name].inputs())


def test_by_name_from_the_hub(tmp_path):
    """From a server in the Hub's place."""
    saved(FocalForImageClassification(small_config()), tmp_path / "repository")
    expected = FocalModel.from_pretrained(tmp_path / "repository").embeddings.patch_embeddings.projection.weight
    with serve(tmp_path / "repository", "org/focal"):
        for options in ({}, {"revision": REVISION, "cache_dir": str(tmp_path / "other")}):
            model = load_backbone_weights(small_detr(), "org/focal", **options)
            weight = model.model.backbone.model.focal.embeddings.patch_embeddings.projection.weight
            assert torch.equal(weight, expected)
    assert (tmp_path / "other" / "models--org--focal").is_dir()


def without(folder, *names, **more):
    file = folder / "model.safetensors"
    weights = {name: tensor for name, tensor in load_file(file).items() if name not in names}
    save_file(weights | more, file, metadata={"format": "pt"})
    return folder


def two(folder):
    return torch.nn.ModuleList([small_detr(), small_detr()])


def with_swin(folder):
    swin = SwinConfig(**SMALL, out_features=STAGES)
    return DetrForObjectDetection(DetrConfig(backbone_config=swin, **DETR))


def partly_elsewhere(folder):
    model = small_detr()
    backbone_of(model).focal.encoder.layers[1].to("meta")
    return model


def adapted(folder):
    model = small_detr()
    inject_adapter_in_model(LoraConfig(target_modules=["q_proj"]), backbone_of(model))
    return model


PATCHES = "focal.embeddings.patch_embeddings.projection.bias"
TABLE = "focal.encoder.layers.0.blocks.0.attention.neighborhood.relative_position_bias_table_to_neighbors"


@pytest.mark.parametrize(
    ("model", "checkpoint", "message"),
    [
        (with_swin, saved, "needs a model with one FocalBackbone in it; DetrForObjectDetection has 0. Build it with"),
        (two, saved, "ModuleList has 2: 0.model.backbone.model, 1.model.backbone.model."),
        (
            lambda folder: small_detr(depths=(1, 1, 2, 1), use_shift=True),
            saved,
            "depths is (1, 1, 1, 1) there and (1, 1, 2, 1) here; use_shift is False there and True here. Build",
        ),
        (
            lambda folder: small_detr(),
            lambda model, folder: saved(SwinForImageClassification(SwinConfig(**SMALL)), folder),
            "is a model of type swin, not focal. Give a checkpoint of a Focal model.",
        ),
        (
            lambda folder: small_detr(),
            lambda model, folder: without(saved(model, folder), PATCHES, TABLE),
            f"it lacks 2 weights: {PATCHES}, {TABLE}, and 0 have no place.",
        ),
        (
            lambda folder: small_detr(),
            lambda model, folder: without(saved(model, folder), extra=torch.zeros(1)),
            "it lacks 0 weights, and 1 have no place: extra. Convert or save it again.",
        ),
        (
            lambda folder: DetrForObjectDetection(DetrConfig(backbone_config=small_config(), **DETR)).to("meta"),
            saved,
            "is on the meta device and cannot hold weights",
        ),
        (partly_elsewhere, saved, "is on the meta device and cannot hold weights"),
        (adapted, saved, "8 weights have no place: "),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_changes(model, checkpoint, message, tmp_path):
    checkpoint = checkpoint(FocalForImageClassification(small_config()), tmp_path)
    model = model(tmp_path)
    before = state(model)
    with pytest.raises(ValueError, match=re.escape(message)):
        load_backbone_weights(model, checkpoint)
    for name, tensor in model.state_dict().items():
        assert tensor.is_meta or torch.equal(tensor, before[name]), name


def test_tensors_of_another_shape_are_refused_before_anything_changes(tmp_path):
    folder = without(saved(FocalForImageClassification(small_config()), tmp_path), **{PATCHES: torch.zeros(17)})
    model = small_detr()
    before = state(model)
    with pytest.raises(RuntimeError, match="mismatch"):
        load_backbone_weights(model, folder)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_examples_of_the_documentation_run(tmp_path, monkeypatch):
    saved(FocalForImageClassification(FocalConfig(depths=(1, 1, 1, 1))), tmp_path / "focal-tiny")
    monkeypatch.chdir(tmp_path)
    examples = {}
    exec("\n".join(re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)), examples)
    backbone, classifier = backbone_of(examples["model"]), FocalModel.from_pretrained("focal-tiny")
    for name, tensor in backbone.focal.state_dict().items():
        assert torch.equal(tensor, classifier.state_dict()[name]), name
