"""Pre-train Focal or Swin on images without labels: it learns to reconstruct hidden parts of the images (SimMIM).

Xie et al. 2021, https://arxiv.org/abs/2111.09886. finetune.py can start from the saved model. See `--help` and
examples/README.md.
"""

import argparse
import functools
import math
import random
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from PIL import Image
from transformers import AutoModelForMaskedImageModeling, BitImageProcessorPil, PreTrainedConfig

from common.data import central_view, random_view, read_data, report_unreadable
from common.loading import IGNORED, Loader, row_fetcher, shuffled
from common.models import apply_speed_options, input_size, load_model, load_processor
from common.options import (
    Problem,
    data_options,
    fraction,
    model_options,
    positive,
    preparing_options,
    result_options,
    script_parser,
    training_options,
    view_options,
)
from common.recipe import default_help_of, fill_defaults
from common.reports import draw_reconstructions, pretraining_card, to_picture
from common.runs import (
    begin,
    check_training,
    make_loaders,
    needs_training,
    result_settings,
    run_training,
    train_and_keep,
    upload,
)
from common.streams import read_streams

EXAMPLES = """\
examples:
  pre-train on a folder of pictures, in classes or not, the network described by a config.json ("model_type": "focal"),
  then fine-tune on those that have labels:
    accelerate launch examples/pretrain_mim.py --config my_config.json --data all_my_images --output pretrained
    accelerate launch examples/finetune.py --model pretrained --data my_images --output my_model

  continue a run that was stopped, with the same result:
    accelerate launch examples/pretrain_mim.py --config my_config.json --data all_my_images --output pretrained --resume

  small pictures, of 32 pixels with patches of 2:
    accelerate launch examples/pretrain_mim.py --config my_config.json --data thumbnails --output pretrained \\
        --mask-patch 8

  as the paper does, on eight GPUs:
    accelerate launch --num_processes 8 --mixed_precision bf16 examples/pretrain_mim.py --config my_config.json \\
        --data imagenet --output pretrained --batch-size 256 --learning-rate 8e-4
"""

# The paper's settings, except the learning rate: the paper has 8e-4 for steps of 2048 images.
PRE_TRAINING = {
    "epochs": 100,
    "learning_rate": 5e-4,
    "min_learning_rate": 0.0,
    "warmup_epochs": None,
    "weight_decay": 0.05,
    "clip": 5.0,
    "crop_scale": 0.67,
}
SHOWN = 8  # validation images whose reconstructions are drawn


def parse_arguments() -> argparse.Namespace:
    default_help = default_help_of(PRE_TRAINING)
    parser = script_parser(__doc__, EXAMPLES)
    parser.set_defaults(label_column=None)
    model_options(parser)
    data_options(parser, "FOLDER/**/*.png, or FOLDER/train/**/*.png with FOLDER/validation/**/*.png")
    result_options(parser)

    group = parser.add_argument_group("hiding")
    group.add_argument(
        "--mask-patch",
        type=positive(int),
        default=32,
        metavar="PIXELS",
        help="side of the hidden squares in pixels, a multiple of the model's patch size (default: 32)",
    )
    group.add_argument(
        "--mask-ratio",
        type=fraction,
        default=0.6,
        metavar="F",
        help="share of the squares that is hidden (default: 0.6)",
    )

    training_options(parser.add_argument_group("training"), default_help)
    view_options(parser.add_argument_group("images in training"), default_help)
    preparing_options(parser)
    return parser.parse_args()


# --------------------------------------------------------------------------------------------------------------- masks


