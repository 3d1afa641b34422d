"""Recipes: default options, augmentation (by kornia), learning rate schedules and the loss of classifiers."""

import argparse
import math
from collections.abc import Callable

import kornia.augmentation as augment
import torch
from kornia.augmentation.auto import RandAugment
from transformers import (
    BaseImageProcessor,
    BitImageProcessorPil,
    PreTrainedConfig,
    get_cosine_with_min_lr_schedule_with_warmup,
    get_polynomial_decay_schedule_with_warmup,
)

from .loading import IGNORED
from .options import Problem

# Defaults of the options with these names. `None`: the default depends on other options.
FINE_TUNING = {
    "epochs": 10,
    "learning_rate": None,  # 5e-5 from a checkpoint, 5e-4 from scratch
    "min_learning_rate": 0.0,
    "warmup_epochs": None,  # a tenth of all epochs
    "weight_decay": 0.05,
    "clip": 5.0,
    "label_smoothing": 0.0,
    "drop_path": None,  # the drop_path_rate of the model's config
    "crop_scale": 0.35,
    "rand_augment": 0.0,
    "color_jitter": 0.0,
    "erasing": 0.0,
    "mixup": 0.0,
    "cutmix": 0.0,
}
# The defaults of the original code. Its colour jitter of 0.4 has no effect there: timm skips it with RandAugment.
PAPER = FINE_TUNING | {
    "epochs": 300,
    "learning_rate": None,  # 5e-4 for 512 images a step, scaled linearly with the images in a step
    "min_learning_rate": None,  # a hundredth of the learning rate
    "warmup_epochs": 20.0,
    "label_smoothing": 0.1,
    "drop_path": None,  # depends on the size of the model
    "crop_scale": 0.08,
    "rand_augment": 9.0,
    "erasing": 0.25,
    "mixup": 0.8,
    "cutmix": 1.0,
}
RECIPES = {"fine-tuning": FINE_TUNING, "paper": PAPER}
DERIVED_DEFAULTS = {  # help texts about the defaults that are None in a recipe
    "learning_rate": "5e-5 with --model, 5e-4 with --config; paper: 5e-4 for every 512 images of a step",
    "min_learning_rate": "0; paper: a hundredth of --learning-rate",
    "warmup_epochs": "a tenth of --epochs; paper: 20",
}

# Images that share the operations of RandAugment: kornia draws the operations once per call.
RAND_AUGMENT_CHUNK = 8
SHEAR = math.degrees(math.atan(0.3)) / 180  # 0.3 pixels per pixel, in kornia's unit: half turns


def defaults_of(name: str) -> str:
    """The help text about the default of an option of finetune.py."""
    if name in DERIVED_DEFAULTS:
        return f"(default: {DERIVED_DEFAULTS[name]})"
    values = [recipe[name] for recipe in RECIPES.values()]
    if values[0] == values[1]:
        return f"(default: {values[0]:g})"
    return f"(default: {values[0]:g}; paper: {values[1]:g})"


def default_help_of(recipe: dict, warmup: str = "a tenth of --epochs") -> Callable[[str], str]:
    """A function from an option to the help text about its default. `warmup` is the default of --warmup-epochs."""

    def default_help(name: str) -> str:
        value = recipe[name]
        return f"(default: {warmup if value is None else 'none' if value == math.inf else f'{value:g}'})"

    return default_help


def fill_defaults(args: argparse.Namespace, recipe: dict, step_size: int) -> None:
    """Set the options that the command line does not give to the defaults of a recipe.

    `step_size` is the number of images in a step.
    """
    for name, value in recipe.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.learning_rate is None:
        rate = 5e-5 if args.model else 5e-4
        args.learning_rate = 5e-4 * step_size / 512 if recipe is PAPER else rate
    if args.min_learning_rate is None:
        args.min_learning_rate = args.learning_rate / 100
    if args.warmup_epochs is None:
        args.warmup_epochs = args.epochs / 10


def drop_path_by_size(config: PreTrainedConfig) -> float:
    if not hasattr(config, "depths") or not hasattr(config, "embed_dim"):
        raise Problem(
            f"The default of --drop-path depends on depths and embed_dim, which the config ({config.model_type}) does "
            "not have: add --drop-path."
        )
    return 0.5 if config.embed_dim > 96 else 0.3 if sum(config.depths) > 12 else 0.2


def set_drop_path(args: argparse.Namespace, config: PreTrainedConfig) -> None:
    """Set the rate of stochastic depth. The paper states it for Focal-Tiny, Small and Base."""
    if args.drop_path is None and args.recipe == "paper":
        args.drop_path = drop_path_by_size(config)
    if args.drop_path is not None:
        config.drop_path_rate = args.drop_path


