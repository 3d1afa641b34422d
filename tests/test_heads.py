"""Heads of transformers on a Focal backbone, as listed in docs/heads.md, and images of detectors."""

import re

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import DetrImageProcessorPil, SwinBackbone, SwinConfig

from focal_hf import FocalBackbone, FocalConfig
from heads import BACKBONES, HEADS, STAGES, build, committed_table, failure, installed_heads, objects, table, train_step
from small_models import BOTH, PILLOW_PROCESSORS, pixels


@pytest.mark.parametrize("name", HEADS)
def test_heads_that_work_with_swin_work_with_focal(name):
    if name not in installed_heads():
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    assert failure(name, "Focal") is None or failure(name, "Swin") is not None, failure(name, "Focal")


def test_documented_table_is_current():
    version = re.search(r"transformers (\S+)", committed_table())[1]
    if transformers.__version__ != version:
        pytest.skip(f"the table was made with transformers {version}, this is {transformers.__version__}")
    assert table() == committed_table(), "make it again with `python tests/heads.py --write`"


@BOTH
@settings(max_examples=6, deadline=None)
@given(short=st.integers(400, 800), long=st.integers(800, 1333), upright=st.booleans(), conv=st.booleans())
def test_maps_of_detector_images_have_the_shapes_of_swin(attention_type, short, long, upright, conv):
    """The maps have strides 4, 8, 16 and 32, rounded up, also if a side is not a multiple of 4."""
    options = {"embed_dim": 8, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2), "out_features": STAGES}
    backbone = FocalBackbone(FocalConfig(**options, attention_type=attention_type, use_conv_embed=conv, topk=16))
    swin = SwinBackbone(SwinConfig(**options))
    height, width = (long, short) if upright else (short, long)
    with torch.no_grad():
        maps = backbone.eval()(pixels(1, 3, height, width)).feature_maps
        expected = swin.eval()(pixels(1, 3, height, width)).feature_maps
    assert [value.shape for value in maps] == [value.shape for value in expected]
    strides = (4, 8, 16, 32)
    assert [tuple(value.shape[2:]) for value in maps] == [(-(-height // n), -(-width // n)) for n in strides]
    assert all(value.isfinite().all() for value in maps)


@PILLOW_PROCESSORS
def test_padded_batch_of_images_of_different_sizes():
    """The sizes are a fifth of those of detectors: shortest side 160, longest side at most 267."""
    processor = DetrImageProcessorPil(size={"shortest_edge": 160, "longest_edge": 267})
    photographs = [Image.effect_noise(size, 50).convert("RGB") for size in ((300, 200), (150, 260))]
    inputs = processor(photographs, return_tensors="pt")
    assert inputs.pixel_values.shape == (2, 3, 267, 240)
    assert [mask.sum().item() for mask in inputs.pixel_mask] == [160 * 240, 267 * 154]

    shapes = []
    for backbone_class in BACKBONES.values():
        model = build("DeformableDetrForObjectDetection", backbone_class)
        shapes.append([value.shape for value in model(**inputs).values() if isinstance(value, torch.Tensor)])
        train_step(model, dict(inputs) | {"labels": objects()["labels"]})
    assert shapes[0] == shapes[1]
    assert (2, 67 * 60 + 34 * 30 + 17 * 15 + 9 * 8, 32) in shapes[0]