def hidden_squares(args: argparse.Namespace, height: int, width: int) -> tuple[int, int]:
    """The number of hidden squares of an image, and the number of all its squares."""
    squares = (height // args.mask_patch) * (width // args.mask_patch)
    return math.ceil(args.mask_ratio * squares), squares


def check_masks(args: argparse.Namespace, config: PreTrainedConfig, height: int, width: int) -> None:
    """Raise an error if the squares do not tile the image, or if all squares are hidden."""
    patch, sizes = config.patch_size, f"images of {height} x {width} pixels in patches of {config.patch_size}"
    fitting = [side for side in range(patch, min(height, width) + 1, patch) if not (height % side or width % side)]
    if args.mask_patch not in fitting:
        advice = (
            f"choose one of {', '.join(map(str, fitting))}"
            if fitting
            else "no size divides them; use another image_size"
        )
        raise Problem(f"--mask-patch {args.mask_patch} does not divide {sizes}: {advice}.")
    hidden, squares = hidden_squares(args, height, width)
    if hidden == squares:
        raise Problem(
            f"--mask-patch {args.mask_patch} and --mask-ratio {args.mask_ratio:g} hide {hidden} of {squares} squares, "
            f"which is all of {sizes}: lower one."
        )


def with_mask(
    args: argparse.Namespace, patch: int, view: Callable, image: Image.Image, rng: random.Random
) -> dict[str, torch.Tensor]:
    """A view of the image, and the mask of its hidden patches. Both are drawn from `rng`."""
    inputs = view(image, rng)
    height, width = inputs["pixel_values"].shape[-2:]
    hidden, squares = hidden_squares(args, height, width)
    mask = torch.zeros(squares, dtype=torch.bool)
    mask[rng.sample(range(squares), hidden)] = True
    mask, repeats = mask.view(height // args.mask_patch, -1), args.mask_patch // patch
    return inputs | {"bool_masked_pos": mask.repeat_interleave(repeats, 0).repeat_interleave(repeats, 1).flatten()}


# ---------------------------------------------------------------------------------------------------------------- data


def training_view(
    args: argparse.Namespace,
    size: tuple[int, int],
    processor: BitImageProcessorPil,
    image: Image.Image,
    rng: random.Random,
) -> dict[str, torch.Tensor]:
    image = random_view(image, size, args.crop_scale, args.flip, processor.resample, rng)
    pixels = processor(image, do_resize=False, do_center_crop=False, return_tensors="pt")["pixel_values"]
    return {"pixel_values": pixels[0]}


def unlabelled(row: tuple[dict, str]) -> tuple[dict, int]:
    return row[0], 0


# ------------------------------------------------------------------------------------------------------------ training


def reconstruct(model: torch.nn.Module, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean loss over the images of a batch, and their reconstructions. The loss of an ignored image is 0."""
    counts = batch["labels"] != IGNORED
    outputs = model(pixel_values=batch["pixel_values"], bool_masked_pos=batch["bool_masked_pos"] & counts[:, None])
    return outputs.loss * counts.float().mean(), outputs.reconstruction


@torch.no_grad()  # not inference_mode: training cannot use tensors that a model caches in inference mode
def evaluate(
    accelerator: Accelerator, model: torch.nn.Module, loader: Loader
) -> tuple[dict, list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]]:
    """Measure the mean loss. Also returns pixel values, mask and reconstruction of some images of this process."""
    model.eval()
    sums = torch.zeros(2, device=accelerator.device)
    shown = []
    for batch in loader:
        counts = batch["labels"] != IGNORED
        loss, reconstruction = reconstruct(model, batch)
        sums += torch.stack([loss * len(counts), counts.sum()])
        of_batch = batch["pixel_values"], batch["bool_masked_pos"], reconstruction.float()
        shown += zip(*(tensor[counts][: SHOWN - len(shown)].cpu() for tensor in of_batch), strict=True)
    loss, images = accelerator.reduce(sums, "sum").tolist()
    if not images:
        raise Problem("None of the validation images can be read.")
    return {"loss": loss / images, "images": int(images)}, shown


def set_stride(config: PreTrainedConfig) -> None:
    """Set the decoder's pixels per token, since the config of a classifier may have another value."""
    if hasattr(config, "depths"):
        config.encoder_stride = config.patch_size * 2 ** (len(config.depths) - 1)


def train(args: argparse.Namespace, accelerator: Accelerator) -> None:
    log = accelerator.print
    fill_defaults(args, PRE_TRAINING, args.batch_size * args.accumulate * accelerator.num_processes)
    check_training(args)
    if not needs_training(args, accelerator):
        return

    set_seed(args.seed)
    with accelerator.local_main_process_first():  # the other processes use its downloads and caches
        model, _ = load_model(
            *(args, AutoModelForMaskedImageModeling, "a model for masked images", ("decoder.",)), log, set_stride
        )
        processor = load_processor(args, model.config, log)
    config, size = model.config, input_size(model.config)
    views = [
        functools.partial(with_mask, args, config.patch_size, view)
        for view in (
            functools.partial(training_view, args, size, processor),
            functools.partial(central_view, processor),
        )
    ]
    for height, width in {size, tuple(central_view(processor, Image.new("RGB", size))["pixel_values"].shape[-2:])}:
        check_masks(args, config, height, width)
    apply_speed_options(args, model)

    with accelerator.local_main_process_first():
        if args.streaming:
            train_data, validation_data, images, _ = read_streams(args)
        else:
            train_data, validation_data, _ = read_data(args, log)
            images = len(train_data["labels"])
    if args.streaming:
        keys, validation_keys, fetchers = train_data.epoch, validation_data.once, [unlabelled] * 2
    else:
        if accelerator.is_local_main_process:
            report_unreadable(args, (train_data, validation_data), log)
        keys = shuffled(images, args.seed)
        # A fixed order, but not that of the folders, so that the first images, which are drawn, are of all kinds.
        validation_keys = functools.partial(shuffled(len(validation_data["labels"]), 0), 0)
        fetchers = [
            row_fetcher(data["rows"], [0] * len(data["labels"]), args.image_column)
            for data in (train_data, validation_data)
        ]
    train_batches, train_loader, validation_loader = make_loaders(
        args, accelerator, keys, images, validation_keys, fetchers, views
    )

    settings = result_settings(args, accelerator, images, (train_data, validation_data))
    hidden, squares = hidden_squares(args, *size)
    about = f"{hidden} of {squares} squares of {args.mask_patch} pixels hidden"
    training = begin(args, accelerator, model, train_batches, train_loader, settings, about, size)
    shown = None

    def measure(model: torch.nn.Module) -> dict:
        nonlocal shown
        measured, shown = evaluate(accelerator, model, validation_loader)
        return measured

    def draw_figures(folder: Path) -> None:
        rows = {"picture": [], "shown": [], "filled in": [], "reconstructed": []}
        for pixels, mask, reconstruction in shown:
            mask = mask.view(pixels.shape[1] // config.patch_size, -1).repeat_interleave(config.patch_size, 0)
            mask = mask.repeat_interleave(config.patch_size, 1)
            # A model with drop_remainder may reconstruct less than the picture.
            height, width = reconstruction.shape[1:]
            pixels, mask = pixels[:, :height, :width], mask[:height, :width]
            picture, reconstruction = to_picture(processor, pixels), to_picture(processor, reconstruction)
            hidden_grey = picture.where(~mask, torch.tensor(0.5))
            for row, content in zip(
                rows.values(), (picture, hidden_grey, picture.where(~mask, reconstruction), reconstruction), strict=True
            ):
                row.append(content)
        if shown:
            draw_reconstructions(folder / "reconstructions.png", rows)

    results = train_and_keep(
        *(args, accelerator, training),
        lambda model, batch: reconstruct(model, batch)[0],
        measure,
        merit=lambda entry: -entry["loss"],
        describe=lambda measured: f"validation loss {measured['loss']:.4f}",
        processor=processor,
        draw_figures=draw_figures,
        card=functools.partial(pretraining_card, config.model_type),
        draw_all=True,
    )
    best = results["best"]
    log(
        f"Best: epoch {best['epoch']}, validation loss {best['loss']:.4f}. The model is in {args.output}; start "
        f"finetune.py from it with --model {args.output}."
    )
    upload(args, accelerator)


if __name__ == "__main__":
    run_training(parse_arguments(), train)
