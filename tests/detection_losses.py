"""Losses of small detectors on a batch that processes share: a line of JSON with each head's loss and gradient norm.

test_masks.py calls `measure` in one process, and starts this file in two.
"""

import json
import math

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel

from common.dense_losses import detection_loss
from common.dense_models import kind_of
from detection_scenes import detector_config

HEADS = ("deformable_detr", "maskformer", "mask2former")
OBJECTS = (3, 1, 0, 0)  # of each image: the second of two processes has none


def build(head: str) -> PreTrainedModel:
    torch.manual_seed(0)
    config = detector_config(head)
    if head == "mask2former":
        config.train_num_points = 8192  # random points, so many that the loss hardly depends on them
    return kind_of(config).from_config(config)


def share_of_batch(rank: int, processes: int) -> dict:
    """Returns images and their objects, as boxes and as masks."""
    draw = torch.Generator().manual_seed(0)
    labels = [
        {
            "class_labels": torch.arange(count) % 2,
            "boxes": torch.rand(count, 4, generator=draw) * 0.5 + 0.2,
            "masks": torch.rand(count, 64, 64, generator=draw) > 0.5,
        }
        for count in OBJECTS
    ]
    images = len(OBJECTS) // processes
    share = slice(rank * images, (rank + 1) * images)
    batch = {"pixel_values": torch.randn(4, 3, 64, 64, generator=draw), "pixel_mask": torch.ones(4, 64, 64).long()}
    return {name: value[share] for name, value in (batch | {"labels": labels}).items()}


def measure(accelerator: Accelerator) -> dict[str, tuple[float, float]]:
    batch = share_of_batch(accelerator.process_index, accelerator.num_processes)
    measured = {}
    for head in HEADS:
        model = build(head).eval()  # without dropout
        loss_function = detection_loss(model, sum(OBJECTS) / len(OBJECTS))
        model = accelerator.prepare(model)
        loss = loss_function(model, batch)
        accelerator.backward(loss)
        norm = accelerator.clip_grad_norm_(model.parameters(), math.inf)
        measured[head] = accelerator.reduce(loss.detach(), "mean").item(), norm.item()
    # With denoising queries where there are objects: DDP stops at the second step if parameters have no gradient.
    model = build("rt_detr").train()
    loss_function = detection_loss(model, 1.0)
    model = accelerator.prepare(model)
    for _ in range(2):
        accelerator.backward(loss_function(model, batch))
    return measured


if __name__ == "__main__":
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    measured = measure(accelerator)
    accelerator.print(json.dumps(measured))
    accelerator.end_training()
