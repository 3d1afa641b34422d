"""Swin as a Focal Transformer: the same function as transformers' Swin, in all its settings."""

import copy
import hashlib
import itertools
import json
import re

import pytest
import torch
import transformers
from huggingface_hub import ModelCard, constants
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import SwinConfig, ViTImageProcessorPil
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.models.swin.modeling_swin import SwinDropPath

import convert_swin_to_focal
from conftest import ROOT
from focal_hf import FocalBackbone, FocalConfig, FocalForImageClassification, add_focal_levels, freeze
from focal_hf.modeling_focal import FocalDropPath
from focal_hf.visualization import record_attention
from forked_scripts import ForkedScript
from hub_server import REVISION, serve
from messages import ConversionError
from small_models import BEFORE_5_9, SWIN_OF_5_9, pixels, randomized
from swin import MODEL_CLASSES, config_from_swin, focal_from_swin, from_swin

SMALL = {"image_size": 32, "patch_size": 2, "embed_dim": 8, "depths": (1, 2, 2), "num_heads": (1, 2, 2)}
SMALL |= {"window_size": 4, "encoder_stride": 8, "num_labels": 5}


def random_swin(name="SwinForImageClassification", **changes):
    return randomized(getattr(transformers, name)(SwinConfig(**SMALL | changes)))


def tensors_of(outputs, size=None):
    """All floating-point outputs, those of the masked-image head without the padding that Swin reconstructs."""
    found = [outputs[key] for key in ("logits", "pooler_output", "last_hidden_state") if key in outputs]
    if "reconstruction" in outputs:
        found.append(outputs.reconstruction[:, :, : size[0], : size[1]])
    return [*found, *(outputs.get("feature_maps") or ()), *(outputs.get("reshaped_hidden_states") or ())]


TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-10}


def assert_close(one, other):
    """Equal within the tolerance, relative to the largest value where that is above 1."""
    tolerance = TOLERANCES[other.dtype] * max(1, other.abs().max().item())
    torch.testing.assert_close(one, other, rtol=0, atol=tolerance)


def assert_same_function(swin, focal, pixel_values, **options):
    """Equal outputs, and equal gradients of the pixels and of all weights."""
    for model in (swin, focal):
        model.zero_grad()
    inputs = [pixel_values.clone().requires_grad_() for _ in range(2)]
    of_swin, of_focal = (
        tensors_of(model(image, output_hidden_states=True, **given), pixel_values.shape[2:])
        for model, image, given in zip((swin, focal), inputs, (options, {}), strict=True)
    )
    assert len(of_swin) == len(of_focal) > 0
    for one, other in zip(of_focal, of_swin, strict=True):
        assert_close(one, other)
    for outputs in (of_swin, of_focal):
        sum(output.square().mean() for output in outputs).backward()
    gradients = {name: parameter.grad for name, parameter in swin.named_parameters() if parameter.grad is not None}
    expected = from_swin(swin.state_dict() | gradients, focal.config, type(focal))
    found = {name: parameter.grad for name, parameter in focal.named_parameters() if parameter.grad is not None}
    assert len(found) == len(gradients)
    tolerance = TOLERANCES[pixel_values.dtype] * max(gradient.abs().max() for gradient in gradients.values())
    for name, gradient in found.items():
        assert (gradient - expected[name]).abs().max() <= tolerance, name
    assert (inputs[1].grad - inputs[0].grad).abs().max() <= tolerance


