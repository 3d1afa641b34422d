"""Recipes: what is done to images, labels, weights and the learning rate in training. Augmentation is kornia's."""

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

# What the options of these names are where the command line does not say. `None`: it follows from something else.
FINE_TUNING = {
    "epochs": 10,
    "learning_rate": None,  # 5e-5 from a checkpoint, 5e-4 from scratch
    "min_learning_rate": 0.0,
    "warmup_epochs": None,  # a tenth of all
    "weight_decay": 0.05,
    "clip": 5.0,
    "label_smoothing": 0.0,
    "drop_path": None,  # as the model's config says
    "crop_scale": 0.35,
    "rand_augment": 0.0,
    "color_jitter": 0.0,
    "erasing": 0.0,
    "mixup": 0.0,
    "cutmix": 0.0,
}
# Of the original's code. It names a colour jitter of 0.4 too, which its library leaves out beside RandAugment.
PAPER = FINE_TUNING | {
    "epochs": 300,
    "learning_rate": None,  # 5e-4 for 512 images a step, in proportion for more or fewer
    "min_learning_rate": None,  # a hundredth of that
    "warmup_epochs": 20.0,
    "label_smoothing": 0.1,
    "drop_path": None,  # by the model's size
    "crop_scale": 0.08,
    "rand_augment": 9.0,
    "erasing": 0.25,
    "mixup": 0.8,
    "cutmix": 1.0,
}
RECIPES = {"fine-tuning": FINE_TUNING, "paper": PAPER}
FOLLOWING = {  # in words, what is None in a recipe
    "learning_rate": "5e-5 with --model, 5e-4 with --config; paper: 5e-4 for every 512 images of a step",
    "min_learning_rate": "0; paper: a hundredth of the highest",
    "warmup_epochs": "a tenth of --epochs; paper: 20",
}

# Images for which RandAugment draws the same operations: kornia has one draw for all images that it is given.
DRAWN_TOGETHER = 8
SHEAR = math.degrees(math.atan(0.3)) / 180  # of 0.3 pixels a pixel, in kornia's measure


def defaults_of(name: str) -> str:
    """The default of an option, for its help."""
    if name in FOLLOWING:
        return f"(default: {FOLLOWING[name]})"
    values = [recipe[name] for recipe in RECIPES.values()]
    if values[0] == values[1]:
        return f"(default: {values[0]:g})"
    return f"(default: {values[0]:g}; paper: {values[1]:g})"


def told_defaults(recipe: dict, warmup: str = "a tenth of --epochs") -> Callable[[str], str]:
    """A function that gives the default of an option in a recipe, for its help. `warmup` is that of --warmup-epochs."""

    def tell(name: str) -> str:
        value = recipe[name]
        return f"(default: {warmup if value is None else 'none' if value == math.inf else f'{value:g}'})"

    return tell


def complete(args: argparse.Namespace, recipe: dict, step_size: int) -> None:
    """Fill in what the command line leaves to the recipe, given the number of images in a step."""
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
        raise Problem(f"A {config.model_type} has no depths and embed_dim from which to choose --drop-path: give that.")
    return 0.5 if config.embed_dim > 96 else 0.3 if sum(config.depths) > 12 else 0.2


def set_drop_path(args: argparse.Namespace, config: PreTrainedConfig) -> None:
    """Stochastic depth; the paper has that of Focal-Tiny, Small and Base, here by the size of the model."""
    if args.drop_path is None and args.recipe == "paper":
        args.drop_path = drop_path_by_size(config)
    if args.drop_path is not None:
        config.drop_path_rate = args.drop_path


