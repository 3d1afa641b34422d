"""Image classifiers and image processors for a data set's classes, and the optimizer's groups of parameters."""

import argparse
import contextlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import peft
import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    BaseImageProcessor,
    BitImageProcessorPil,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from transformers.utils import ModelOutput, logging

from focal_hf import FocalForImageClassification

from .options import Problem, first_line


def check_config(args: argparse.Namespace) -> None:
    if args.config and not Path(args.config).exists():
        raise Problem(f"No such file or folder: --config {args.config}. Give a config.json, or a folder with one.")


@contextlib.contextmanager
def errors_only() -> Iterator[None]:
    """Of what transformers logs, show errors alone: no table of the weights that differ, and no advice."""
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
    say: Callable[[str], None],
    adjust: Callable[[PreTrainedConfig], None],
) -> tuple[PreTrainedModel, dict]:
    """The model of `--config` or `--model`, and what transformers tells about loading it.

    Args:
        kind: an Auto class.
        what: the same in words.
        head: what the names of weights begin with that a checkpoint of another kind has not.
        say: is told about other weights that the checkpoint and the model do not have in common.
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
            "lacks weights of the model, or has them in another shape; these start anew",
        ),
        (loading.get("unexpected_keys", ()), "has weights that the model does not use"),
    ):
        if names:
            shown = ", ".join(sorted(names)[:5]) + (" …" if len(names) > 5 else "")
            say(f"{source} {said}: {shown}.")
    return model, loading


def stored_processor(name: str) -> BaseImageProcessor:
    """That of a checkpoint, by Pillow as in training: torchvision's, where it is installed, resizes otherwise."""
    return AutoImageProcessor.from_pretrained(name, backend="pil")


def load_processor(args: argparse.Namespace, config: PreTrainedConfig, say: Callable) -> BitImageProcessorPil:
    """The image processor of the checkpoint, or one for the config."""
    if args.model:
        try:
            return stored_processor(args.model)
        except OSError:
            say(f"{args.model} brings no image processor: using ImageNet's statistics and --crop {args.crop}.")
    return default_processor(config, args.crop)


def build_model(
    args: argparse.Namespace,
    names: list[str],
    say: Callable[[str], None],
    adjust: Callable[[PreTrainedConfig], None] = lambda config: None,
) -> tuple[PreTrainedModel, BitImageProcessorPil]:
    """The classifier, its id2label being the data's classes, and the image processor that goes with it.

    `adjust` may change the config before the model is built.
    """
    same_labels = False

    def set_labels(config: PreTrainedConfig) -> None:
        nonlocal same_labels
        same_labels = args.model and set(config.id2label.values()) == set(names)
        if not same_labels:  # equal sets keep the checkpoint's order, to which its classifier is trained
            config.id2label = dict(enumerate(names))
        config.label2id = {name: index for index, name in config.id2label.items()}
        adjust(config)

    model, loading = load_model(
        *(args, AutoModelForImageClassification, "an image classifier", ("classifier.",)), say, set_labels
    )
    if args.model:
        if any(name.startswith("classifier.") for name in loading["missing_keys"]):  # after pre-training
            say(f"{args.model} has no classifier: one starts anew, with the {len(names)} classes of the data.")
        elif not same_labels:
            if not any(name.startswith("classifier.") for name, *_ in loading["mismatched_keys"]):  # as many, but other
                for layer in model.classifier.modules():
                    if isinstance(layer, torch.nn.Linear):
                        torch.nn.init.trunc_normal_(layer.weight, std=0.02)
                        torch.nn.init.zeros_(layer.bias)
            told = f"with the {len(names)} classes of the data"
            say(f"{args.model} knows other classes: its classifier starts anew, {told}.")
    return model, load_processor(args, model.config, say)


def load_trained(name: str, auto_class: type, **options) -> tuple[PreTrainedModel, BaseImageProcessor]:
    """A model with all its weights from --model, and its image processor."""
    try:
        model, loading = auto_class.from_pretrained(name, dtype=torch.float32, output_loading_info=True, **options)
        processor = stored_processor(name)
    except Exception as error:
        raise Problem(f"Cannot load --model {name} and its image processor: {first_line(error)}") from error
    if getattr(model.config, "num_channels", 3) != 3:
        raise Problem(
            f"{name} takes {model.config.num_channels} channels; this script feeds colour images (3 channels)."
        )
    # Backbones have norms of their own, which leave the maps of a checkpoint without them merely normalised.
    missing = sorted(key for key in loading["missing_keys"] if not key.startswith("hidden_states_norms."))
    if missing:
        raise Problem(
            f"--model {name} lacks weights that {type(model).__name__} needs: {', '.join(missing[:3])}. Its answers "
            "would be random."
        )
    return model.eval(), processor


def load_focal(name: str) -> tuple[FocalForImageClassification, BaseImageProcessor]:
    """A Focal classifier from --model, and its image processor."""
    model, processor = load_trained(name, AutoModelForImageClassification)
    if not isinstance(model, FocalForImageClassification):
        raise Problem(f"--model {name} is a {model.config.model_type}; this script shows Focal's attention.")
    return model, processor