@st.composite
def swins(draw):
    """A class of Swin, its settings, the height and width of an image that it can run, and options of the call."""
    name = draw(st.sampled_from(sorted(MODEL_CLASSES)))
    stages = draw(st.integers(1, 4))
    patch, window = draw(st.integers(1, 3)), draw(st.integers(1, 5))
    stride = patch * 2 ** (stages - 1)
    heads = [draw(st.sampled_from([1, 2, 4])) for _ in range(stages)]
    settings = {
        "image_size": draw(st.integers(stride, 40)),
        "patch_size": patch,
        "num_channels": draw(st.integers(1, 3)),
        "embed_dim": 4 * draw(st.integers(1, 2)),
        "depths": [draw(st.integers(1, 2)) for _ in range(stages)],
        "num_heads": heads,
        "window_size": window,
        "mlp_ratio": draw(st.sampled_from([0.5, 1, 2.3, 4])),
        "qkv_bias": draw(st.booleans()),
        "hidden_dropout_prob": draw(st.sampled_from([0.0, 0.3])),
        "attention_probs_dropout_prob": draw(st.sampled_from([0.0, 0.3])),
        "drop_path_rate": draw(st.sampled_from([0.0, 0.4])),
        "hidden_act": draw(st.sampled_from(["gelu", "relu", "gelu_new", "silu"])),
        "use_absolute_embeddings": draw(st.booleans()) and not BEFORE_5_9,
        "layer_norm_eps": draw(st.sampled_from([1e-5, 1e-12, 1e-2])),
        "encoder_stride": stride,
        "num_labels": draw(st.integers(0, 3)),
    }
    options = {}
    # Except in a backbone, Swin runs no map that is smaller than its window.
    least = 1 if name == "SwinBackbone" else (window - 1) * stride + 1
    size = [least + draw(st.integers(0, 2 * stride + 5)) for _ in range(2)]
    if settings["use_absolute_embeddings"]:
        options = {"interpolate_pos_encoding": True}
        size = [-(-side // patch) * patch for side in size]
    elif draw(st.booleans()):
        settings["image_size"] = (settings["image_size"], draw(st.integers(stride, 40)))
        settings["patch_size"] = (patch, patch)
    if name == "SwinForMaskedImageModeling":
        size = [-(-max(size) // stride) * stride] * 2  # Swin reconstructs square maps only
    if name == "SwinBackbone":
        names = ["stem", *(f"stage{stage}" for stage in range(1, stages + 1))]
        chosen = draw(st.sets(st.sampled_from(names), min_size=1))
        settings["out_features"] = [stage for stage in names if stage in chosen]
    return name, settings, size, options


@settings(deadline=None, max_examples=50, suppress_health_check=list(HealthCheck))
@given(swins())
def test_focal_computes_what_swin_computes(case):
    """In float64: among so many models, rounding in float32 exceeds any small tolerance in some."""
    name, changes, size, options = case
    swin = random_swin(name, **changes).double()
    images = pixels(2, swin.config.num_channels, *size).double()
    assert_same_function(swin, focal_from_swin(swin), images, **options)


@SWIN_OF_5_9
@pytest.mark.parametrize("name", ["SwinForImageClassification", "SwinBackbone"])
def test_absolute_positions_of_rectangular_images(name):
    """At the model's own size, which is the only one at which Swin has the right positions."""
    swin = random_swin(name, use_absolute_embeddings=True, image_size=(32, 48))
    assert_same_function(swin, focal_from_swin(swin), pixels(2, 3, 32, 48))


@SWIN_OF_5_9
def test_absolute_positions_where_patches_do_not_fill_the_image():
    swin = random_swin(use_absolute_embeddings=True, image_size=35, patch_size=2)
    focal = focal_from_swin(swin)
    assert focal.config.image_size == 34
    assert_same_function(swin, focal, pixels(2, 3, 34, 34))


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("sides", [(32, 32), (37, 54)])
def test_inference_on_a_cpu(attn_implementation, sides):
    """In chunks or densely, where the attention has no gradients."""
    swin = random_swin()
    focal = focal_from_swin(swin)
    focal.set_attn_implementation(attn_implementation)
    with torch.inference_mode():
        assert_close(focal(pixels(2, 3, *sides)).logits, swin(pixels(2, 3, *sides)).logits)


def test_masked_images():
    swin = random_swin("SwinForMaskedImageModeling")
    focal = focal_from_swin(swin)
    mask = torch.rand(2, 256, generator=torch.Generator().manual_seed(0)) < 0.5
    one, other = (model(pixels(2, 3, 32, 32), bool_masked_pos=mask) for model in (focal, swin))
    assert_close(one.loss, other.loss)
    assert_close(one.reconstruction, other.reconstruction)


def test_a_map_of_one_window_is_shifted_in_a_backbone_alone():
    """The same weights as classifier and as backbone: each is the Swin of its class, for small and large images."""
    classifier = random_swin(image_size=16, out_features=["stage1", "stage2", "stage3"])  # the last map: 2 x 2
    backbone = randomized(transformers.SwinBackbone(classifier.config))
    if hasattr(backbone, "swin"):
        backbone.swin.load_state_dict(classifier.swin.state_dict())
    else:  # transformers before 5.9
        backbone.load_state_dict(classifier.swin.state_dict(), strict=False)
    for side in (32, 41, 64):
        swin = random_swin(image_size=16)  # which has not seen another size: Swin forgets its shift at a small one
        assert_same_function(swin, focal_from_swin(swin), pixels(1, 3, side, side))
        focal = focal_from_swin(backbone)
        assert [block.attention.shift_of(4, 4) for block in focal.focal.encoder.layers[2].blocks] == [0, 2]
        assert_same_function(backbone, focal, pixels(1, 3, side, side))


@SWIN_OF_5_9
def test_dropout_and_stochastic_depth_are_in_the_same_places(monkeypatch):
    """Seen by factors in their stead."""
    monkeypatch.setattr(nn.Dropout, "forward", lambda self, inputs: inputs * (1 - self.p / 2))
    for drop_path in (SwinDropPath, FocalDropPath):
        monkeypatch.setattr(drop_path, "forward", lambda self, inputs: inputs * (1 - self.drop_prob / 3))
    swin = random_swin(hidden_dropout_prob=0.4, drop_path_rate=0.6)
    focal = focal_from_swin(swin)
    assert_same_function(swin.train(), focal.train(), pixels(2, 3, 32, 40))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_pre_norm": True, "downsample_type": "patch_merging"}, "use_pre_norm must be False"),
        ({"downsample_type": "merging"}, "downsample_type must be one of conv, patch_merging"),
        ({"attention_type": "topk", "swin_compatible": True}, "needs attention_type='focal'"),
    ],
)
def test_settings_that_contradict_each_other(changes, message):
    with pytest.raises(Exception, match=message):
        FocalConfig(**changes)


@pytest.mark.parametrize("drop_remainder", [False, True])
def test_patch_merging_in_a_focal_network(drop_remainder):
    """All levels, odd maps. Each output token depends on its four tokens alone, as with the convolution."""
    config = FocalConfig(
        image_size=32,
        embed_dim=8,
        num_heads=(1, 2, 2, 2),
        window_size=3,
        focal_windows=(3, 3, 1, 1),
        downsample_type="patch_merging",
        drop_remainder=drop_remainder,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    model = randomized(FocalBackbone(config))
    maps = model(pixels(1, 3, 60, 56)).feature_maps
    expected = [(15, 14), (7, 7), (3, 3), (1, 1)] if drop_remainder else [(15, 14), (8, 7), (4, 4), (2, 2)]
    assert [tuple(stage.shape[2:]) for stage in maps] == expected
    merging = model.focal.encoder.layers[0].downsample
    tokens = pixels(1, 15 * 14, 8).requires_grad_()
    gradient = torch.autograd.grad(merging(tokens, (15, 14))[0, 7 + 2].sum(), tokens)[0][0].any(dim=1)
    assert gradient.nonzero().flatten().tolist() == [row * 14 + col for row, col in itertools.product((2, 3), (4, 5))]


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("SwinForImageClassification", {"patch_size": (2, 4)}, r"square patches; .* patch_size = \(2, 4\)"),
        ("SwinForMaskedImageModeling", {"encoder_stride": 4}, "encoder_stride of 8 for this model; it has .* = 4"),
        ("SwinForImageClassification", {"embed_dim": 6, "num_heads": (4, 4, 4)}, "num_heads"),
        ("SwinForImageClassification", {"depths": (1, 0, 1)}, "depths"),
    ],
)
def test_misfits_are_refused_by_name(name, changes, message):
    with pytest.raises(ConversionError, match=message):
        config_from_swin(SwinConfig(**SMALL | changes), MODEL_CLASSES[name])


@SWIN_OF_5_9
def test_every_tensor_is_accounted_for():
    swin = random_swin()
    config, state = config_from_swin(swin.config, FocalForImageClassification), swin.state_dict()
    table = "swin.encoder.layers.1.blocks.1.attention.relative_position_bias.relative_position_bias_table"
    before_5_9 = {}
    for name, tensor in state.items():
        for new, old in (("q_proj", "self.query"), ("k_proj", "self.key"), ("v_proj", "self.value"),
                         ("o_proj", "output.dense"), ("mlp.fc1", "intermediate.dense"), ("mlp.fc2", "output.dense"),
                         ("relative_position_bias.rel", "self.rel")):  # fmt: skip
            name = name.replace(f".{new}", f".{old}")
        before_5_9[name] = tensor
    before_5_9[f"{table}".replace("relative_position_bias.", "self.").replace("bias_table", "index")] = torch.zeros(1)
    converted = from_swin(before_5_9, config, FocalForImageClassification)
    for name, tensor in from_swin(state, config, FocalForImageClassification).items():
        assert torch.equal(converted[name], tensor)
    for changed, message in (
        ({name: tensor for name, tensor in state.items() if name != table}, "lacks focal.*bias_table"),
        (state | {"swin.other": torch.zeros(1)}, "holds focal.other"),
        (state | {table: torch.zeros(9, 2)}, r"shape \(9, 2\) in the model and shape \(49, 2\)"),
        (state | {table: torch.full((49, 2), torch.inf)}, "not finite"),
    ):
        with pytest.raises(ConversionError, match=message):
            from_swin(changed, config, FocalForImageClassification)


# --- Growing ----------------------------------------------------------------------------------------------------------

LEVELS = {"focal_levels": (2, 3, 2), "focal_windows": (3, 3, 1), "expand_sizes": (2, 1, 2)}


def new_weights(grown, model):
    old = dict(model.named_parameters())
    return {name: parameter for name, parameter in grown.named_parameters() if name not in old}


@pytest.mark.parametrize("name", MODEL_CLASSES)
def test_share_0_gives_the_answers_of_swin(name):
    swin = random_swin(name)
    model = focal_from_swin(swin)
    grown = add_focal_levels(model, **LEVELS, new_share=0)
    assert type(grown) is type(model)
    assert grown.config.focal_levels == [2, 3, 2]
    assert model.config.focal_levels == [0, 0, 0]
    for size in ((48, 48), (32, 32)):  # Swin forgets its shift at a small size
        expected = tensors_of(swin(pixels(2, 3, *size)), size)
        for one, other in zip(tensors_of(grown(pixels(2, 3, *size)), size), expected, strict=True):
            assert_close(one, other)
    for name, weight in new_weights(grown, model).items():
        assert weight.isfinite().all(), name


@pytest.mark.parametrize("share", [0.01, 0.3])
@pytest.mark.parametrize("own_bias", [0.0, 2.0])
def test_new_keys_have_the_share_that_was_asked_for(share, own_bias):
    """Where all products are equal. Own biases that are equal, whatever they are, do not change the share."""
    model = focal_from_swin(random_swin(image_size=96))
    for block in (block for stage in model.focal.encoder.layers for block in stage.blocks):
        torch.nn.init.zeros_(block.attention.q_proj.weight)
        torch.nn.init.zeros_(block.attention.q_proj.bias)
        torch.nn.init.constant_(block.attention.neighborhood.relative_position_bias_table, own_bias)
    grown = add_focal_levels(model, **LEVELS, new_share=share)
    record = record_attention(grown, pixels(1, 3, 96, 96))
    for stage, (level, expand) in enumerate(zip(LEVELS["focal_levels"], LEVELS["expand_sizes"], strict=True)):
        block = record.stages[stage][0]
        side = 4 + 2 * expand
        inner = torch.zeros(side, side, dtype=torch.bool)
        inner[expand:-expand, expand:-expand] = True
        own = torch.cat([inner.flatten(), torch.zeros(block.weights.shape[-1] - side**2, dtype=torch.bool)])
        complete = (block.neighborhood.index >= 0).all(-1).flatten()  # windows with no key beyond the edge
        assert complete.any()
        assert len(block.cells) == level
        shares = block.weights[complete][..., ~own].sum(-1)
        torch.testing.assert_close(shares, torch.full_like(shares, share))


@pytest.mark.parametrize("name", MODEL_CLASSES)
def test_all_new_weights_receive_gradients_at_a_small_share(name):
    model = focal_from_swin(random_swin(name, image_size=64, out_features=["stage1", "stage2", "stage3"]))
    grown = add_focal_levels(model, **LEVELS, new_share=0.01)
    weights = new_weights(grown, model)
    # By block: a table for the surroundings; for each pooled level a table, a weight and a bias.
    assert len(weights) == 4 + 2 * 7 + 2 * 4
    sum(output.square().sum() for output in tensors_of(grown(pixels(1, 3, 64, 64)), (64, 64))).backward()
    for name, weight in weights.items():
        assert weight.grad is not None, name
        assert weight.grad.isfinite().all(), name
        assert weight.grad.abs().max() > 0, name
    (pooling,) = (
        module for path, module in grown.named_modules() if path.endswith("layers.1.blocks.1.attention.pooling")
    )
    for layer, cell in zip(pooling.layers, (4, 2), strict=True):
        assert layer(torch.arange(cell**2.0)).item() == pytest.approx((cell**2 - 1) / 2)  # the mean


@pytest.mark.parametrize("pool", ["fc", "conv", "mean", "max", "none"])
def test_growing_keeps_class_dtype_and_mode(pool):
    model = focal_from_swin(random_swin()).to(torch.bfloat16).train()
    model.config.focal_pool = pool
    grown = add_focal_levels(model, [1, 0, 2], expand_sizes=[0, 0, 1], new_share=0.1)
    assert (grown.dtype, grown.training) == (torch.bfloat16, True)
    assert all(weight.isfinite().all() for weight in grown.parameters())
    assert grown.config.focal_windows == [5, 3, 1]
    grown(pixels(1, 3, 32, 32).bfloat16()).logits.sum().backward()


def test_a_saved_grown_model(tmp_path):
    grown = add_focal_levels(focal_from_swin(random_swin()), **LEVELS)
    grown.save_pretrained(tmp_path)
    loaded = FocalForImageClassification.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(pixels(1, 3, 32, 32)).logits, grown(pixels(1, 3, 32, 32)).logits)