def schedule(
    args: argparse.Namespace, optimizer: torch.optim.Optimizer, steps: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """Linear from 0 in the warm-up, then half a cosine down to the least."""
    return get_cosine_with_min_lr_schedule_with_warmup(
        optimizer,
        round(args.warmup_epochs / args.epochs * steps),
        steps,
        min_lr_rate=args.min_learning_rate / args.learning_rate,
    )


def linear_schedule(
    args: argparse.Namespace, optimizer: torch.optim.Optimizer, steps: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """Linear from 0 in the warm-up, then linear down to the least."""
    warmup = round(args.warmup_epochs / args.epochs * steps)
    return get_polynomial_decay_schedule_with_warmup(optimizer, warmup, steps, lr_end=args.min_learning_rate, power=1.0)


def operations(strength: float, sign: int) -> list:
    """The original's operations for RandAugment as they are at a strength, whose greatest is 10.

    Colour, contrast, brightness and sharpness grow with `sign` 1 and shrink with -1; kornia itself draws other signs.
    """
    share = strength / 10
    fixed = dict.fromkeys(("color", "contrast", "sharpness"), 1 + 0.9 * share * sign)
    # Kornia adds brightness, where the original multiplies by a factor of up to 1.9: that would leave white and black.
    fixed["brightness"] = 1 + 0.3 * share * sign
    fixed |= {"posterize": 4 - int(4 * share), "solarize": 1 - share, "solarize_add": 0.43 * share}
    symmetric = {"rotate": 30, "shear_x": SHEAR, "shear_y": SHEAR, "translate_x": 0.45, "translate_y": 0.45}
    return [
        *([(name, 0, 1)] for name in ("auto_contrast", "equalize", "invert")),
        *([(name, value, value)] for name, value in fixed.items()),
        *([(name, -share * limit, share * limit)] for name, limit in symmetric.items()),
    ]


def balanced_weights(labels: list[int], classes: int) -> torch.Tensor:
    """A weight for each class, in inverse proportion to its number of images; 1 where all have as many."""
    counts = torch.bincount(torch.tensor(labels), minlength=classes)
    return len(labels) / (classes * counts.clamp(min=1))


def normalize(processor: BaseImageProcessor, pixels: torch.Tensor) -> torch.Tensor:
    """Pixels in 0 … 1 as the model's image processor would give them, whose range is 0 … 255."""
    pixels = pixels * (255 * (processor.rescale_factor if processor.do_rescale else 1))
    if not processor.do_normalize:
        return pixels
    mean, std = (
        torch.tensor(values, device=pixels.device)[:, None, None]
        for values in (processor.image_mean, processor.image_std)
    )
    return (pixels - mean) / std


class Augmentation:
    """Batches of pixels in 0 … 1 to what the model sees, and class indices to targets (batch, classes).

    Each piece is kornia's, works where the batch is, in float32, and draws from PyTorch's random state.
    """

    def __init__(self, args: argparse.Namespace, processor: BitImageProcessorPil, classes: int):
        self.classes = classes
        self.mixup, self.cutmix = args.mixup, args.cutmix
        # Of two operations, each is done with a probability of a half, as in the original. Strength is in the policy:
        # nearly kornia's greatest leaves it as it is.
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
        """Zeros for an image that does not count."""
        counts = labels != IGNORED
        one_hot = torch.nn.functional.one_hot(labels.where(counts, 0).long(), self.classes)
        return one_hot * counts[:, None]

    @torch.no_grad()
    def __call__(self, pixels: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.rand_augment:
            pixels = torch.cat([self.some_operations(some) for some in pixels.split(DRAWN_TOGETHER)])
        if self.color_jitter:
            pixels = self.color_jitter(pixels)
        pixels = normalize(self.processor, pixels)
        if self.erase:  # after normalising, so that what is erased has the mean colour
            pixels = self.erase(pixels)
        if self.cutmix and (not self.mixup or torch.rand(()) < 0.5):
            pixels, mixed = self.cut(pixels, labels)
            own, other, share_of_own = mixed[0].unbind(-1)
        elif self.mixup:
            drawn = self.mix.forward_parameters(pixels.shape)  # of a uniform distribution, where the paper's is Beta
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
    """The mean cross-entropy over the images of a batch, for targets between classes, too."""

    def loss(model: torch.nn.Module, batch: dict) -> torch.Tensor:
        pixel_values, targets = augmentation(batch["pixel_values"].float() / 255, batch["labels"])
        logits = model(pixel_values=pixel_values).logits.float()
        losses = torch.nn.functional.cross_entropy(
            logits, targets, weight=class_weights, label_smoothing=smoothing, reduction="none"
        )
        return (losses * (targets.sum(-1) > 0)).mean()

    return loss
