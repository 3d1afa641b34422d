"""Losses of detection and segmentation that do not depend on how the images of a step are divided into batches."""

from collections.abc import Callable

import kornia.augmentation as augment
import torch
import transformers
from transformers import BaseImageProcessor, PreTrainedModel
from transformers.loss.loss_for_object_detection import ImageLoss
from transformers.models.mask2former.modeling_mask2former import Mask2FormerLoss
from transformers.models.maskformer.modeling_maskformer import MaskFormerLoss
from transformers.utils import ModelOutput

from .dense_models import MASK_MODELS, inputs_of
from .options import Problem
from .recipe import normalize
from .segmentation_data import NO_CLASS

# The functions of transformers that divide a loss by the mean number of objects of all processes.
OBJECT_COUNTERS = (ImageLoss.forward, Mask2FormerLoss.get_num_masks, MaskFormerLoss.get_num_masks)


def divide_by_own_objects() -> None:
    """Make DETR-like models, Mask2Former and MaskFormer divide their loss by the objects of their own batch.

    RT-DETR does so. With several processes, transformers divides the mean number of objects of all processes by the
    number of processes once more, so that the loss grows with that number. Without Accelerate, it does neither.
    """
    for counter in OBJECT_COUNTERS:
        if "is_accelerate_available" not in counter.__code__.co_names:
            raise Problem(
                f"transformers {transformers.__version__} counts objects in {counter.__qualname__} in a way that this "
                "script does not know: install a version that the README names."
            )
        counter.__globals__["is_accelerate_available"] = lambda: False


def detection_loss(model: PreTrainedModel, objects: float) -> Callable[[torch.nn.Module, dict], torch.Tensor]:
    """The model's own loss, scaled so that a step does not depend on how its images are divided into batches.

    The model divides its loss by the objects of a batch. Scaling by their number replaces this divisor by the expected
    number: `objects`, the average of an image, times the images of the batch.
    """
    names = inputs_of(model)
    divide_by_own_objects()

    def loss(trained: torch.nn.Module, batch: dict) -> torch.Tensor:
        inputs, labels = {name: batch[name] for name in names}, batch["labels"]
        if type(model.config) in MASK_MODELS:
            loss = mask_loss(model, trained(**inputs, output_auxiliary_logits=True), labels, objects)
        else:
            count = max(1, sum(len(target["class_labels"]) for target in labels))
            loss = trained(**inputs, labels=labels).loss * (count / (objects * len(labels)))
        # DDP waits for a gradient of every parameter, but Swin's last norm never has one, and denoising queries have
        # none in a batch without objects. (Sharded models, in which parameters are DTensors, are refused.)
        return loss + 0 * sum(parameter.sum() for parameter in trained.parameters() if parameter.requires_grad)

    return loss


def mask_loss(model: PreTrainedModel, outputs: ModelOutput, labels: list[dict], objects: float) -> torch.Tensor:
    """The model's own loss, divided by averages over all images instead of sums over the batch.

    The model divides mask losses by the number of objects, and the class loss by the sum of the queries' weights. The
    weight is 1 for a query with an object, and less for the others.

    Args:
        objects: the average number of objects in an image.
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


def segmentation_loss(
    processor: BaseImageProcessor, distortion: bool
) -> Callable[[torch.nn.Module, dict], torch.Tensor]:
    """The mean loss over all pixels of a batch, where ignored pixels have loss 0.

    It is also the mean over images, whose numbers of ignored pixels may differ. Colours are distorted as in
    mmsegmentation's recipes.
    """
    operations = torch.nn.Sequential(
        augment.RandomBrightness((1 - 32 / 255, 1 + 32 / 255), p=0.5),  # which adds up to 32 of 255
        augment.RandomContrast((0.5, 1.5), p=0.5),
        augment.RandomSaturation((0.5, 1.5), p=0.5),
        augment.RandomHue((-0.05, 0.05), p=0.5),
    )

    def loss(model: torch.nn.Module, batch: dict) -> torch.Tensor:
        pixels, labels = batch["pixel_values"].float() / 255, batch["labels"].long()
        with torch.no_grad():
            pixels = normalize(processor, operations(pixels) if distortion else pixels)
        counts = labels != NO_CLASS
        # If all pixels were ignored, the mean of the model would be NaN.
        labels = labels.where(counts.any(), 0)
        return model(pixel_values=pixels, labels=labels).loss * counts.float().mean()

    return loss