def test_what_cannot_grow():
    model = focal_from_swin(random_swin())
    grown = add_focal_levels(model, **LEVELS)
    with_more = copy.deepcopy(model)
    with_more.adapter = nn.Linear(2, 2)
    for grower, share, message in (
        (nn.Linear(2, 2), 0.1, "takes a Focal model; got Linear"),
        (model, 1, "below 1; got 1"),
        (model, -0.1, "at least 0"),
        (model, float("nan"), "got nan"),
        (grown, 0.1, r"focal_levels=\(2, 3, 2\)"),
        (with_more, 0.1, "adapter.weight"),
        (freeze(model, (32, 32)), 0.1, r"it lacks \['.*neighborhood.relative_position_bias_table'.* before freezing"),
    ):
        with pytest.raises(ValueError, match=message):
            add_focal_levels(grower, **LEVELS, new_share=share)
    with pytest.raises(Exception, match="expand_sizes must be at most window_size = 4"):
        add_focal_levels(model, [1, 1, 1], expand_sizes=[5, 5, 5])


# --- The converter ----------------------------------------------------------------------------------------------------

CARD = "---\nlicense: apache-2.0\ndatasets:\n- imagenet-1k\n---\n\n# A Swin\n\nIts own text.\n"
LABELS = {"id2label": {0: "cat", 1: "dog", 2: "cow"}, "label2id": {"cat": 0, "dog": 1, "cow": 2}}
MODEL_FILES = ["README.md", "config.json", "conversion.json", "model.safetensors", "preprocessor_config.json"]


