"""A frozen model gives the outputs of its model, for images of one size."""

import pytest
import torch
from torch import nn

from focal_hf import FocalBackbone, FocalForImageClassification, freeze
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


def test_other_sizes_and_other_models_are_refused():
    frozen = freeze(FocalForImageClassification(tiny()), (64, 48))
    with pytest.raises(ValueError, match=r"frozen for images of another size: a block expects \(16, 12\) tokens"):
        frozen(pixels(1, 3, 48, 48))
    with pytest.raises(ValueError, match="must contain a Focal Transformer; got Linear"):
        freeze(nn.Linear(1, 1), (64, 48))
