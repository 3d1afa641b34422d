"""Tiny models and attentions, images for them, and parametrization over both attention types."""

import os
import shutil

import pytest
import torch
import transformers
from huggingface_hub.errors import StrictDataclassClassValidationError
from hypothesis import assume
from hypothesis import strategies as st
from packaging.version import Version
from PIL import Image
from transformers import BitImageProcessorPil
from transformers.utils import is_torchvision_available

from focal_hf import FocalConfig, FocalForImageClassification
from focal_hf.compatibility_focal import AutoImageProcessor
from focal_hf.configuration_focal import POOLS
from focal_hf.modeling_focal import FocalAttention

DEVICE = torch.get_default_device()  # that of --device: see conftest.py
BOTH = pytest.mark.parametrize("attention_type", ["focal", "topk"])
TORCH_2_7 = pytest.mark.skipif(
    torch.__version__ < "2.7", reason="torch 2.6 does not get through transformers' own functions"
)
# For tests of examples that a user copies.
PUBLIC_PROCESSOR = pytest.mark.skipif(
    transformers.AutoImageProcessor is not AutoImageProcessor,
    reason="up to 5.17, transformers.AutoImageProcessor can only be used with torchvision",
)
BEFORE_5_9 = Version(transformers.__version__) < Version("5.9")
SWIN_OF_5_9 = pytest.mark.skipif(
    BEFORE_5_9, reason="up to transformers 5.8, Swin has other hidden states, absolute positions and stochastic depth"
)
PROCESSORS_NEED_TORCHVISION = not is_torchvision_available() and Version(transformers.__version__) < Version("5.5")
PILLOW_PROCESSORS = pytest.mark.skipif(
    PROCESSORS_NEED_TORCHVISION, reason="in transformers 5.4, most image processors can only be used with torchvision"
)
NO_COMPILER = shutil.which(os.environ.get("CXX", "g++")) is None
SWIN = {"image_size": 32, "embed_dim": 8, "depths": (1, 2, 1), "num_heads": (1, 2, 2), "window_size": 4}
SWIN |= {"encoder_stride": 16, "num_labels": 5}


def tiny(attention_type="focal", **changes):
    options = {"focal_levels": (2, 2, 2), "focal_windows": (3, 3, 1), "expand_sizes": (2, 2, 2), "topk": 11}
    return FocalConfig(attention_type=attention_type, **SWIN | options | changes)


def randomized(model):
    """Draws weights so that every part of the model affects its output. They are the same on every device."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.empty(parameter.shape, device="cpu").normal_(std=0.2, generator=generator))
    return model.to(DEVICE).eval()


def pixels(*shape):
    """Draws images, the same on every device."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), device="cpu").to(DEVICE)


def prepare(folder, attention_type):
    """Writes a model, its image processor and a picture, under the names that the documentation uses."""
    # Small, but of as many stages as the documentation's.
    stages = {"depths": (1,) * 4, "num_heads": (2,) * 4, "focal_levels": (2,) * 4, "focal_windows": (3,) * 4}
    stages |= {"embed_dim": 4, "expand_sizes": (2,) * 4}
    model = randomized(FocalForImageClassification(tiny(attention_type, **stages)))
    model.save_pretrained(folder / "focal-tiny")
    BitImageProcessorPil(
        size={"shortest_edge": 36}, crop_size={"height": 32, "width": 32}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    ).save_pretrained(folder / "focal-tiny")
    Image.effect_mandelbrot((60, 50), (-2, -1.5, 1, 1.5), 100).convert("RGB").save(folder / "cat.jpg")


@st.composite
def one_stage_configs(draw, embed_dims=(4,), largest_window=5):
    window = draw(st.integers(1, largest_window))
    options = {
        "image_size": draw(st.tuples(st.integers(1, 14), st.integers(1, 14))),
        "patch_size": 1,
        "embed_dim": draw(st.sampled_from(embed_dims)),
        "depths": (2,),
        "num_heads": (draw(st.sampled_from([1, 2])),),
        "window_size": window,
        "attention_type": draw(st.sampled_from(["focal", "topk"])),
        "focal_levels": (draw(st.integers(0, 4)),),
        "focal_windows": (draw(st.sampled_from([1, 3, 5])),),
        "focal_pool": draw(st.sampled_from(POOLS)),
        "expand_sizes": (draw(st.integers(0, window)),),
        "topk": draw(st.integers(1, 40)),
        "use_shift": draw(st.booleans()),
        "qkv_bias": draw(st.booleans()),
        "qk_scale": draw(st.sampled_from([None, 0.5])),
        "out_features": None,
    }
    try:
        return FocalConfig(**options)
    except StrictDataclassClassValidationError:
        assume(False)


def build(config, block):
    attention = FocalAttention(config, 0, config.block_geometry(0, block)).double().eval()
    with torch.no_grad():
        for parameter in attention.parameters():
            # So that scores are within what the -100 of the original hides.
            parameter.normal_(std=0.5)
    return attention
