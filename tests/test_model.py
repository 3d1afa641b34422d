"""The transformers API, for both attention types: names, shapes, sizes, saving, initial weights, errors."""

import copy
import math
import subprocess
import sys

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from huggingface_hub.errors import StrictDataclassClassValidationError
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForMaskedImageModeling,
    BitImageProcessorPil,
    SwinBackbone,
    SwinConfig,
    SwinForImageClassification,
    SwinForMaskedImageModeling,
    SwinModel,
    pipeline,
)

from focal_hf import (
    FocalBackbone,
    FocalConfig,
    FocalForImageClassification,
    FocalForMaskedImageModeling,
    FocalModel,
    FocalPreTrainedModel,
    cpu_attention_focal,
)
from focal_hf.compatibility_focal import AutoImageProcessor
from focal_hf.configuration_focal import ATTENTION_TYPES, EXPAND_LAYERS, POOLS
from focal_hf.modeling_focal import FocalAttention
from hub_server import serve
from small_models import BOTH, DEVICE, SWIN, SWIN_OF_5_9, pixels, randomized, tiny

CLASSES = {
    FocalModel: AutoModel,
    FocalForImageClassification: AutoModelForImageClassification,
    FocalForMaskedImageModeling: AutoModelForMaskedImageModeling,
}