def prepare(processor: BaseImageProcessor, image: Image.Image) -> tuple[torch.Tensor, np.ndarray]:
    """`pixel_values` of shape (1, 3, height, width), and the same as a picture of shape (height, width, 3), uint8."""
    seen = processor(image, return_tensors="np", do_rescale=False, do_normalize=False)["pixel_values"][0]
    return processor(image, return_tensors="pt")["pixel_values"], seen.transpose(1, 2, 0).astype(np.uint8)


def resize_views(processor: BaseImageProcessor, pixels: int) -> None:
    """Make the views of a processor `pixels` on their shorter side; their shape and the share cut off stay the same."""
    crops = getattr(processor, "do_center_crop", False)
    side = view_side(processor)
    for name in ("size", "crop_size") if crops else ("size",):
        setattr(
            processor,
            name,
            {key: round(value * pixels / side) for key, value in dict(getattr(processor, name)).items()},
        )


@torch.no_grad()
def try_out(model: PreTrainedModel, processor: BaseImageProcessor, name: str) -> tuple[ModelOutput, list[int]]:
    """What the model makes of two plain images, one wide and one high, and the size at which it sees them."""
    images = [Image.new("RGB", size) for size in ((300, 200), (200, 300))]
    views = [processor(image, return_tensors="pt")["pixel_values"][0].to(model.device) for image in images]
    try:
        return model(pixel_values=torch.stack(views)), list(views[0].shape[-2:])
    except Exception as error:
        shapes = " and ".join(f"{view.shape[-2]} x {view.shape[-1]}" for view in views)
        raise Problem(
            f"--model {name} cannot take the images of {shapes} pixels that its image processor makes of a wide and a "
            f"high one: {first_line(error)}"
        ) from error


def view_side(processor: BaseImageProcessor) -> int:
    """The shorter side of what an image processor makes of a picture."""
    return min(dict(processor.crop_size if getattr(processor, "do_center_crop", False) else processor.size).values())


def input_size(config: PreTrainedConfig, processor: BaseImageProcessor | None = None) -> tuple[int, int]:
    """Height and width of the images that a model takes, by its config or, if that is silent, by its processor."""
    size = getattr(config, "image_size", None)
    if size is None and processor is not None:
        size = view_side(processor)
    if size is None:
        raise Problem(
            f"A {config.model_type} takes images of any size, and there is no image processor to choose one: write one "
            'into its config.json, as "image_size": 224.'
        )
    return (size, size) if isinstance(size, int) else tuple(size)


def default_processor(config: PreTrainedConfig, crop: float) -> BitImageProcessorPil:
    """Shorter side to image_size / crop, then the central crop; ImageNet's mean and deviation."""
    height, width = input_size(config)
    return BitImageProcessorPil(
        size={"shortest_edge": round(max(height, width) / crop)},
        crop_size={"height": height, "width": width},
        resample=Image.Resampling.BICUBIC,
        image_mean=IMAGENET_DEFAULT_MEAN,
        image_std=IMAGENET_DEFAULT_STD,
    )


def stages_of(model: PreTrainedModel, option: str) -> list[torch.nn.Module]:
    """The stem and the stages, for an option that needs to know them."""
    base = model.base_model
    parts = hasattr(base, "embeddings") and hasattr(getattr(base, "encoder", None), "layers")
    if not parts or not hasattr(model.config, "depths"):
        raise Problem(f"{option} is for models with stages, as Focal and Swin are; {model.config.model_type} has none.")
    return [base.embeddings, *base.encoder.layers]


def freeze(model: PreTrainedModel, stages: int) -> None:
    """Fix the stem and the first `stages` stages."""
    parts = stages_of(model, "--freeze")
    if stages >= len(parts):
        raise Problem(f"--freeze {stages} is more stages than the {len(parts) - 1} that the model has.")
    for part in parts[: stages + 1]:
        part.requires_grad_(False)


def add_adapters(model: PreTrainedModel, rank: int) -> peft.PeftModel:
    """LoRA beside the linear layers of attention and MLPs; of the rest, only the classifier still learns."""
    names = {"q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2", "query", "key", "value"}
    layers = {name.rsplit(".", 1)[-1] for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear)}
    if not layers & names:
        raise Problem(f"--lora knows no layer of {model.config.model_type} to adapt.")
    settings = peft.LoraConfig(
        r=rank, lora_alpha=rank, target_modules=sorted(layers & names), modules_to_save=["classifier"]
    )
    return peft.get_peft_model(model, settings)


def apply_speed_options(
    args: argparse.Namespace, model: torch.nn.Module, checkpointed: PreTrainedModel | None = None
) -> None:
    """What --gradient-checkpointing and --compile say. `checkpointed` is the part that can be, if the model cannot."""
    if args.gradient_checkpointing:
        (checkpointed or model).gradient_checkpointing_enable({"use_reentrant": False})
    if args.compile:
        model.compile()


def decay_groups(
    model: torch.nn.Module, weight_decay: float, rate: float = 0.0, layer_decay: float = 1.0
) -> list[dict]:
    """Weight decay for matrices and kernels; none for biases, norms and tables of positions (as in the paper).

    With `layer_decay` below 1, the learning rate is `rate` for the classifier and its norm, and for each block before
    them `layer_decay` times that of the block after it; the stem comes before the first block.
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
