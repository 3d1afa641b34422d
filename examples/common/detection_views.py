"""Crop, resize and batch images, with their boxes and masks."""

import argparse
import math
import random
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image, ImageOps
from transformers import BaseImageProcessor

from .coco import clipped_boxes, decode
from .loading import Images, Item
from .options import first_line
from .pictures import in_colour, open_picture

SMALLEST_SHARE = 0.25  # objects with a smaller share inside a crop are dropped


def picture(cell: dict, size: tuple[int, int]) -> Image.Image:
    """Decode an image in the orientation of its annotations: most ignore the EXIF orientation, some do not."""
    image = open_picture(cell)
    if image.size != size:
        image = ImageOps.exif_transpose(image)
    if image.size != size:
        raise ValueError(f"it has {image.width} x {image.height} pixels, but its annotations say {size[0]} x {size[1]}")
    return in_colour(image)


def random_part(
    image: Image.Image, boxes: np.ndarray, masks: np.ndarray | None, args: argparse.Namespace, rng: random.Random
) -> tuple[Image.Image, np.ndarray, np.ndarray | None, np.ndarray]:
    """Crop and mirror, each with probability 1/2. Returns image, boxes, masks, and which objects are kept."""

    def extent() -> np.ndarray:
        return (boxes[:, 2:] - boxes[:, :2]).prod(1) if masks is None else masks.sum((1, 2))

    left_over = np.ones(len(boxes), bool)
    if args.crop_scale < 1 and rng.random() < 0.5:
        area = image.width * image.height * rng.uniform(args.crop_scale, 1)
        ratio = image.width / image.height * math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        width = min(image.width, max(1, round(math.sqrt(area * ratio))))
        height = min(image.height, max(1, round(math.sqrt(area / ratio))))
        left, top = rng.randint(0, image.width - width), rng.randint(0, image.height - height)
        image = image.crop((left, top, left + width, top + height))
        before = extent()
        boxes = (boxes - np.float32([left, top, left, top])).clip(0, np.float32([width, height, width, height]))
        masks = None if masks is None else masks[:, top : top + height, left : left + width]
        left_over = extent() >= SMALLEST_SHARE * before
    if args.flip and rng.random() < 0.5:
        image = ImageOps.mirror(image)
        boxes = np.stack([image.width - boxes[:, 2], boxes[:, 1], image.width - boxes[:, 0], boxes[:, 3]], 1)
        masks = None if masks is None else masks[..., ::-1]
    return image, boxes, masks, left_over


def sides(processor: BaseImageProcessor) -> dict[str, int]:
    return {name: value for name, value in dict(processor.size).items() if value}


class View:
    """The inputs of a detector for an image and its objects. In training, images are cropped, mirrored and resized.

    Args:
        sizes: sizes for the image processor. One is drawn for each image.
        args: the options of training, or `None` for evaluation.
    """

    def __init__(
        self,
        processor: BaseImageProcessor,
        label2id: dict[str, int],
        sizes: list[dict[str, int]],
        args: argparse.Namespace | None = None,
    ):
        self.processor, self.label2id, self.sizes, self.args = processor, label2id, sizes, args

    def __call__(self, image: Image.Image, target: dict, rng: random.Random) -> dict:
        boxes, kept = clipped_boxes(target)
        classes = np.asarray([self.label2id[name] for name in target["name"]], np.int64)
        boxes, classes = boxes[kept], classes[kept]
        masks = decode(target["masks"], target["size"])[kept] if "masks" in target else None
        if self.args:
            image, boxes, masks, kept = random_part(image, boxes, masks, self.args, rng)
            boxes, classes = boxes[kept], classes[kept]
            masks = None if masks is None else masks[kept]
        pixels = self.processor(image, size=rng.choice(self.sizes), do_pad=False, return_tensors="pt")["pixel_values"]
        if masks is not None:
            masks = resize(masks, *pixels.shape[-2:])
            kept = masks.any((1, 2))  # resizing may remove all pixels of a small mask
            labels = {"class_labels": torch.from_numpy(classes[kept]), "masks": torch.from_numpy(masks[kept])}
            return {"pixel_values": pixels[0], "labels": labels}
        boxes = boxes / np.tile(np.float32(image.size), 2)
        boxes = np.concatenate([(boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]], 1)
        labels = {"class_labels": torch.from_numpy(classes), "boxes": torch.from_numpy(boxes.astype(np.float32))}
        return {"pixel_values": pixels[0], "labels": labels}


