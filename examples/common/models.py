"""Image classifiers and image processors for the classes of a data set, and parameter groups for the optimizer."""

import argparse
import contextlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import peft
import torch
import transformers
from PIL import Image
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    BaseImageProcessor,
    BitImageProcessorPil,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from transformers.utils import IMAGE_PROCESSOR_NAME, ModelOutput, has_file, logging

from focal_hf import FocalForImageClassification
from focal_hf.compatibility_focal import AutoImageProcessor

from .options import Problem, first_line, format_names


def check_config(args: argparse.Namespace) -> None:
    if args.config and not Path(args.config).exists():
        raise Problem(f"No such file or folder: --config {args.config}. Give a config.json, or a folder with one.")


@contextlib.contextmanager
def errors_only() -> Iterator[None]:
    """Silence transformers' warnings, such as the table of missing weights."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


@errors_only()
def load_model(
    args: argparse.Namespace,
    kind: type,
    what: str,
    head: tuple[str, ...],
    log: Callable[[str], None],
    adjust: Callable[[PreTrainedConfig], None],
) -> tuple[PreTrainedModel, dict]:
    """The model of `--config` or `--model`, and transformers' loading info.

    Args:
        kind: an Auto class.
        what: the kind of model in words, for error messages.
        head: prefixes of the names of weights that a checkpoint for another task does not have.
        log: prints a line about other missing or unused weights.
        adjust: may change the config before the model is built.
    """
    source = args.config or args.model
    check_config(args)
    try:
        config = AutoConfig.from_pretrained(source)
        adjust(config)
        if args.config:
            model, loading = kind.from_config(config), {}
        else:
            model, loading = kind.from_pretrained(
                source, config=config, ignore_mismatched_sizes=True, output_loading_info=True, dtype=torch.float32
            )
    except Problem:
        raise
    except Exception as error:
        option = "--config" if args.config else "--model"
        raise Problem(f"Cannot build {what} from {option} {source}: {first_line(error)}") from error
    if getattr(config, "num_channels", 3) != 3:
        raise Problem(f"{source} takes {config.num_channels} channels; this script feeds colour images (3 channels).")

    lacking = {*loading.get("missing_keys", ()), *(name for name, *_ in loading.get("mismatched_keys", ()))}
    for names, said in (
        (
            [name for name in lacking if not name.startswith(head)],
            "has no weights, or weights of another shape, for parts of the model, which are newly initialized",
        ),
        (loading.get("unexpected_keys", ()), "has weights that the model does not use"),
    ):
        if names:
            log(f"{source} {said}: {format_names(sorted(names))}.")
    return model, loading


def stored_processor(name: str) -> BaseImageProcessor:
    """The image processor of a checkpoint, with Pillow as in training: torchvision resizes differently."""
    with explain_missing_torchvision():
        return AutoImageProcessor.from_pretrained(name, backend="pil")


@contextlib.contextmanager
def explain_missing_torchvision() -> Iterator[None]:
    """Transformers 5.4 imports torchvision for most image processors, even with Pillow."""
    try:
        yield
    except ImportError as error:
        raise Problem(
            f"This image processor needs torchvision with transformers {transformers.__version__}. Install torchvision "
            "or a newer transformers (5.5 or later)."
        ) from error


def stored_processor_if_any(name: str) -> BaseImageProcessor | None:
    """The image processor of a checkpoint, or `None` if it has none. An unusable one raises an error."""
    try:
        return stored_processor(name)
    except Problem:
        raise
    except Exception as error:
        if isinstance(error, OSError) and not has_file(name, IMAGE_PROCESSOR_NAME):
            return None
        raise Problem(
            f"Cannot load the image processor of --model {name} ({first_line(error)}): repair its "
            f"{IMAGE_PROCESSOR_NAME}, or remove this file to use default values."
        ) from error


def load_processor(args: argparse.Namespace, config: PreTrainedConfig, log: Callable) -> BitImageProcessorPil:
    """The image processor of the checkpoint, or a default one for the config."""
    if args.model:
        processor = stored_processor_if_any(args.model)
        if processor is not None:
            return processor
        log(f"{args.model} has no image processor: using ImageNet's mean and std, and --crop {args.crop}.")
    return default_processor(config, args.crop)


def build_model(
    args: argparse.Namespace,
    names: list[str],
    log: Callable[[str], None],
    adjust: Callable[[PreTrainedConfig], None] = lambda config: None,
) -> tuple[PreTrainedModel, BitImageProcessorPil]:
    """The classifier, with the classes of the data as its id2label, and its image processor.

    `adjust` may change the config before the model is built.
    """
    same_labels = False

    def set_labels(config: PreTrainedConfig) -> None:
        nonlocal same_labels
        same_labels = args.model and set(config.id2label.values()) == set(names)
        if not same_labels:  # the same classes keep the order that the classifier was trained with
            config.id2label = dict(enumerate(names))
        config.label2id = {name: index for index, name in config.id2label.items()}
        adjust(config)

    model, loading = load_model(
        *(args, AutoModelForImageClassification, "an image classifier", ("classifier.",)), log, set_labels
    )
    if args.model:
        if any(name.startswith("classifier.") for name in loading["missing_keys"]):  # a checkpoint for another task
            log(f"{args.model} has no classifier: one is newly initialized for the {len(names)} classes of the data.")
        elif not same_labels:
            if not any(name.startswith("classifier.") for name, *_ in loading["mismatched_keys"]):  # as many classes
                for layer in model.classifier.modules():
                    if isinstance(layer, torch.nn.Linear):
                        torch.nn.init.trunc_normal_(layer.weight, std=0.02)
                        torch.nn.init.zeros_(layer.bias)
            log(
                f"{args.model} has other classes: its classifier is newly initialized for the {len(names)} classes of "
                "the data."
            )
    return model, load_processor(args, model.config, log)


def load_trained(name: str, auto_class: type, **options) -> tuple[PreTrainedModel, BaseImageProcessor]:
    """The trained model of --model and its image processor. Missing weights raise an error."""
    try:
        model, loading = auto_class.from_pretrained(name, dtype=torch.float32, output_loading_info=True, **options)
        processor = stored_processor(name)
    except Problem:
        raise
    except Exception as error:
        raise Problem(f"Cannot load --model {name} and its image processor: {first_line(error)}") from error
    if getattr(model.config, "num_channels", 3) != 3:
        raise Problem(
            f"{name} takes {model.config.num_channels} channels; this script feeds colour images (3 channels)."
        )
    # Backbones have extra norms. Without weights for them, the feature maps are normalised and still meaningful.
    missing = sorted(key for key in loading["missing_keys"] if not key.startswith("hidden_states_norms."))
    if missing:
        raise Problem(
            f"--model {name} lacks weights that {type(model).__name__} needs: {', '.join(missing[:3])}. Its "
            "predictions would be random: use a checkpoint for this task."
        )
    return model.eval(), processor


def load_focal(name: str) -> tuple[FocalForImageClassification, BaseImageProcessor]:
    """A Focal classifier from --model, and its image processor."""
    model, processor = load_trained(name, AutoModelForImageClassification)
    if not isinstance(model, FocalForImageClassification):
        raise Problem(
            f"--model {name} is a {model.config.model_type}; this script shows Focal's attention: use a Focal model."
        )
    return model, processor


def prepare(processor: BaseImageProcessor, image: Image.Image) -> tuple[torch.Tensor, np.ndarray]:
    """`pixel_values` (1, 3, height, width), and the same picture before normalisation, uint8 (height, width, 3)."""
    seen = processor(image, return_tensors="np", do_rescale=False, do_normalize=False)["pixel_values"][0]
    return processor(image, return_tensors="pt")["pixel_values"], seen.transpose(1, 2, 0).astype(np.uint8)


def resize_views(processor: BaseImageProcessor, pixels: int) -> None:
    """Scale the size and the crop size of an image processor, so that its outputs are `pixels` on the shorter side."""
    crops = getattr(processor, "do_center_crop", False)
    side = view_side(processor)
    for name in ("size", "crop_size") if crops else ("size",):
        setattr(
            processor,
            name,
            {key: round(value * pixels / side) for key, value in dict(getattr(processor, name)).items()},
        )


@torch.no_grad()
def run_on_plain_images(
    model: PreTrainedModel, processor: BaseImageProcessor, name: str
) -> tuple[ModelOutput, list[int]]:
    """Run the model on two plain images, one wide and one high. Returns its output and the input size."""
    images = [Image.new("RGB", size) for size in ((300, 200), (200, 300))]
    views = [processor(image, return_tensors="pt")["pixel_values"][0].to(model.device) for image in images]
    try:
        return model(pixel_values=torch.stack(views)), list(views[0].shape[-2:])
    except Exception as error:
        shapes = " and ".join(f"{view.shape[-2]} x {view.shape[-1]}" for view in views)
        raise Problem(
            f"--model {name} cannot process images of {shapes} pixels, to which its image processor resizes a wide and "
            f"a high image: {first_line(error)}"
        ) from error


@torch.no_grad()
def check_size(model: torch.nn.Module, height: int, width: int) -> None:
    """Raise an error if the model cannot process images of this size. The model is in evaluation mode afterwards."""
    weight = next(model.parameters())
    image = torch.zeros(1, 3, height, width, dtype=weight.dtype, device=weight.device)
    try:
        model.eval().forward(pixel_values=image)  # not `model(...)`, which may be compiled
    except Exception as error:
        raise Problem(
            f"The model ({model.config.model_type}) cannot process training images of {height} x {width} pixels: "
            f"{first_line(error)}. Train on larger images, or use another model."
        ) from error


def view_side(processor: BaseImageProcessor) -> int:
    """The shorter side of an image processor's outputs, in pixels."""
    return min(dict(processor.crop_size if getattr(processor, "do_center_crop", False) else processor.size).values())