def schedule(
    args: argparse.Namespace, optimizer: torch.optim.Optimizer, steps: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """A linear warm-up from 0, then a cosine decay to --min-learning-rate."""
    return get_cosine_with_min_lr_schedule_with_warmup(
        optimizer,
        round(args.warmup_epochs / args.epochs * steps),
        steps,
        min_lr_rate=args.min_learning_rate / args.learning_rate,
    )


def linear_schedule(
    args: argparse.Namespace, optimizer: torch.optim.Optimizer, steps: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """A linear warm-up from 0, then a linear decay to --min-learning-rate."""
    warmup = round(args.warmup_epochs / args.epochs * steps)
    return get_polynomial_decay_schedule_with_warmup(optimizer, warmup, steps, lr_end=args.min_learning_rate, power=1.0)


def operations(strength: float, sign: int) -> list:
    """The operations of the original RandAugment at a strength from 0 to 10, as a policy for kornia.

    Colour, contrast, brightness and sharpness increase with `sign` 1 and decrease with -1. kornia draws the signs of
    the other operations.
    """
    share = strength / 10
    fixed = dict.fromkeys(("color", "contrast", "sharpness"), 1 + 0.9 * share * sign)
    # kornia adds to the brightness, while the original multiplies by a factor of up to 1.9. Adding that much would make
    # the image all white or black.
    fixed["brightness"] = 1 + 0.3 * share * sign
    fixed |= {"posterize": 4 - int(4 * share), "solarize": 1 - share, "solarize_add": 0.43 * share}
    symmetric = {"rotate": 30, "shear_x": SHEAR, "shear_y": SHEAR, "translate_x": 0.45, "translate_y": 0.45}
    return [
        *([(name, 0, 1)] for name in ("auto_contrast", "equalize", "invert")),
        *([(name, value, value)] for name, value in fixed.items()),
        *([(name, -share * limit, share * limit)] for name, limit in symmetric.items()),
    ]


def balanced_weights(labels: list[int], classes: int) -> torch.Tensor:
    """A weight for each class, inversely proportional to its number of images. The mean over the images is 1."""
    counts = torch.bincount(torch.tensor(labels), minlength=classes)
    return len(labels) / (classes * counts.clamp(min=1))


def normalize(processor: BaseImageProcessor, pixels: torch.Tensor) -> torch.Tensor:
    """Normalise pixels in 0 … 1 as the image processor normalises pixels in 0 … 255."""
    pixels = pixels * (255 * (processor.rescale_factor if processor.do_rescale else 1))
    if not processor.do_normalize:
        return pixels
    mean, std = (
        torch.tensor(values, device=pixels.device)[:, None, None]
        for values in (processor.image_mean, processor.image_std)
    )
    return (pixels - mean) / std


class Augmentation:
    """Augment and normalise a batch of pixels in 0 … 1, and turn class indices into targets (batch, classes).

    All operations are kornia's. They run on the device of the batch, in float32, with PyTorch's random state.
    """

    def __init__(self, args: argparse.Namespace, processor: BitImageProcessorPil, classes: int):
        self.classes = classes
        self.mixup, self.cutmix = args.mixup, args.cutmix
        # As in the original, each of two operations is applied with probability 1/2. The policy contains the strength,
        # so kornia's own magnitude stays just below its maximum of 30.
        self.rand_augment = args.rand_augment and [
            [RandAugment(count, 29.999, operations(args.rand_augment, sign)) for sign in (-1, 1)] for count in (1, 2)
        ]
        jitter = args.color_jitter
        self.color_jitter = augment.ColorJitter(jitter, jitter, jitter) if jitter else None
        shapes = {"scale": (0.02, 1 / 3), "ratio": (0.3, 1 / 0.3)}
        self.erase = augment.RandomErasing(**shapes, p=args.erasing) if args.erasing else None
        both = {"data_keys": ["input", "class"]}
        self.mix = augment.RandomMixUpV2(**both)
        self.cut = augment.RandomCutMixV2(beta=args.cutmix or None, use_correct_lambda=True, **both)
        self.processor = processor

    def some_operations(self, pixels: torch.Tensor) -> torch.Tensor:
        count, sign = int(torch.randint(2, (2,)).sum()), int(torch.randint(2, ()))
        return self.rand_augment[count - 1][sign](pixels) if count else pixels

    def one_hot(self, labels: torch.Tensor) -> torch.Tensor:
        """One-hot targets. The target of an ignored image is zero."""
        counts = labels != IGNORED
        one_hot = torch.nn.functional.one_hot(labels.where(counts, 0).long(), self.classes)
        return one_hot * counts[:, None]

    @torch.no_grad()
    def __call__(self, pixels: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.rand_augment:
            pixels = torch.cat([self.some_operations(some) for some in pixels.split(RAND_AUGMENT_CHUNK)])
        if self.color_jitter:
            pixels = self.color_jitter(pixels)
        pixels = normalize(self.processor, pixels)
        if self.erase:  # after normalisation, so that erased parts have the mean colour
            pixels = self.erase(pixels)
        if self.cutmix and (not self.mixup or torch.rand(()) < 0.5):
            pixels, mixed = self.cut(pixels, labels)
            own, other, share_of_own = mixed[0].unbind(-1)
        elif self.mixup:
            # kornia draws the shares from a uniform distribution, the paper from Beta.
            drawn = self.mix.forward_parameters(pixels.shape)
            strength = torch.tensor(self.mixup)
            drawn["mixup_lambdas"] = torch.distributions.Beta(strength, strength).sample((len(pixels),))
            pixels, mixed = self.mix(pixels, labels, params=drawn)
            own, other, share_of_other = mixed.unbind(-1)
            share_of_own = 1 - share_of_other
        else:
            return pixels, self.one_hot(labels).float()
        share_of_own = share_of_own[:, None]
        return pixels, self.one_hot(own) * share_of_own + self.one_hot(other) * (1 - share_of_own)


def classification_loss(
    augmentation: Augmentation, smoothing: float, class_weights: torch.Tensor | None
) -> Callable[[torch.nn.Module, dict], torch.Tensor]:
    """The mean cross-entropy over the images of a batch. Targets may be mixtures of classes."""

    def loss(model: torch.nn.Module, batch: dict) -> torch.Tensor:
        pixel_values, targets = augmentation(batch["pixel_values"].float() / 255, batch["labels"])
        logits = model(pixel_values=pixel_values).logits.float()
        losses = torch.nn.functional.cross_entropy(
            logits, targets, weight=class_weights, label_smoothing=smoothing, reduction="none"
        )
        return (losses * (targets.sum(-1) > 0)).mean()

    return loss