def training_sizes(processor: BaseImageProcessor, smallest: int, step: int) -> list[dict[str, int]]:
    """Sizes for the image processor, from `smallest` on the shorter side to its own, in multiples of `step`."""
    size = sides(processor)
    side = min(size.values())
    drawn = [*range(math.ceil(smallest / step) * step, side, step), side]
    return [{name: round(value * shorter / side) for name, value in size.items()} for shorter in drawn]


def smallest_batch(sizes: list[dict[str, int]], step: int) -> tuple[int, int]:
    """Height and width of the smallest batch: those of a square image, unless the sizes have a height and a width."""
    shorter = min(sizes[0].values())
    height, width = (math.ceil(sizes[0].get(name, shorter) / step) * step for name in ("height", "width"))
    return height, width


class ObjectImages(Images):
    """Images with their objects. An unreadable image becomes a black image without objects.

    `fetch` returns an undecoded image and its objects. `view` takes the image, the objects and a `random.Random`. The
    height and width of a batch are multiples of `step`.
    """

    def __init__(self, fetch: Callable, view: Callable, step: int):
        super().__init__(fetch, view)
        self.step = step

    def __getitem__(self, item: Item) -> dict:
        cell, target = self.fetch(item.key)
        rng, broken = random.Random(item.seed), None
        try:
            image = picture(cell, target["size"])
        except Exception as error:  # damaged bytes may raise any error
            broken = f"{cell['path']} ({first_line(error)})"
            image = Image.new("RGB", (64, 64))
            lists = ("bbox", "name", "iscrowd", "masks")
            target = {"size": image.size} | {name: [] for name in lists if name in target}
        index = item.key if item.counts and not broken else -1
        size = torch.tensor([image.height, image.width])
        return self.view(image, target, rng) | {"size": size, "index": index, "broken": broken}

    def collate(self, samples: list[dict]) -> dict:
        """A batch of images and masks, padded at the right and bottom, with boxes relative to the padded size.

        `shapes` are the heights and widths of the images in the batch, `sizes` those in the files.
        """
        shapes = torch.tensor([sample["pixel_values"].shape[-2:] for sample in samples])
        height, width = (math.ceil(side / self.step) * self.step for side in shapes.amax(0).tolist())
        pixels = torch.zeros(len(samples), 3, height, width)
        mask = torch.zeros(len(samples), height, width, dtype=torch.long)
        labels = []
        for sample, (rows, columns), image, valid in zip(samples, shapes.tolist(), pixels, mask, strict=True):
            image[:, :rows, :columns] = sample["pixel_values"]
            valid[:rows, :columns] = 1
            objects = dict(sample["labels"])
            if "masks" in objects:
                padding = (0, width - columns, 0, height - rows)
                objects["masks"] = torch.nn.functional.pad(objects["masks"], padding)
            else:
                objects["boxes"] = objects["boxes"] * torch.tensor([columns / width, rows / height]).repeat(2)
            labels.append(objects)
        return {
            "pixel_values": pixels,
            "pixel_mask": mask,
            "labels": labels,
            "shapes": shapes,
            "sizes": torch.stack([sample["size"] for sample in samples]),
            "indices": torch.tensor([sample["index"] for sample in samples]),
            "broken": [sample["broken"] for sample in samples if sample["broken"]],
        }


def resize(masks: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize masks. A pixel belongs to a mask if the mask covers at least half of the pixel."""
    shape = (width, height)
    return (
        np.asarray(
            [np.asarray(Image.fromarray(mask).convert("L").resize(shape, Image.Resampling.BILINEAR)) for mask in masks]
        ).reshape(-1, height, width)
        >= 128
    )