def input_size(config: PreTrainedConfig, processor: BaseImageProcessor | None = None) -> tuple[int, int]:
    """Height and width of a model's inputs, from image_size in its config or, without it, from its image processor."""
    size = getattr(config, "image_size", None)
    if size is None and processor is not None:
        size = view_side(processor)
    if size is None:
        raise Problem(
            f"The config ({config.model_type}) has no image_size, and there is no image processor that has a size: "
            'add a size to config.json, as in "image_size": 224.'
        )
    return (size, size) if isinstance(size, int) else tuple(size)


def default_processor(config: PreTrainedConfig, crop: float) -> BitImageProcessorPil:
    """An image processor that resizes the shorter side to image_size / crop, then crops the centre to image_size."""
    height, width = input_size(config)
    return BitImageProcessorPil(
        size={"shortest_edge": round(max(height, width) / crop)},
        crop_size={"height": height, "width": width},
        resample=Image.Resampling.BICUBIC,
        image_mean=IMAGENET_DEFAULT_MEAN,
        image_std=IMAGENET_DEFAULT_STD,
    )


def stages_of(model: PreTrainedModel, option: str) -> list[torch.nn.Module]:
    """The stem and the stages of a model. `option` is the option that needs them, for the error message."""
    base = model.base_model
    parts = hasattr(base, "embeddings") and hasattr(getattr(base, "encoder", None), "layers")
    if not parts or not hasattr(model.config, "depths"):
        raise Problem(
            f"{option} needs a model with stages, such as Focal or Swin; {model.config.model_type} has none: leave out "
            f"{option}."
        )
    return [base.embeddings, *base.encoder.layers]