def write_swin(folder, name="SwinForImageClassification", **changes):
    changes = {"num_labels": 3} | LABELS | changes
    swin = random_swin(name, **changes)
    swin.save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 32, "width": 32}, image_mean=[0.4] * 3).save_pretrained(folder)
    (folder / "README.md").write_text(CARD)
    return swin


def convert(*arguments):
    convert_swin_to_focal.main([str(argument) for argument in arguments])


@pytest.mark.parametrize("name", MODEL_CLASSES)
def test_a_folder_is_converted(name, tmp_path):
    swin = write_swin(tmp_path / "swin", name, image_size=64, out_features=["stage1", "stage3"])
    convert("--model", tmp_path / "swin", "--output", tmp_path / "focal")
    assert sorted(file.name for file in (tmp_path / "focal").iterdir()) == MODEL_FILES
    focal = MODEL_CLASSES[name].from_pretrained(tmp_path / "focal")
    assert_same_function(swin, focal, pixels(1, 3, 64, 64))
    assert focal.config.id2label == LABELS["id2label"]
    assert list(AutoImageProcessor.from_pretrained(tmp_path / "focal").image_mean) == [0.4] * 3
    record = json.loads((tmp_path / "focal" / "conversion.json").read_text())
    weights = (tmp_path / "swin" / "model.safetensors").read_bytes()
    file = {"file": "model.safetensors", "size": len(weights), "sha256": hashlib.sha256(weights).hexdigest()}
    assert record == {"source": "local folder", "revision": None, "files": [file]}
    card = ModelCard.load(tmp_path / "focal" / "README.md")
    assert (card.data.license, card.data.datasets) == ("apache-2.0", ["imagenet-1k"])
    assert card.text.index("liu2021swin") < card.text.index("yang2021focal") < card.text.index("Its own text.")
    if name != "SwinForMaskedImageModeling":
        with pytest.raises(ConversionError, match="Choose another folder, or add --overwrite"):
            convert("--model", tmp_path / "swin", "--output", tmp_path / "focal")
        convert("--model", tmp_path / "swin", "--output", tmp_path / "focal", "--overwrite", "--levels", 1, 1, 1)
        assert "weights for these are not trained" in (tmp_path / "focal" / "README.md").read_text()


