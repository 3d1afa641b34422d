"""Swin as a Focal Transformer: the same function as transformers' Swin, in all its settings."""

import itertools

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import SwinConfig
from transformers.models.swin.modeling_swin import SwinDropPath

from focal_hf import FocalBackbone, FocalConfig, FocalForImageClassification
from focal_hf.modeling_focal import FocalDropPath
from messages import ConversionError
from small_models import pixels, randomized
from swin import MODEL_CLASSES, config_from_swin, from_swin

SMALL = {"image_size": 32, "patch_size": 2, "embed_dim": 8, "depths": (1, 2, 2), "num_heads": (1, 2, 2)}
SMALL |= {"window_size": 4, "encoder_stride": 8, "num_labels": 5}


def random_swin(name="SwinForImageClassification", **changes):
    return randomized(getattr(transformers, name)(SwinConfig(**SMALL | changes)))


def as_focal(swin):
    model_class = MODEL_CLASSES[type(swin).__name__]
    config = config_from_swin(swin.config, model_class)
    focal = model_class(config)
    focal.load_state_dict(from_swin(swin.state_dict(), config, model_class))
    return focal.eval()


def tensors_of(outputs, size=None):
    """All floating-point outputs, those of the masked-image head without the padding that Swin reconstructs."""
    found = [outputs[key] for key in ("logits", "pooler_output", "last_hidden_state") if key in outputs]
    if "reconstruction" in outputs:
        found.append(outputs.reconstruction[:, :, : size[0], : size[1]])
    return [*found, *(outputs.get("feature_maps") or ()), *(outputs.get("reshaped_hidden_states") or ())]


def assert_close(one, other):
    """Equal within 1e-5, relative to the largest value where that is above 1."""
    torch.testing.assert_close(one, other, rtol=0, atol=1e-5 * max(1, other.abs().max().item()))


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
    scale = max(gradient.abs().max() for gradient in gradients.values())
    for name, gradient in found.items():
        assert (gradient - expected[name]).abs().max() <= 1e-5 * scale, name
    assert (inputs[1].grad - inputs[0].grad).abs().max() <= 1e-5 * scale


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
        "use_absolute_embeddings": draw(st.booleans()),
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
    name, changes, size, options = case
    swin = random_swin(name, **changes)
    assert_same_function(swin, as_focal(swin), pixels(2, swin.config.num_channels, *size), **options)


@pytest.mark.parametrize("name", ["SwinForImageClassification", "SwinBackbone"])
def test_absolute_positions_of_rectangular_images(name):
    """At the model's own size, which is the only one at which Swin has the right positions."""
    swin = random_swin(name, use_absolute_embeddings=True, image_size=(32, 48))
    assert_same_function(swin, as_focal(swin), pixels(2, 3, 32, 48))


def test_absolute_positions_where_patches_do_not_fill_the_image():
    swin = random_swin(use_absolute_embeddings=True, image_size=35, patch_size=2)
    focal = as_focal(swin)
    assert focal.config.image_size == 34
    assert_same_function(swin, focal, pixels(2, 3, 34, 34))


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("sides", [(32, 32), (37, 54)])
def test_inference_on_a_cpu(attn_implementation, sides):
    """In chunks or densely, where the attention has no gradients."""
    swin = random_swin()
    focal = as_focal(swin)
    focal.set_attn_implementation(attn_implementation)
    with torch.inference_mode():
        assert_close(focal(pixels(2, 3, *sides)).logits, swin(pixels(2, 3, *sides)).logits)


def test_masked_images():
    swin = random_swin("SwinForMaskedImageModeling")
    focal = as_focal(swin)
    mask = torch.rand(2, 256, generator=torch.Generator().manual_seed(0)) < 0.5
    one, other = (model(pixels(2, 3, 32, 32), bool_masked_pos=mask) for model in (focal, swin))
    assert_close(one.loss, other.loss)
    assert_close(one.reconstruction, other.reconstruction)


def test_a_map_of_one_window_is_shifted_in_a_backbone_alone():
    """The same weights as classifier and as backbone: each is the Swin of its class, for small and large images."""
    classifier = random_swin(image_size=16, out_features=["stage1", "stage2", "stage3"])  # the last map: 2 x 2
    backbone = randomized(transformers.SwinBackbone(classifier.config))
    backbone.swin.load_state_dict(classifier.swin.state_dict())
    for side in (32, 41, 64):
        swin = random_swin(image_size=16)  # which has not seen another size: Swin forgets its shift at a small one
        assert_same_function(swin, as_focal(swin), pixels(1, 3, side, side))
        focal = as_focal(backbone)
        assert [block.attention.shift_of(4, 4) for block in focal.focal.encoder.layers[2].blocks] == [0, 2]
        assert_same_function(backbone, focal, pixels(1, 3, side, side))


def test_dropout_and_stochastic_depth_are_in_the_same_places(monkeypatch):
    """Seen by factors in their stead."""
    monkeypatch.setattr(nn.Dropout, "forward", lambda self, inputs: inputs * (1 - self.p / 2))
    for drop_path in (SwinDropPath, FocalDropPath):
        monkeypatch.setattr(drop_path, "forward", lambda self, inputs: inputs * (1 - self.drop_prob / 3))
    swin = random_swin(hidden_dropout_prob=0.4, drop_path_rate=0.6)
    focal = as_focal(swin)
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


def test_every_tensor_is_accounted_for():
    swin = random_swin()
    config, state = config_from_swin(swin.config, FocalForImageClassification), swin.state_dict()
    table = "swin.encoder.layers.1.blocks.1.attention.relative_position_bias.relative_position_bias_table"
    for changed, message in (
        ({name: tensor for name, tensor in state.items() if name != table}, "lacks focal.*bias_table"),
        (state | {"swin.other": torch.zeros(1)}, "holds focal.other"),
        (state | {table: torch.zeros(9, 2)}, r"shape \(9, 2\) in the model and shape \(49, 2\)"),
        (state | {table: torch.full((49, 2), torch.inf)}, "not finite"),
    ):
        with pytest.raises(ConversionError, match=message):
            from_swin(changed, config, FocalForImageClassification)
