"""Pictures of rectangles in COCO's format, small detectors to train on them, and the metrics of pycocotools."""

import contextlib
import copy
import io
import json
import random
from argparse import Namespace
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from transformers import (
    DeformableDetrConfig,
    DetrConfig,
    Mask2FormerConfig,
    MaskFormerConfig,
    PreTrainedConfig,
    RTDetrConfig,
)

from common.coco import read_objects
from example_runs import COLOURS, tiny_config

NAMES = [*COLOURS]
STAGES = {"depths": (1, 1, 1), "num_heads": (1, 2, 4), "patch_size": 4, "embed_dim": 16, "window_size": 4}
LEVELS = {"focal_levels": (2,) * 3, "focal_windows": (3, 3, 1), "expand_sizes": (1,) * 3}
CLASSIFIER = STAGES | LEVELS | {"image_size": 64}
BACKBONE = STAGES | LEVELS | {"drop_path_rate": 0.0, "initializer_range": 0.1, "out_indices": [1, 2, 3]}


def detector_config(head: str) -> PreTrainedConfig:
    """Returns the config of a small detector with a Focal backbone."""
    backbone = {"backbone_config": tiny_config(**BACKBONE)}
    if head == "maskformer":
        layers = {"encoder_layers": 1, "encoder_ffn_dim": 32, "encoder_attention_heads": 2}
        layers |= {"decoder_layers": 1, "decoder_ffn_dim": 32, "decoder_attention_heads": 2}
        decoder = DetrConfig(d_model=32, num_queries=8, **layers)
        return MaskFormerConfig(decoder_config=decoder, fpn_feature_size=32, mask_feature_size=32, **backbone)
    if head == "mask2former":
        return Mask2FormerConfig(
            **{"feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32, "encoder_feedforward_dim": 32},
            **{"dim_feedforward": 32, "encoder_layers": 1, "decoder_layers": 3, "num_attention_heads": 2},
            **{"num_queries": 8, "train_num_points": 256, "feature_strides": [4, 8, 16]},
            **backbone,
        )
    small = {
        **{"d_model": 32, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "num_queries": 12},
        **{"encoder_attention_heads": 2, "decoder_attention_heads": 2},
    }
    if head == "deformable_detr":
        return DeformableDetrConfig(
            **{"use_timm_backbone": False, "encoder_layers": 1, "decoder_layers": 2, "num_feature_levels": 3},
            **{"dropout": 0.0, "activation_dropout": 0.0, "attention_dropout": 0.0},
            **small | backbone,
        )
    return RTDetrConfig(
        **{"encoder_hidden_dim": 32, "decoder_in_channels": [32] * 3, "hidden_expansion": 0.5, "decoder_layers": 1},
        **{"num_denoising": 10, "encoder_in_channels": [16, 32, 64], "feat_strides": [4, 8, 16]},
        **small | backbone | {"initializer_range": 0.1},
    )


def rectangle(left: int, top: int, width: int, height: int) -> tuple[list, dict, dict]:
    """Returns the mask of a rectangle in 64 x 48 pixels as polygon, run lengths and compressed run lengths."""
    right, bottom = left + width, top + height
    lengths = [left * 48 + top, *[height, 48 - height] * (width - 1), height, (64 - right) * 48 + 48 - bottom]
    lengths = {"size": [48, 64], "counts": lengths}
    compressed = coco_mask.frPyObjects(lengths, 48, 64)
    compressed["counts"] = compressed["counts"].decode()
    return [[left, top, right, top, right, bottom, left, bottom]], lengths, compressed


def draw_scenes(folder: Path, split: str, count: int, **changes) -> dict:
    """Draws pictures of 64 x 48 pixels with up to two rectangles. Returns their annotations in COCO's format."""
    draw, noise = random.Random(split), np.random.default_rng(count)
    (folder / split).mkdir(parents=True)
    (folder / "annotations").mkdir(exist_ok=True)
    images, annotations = [], []
    for number in range(count):
        pixels = noise.integers(90, 170, (48, 64, 3), dtype=np.uint8)
        for _ in range(draw.randint(0, 2)):
            width, height, label = draw.randint(12, 28), draw.randint(12, 28), draw.randrange(3)
            left, top = draw.randint(0, 64 - width), draw.randint(0, 48 - height)
            pixels[top : top + height, left : left + width] = COLOURS[NAMES[label]]
            box = {"bbox": [left, top, width, height], "area": width * height, "iscrowd": 0}
            box["segmentation"] = rectangle(left, top, width, height)[len(annotations) % 3]
            # Numbers of categories begin where they like, and have gaps.
            annotations.append({"id": len(annotations) + 1, "image_id": number, "category_id": 2 * label + 7} | box)
        Image.fromarray(pixels).save(folder / split / f"{number}.png")
        images.append({"id": number, "file_name": f"{number}.png", "width": 64, "height": 48})
    categories = [{"id": 2 * label + 7, "name": name} for label, name in enumerate(NAMES)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return content


def read(folder: Path, masks: bool = False, **options) -> tuple[dict, dict, list[str], list[str]]:
    """Returns what `read_objects` returns, and the messages that it prints."""
    said = []
    args = Namespace(
        **{"data": str(folder), "train_split": "train", "validation_split": "validation", "seed": 0}
        | {"image_column": "image", "objects_column": "objects", "validation_fraction": 0.25}
        | options
    )
    return *read_objects(args, said.append, masks), said


def write_scenes(place: Path) -> None:
    """Writes training and validation pictures to PLACE/scenes. One of them is unreadable."""
    draw_scenes(place / "scenes", "train", 98)
    draw_scenes(place / "scenes", "validation", 13)
    whole = (place / "scenes" / "train" / "5.png").read_bytes()
    (place / "scenes" / "train" / "5.png").write_bytes(whole[: len(whole) // 2])


def official(content: dict, answers: list[dict], kind: str = "bbox") -> list[float]:
    """Returns the metrics that pycocotools computes."""
    truth = COCO()
    truth.dataset = copy.deepcopy(content)
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(answers), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats.tolist()