def test_levels_are_added(tmp_path):
    swin = write_swin(tmp_path / "swin", window_size=3, image_size=48)
    levels = ("--levels", 2, 1, 2, "--focal-windows", 5, 1, 1, "--expand-sizes", 1, 2, 0)
    convert("--model", tmp_path / "swin", "--output", tmp_path / "focal", *levels, "--new-share", 0)
    focal = FocalForImageClassification.from_pretrained(tmp_path / "focal")
    config = focal.config
    assert (config.focal_levels, config.focal_windows, config.expand_sizes) == ([2, 1, 2], [5, 1, 1], [1, 2, 0])
    assert_close(focal(pixels(1, 3, 48, 50)).logits, swin(pixels(1, 3, 48, 50)).logits)
    convert("--model", tmp_path / "swin", "--output", tmp_path / "default", "--levels", 2, 2, 2)
    default = FocalForImageClassification.from_pretrained(tmp_path / "default")
    expected = add_focal_levels(focal_from_swin(swin), [2, 2, 2], focal_windows=[5, 3, 1], expand_sizes=[1, 1, 1])
    assert_close(default(pixels(1, 3, 48, 50)).logits, expected(pixels(1, 3, 48, 50)).logits)


@SWIN_OF_5_9
def test_shards_dtype_and_missing_files(tmp_path):
    """A model in several files, in bfloat16, larger windows than maps, and with neither card nor image processor."""
    swin = random_swin(image_size=8, use_absolute_embeddings=True).to(torch.bfloat16)
    swin.save_pretrained(tmp_path / "swin", max_shard_size="20KB")
    convert("--model", tmp_path / "swin", "--output", tmp_path / "focal")
    assert sorted(file.name for file in (tmp_path / "focal").iterdir()) == MODEL_FILES[:-1]
    focal = FocalForImageClassification.from_pretrained(tmp_path / "focal")
    assert focal.dtype == torch.bfloat16
    record = json.loads((tmp_path / "focal" / "conversion.json").read_text())
    shards = sorted(file.name for file in (tmp_path / "swin").glob("*.safetensors"))
    assert [file["file"] for file in record["files"]] == shards
    assert len(shards) > 1
    assert "states no licence" in (tmp_path / "focal" / "README.md").read_text()


