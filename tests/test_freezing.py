"""A frozen model gives the outputs of its model, for images of one size."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from focal_hf import FocalBackbone, FocalForImageClassification, FocalModel, freeze
from focal_hf.modeling_focal import FocalPooling
from hub_server import serve
from small_models import BOTH, TORCH_2_7, pixels, randomized, tiny


@BOTH
@pytest.mark.parametrize(
    ("options", "run"),
    [
        pytest.param({}, "compiled", marks=TORCH_2_7),
        pytest.param({"use_shift": True, "focal_pool": "mean"}, "exported", marks=TORCH_2_7),
        ({"focal_pool": "conv"}, "plain"),
    ],
)
# Maps without and with padding; of one window, of windows that see all tokens, and of more.
@pytest.mark.parametrize("size", [(16, 16), (64, 48), (50, 70)])
def test_outputs_stay(attention_type, options, run, size):
    stages = {"depths": (2,), "num_heads": (2,), "focal_levels": (2,), "focal_windows": (3,), "expand_sizes": (2,)}
    config = tiny(attention_type, **stages, **options, encoder_stride=4)
    model_class = FocalBackbone if options else FocalForImageClassification
    model = randomized(model_class(config)).train()  # freezing is for inference
    images = pixels(2, 3, *size)
    frozen = freeze(model, size)
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    with torch.no_grad():
        expected = model.eval()(images).to_tuple()
        if run == "exported":
            frozen = torch.export.export(frozen, (), {"pixel_values": images}).module()
        if run == "compiled":
            torch.compiler.reset()
            frozen = torch.compile(frozen, backend="eager", fullgraph=True)
        found = frozen(pixel_values=images).to_tuple()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"use_pre_norm": True, "drop_remainder": True}, {"use_conv_embed": True}])
def test_patch_merging_stays(options):
    model = randomized(FocalBackbone(tiny(**options))).eval()
    images = pixels(2, 3, 50, 70)
    with torch.no_grad():
        found, expected = freeze(model, (50, 70))(images).to_tuple(), model(images).to_tuple()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [(48, 48), (61, 48)])  # the second has a map that is padded to the same size
def test_other_images_are_refused(size):
    frozen = freeze(FocalForImageClassification(tiny()), (58, 48))
    with pytest.raises(ValueError, match=r"frozen for images of another size: .* a map of \(15, 12\) patches, and got"):
        frozen(pixels(1, 3, *size))


@pytest.mark.parametrize("size", [64, (64,), (0, 64), (64.0, 64), (64, 15)])
def test_sizes_that_the_model_cannot_run_are_refused(size):
    with pytest.raises(ValueError, match=r"^image_size must be .* both at least 16 for this model; got "):
        freeze(FocalForImageClassification(tiny(drop_remainder=True)), size)


def test_other_models_are_refused():
    with pytest.raises(ValueError, match="must contain a Focal Transformer; got Linear"):
        freeze(nn.Linear(1, 1), (64, 48))
    with pytest.raises(ValueError, match="is frozen already"):
        freeze(freeze(FocalBackbone(tiny()), (64, 48)), (64, 48))
    with pytest.raises(ValueError, match=r"nor offloaded; embeddings\S+ is on the meta device\. Load it "):
        freeze(FocalModel(tiny()).to("meta"), (64, 48))


def test_frozen_models_are_not_saved(tmp_path):
    """They lack the weights from which the biases were computed."""
    frozen = freeze(FocalForImageClassification(tiny()), (64, 48))
    with serve(tmp_path / "hub", "me/focal"), pytest.raises(ValueError, match="A frozen model cannot be saved"):
        frozen.push_to_hub("me/focal")
    with pytest.raises(ValueError, match="A frozen model cannot be saved"):
        frozen.save_pretrained(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


@BOTH
def test_frozen_models_load_no_weights(attention_type):
    """Not even those of another frozen model, which fit: the constant biases would stay those of the old weights."""
    model, images = randomized(FocalBackbone(tiny(attention_type))), pixels(1, 3, 64, 48)
    other = freeze(FocalBackbone(tiny(attention_type)), (64, 48))
    frozen = copy.deepcopy(freeze(model, (64, 48)))
    for whole, part in ((frozen, other), (frozen.focal, other.focal), (nn.Sequential(frozen), nn.Sequential(other))):
        with pytest.raises(ValueError, match=r"A frozen model cannot load weights\. Load them into the model that was"):
            whole.load_state_dict(part.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(frozen(images).to_tuple(), model(images).to_tuple(), rtol=1e-5, atol=1e-5)


class Doubled(nn.Module):
    """Another layer in the place of one, as adapters put it."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, inputs):
        return 2 * self.layer(inputs)


@pytest.mark.parametrize("pool", ["fc", "conv"])
def test_layers_in_the_place_of_pooling_layers_are_called(pool):
    model = randomized(FocalForImageClassification(tiny(focal_pool=pool))).eval()
    for module in model.modules():
        if isinstance(module, FocalPooling):
            module.layers = nn.ModuleList(map(Doubled, module.layers))
    images = pixels(2, 3, 40, 36)
    with torch.no_grad():
        exported = torch.export.export(model, (), {"pixel_values": images}).module()
        torch.testing.assert_close(exported(pixel_values=images).logits, model(images).logits, rtol=1e-5, atol=1e-5)


def test_adapters_of_patch_merging_are_called():
    model = randomized(FocalForImageClassification(tiny()))
    adapted = get_peft_model(model, LoraConfig(target_modules=["projection"], init_lora_weights=False)).eval()
    images = pixels(2, 3, 40, 36)
    with torch.no_grad():
        expected, found = adapted(images).logits, freeze(adapted, (40, 36))(images).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