def freeze(model: PreTrainedModel, stages: int) -> None:
    """Freeze the stem and the first `stages` stages."""
    parts = stages_of(model, "--freeze")
    if stages >= len(parts):
        raise Problem(
            f"--freeze {stages} is too large: the model has {len(parts) - 1} stages, and at least one must be trained."
        )
    for part in parts[: stages + 1]:
        part.requires_grad_(False)


def add_adapters(model: PreTrainedModel, rank: int) -> peft.PeftModel:
    """Add LoRA adapters to the linear layers of attention and MLPs. Only they and the classifier are trained."""
    names = {"q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2", "query", "key", "value"}
    layers = {name.rsplit(".", 1)[-1] for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear)}
    if not layers & names:
        raise Problem(f"--lora finds no layer to adapt in {model.config.model_type}: leave out --lora.")
    settings = peft.LoraConfig(
        r=rank, lora_alpha=rank, target_modules=sorted(layers & names), modules_to_save=["classifier"]
    )
    return peft.get_peft_model(model, settings)


def apply_speed_options(
    args: argparse.Namespace, model: torch.nn.Module, checkpointed: PreTrainedModel | None = None
) -> None:
    """Apply --gradient-checkpointing and --compile.

    `checkpointed` is the part of the model to which gradient checkpointing is applied (default: the whole model).
    """
    if args.gradient_checkpointing:
        (checkpointed or model).gradient_checkpointing_enable({"use_reentrant": False})
    if args.compile:
        model.compile()


def decay_groups(
    model: torch.nn.Module, weight_decay: float, rate: float = 0.0, layer_decay: float = 1.0
) -> list[dict]:
    """Parameter groups: as in the paper, no weight decay for biases, norms and position tables.

    With `layer_decay` below 1, the learning rate of the classifier and its norm is `rate`. The learning rate of each
    block is `layer_decay` times that of the next block. The stem counts as the block before the first.
    """
    positions = ("position_embeddings", "relative_position_bias_table")
    depths = list(model.config.depths) if layer_decay != 1 else []
    groups: dict[tuple[bool, int], list] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = parameter.ndim > 1 and not name.endswith(".bias") and not any(key in name for key in positions)
            from_top = sum(depths) + 1
            if layer_decay == 1 or not (".encoder." in name or ".embeddings." in name):
                from_top = 0
            elif place := re.search(r"\.layers\.(\d+)\.(?:blocks\.(\d+)|downsample)", name):
                stage = int(place[1])
                block = int(place[2]) if place[2] else depths[stage] - 1
                from_top = sum(depths[stage:]) - block
            groups.setdefault((decays, from_top), []).append(parameter)
    return [
        {"params": parameters, "weight_decay": weight_decay if decays else 0.0}
        | ({"lr": rate * layer_decay**from_top} if layer_decay != 1 else {})
        for (decays, from_top), parameters in sorted(groups.items(), key=lambda group: group[0], reverse=True)
    ]
