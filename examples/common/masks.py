"""Masks of objects: as annotators write them, in views, in the loss of models that find them, and drawn."""

import numpy as np
import torch
from matplotlib.colors import to_rgba
from PIL import Image
from pycocotools import mask as coco_mask
from transformers import Mask2FormerConfig, MaskFormerConfig, PreTrainedModel
from transformers.utils import ModelOutput

from .options import Problem

# Types of models that take images and give a class and a mask for each of their queries.
MASK_MODELS = (Mask2FormerConfig, MaskFormerConfig)
NOTHING = {"size": [0, 0], "counts": b""}  # the mask of an object in a picture that cannot be read

# ---------------------------------------------------------------------------------------------------------------- data


def run_lengths(segmentation: object, size: tuple[int, int], where: str) -> dict:
    """COCO's polygons or run lengths, compressed or not, as compressed run lengths.

    What is not right is refused here: pycocotools may take a polygon for a box, or run lengths that end too early for
    those of whatever is in memory.

    Args:
        size: width and height of the image.
        where: the annotation, for the error that says what is wrong with it.
    """
    width, height = size
    try:
        if isinstance(segmentation, dict):
            if list(segmentation["size"]) != [height, width]:
                raise ValueError(f"it is for {segmentation['size']}, [height, width]")
            counts = segmentation["counts"]
            counts = list(counts) if isinstance(counts, list | tuple) else decompressed(counts)
            if min(counts, default=0) < 0 or sum(counts) != height * width:
                raise ValueError("its run lengths do not add up to the image's pixels")
            return coco_mask.frPyObjects({"size": [height, width], "counts": counts}, height, width)
        polygons = [[float(value) for value in polygon] for polygon in segmentation]
        if not polygons:
            raise ValueError("it has no polygon")
        for polygon in polygons:
            if len(polygon) < 6 or len(polygon) % 2:
                raise ValueError(f"it has a polygon of {len(polygon)} numbers")
            for values, side in ((polygon[::2], width), (polygon[1::2], height)):
                if not all(-side <= value <= 2 * side for value in values):
                    raise ValueError("it has a polygon with points that are not numbers, or far outside of the image")
        return coco_mask.merge(coco_mask.frPyObjects(polygons, height, width))
    except (ValueError, TypeError, KeyError, OverflowError) as error:
        what = "it has none" if segmentation is None else str(error)
        raise Problem(
            f"{where} has no usable segmentation ({what}): expected polygons, [[x, y, x, y, x, y, ...], ...], or run "
            f"lengths, {{'size': [{height}, {width}], 'counts': ...}}. Add it, remove the annotation, or train a "
            "detector of boxes (--head rt_detr)."
        ) from error


def decompressed(counts: str | bytes) -> list[int]:
    """Run lengths of COCO's compressed ones: six bits a character, each number less the one two before it."""
    numbers, value, shift = [], 0, 0
    for character in counts.encode() if isinstance(counts, str) else counts:
        bits = character - 48
        if not 0 <= bits < 64:
            raise ValueError("it has characters that compressed run lengths have not")
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            value -= (bits & 16) << (shift - 4)  # the sign
            numbers.append(value + (numbers[-2] if len(numbers) > 2 else 0))
            value = shift = 0
    return numbers


def areas(codes: list[dict]) -> list[int]:
    return [int(area) for area in coco_mask.area(codes)]


def decode(codes: list[dict], size: tuple[int, int]) -> np.ndarray:
    """Masks (objects, height, width) of run lengths; `size` is the image's width and height."""
    if not codes:
        return np.zeros((0, *size[::-1]), bool)
    return coco_mask.decode(codes).transpose(2, 0, 1).astype(bool)


def resize(masks: np.ndarray, height: int, width: int) -> np.ndarray:
    """Masks of another size, that have the pixels of which they have half at least."""
    shape = (width, height)
    return (
        np.asarray(
            [np.asarray(Image.fromarray(mask).convert("L").resize(shape, Image.Resampling.BILINEAR)) for mask in masks]
        ).reshape(-1, height, width)
        >= 128
    )


# --------------------------------------------------------------------------------------------------------------- model