def test_importing_prints_nothing_and_does_without_matplotlib():
    """Beside a transformers like that of 5.17, too: without torchvision, it has a stand-in for `AutoImageProcessor`."""
    script = """
import sys
import transformers
stand_in = transformers.utils.DummyObject("AutoImageProcessor", (), {"_backends": ["a_package_that_is_absent"]})
transformers.AutoImageProcessor = stand_in
import focal_hf.visualization
sys.exit("matplotlib" in sys.modules)
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


@BOTH
@pytest.mark.parametrize("model_class", CLASSES)
def test_auto_classes_save_and_load(model_class, attention_type, tmp_path):
    model = randomized(model_class(tiny(attention_type)))
    model.save_pretrained(tmp_path)
    loaded = CLASSES[model_class].from_pretrained(tmp_path)
    assert type(loaded) is model_class
    assert type(CLASSES[model_class].from_config(AutoConfig.from_pretrained(tmp_path))) is model_class
    for (name, saved), (_, value) in zip(model.state_dict().items(), loaded.state_dict().items(), strict=True):
        assert torch.equal(saved, value), name
    mask = {"bool_masked_pos": torch.ones(1, 64).bool()} if model_class is FocalForMaskedImageModeling else {}
    with torch.no_grad():
        # A copy, as the products of some processors differ in their last bit by where in memory a matrix begins.
        loaded = copy.deepcopy(loaded)
        assert torch.equal(model(pixels(1, 3, 32, 32), **mask)[0], loaded(pixels(1, 3, 32, 32), **mask)[0])


@BOTH
def test_backbone_takes_the_weights_of_a_classifier(attention_type, tmp_path):
    model = randomized(FocalForImageClassification(tiny(attention_type)))
    model.save_pretrained(tmp_path)
    backbone, info = FocalBackbone.from_pretrained(tmp_path, out_indices=(1, 3), output_loading_info=True)
    assert all(name.startswith("hidden_states_norms.") for name in info["missing_keys"])
    assert backbone.out_features == ["stage1", "stage3"]
    assert backbone.channels == [8, 32]
    outputs = backbone.eval()(pixels(2, 3, 32, 48), output_hidden_states=True)
    assert [tuple(maps.shape) for maps in outputs.feature_maps] == [(2, 8, 8, 12), (2, 32, 2, 3)]
    expected = model.focal(pixels(2, 3, 32, 48), output_hidden_states=True).reshaped_hidden_states
    torch.testing.assert_close(outputs.hidden_states[-1], expected[-1])
    assert type(AutoBackbone.from_config(tiny(attention_type))) is FocalBackbone
    assert FocalBackbone(tiny(attention_type))(pixels(1, 3, 32, 32)).hidden_states is None


@BOTH
def test_every_parameter_of_a_backbone_is_trained(attention_type):
    backbone = FocalBackbone(tiny(attention_type, out_features=["stage1", "stage3"]))
    sum(maps.square().mean() for maps in backbone(pixels(1, 3, 32, 32)).feature_maps).backward()
    assert [name for name, parameter in backbone.named_parameters() if parameter.grad is None] == []


@SWIN_OF_5_9
@BOTH
def test_outputs_are_named_and_shaped_as_swins(attention_type):
    for ours, swins in (
        (FocalModel, SwinModel),
        (FocalForImageClassification, SwinForImageClassification),
        (FocalForMaskedImageModeling, SwinForMaskedImageModeling),
        (FocalBackbone, SwinBackbone),
    ):
        names = ["stem", "stage2", "stage3"]
        # Swin itself fails where a map is smaller than its window.
        config = tiny(attention_type, out_features=names, image_size=64)
        swin_config = SwinConfig(**SWIN | {"image_size": 64}, out_features=names)
        config._attn_implementation = swin_config._attn_implementation = "eager"
        with torch.no_grad():
            for selection in (None, False, 0, 1, [0, 2]):
                chosen = ours(config).eval()(pixels(1, 3, 64, 64), output_hidden_states=selection)
                assert list(chosen) == list(
                    swins(swin_config).eval()(pixels(1, 3, 64, 64), output_hidden_states=selection)
                ), selection
            options = {"output_hidden_states": True, "output_attentions": True}
            outputs = ours(config).eval()(pixels(2, 3, 64, 64), **options)
            expected = swins(swin_config).eval()(pixels(2, 3, 64, 64), **options)
        assert list(outputs) == list(expected)
        for name in expected:
            if name == "attentions":  # Swin's windows have other keys
                assert len(outputs[name]) == len(expected[name])
            elif isinstance(expected[name], tuple):
                assert [value.shape for value in outputs[name]] == [value.shape for value in expected[name]], name
            else:
                assert outputs[name].shape == expected[name].shape, name
        # Recipes for Swin name these modules.
        modules = {name.removeprefix("focal.") for name, _ in ours(config).named_modules()}
        for name in ("embeddings.patch_embeddings.projection", "encoder.layers.1.blocks.1.attention.q_proj"):
            assert name in modules


@BOTH
@settings(max_examples=25, deadline=None)
@given(height=st.integers(1, 150), width=st.integers(1, 150), conv=st.booleans(), shift=st.booleans())
def test_maps_have_the_sizes_of_swins(attention_type, height, width, conv, shift):
    config = tiny(attention_type, use_conv_embed=conv, use_shift=shift, use_pre_norm=shift)
    config.out_features = config.stage_names
    backbone = randomized(FocalBackbone(config))
    swin = SwinBackbone(SwinConfig(**SWIN, out_features=config.stage_names)).eval()
    with torch.no_grad():
        maps = backbone(pixels(1, 3, height, width)).feature_maps
        expected = swin(pixels(1, 3, height, width)).feature_maps
    assert [value.shape for value in maps] == [value.shape for value in expected]
    assert all(value.isfinite().all() for value in maps)


@BOTH
@pytest.mark.parametrize("stages", [1, 5])
def test_any_number_of_stages(attention_type, stages, tmp_path):
    settings = {"depths": (1,) * stages, "num_heads": (2,) * stages, "focal_levels": (2,) * stages}
    settings |= {"focal_windows": (3,) * stages, "expand_sizes": (1,) * stages, "encoder_stride": 4 * 2 ** (stages - 1)}
    model = randomized(FocalForMaskedImageModeling(tiny(attention_type, **settings)))
    model.save_pretrained(tmp_path)
    backbone = FocalBackbone.from_pretrained(tmp_path, out_indices=range(stages + 1)).eval()
    maps = backbone(pixels(1, 3, 50, 70)).feature_maps
    sides = [(13, 18), (13, 18), (7, 9), (4, 5), (2, 3), (1, 2)]
    assert [tuple(value.shape[2:]) for value in maps] == sides[: stages + 1]
    assert model(pixels(1, 3, 50, 70)).reconstruction.shape == (1, 3, 50, 70)


@BOTH
def test_input_is_padded_with_zeros_to_whole_patches(attention_type):
    model = randomized(FocalModel(tiny(attention_type)))
    image = pixels(1, 3, 35, 46)
    padded = torch.nn.functional.pad(image, (0, 2, 0, 1))
    with torch.no_grad():
        torch.testing.assert_close(model(image).last_hidden_state, model(padded).last_hidden_state)


def test_odd_maps_are_padded_with_zeros():
    model = randomized(FocalModel(tiny()))
    downsample = model.encoder.layers[0].downsample
    tokens = pixels(1, 5 * 7, 8)
    even = torch.nn.functional.pad(tokens.unflatten(1, (5, 7)), (0, 0, 0, 1, 0, 1)).flatten(1, 2)
    torch.testing.assert_close(downsample(tokens, (5, 7)), downsample(even, (6, 8)))


def test_absolute_positions_are_interpolated():
    model = randomized(FocalModel(tiny(use_absolute_embeddings=True)))
    slope = torch.linspace(-1, 1, 8)[:, None].expand(8, 8).reshape(1, 64, 1).expand(1, 64, 8)
    with torch.no_grad():
        model.embeddings.position_embeddings.copy_(slope)
        maps = model.embeddings.interpolated_positions(11, 17).view(11, 17, 8)
    assert (maps.diff(dim=0) > 0).all()
    torch.testing.assert_close(maps, maps[:, :1, :1].expand_as(maps))
    torch.testing.assert_close(maps[5], torch.zeros(17, 8))
    assert model(pixels(1, 3, 41, 67)).last_hidden_state.shape == (1, 3 * 5, 32)


@BOTH
@pytest.mark.parametrize("size", [(32, 32), (30, 45), (7, 64)])
def test_masked_image_modelling(attention_type, size):
    model = randomized(FocalForMaskedImageModeling(tiny(attention_type)))
    height, width = size
    rows, cols = -(-height // 4), -(-width // 4)
    image = pixels(2, 3, height, width)
    mask = pixels(2, rows * cols) < 0
    outputs = model(image, bool_masked_pos=mask)
    assert outputs.reconstruction.shape == image.shape
    hidden = torch.zeros(2, 3, height, width, dtype=torch.bool)
    for row in range(height):
        for col in range(width):
            hidden[:, :, row, col] = mask[:, row // 4 * cols + col // 4, None]
    torch.testing.assert_close(outputs.loss, (outputs.reconstruction - image)[hidden].abs().mean())
    # What is hidden does not reach the encoder.
    changed = torch.where(hidden, 3 * image, image)
    torch.testing.assert_close(model(changed, bool_masked_pos=mask).reconstruction, outputs.reconstruction)
    assert model(image).loss is None
    with pytest.raises(ValueError, match=f"bool_masked_pos must have shape .* = \\(2, {rows * cols}\\)"):
        model(image, bool_masked_pos=mask[:, 1:])


@BOTH
@pytest.mark.parametrize("use_conv_embed", [False, True])
def test_remainder_is_dropped_at_every_size(attention_type, use_conv_embed):
    """With `drop_remainder`: of the image, of maps between stages, of masks and of the reconstruction."""
    config = tiny(attention_type, drop_remainder=True, use_conv_embed=use_conv_embed, image_size=(44, 39))
    assert config.stage_grids == [(11, 9), (5, 4), (2, 2)]
    config.out_features = config.stage_names
    image = pixels(2, 3, 39, 55)
    maps = randomized(FocalBackbone(config))(image).feature_maps
    assert [tuple(of_stage.shape[2:]) for of_stage in maps] == [(9, 13), (9, 13), (4, 6), (2, 3)]
    hidden_states = FocalModel(config)(image, output_hidden_states=True).reshaped_hidden_states
    assert [tuple(of_stage.shape[2:]) for of_stage in hidden_states] == [(9, 13), (4, 6), (2, 3), (2, 3)]

    model = randomized(FocalForMaskedImageModeling(config))
    mask = pixels(2, 9 * 13) < 0
    outputs = model(image, bool_masked_pos=mask)
    assert outputs.reconstruction.shape == (2, 3, 32, 48)
    hidden = mask.view(2, 1, 9, 13).repeat_interleave(4, 2).repeat_interleave(4, 3)[:, :, :32, :48].expand(2, 3, 32, 48)
    torch.testing.assert_close(outputs.loss, (outputs.reconstruction - image[:, :, :32, :48])[hidden].abs().mean())
    # No patch sees what does not fill one, but for the first row and column where patches overlap.
    seen = image[:, :, : 36 + use_conv_embed, : 52 + use_conv_embed]
    torch.testing.assert_close(model(seen, bool_masked_pos=mask).reconstruction, outputs.reconstruction)

    with pytest.raises(ValueError, match=r"at least 16 pixels high and wide .*drop_remainder=True.*\(2, 3, 15, 55\)"):
        model(image[:, :, :15])


def test_masked_image_modelling_in_float16():
    """Sums over so many pixels exceed its range."""
    model = FocalForMaskedImageModeling(tiny()).half()
    image = pixels(2, 3, 192, 192).half()
    assert 0.5 < model(image, bool_masked_pos=torch.ones(2, 2304).bool()).loss < 2


def test_masked_image_modelling_needs_its_stride():
    with pytest.raises(ValueError, match=r"encoder_stride must be patch_size .* = 16.*got 32"):
        FocalForMaskedImageModeling(tiny(encoder_stride=32))
    with pytest.raises(ValueError, match="use_mask_token=True"):
        FocalModel(tiny())(pixels(1, 3, 32, 32), bool_masked_pos=torch.ones(1, 64).bool())


@BOTH
def test_attention_of_every_block(attention_type):
    model = FocalModel(tiny(attention_type)).eval()
    model.set_attn_implementation("eager")
    weights = []
    for module in model.modules():
        if isinstance(module, FocalAttention):
            module.register_forward_hook(lambda module, args, output: weights.append(output[1]))
    last = model(pixels(1, 3, 32, 32), output_attentions=True).attentions
    assert len(weights) == sum(model.config.depths)
    assert all(torch.equal(weights[block], value) for block, value in zip((0, 2, 3), last, strict=True))
    assert weights[1].shape[:3] == (1, 2, 16)  # one window of 4 by 4 queries, two heads
    for value in weights:
        torch.testing.assert_close(value.sum(-1), torch.ones_like(value[..., 0]))


def test_initial_weights_are_the_originals():
    torch.manual_seed(0)
    config = tiny(embed_dim=32, use_absolute_embeddings=True, use_layerscale=True, use_pre_norm=True, image_size=64)
    model = FocalForImageClassification(config)
    seen = set()
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            assert module.bias.abs().max() == 0, name
            if module.weight.numel() > 1000:
                assert 0.018 < module.weight.std() < 0.022, name
        elif isinstance(module, torch.nn.Conv2d):
            bound = (module.weight.shape[1] * module.kernel_size[0] ** 2) ** -0.5  # PyTorch's uniform default
            assert 0.95 * bound < module.weight.abs().max() <= bound, name
            assert 0.5 * bound < module.bias.abs().max() <= bound, name
        elif isinstance(module, torch.nn.LayerNorm | torch.nn.GroupNorm):
            assert (module.weight == 1).all(), name
            assert (module.bias == 0).all(), name
        seen.add(type(module))
    assert {torch.nn.Linear, torch.nn.Conv2d, torch.nn.LayerNorm, torch.nn.GroupNorm} <= seen
    for name, parameter in model.named_parameters():
        if name.endswith("relative_position_bias_table"):
            assert parameter.abs().max() == 0, name
        elif "relative_position_bias_table_to" in name or "position_embeddings" in name:
            assert 0.015 < parameter.std() < 0.025, name
        elif "layer_scale" in name:
            assert (parameter == 1e-4).all(), name


def test_indices_that_a_checkpoint_lacks_are_computed(tmp_path):
    """Models are built without memory and filled from the file; what it lacks must not stay garbage."""
    model = FocalModel(tiny("topk"))
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    kept = {name: tensor for name, tensor in state.items() if "nearest_index" not in name}
    assert len(kept) == len(state) - 8
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = FocalModel.from_pretrained(tmp_path)
    for name, tensor in state.items():
        assert torch.equal(loaded.state_dict()[name].cpu(), tensor), name


@BOTH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(attention_type, dtype, tmp_path):
    torch.manual_seed(0)
    model = FocalForImageClassification(tiny(attention_type)).eval()
    model.save_pretrained(tmp_path)
    low = AutoModelForImageClassification.from_pretrained(tmp_path, dtype=dtype).eval()
    with torch.no_grad():
        expected, logits = model(pixels(2, 3, 40, 32)).logits, low(pixels(2, 3, 40, 32).to(dtype)).logits
    assert logits.dtype == dtype
    assert (logits - expected).abs().max() < 2e-2 * expected.abs().max()


@BOTH
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(attention_type, reentrant, monkeypatch):
    """Each block runs twice.

    Reentrant checkpointing first runs without gradients, and must draw the same random numbers then.
    """
    monkeypatch.setattr(cpu_attention_focal, "TOKENS_PER_CHUNK", 10)
    rates = {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.1, "drop_path_rate": 0.3}
    model = randomized(FocalForImageClassification(tiny(attention_type, **rates))).train()
    attentions = [module for module in model.modules() if isinstance(module, FocalAttention)]
    calls = []
    for attention in attentions:
        attention.register_forward_hook(lambda *_: calls.append(1))
    gradients = []
    for runs in (1, 2):
        if runs == 2:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.zero_grad()
        calls.clear()
        torch.manual_seed(0)
        model(pixels(2, 3, 32, 32), labels=torch.tensor([1, 4])).loss.backward()
        assert len(calls) == runs * len(attentions)
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    torch.testing.assert_close(*gradients)


@BOTH
@pytest.mark.parametrize("rate", ["hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate"])
def test_dropout_and_stochastic_depth(attention_type, rate):
    others = {"drop_path_rate": 0.0} if rate != "drop_path_rate" else {}
    model = randomized(FocalModel(tiny(attention_type, **others | {rate: 0.5})))
    image = pixels(4, 3, 32, 32)
    assert torch.equal(model(image)[0], model(image)[0])
    model.train()
    assert not torch.equal(model(image)[0], model(image)[0])


@BOTH
@pytest.mark.parametrize("shift", [False, True])
def test_inference_in_pieces_is_the_same(attention_type, shift, monkeypatch):
    """Without gradients a CPU works in pieces; many small ones here."""
    monkeypatch.setattr(cpu_attention_focal, "TOKENS_PER_CHUNK", 10)
    model = randomized(FocalForImageClassification(tiny(attention_type, use_shift=shift)))
    image = pixels(5, 3, 52, 71)
    whole = model(image, output_hidden_states=True)
    with torch.no_grad():
        pieces = model(image, output_hidden_states=True)
    torch.testing.assert_close(pieces.logits, whole.logits)
    torch.testing.assert_close(pieces.hidden_states, whole.hidden_states)


@BOTH
def test_tracing_and_exporting_without_gradients(attention_type):
    """Pieces are not for graphs: what is traced or exported for one batch serves another."""
    stages = {"depths": (1, 1), "num_heads": (1, 2), "focal_levels": (2, 2), "focal_windows": (3, 1)}
    stages |= {"expand_sizes": (2, 2), "encoder_stride": 8}
    model = randomized(FocalModel(tiny(attention_type, **stages)))
    two, five = pixels(2, 3, 24, 20), pixels(5, 3, 24, 20)  # maps of fewer tokens than a window
    torch.jit.trace(model, two, strict=False)  # with gradients; PyTorch checks it without
    with torch.no_grad():
        traced = torch.jit.trace(model, two, strict=False)
        batch = ({0: torch.export.Dim.AUTO},)
        program = torch.export.export(model, (two,), dynamic_shapes=batch, strict=False)
        expected = model(five).pooler_output
        torch.testing.assert_close(traced(five)["pooler_output"], expected)
    torch.testing.assert_close(program.module()(five)["pooler_output"], expected)


@BOTH
def test_offloading(attention_type, tmp_path):
    """Weights that are brought in only while a module runs: every parameter must belong to a module that is called."""
    expected = randomized(FocalModel(tiny(attention_type)))(pixels(1, 3, 32, 32)).last_hidden_state
    offloaded = cpu_offload(randomized(FocalModel(tiny(attention_type))), execution_device=DEVICE)
    torch.testing.assert_close(offloaded(pixels(1, 3, 32, 32)).last_hidden_state, expected)
    on_disk = disk_offload(randomized(FocalModel(tiny(attention_type))), tmp_path, execution_device=DEVICE)
    torch.testing.assert_close(on_disk(pixels(1, 3, 32, 32)).last_hidden_state, expected)


class Int8Linear(torch.nn.Module):
    """A linear layer as quantizers leave it: whole numbers for weights, and a scale."""

    def __init__(self, linear):
        super().__init__()
        self.scale = linear.weight.abs().max() / 127
        self.weight = torch.nn.Parameter((linear.weight / self.scale).round().to(torch.int8), requires_grad=False)
        self.bias = linear.bias

    def forward(self, hidden_states):
        return torch.nn.functional.linear(hidden_states, self.weight * self.scale, self.bias)


@BOTH
def test_quantized_linear_layers(attention_type):
    model = randomized(FocalModel(tiny(attention_type)))
    with torch.no_grad():
        expected = model(pixels(1, 3, 32, 32))[0]
        for name, module in list(model.named_modules()):
            if isinstance(module, torch.nn.Linear):
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, Int8Linear(module))
        output = model(pixels(1, 3, 32, 32))[0]
    assert 0 < (output - expected).abs().max() < 0.05 * expected.abs().max()


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (torch.zeros(3, 32, 32), r"shape \(batch, 3, height, width\).*got \(3, 32, 32\)"),
        (torch.zeros(1, 1, 32, 32), r"config.num_channels = 3 channels; got \(1, 1, 32, 32\)"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), "must be floating point.*got torch.uint8"),
        (None, "must be a torch.Tensor of shape .*got NoneType"),
        ([torch.zeros(3, 32, 32)], "must be a torch.Tensor of shape .*got list"),
        (torch.zeros(0, 3, 32, 32), r"at least one image of at least one pixel; got \(0, 3, 32, 32\)"),
        (torch.zeros(1, 3, 32, 0), r"at least one image of at least one pixel; got \(1, 3, 32, 0\)"),
    ],
)
@pytest.mark.parametrize("model_class", [*CLASSES, FocalBackbone])
def test_bad_pixels_are_refused(model_class, image, message):
    with pytest.raises(ValueError, match=message):
        model_class(tiny())(image)


@st.composite
def configs(draw):
    """Any that is accepted."""
    stages = draw(st.integers(1, 3))

    def per_stage(values):
        return draw(st.lists(values, min_size=stages, max_size=stages))

    options = {
        "image_size": draw(st.one_of(st.integers(1, 40), st.tuples(st.integers(1, 40), st.integers(1, 40)))),
        "patch_size": draw(st.sampled_from([1, 2, 4])),
        "num_channels": draw(st.integers(1, 4)),
        "embed_dim": draw(st.sampled_from([4, 12])),
        "depths": per_stage(st.integers(1, 2)),
        "num_heads": per_stage(st.sampled_from([1, 2, 4])),
        "window_size": draw(st.integers(1, 8)),
        "attention_type": draw(st.sampled_from(ATTENTION_TYPES)),
        "focal_levels": per_stage(st.integers(0, 3)),
        "focal_windows": per_stage(st.integers(1, 5)),
        "focal_stages": draw(st.one_of(st.none(), st.lists(st.integers(0, stages - 1), unique=True))),
        "focal_pool": draw(st.sampled_from(POOLS)),
        "expand_sizes": per_stage(st.integers(0, 4)),
        "expand_layer": draw(st.sampled_from(EXPAND_LAYERS)),
        "topk": draw(st.integers(1, 200)),
        "mlp_ratio": draw(st.sampled_from([0.5, 4])),
        "hidden_act": draw(st.sampled_from(["gelu", "relu", "silu"])),
        "layerscale_value": draw(st.sampled_from([1e-4, 1])),
        "drop_path_rate": draw(st.sampled_from([0, 0.5])),
        "hidden_dropout_prob": draw(st.sampled_from([0, 0.2])),
        "attention_probs_dropout_prob": draw(st.sampled_from([0, 0.2])),
    }
    for name in ("use_shift", "use_conv_embed", "use_pre_norm", "use_layerscale", "use_absolute_embeddings"):
        options[name] = draw(st.booleans())
    for name in ("patch_norm", "qkv_bias", "drop_remainder"):
        options[name] = draw(st.booleans())
    options["encoder_stride"] = options["patch_size"] * 2 ** (stages - 1)
    try:
        return FocalConfig(**options)
    except StrictDataclassClassValidationError:
        assume(False)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
@given(
    config=configs(),
    height=st.integers(1, 60),
    width=st.integers(1, 60),
    implementation=st.sampled_from(["sdpa", "eager"]),
)
def test_any_config_that_is_accepted_trains_at_any_size(config, height, width, implementation):
    config._attn_implementation = implementation
    model = FocalForMaskedImageModeling(config).train()
    height, width = max(height, config.least_side), max(width, config.least_side)
    pixel_values = pixels(2, config.num_channels, height, width)
    patches = math.prod(config.reduced_size((height, width), config.patch_size))
    mask = torch.arange(2 * patches).view(2, patches) % 2 == 0
    outputs = model(pixel_values, bool_masked_pos=mask, output_hidden_states=True)
    dropped = [side % config.encoder_stride if config.drop_remainder else 0 for side in (height, width)]
    assert outputs.reconstruction.shape[2:] == (height - dropped[0], width - dropped[1])
    outputs.loss.backward()
    assert outputs.loss.isfinite()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    with torch.no_grad():
        assert model.eval()(pixel_values).reconstruction.isfinite().all()


def test_pipelines_on_a_folder(tmp_path):
    model = randomized(FocalForImageClassification(tiny(id2label={0: "ant", 1: "bee", 2: "cow"}, num_labels=3)))
    model.save_pretrained(tmp_path)
    BitImageProcessorPil(size={"shortest_edge": 36}, crop_size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    assert type(AutoImageProcessor.from_pretrained(tmp_path)).__name__.startswith("BitImageProcessor")
    image = Image.effect_mandelbrot((60, 50), (-2, -1.5, 1, 1.5), 100).convert("RGB")
    image.save(tmp_path / "image.png")

    predictions = pipeline("image-classification", model=str(tmp_path))([str(tmp_path / "image.png"), image], top_k=2)
    assert predictions[0] == predictions[1]
    pixel_values = AutoImageProcessor.from_pretrained(tmp_path)(image, return_tensors="pt").pixel_values
    scores = model(pixel_values).logits.softmax(-1)[0].topk(2)
    assert [p["label"] for p in predictions[0]] == [model.config.id2label[i] for i in scores.indices.tolist()]
    assert [p["score"] for p in predictions[0]] == pytest.approx(scores.values.tolist(), abs=1e-5)

    features = pipeline("image-feature-extraction", model=str(tmp_path))(image)
    torch.testing.assert_close(torch.tensor(features), model.focal(pixel_values).last_hidden_state)


def test_original_layout_of_classes():
    for model_class in (*CLASSES, FocalBackbone):
        assert issubclass(model_class, FocalPreTrainedModel)
        assert model_class.config_class is FocalConfig


def test_loads_by_name_from_the_hub(tmp_path):
    """From a server in the Hub's place; with buffers, which only topk has."""
    randomized(FocalForImageClassification(tiny("topk"))).save_pretrained(tmp_path / "repository")
    BitImageProcessorPil().save_pretrained(tmp_path / "repository")
    with serve(tmp_path / "repository", "org/focal"):
        AutoModel.from_pretrained("org/focal")
        AutoImageProcessor.from_pretrained("org/focal")
        pipeline("image-classification", model="org/focal")
        backbone = AutoBackbone.from_pretrained("org/focal", out_indices=[1, 3])
    shapes = [tuple(maps.shape) for maps in backbone(torch.zeros(1, 3, 64, 32)).feature_maps]
    assert shapes == [(1, 8, 16, 8), (1, 32, 4, 2)]