def test_a_name_on_the_hub_is_converted(tmp_path):
    """A name that exists, and one that does not."""
    swin = write_swin(tmp_path / "hub")
    with serve(tmp_path / "hub", "me/swin"):
        convert("--model", "me/swin", "--output", tmp_path / "focal")
        with pytest.raises(ConversionError, match=r"--model me/none cannot be loaded\. "):
            convert("--model", "me/none", "--output", tmp_path / "none")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["focal", "hub", "hub.cache"]
    focal = FocalForImageClassification.from_pretrained(tmp_path / "focal")
    assert_same_function(swin, focal, pixels(1, 3, 32, 32))
    record = json.loads((tmp_path / "focal" / "conversion.json").read_text())
    assert (record["source"], record["revision"]) == ("me/swin", REVISION)
    card = ModelCard.load(tmp_path / "focal" / "README.md")
    assert card.data.base_model == "me/swin"
    assert f"[me/swin](https://huggingface.co/me/swin), revision `{REVISION}`" in card.text


def test_a_name_without_a_network(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConversionError, match=r"--model me/other cannot be loaded\. Give a folder"):
        convert("--model", "me/other", "--output", tmp_path / "focal")
    assert not (tmp_path / "focal").exists()


def without_a_tensor(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["swin.encoder.layers.1.blocks.0.layernorm_before.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def with_settings(**settings):
    def change(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | settings))

    return change


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (without_a_tensor, (), "all its weights. Weights that are missing.*layers.1.blocks.0.layernorm_before.weight"),
        (with_settings(model_type="swinv2"), (), "is a swinv2 model. It has attention by cosine similarity"),
        (with_settings(model_type="vit"), (), "is a vit model. Give a Swin"),
        (with_settings(architectures=["SwinModel", "x"]), (), r"\['SwinModel', 'x'\] in its config.json; expected one"),
        (with_settings(architectures=None), (), "has architectures = None"),
        (with_settings(architectures=[["SwinModel"]]), (), "has architectures = "),
        (with_settings(patch_size=0, use_absolute_embeddings=True), (), "patch_size must be at least 1"),
        (with_settings(image_size=40_000), (), "needs tensors of 6,400,000,000 elements for one image; at most"),
        (with_settings(window_size=256), (), "needs tensors of 4,294,967,296 elements"),
        (with_settings(depths=[1, 1, 1000]), (), "at most 200 blocks in total"),
        (with_settings(embed_dim=16), (), "wrong shape|size mismatch|cannot be loaded"),
        (with_settings(patch_size=[2, 4]), (), r"square patches; this model has patch_size = \[2, 4\]"),
        (lambda folder: (folder / "config.json").unlink(), (), "cannot be loaded"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"no"), (), "cannot be loaded"),
        (lambda folder: (folder / "model.safetensors").unlink(), (), "cannot be loaded"),
        (with_settings(), ("--levels", 2, 2), "focal_levels must hold one value for each of the 3 stages"),
        (with_settings(), ("--levels", 2, 2, 2, "--focal-windows", 3, 4, 1), "focal_windows must be odd"),
        (with_settings(), ("--levels", 1, 1, 1, "--expand-sizes", 5, 1, 1), "expand_sizes must be at most window_size"),
    ],
)
def test_bad_input_is_refused_and_nothing_is_written(change, options, message, tmp_path):
    write_swin(tmp_path / "swin")
    change(tmp_path / "swin")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ConversionError, match=message):
        convert("--model", tmp_path / "swin", "--output", tmp_path / "focal", *options)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("options", [("--new-share", "0.1"), ("--levels", "2", "--new-share", "1")])
def test_options_that_do_not_fit(options, tmp_path, capsys):
    with pytest.raises(SystemExit):
        convert("--model", tmp_path, "--output", tmp_path / "focal", *options)
    assert "argument --new-share: " in capsys.readouterr().err


def test_an_error_of_the_script_is_one_line(tmp_path):
    """Without the table of missing weights that transformers logs."""
    write_swin(tmp_path / "swin")
    without_a_tensor(tmp_path / "swin")
    script = str(ROOT / "convert" / "convert_swin_to_focal.py")
    done = ForkedScript(script, "--model", tmp_path / "swin", "--output", tmp_path / "focal", folder=tmp_path).wait()
    assert done.returncode == 1
    assert re.fullmatch(r"error: --model \S+ must be a Swin Transformer with all its weights\. .*\n", done.stderr)
