"""Figures and model cards of detection and segmentation."""

import itertools
from pathlib import Path

import datasets
import numpy as np
import torch
from matplotlib.colors import hsv_to_rgb, to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from transformers import BaseImageProcessor

from .coco import clipped_boxes, decode
from .dense_evaluation import BOX_METRICS, METRICS
from .detection_views import picture
from .reports import Card, to_picture
from .segmentation_data import NO_CLASS

SHOWN, SCORE_THRESHOLD = 6, 0.5  # images in a figure, and the score above which predictions are drawn
LEGEND = 24  # largest number of classes for which a figure has a legend


def colour_of(label: int) -> str:
    return f"C{label % 10}"


def draw_objects(
    axes, boxes: np.ndarray, masks: list[dict] | None, labels: list[int], texts: list[str], size: tuple[int, int]
) -> None:
    if masks is not None:
        draw_masks(axes, decode(masks, size), [colour_of(label) for label in labels])
    for (left, top, right, bottom), label, text in zip(boxes.tolist(), labels, texts, strict=True):
        colour = colour_of(label)
        axes.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, color=colour, linewidth=1.5))
        axes.text(
            left, top, text, fontsize=7, color="white", va="bottom", bbox={"facecolor": colour, "lw": 0, "pad": 0.8}
        )


def draw_masks(axes, masks: np.ndarray, colours: list[str]) -> None:
    """Draw masks half transparent, with outlines."""
    limits = axes.axis()
    for mask, colour in zip(masks, colours, strict=True):
        axes.imshow(mask[..., None] * np.asarray(to_rgba(colour, 0.5)))
        height, width = mask.shape
        framed = np.pad(mask, 1).astype(float)  # an outline goes along the image's edge, too
        axes.contour(np.arange(-1, width + 1), np.arange(-1, height + 1), framed, [0.5], colors=colour, linewidths=1)
    axes.axis(limits)


def draw_detections(file: Path, data: dict, column: str, predictions: dict[int, dict], names: dict[int, str]) -> None:
    """Draw the first images with their objects above, and with predictions that score above SCORE_THRESHOLD below."""
    label2id = {name: label for label, name in names.items()}
    shown = sorted(predictions)[:SHOWN]
    if not shown:
        return
    figure = Figure(figsize=(0.4 + 2.4 * len(shown), 5), layout="constrained")
    grid = figure.subplots(2, len(shown), squeeze=False)
    rows = data["rows"].cast_column(column, datasets.Image(decode=False))
    for index, (upper, lower) in zip(shown, grid.T, strict=True):
        target, found = data["labels"][index], predictions[index]
        image = picture(rows[index][column], target["size"])
        for axes in (upper, lower):
            axes.imshow(image)
            axes.set(xticks=[], yticks=[])
        boxes, kept = clipped_boxes(target)
        truth = [name for name, keep in zip(target["name"], kept, strict=True) if keep]
        masks = [*itertools.compress(target["masks"], kept)] if "masks" in target else None
        draw_objects(upper, boxes[kept], masks, [label2id[name] for name in truth], truth, image.size)
        sure = found["scores"] > SCORE_THRESHOLD
        labels = found["labels"][sure].tolist()
        texts = [f"{names[label]} {score:.2f}" for label, score in zip(labels, found["scores"][sure], strict=True)]
        boxes = found["boxes"][sure].clip(0, np.tile(np.float32(image.size), 2))
        masks = [*itertools.compress(found["masks"], sure)] if "masks" in found else None
        draw_objects(lower, boxes, masks, labels, texts, image.size)
    grid[0, 0].set_ylabel("truth")
    grid[1, 0].set_ylabel(f"predicted, score > {SCORE_THRESHOLD}")
    figure.savefig(file, dpi=100)


def detection_card(model_type: str, entry: dict) -> Card:
    titles = ("AP", "AP50", "AP75", "AP small", "AP medium", "AP large", "AP of boxes", "AP50 of boxes")
    titles = dict(zip((*METRICS, *BOX_METRICS), titles, strict=True))
    measures = {key: (title, entry[key]) for key, title in titles.items() if entry.get(key) is not None}
    settings = {"tags": [model_type], "measures": measures, "classes": ("AP", entry["classes"])}
    if "box_ap" in entry:
        kind, options = "A model for instance segmentation", ', subtask="instance", threshold=0.5'
        settings |= {"task": "image-segmentation", "pipeline_options": options}
    else:
        kind = "A detector"
        settings |= {"task": "object-detection"}
    return Card(f"{kind} ({model_type})", "finetune_detection.py", **settings)


def draw_scenes(
    file: Path,
    scenes: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]],
    processor: BaseImageProcessor,
    names: list[str],
) -> None:
    """Draw images, given as pixel values (channels, height, width), above their true and their predicted classes."""
    numbers = np.arange(len(names))
    # Hues differ by the golden ratio, so that classes with similar numbers look different. The first class, which is
    # often the background, is dark, and ignored pixels are white.
    colours = hsv_to_rgb(
        np.stack([numbers * 0.618 % 1, 0.9 - 0.3 * (numbers % 2), 0.95 - 0.25 * (numbers % 3 == 1)], 1)
    )
    colours[0] = 0.2
    palette = np.ones((NO_CLASS + 1, 3))
    palette[: len(names)] = colours
    figure = Figure(figsize=(0.4 + 1.8 * len(scenes), 6.2), layout="constrained")
    grid = figure.subplots(3, len(scenes), squeeze=False)
    for column, (pixels, truth, predicted) in zip(grid.T, scenes, strict=True):
        picture = to_picture(processor, pixels).clamp(0, 1).permute(1, 2, 0).numpy()
        for axes, content in zip(column, (picture, palette[truth.numpy()], palette[predicted.numpy()]), strict=True):
            axes.imshow(content, interpolation="nearest")
            axes.set(xticks=[], yticks=[])
    for axes, name in zip(grid[:, 0], ("image", "truth", "predicted"), strict=True):
        axes.set_ylabel(name)
    seen = sorted({int(number) for _, *maps in scenes for part in maps for number in part.unique()} - {NO_CLASS})
    if len(seen) <= LEGEND:
        patches = [Patch(color=colours[number], label=names[number]) for number in seen]
        figure.legend(handles=patches, loc="outside lower center", ncols=min(len(seen), 2 + 2 * len(scenes)))
    figure.savefig(file, dpi=100)


def segmentation_card(model_type: str, entry: dict) -> Card:
    titles = {"mean_iou": "Mean IoU", "mean_accuracy": "Mean accuracy", "pixel_accuracy": "Pixel accuracy"}
    measures = {key: (title, entry[key]) for key, title in titles.items()}
    kind = f"A semantic segmentation model (UperNet on {model_type})"
    return Card(kind, "finetune_segmentation.py", ["upernet", model_type], measures, "image-segmentation")