def mask_loss(model: PreTrainedModel, outputs: ModelOutput, labels: list[dict], objects: float) -> torch.Tensor:
    """The model's own loss, divided by what images have on average, where the model divides by what these have.

    The losses of masks are divided by the number of objects, and that of classes by the queries' weights, which are 1
    for those with an object and less for the others.

    Args:
        objects: the average number of an image.
    """
    losses = model.get_loss_dict(
        *(outputs.masks_queries_logits, outputs.class_queries_logits),
        *([target["masks"].float() for target in labels], [target["class_labels"] for target in labels]),
        outputs.auxiliary_logits,
    )
    queries, background = outputs.class_queries_logits.shape[1], model.config.no_object_weight
    counts = [len(target["class_labels"]) for target in labels]
    weights = [background * queries + (1 - background) * min(queries, count) for count in [*counts, objects]]
    of_masks = max(1, sum(counts)) / (objects * len(labels))
    of_classes = sum(weights[:-1]) / (weights[-1] * len(labels))
    return sum(loss * (of_classes if "cross_entropy" in name else of_masks) for name, loss in losses.items())


def found_masks(
    outputs: ModelOutput, padded: tuple[int, int], shapes: list[tuple[int, int]], sizes: list[tuple[int, int]]
) -> list[dict]:
    """What a model found in each image of a batch: `masks` as run lengths, their `boxes`, `scores` and `labels`.

    Args:
        padded: height and width of the batch.
        shapes: heights and widths of the images in it.
        sizes: heights and widths of the masks.
    """
    logits = zip(outputs.class_queries_logits.float(), outputs.masks_queries_logits.float(), strict=True)
    return [found_in_image(*both, padded, shape, size) for both, shape, size in zip(logits, shapes, sizes, strict=True)]


def found_in_image(
    classes: torch.Tensor,
    maps: torch.Tensor,
    padded: tuple[int, int],
    shape: tuple[int, int],
    size: tuple[int, int],
) -> dict:
    """The same of one image, as Mask2Former's authors evaluate it.

    Of all pairs of a query and a class the likeliest, as many as there are queries. Masks may overlap. A score is the
    class's probability times the mean probability of the mask's pixels. transformers' own post-processing does the same
    on masks of 384 x 384 pixels, whatever an image's size.

    Args:
        classes: logits (queries, classes and none).
        maps: logits (queries, height, width) of the masks.
    """
    probabilities = classes.softmax(-1)[:, :-1]
    scores, places = probabilities.flatten().topk(len(probabilities))
    queries, labels = (places // probabilities.shape[1]).tolist(), (places % probabilities.shape[1]).tolist()
    codes = {}
    for query in set(queries):  # one after the other: of large images, all together are gigabytes
        logits = torch.nn.functional.interpolate(maps[query][None, None], padded, mode="bilinear")
        logits = logits[..., : shape[0], : shape[1]]
        logits = torch.nn.functional.interpolate(logits, size, mode="bilinear")[0, 0]
        mask = logits > 0
        if mask.any():
            code = coco_mask.encode(np.asfortranarray(mask.cpu().numpy(), np.uint8))
            codes[query] = code, logits[mask].sigmoid().mean().item()
    found = [
        (codes[query][0], score * codes[query][1], label)
        for query, score, label in zip(queries, scores.tolist(), labels, strict=True)
        if query in codes
    ]
    masks, scores, labels = zip(*found, strict=True) if found else ((), (), ())
    boxes = np.reshape(coco_mask.toBbox(list(masks)), (-1, 4))
    boxes[:, 2:] += boxes[:, :2]
    return {
        "masks": list(masks),
        "boxes": boxes,
        "scores": np.asarray(scores, np.float64),
        "labels": np.asarray(labels, np.int64),
    }


# ------------------------------------------------------------------------------------------------------------- reports


def draw_masks(axes, masks: np.ndarray, colours: list[str]) -> None:
    """Half transparent, with their outlines."""
    limits = axes.axis()
    for mask, colour in zip(masks, colours, strict=True):
        axes.imshow(mask[..., None] * np.asarray(to_rgba(colour, 0.5)))
        height, width = mask.shape
        framed = np.pad(mask, 1).astype(float)  # an outline goes along the image's edge, too
        axes.contour(np.arange(-1, width + 1), np.arange(-1, height + 1), framed, [0.5], colors=colour, linewidths=1)
    axes.axis(limits)
