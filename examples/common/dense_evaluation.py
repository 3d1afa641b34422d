"""Predictions of detectors and segmentation models for whole images, and the average precision of COCO."""

import contextlib
import io
import math
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from transformers import BaseImageProcessor
from transformers.utils import ModelOutput

from .loading import Loader

METRICS = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
BOX_METRICS = {f"box_{name}": name for name in ("ap", "ap50")}  # metrics of boxes, for models with masks


def ground_truth(images: list[dict], label2id: dict[str, int]) -> COCO:
    """The annotations, including crowds, as a COCO object. The ids of the images are their indices."""
    annotations = []
    for index, image in enumerate(images):
        for place, name in enumerate(image["name"]):
            annotation = {"id": len(annotations) + 1, "image_id": index, "category_id": label2id[name]}
            annotation |= {key: image[key][place] for key in ("bbox", "area", "iscrowd")}
            if "masks" in image:
                annotation["segmentation"] = image["masks"][place]
            annotations.append(annotation)
    truth = COCO()
    truth.dataset = {
        "images": [
            {"id": index, "width": image["size"][0], "height": image["size"][1]} for index, image in enumerate(images)
        ],
        "annotations": annotations,
        "categories": [{"id": index, "name": name} for name, index in label2id.items()],
    }
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
    return truth


def average_precision(truth: COCO, predictions: dict[int, dict], names: dict[int, str], kind: str = "bbox") -> dict:
    """COCO's average precision of all classes and of each class, on the images that have predictions.

    Args:
        predictions: by the index of an image, a dict with `boxes` [left, top, right, bottom], `scores`, `labels` and,
            for masks, `masks` as run lengths.
        kind: "bbox" for boxes, "segm" for masks.

    Returns:
        The metrics by name. A metric is `None` if there is no object.
    """
    results = []
    for index, found in predictions.items():
        if kind == "segm":
            places = [{"segmentation": code} for code in found["masks"]]
        else:
            corners = np.asarray(found["boxes"]).tolist()
            places = [{"bbox": [left, top, right - left, bottom - top]} for left, top, right, bottom in corners]
        numbers = (np.asarray(found[key]).tolist() for key in ("labels", "scores"))
        for place, label, score in zip(places, *numbers, strict=True):
            results.append({"image_id": index, "category_id": label, "score": score} | place)
    with contextlib.redirect_stdout(io.StringIO()):
        answers = truth.loadRes(results) if results else COCO()
        evaluation = COCOeval(truth, answers, kind)
        evaluation.params.imgIds = sorted(predictions)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()

    def mean(values: np.ndarray) -> float | None:
        return float(values[values > -1].mean()) if (values > -1).any() else None

    precision = evaluation.eval["precision"][:, :, :, 0, -1]  # (thresholds, recalls, classes)
    classes = {names[label]: mean(precision[:, :, place]) for place, label in enumerate(evaluation.params.catIds)}
    measured = {
        name: value if value > -1 else None for name, value in zip(METRICS, evaluation.stats[:6].tolist(), strict=True)
    }
    return measured | {"images": len(predictions), "classes": classes}


@torch.no_grad()  # not inference_mode: tensors that a model caches there could not be used in training later
def predict(
    accelerator: Accelerator,
    model: torch.nn.Module,
    names: tuple[str, ...],
    processor: BaseImageProcessor,
    loader: Loader,
) -> dict[int, dict]:
    """The predictions of all processes for each readable image, by the index of the image."""
    model.eval()
    found = {}
    for batch in loader:
        with accelerator.autocast():
            outputs = model(**{name: batch[name] for name in names})
        padded, shapes, sizes = batch["pixel_values"].shape[-2:], batch["shapes"], batch["sizes"]
        if "masks_queries_logits" in outputs:
            answers = find_masks(outputs, padded, shapes.tolist(), sizes.tolist())
        else:
            outputs.logits, outputs.pred_boxes = outputs.logits.float(), outputs.pred_boxes.float()
            sizes = sizes * sizes.new_tensor(padded) / shapes  # size of the padded batch, in pixels of the files
            answers = processor.post_process_object_detection(outputs, threshold=0.0, target_sizes=sizes)
            answers = [{name: value.cpu().numpy() for name, value in answer.items()} for answer in answers]
        for index, answer in zip(batch["indices"].tolist(), answers, strict=True):
            if index >= 0:
                found[index] = answer
    everything = gather_object([found])
    return {index: answer for part in everything for index, answer in part.items()}


def find_masks(
    outputs: ModelOutput, padded: tuple[int, int], shapes: list[tuple[int, int]], sizes: list[tuple[int, int]]
) -> list[dict]:
    """The predictions for each image of a batch: `masks` as run lengths, their `boxes`, `scores` and `labels`.

    Args:
        padded: height and width of the batch.
        shapes: heights and widths of the images in it.
        sizes: heights and widths of the masks.
    """
    logits = zip(outputs.class_queries_logits.float(), outputs.masks_queries_logits.float(), strict=True)
    return [
        find_masks_in_image(*both, padded, shape, size) for both, shape, size in zip(logits, shapes, sizes, strict=True)
    ]


def find_masks_in_image(
    classes: torch.Tensor,
    maps: torch.Tensor,
    padded: tuple[int, int],
    shape: tuple[int, int],
    size: tuple[int, int],
) -> dict:
    """The predictions for one image, as Mask2Former's authors evaluate it.

    Keeps the most probable pairs of a query and a class, as many as there are queries. Masks may overlap. A score is
    the probability of the class times the mean probability of the pixels of the mask. The post-processing of
    transformers does the same, but with masks of 384 x 384 pixels for images of all sizes.

    Args:
        classes: logits (queries, classes + 1). The last one is "no object".
        maps: logits (queries, height, width) of the masks.
    """
    probabilities = classes.softmax(-1)[:, :-1]
    scores, places = probabilities.flatten().topk(len(probabilities))
    queries, labels = (places // probabilities.shape[1]).tolist(), (places % probabilities.shape[1]).tolist()
    codes = {}
    for query in set(queries):  # one at a time, since all masks of a large image would need gigabytes
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


def window_starts(length: int, window: int, stride: int) -> list[int]:
    """The starts of windows that cover `length`. The last window ends at `length`."""
    last = max(0, length - window)
    return [min(number * stride, last) for number in range(math.ceil(last / stride) + 1)]


def window_logits(
    model: torch.nn.Module, pixel_values: torch.Tensor, window: int | None, stride: int, batch_size: int
) -> torch.Tensor:
    """Logits (1, classes, height, width) of one image, as the mean of overlapping windows or of the whole image."""
    height, width = pixel_values.shape[-2:]
    if not window or window >= max(height, width):
        return model(pixel_values=pixel_values).logits.float()
    corners = [
        (top, left) for top in window_starts(height, window, stride) for left in window_starts(width, window, stride)
    ]
    total, covered = 0, torch.zeros(height, width, device=pixel_values.device)
    for start in range(0, len(corners), batch_size):
        some = corners[start : start + batch_size]
        parts = [pixel_values[..., top : top + window, left : left + window] for top, left in some]
        logits = model(pixel_values=torch.cat(parts)).logits.float()
        if start == 0:
            total = logits.new_zeros(1, logits.shape[1], height, width)
        for (top, left), part in zip(some, logits, strict=True):
            total[0, :, top : top + window, left : left + window] += part
            covered[top : top + window, left : left + window] += 1
    return total / covered


def probabilities(
    model: torch.nn.Module,
    views: Iterable[torch.Tensor],
    size: tuple[int, int],
    *,
    window: int | None = None,
    stride: int = 1,
    flip: bool = False,
    batch_size: int = 1,
) -> torch.Tensor:
    """The probability (classes, height, width) of each class at each pixel of an image of `size`.

    Args:
        views: the image (1, channels, height, width) at each scale. Their probabilities are averaged.
        window, stride: side and step of the sliding window, in pixels of a view. Without a window, the model gets the
            whole view.
        flip: whether to average over mirrored views, too.
        batch_size: the number of windows in a batch.
    """

    def answers() -> Iterator[torch.Tensor]:
        for view in views:
            for mirrored in (False, True)[: 1 + flip]:
                logits = window_logits(model, view.flip(-1) if mirrored else view, window, stride, batch_size)
                logits = logits.flip(-1) if mirrored else logits
                logits = torch.nn.functional.interpolate(logits, size, mode="bilinear", align_corners=False)
                yield logits[0].softmax(0)

    total, count = 0, 0
    for answer in answers():
        total, count = total + answer, count + 1
    return total / count
