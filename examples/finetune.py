"""Fine-tune Focal, or any image classifier of transformers, on a folder of images or a data set from the Hub.

The training loop is plain PyTorch with Accelerate. It runs on a CPU, one GPU or several. See `--help` and
examples/README.md.
"""

import argparse
import functools
import random
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed
from PIL import Image
from transformers import BitImageProcessorPil, PreTrainedConfig, PreTrainedModel

from common.data import central_view, random_view, read_data, read_names, report_unreadable
from common.engine import refuse_sharding
from common.loading import IGNORED, Loader, TrainingBatches, row_fetcher, shuffled
from common.models import add_adapters, apply_speed_options, build_model, freeze, input_size, stages_of
from common.options import (
    Problem,
    between,
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
from common.recipe import (
    RECIPES,
    Augmentation,
    balanced_weights,
    classification_loss,
    defaults_of,
    fill_defaults,
    set_drop_path,
)
from common.reports import classification_card, draw_confusion
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
from common.streams import Stream, read_streams

EXAMPLES = """\
examples:
  start from a checkpoint (a converted or a fine-tuned folder, or a name on the Hub):
    accelerate launch examples/finetune.py --model focal-tiny --data my_images --output my_model

  continue a run that was stopped, with the same result:
    accelerate launch examples/finetune.py --model focal-tiny --data my_images --output my_model --resume

  train from scratch as the paper does, the network described by a config.json ("model_type": "focal"):
    accelerate launch examples/finetune.py --recipe paper --config my_config.json --data imagenet --output my_model \\
        --batch-size 128

  a data set from the Hub with other names of columns and splits:
    accelerate launch examples/finetune.py --model focal-tiny --data uoft-cs/cifar100 --output my_model \\
        --image-column img --label-column fine_label --validation-split test

  WebDataset shards (train-*.tar, validation-*.tar), without a copy on the disk:
    accelerate launch examples/finetune.py --model focal-tiny --data shards --streaming --train-images 1281167 \\
        --image-column jpg --label-column cls --classes classes.txt --output my_model

  two GPUs in bfloat16:
    accelerate launch --num_processes 2 --mixed_precision bf16 examples/finetune.py ...
"""


def parse_arguments() -> argparse.Namespace:
    parser = script_parser(__doc__, EXAMPLES)
    not_negative = positive(float, or_zero=True)

    model_options(parser)
    group = data_options(parser, "FOLDER/train/CLASS/*.png with FOLDER/validation/CLASS/*.png")
    group.add_argument("--label-column", default="label", metavar="NAME", help="default: label")
    group.add_argument(
        "--classes",
        metavar="FILE",
        help="with --streaming: names of the classes, one a line, if the data has none",
    )

    result_options(parser)

    group = parser.add_argument_group("training")
    group.add_argument(
        "--recipe",
        choices=RECIPES,
        default="fine-tuning",
        help="defaults of the training options; paper: the original training on ImageNet from scratch (default: "
        "fine-tuning)",
    )
    training_options(group, defaults_of)
    group.add_argument(
        "--drop-path",
        type=not_negative,
        metavar="P",
        help="stochastic depth of the last block (default: the config's; paper: 0.2, 0.3 or 0.5, by the model's size)",
    )
    group.add_argument("--label-smoothing", type=not_negative, metavar="S", help=defaults_of("label_smoothing"))
    group.add_argument(
        "--class-weights",
        choices=["balanced"],
        help="weight each class by the inverse of its share of the training images",
    )
    group.add_argument(
        "--ema", type=fraction, metavar="DECAY", help="evaluate and save a moving average of the weights"
    )
    group.add_argument(
        "--layer-decay",
        type=fraction,
        default=1.0,
        metavar="F",
        help="ratio of the learning rates of a block and the next block (default: 1)",
    )
    group.add_argument("--freeze", type=positive(int), metavar="N", help="freeze the stem and the first N stages")
    group.add_argument(
        "--lora",
        type=positive(int),
        metavar="RANK",
        help="train only LoRA adapters of this rank and the classifier; the saved model has them merged, and "
        "FOLDER/adapter has them unmerged",
    )

    group = parser.add_argument_group("images in training")
    view_options(group, defaults_of)
    group.add_argument(
        "--rand-augment",
        type=not_negative,
        metavar="M",
        help=f"up to two random operations of RandAugment, with strength M below 10 {defaults_of('rand_augment')}",
    )
    group.add_argument(
        "--color-jitter",
        type=not_negative,
        metavar="F",
        help=f"change brightness, contrast and saturation by up to F {defaults_of('color_jitter')}",
    )
    group.add_argument(
        "--erasing",
        type=between(float, 0, 1),
        metavar="P",
        help=f"erase a random rectangle with probability P {defaults_of('erasing')}",
    )
    group.add_argument(
        "--mixup",
        type=not_negative,
        metavar="A",
        help=f"blend pictures with shares from Beta(A, A) {defaults_of('mixup')}",
    )
    group.add_argument(
        "--cutmix",
        type=not_negative,
        metavar="A",
        help="paste a part of a picture into another, with shares from Beta(A, A); with --mixup, each in half of "
        "the batches " + defaults_of("cutmix"),
    )

    preparing_options(parser)
    return parser.parse_args()


def check_options(args: argparse.Namespace, accelerator: Accelerator) -> None:
    """Raise an error for contradictory options, before any data is read."""
    for name, limit in (("rand_augment", 10), ("label_smoothing", 1), ("drop_path", 1)):
        value = getattr(args, name)
        if value is not None and value >= limit:
            raise Problem(f"--{name.replace('_', '-')} {value:g} is too large: it must be below {limit:g}.")
    if args.lora and args.freeze:
        raise Problem("--lora already freezes the weights of the model: leave out --freeze.")
    if args.lora:
        refuse_sharding(accelerator, "--lora merges whole weights: leave out one of the two")
    if args.freeze and args.config:
        raise Problem(
            "--freeze keeps the weights of a checkpoint, but --config starts from random weights: use --model."
        )
    if args.classes and not args.streaming:
        raise Problem("--classes needs --streaming: add --streaming, or leave out --classes.")
    if args.streaming and args.class_weights:
        raise Problem(
            "--class-weights counts the images of each class, which --streaming cannot do: leave out one of the two."
        )
    if args.classes:
        read_names(Path(args.classes), "--classes")


# ---------------------------------------------------------------------------------------------------------------- data


def training_view(
    size: tuple[int, int], args: argparse.Namespace, resample: int, image: Image.Image, rng: random.Random
) -> dict:
    """A random crop as uint8 pixels. Augmentation and normalisation follow on the device."""
    image = random_view(image, size, args.crop_scale, args.flip, resample, rng)
    return {"pixel_values": torch.from_numpy(np.array(image)).permute(2, 0, 1)}


def with_label_index(label2id: dict[str, int], row: tuple[dict, str | None]) -> tuple[dict, int | None]:
    cell, name = row
    return cell, label2id.get(name)


def labelled_loaders(
    args: argparse.Namespace,
    accelerator: Accelerator,
    data: tuple[dict, dict] | tuple[Stream, Stream],
    images: int,
    config: PreTrainedConfig,
    processor: BitImageProcessorPil,
) -> tuple[TrainingBatches, Loader, Loader]:
    """The batch sampler of training, the training loader and the validation loader.

    `data` is the training and the validation data.
    """
    if args.streaming:
        keys, validation_keys = data[0].epoch, data[1].once
        fetchers = [functools.partial(with_label_index, config.label2id)] * 2
    else:
        keys, validation_keys = shuffled(images, args.seed), functools.partial(range, len(data[1]["labels"]))
        fetchers = [
            row_fetcher(part["rows"], [config.label2id[name] for name in part["labels"]], args.image_column)
            for part in data
        ]
    views = (
        functools.partial(training_view, input_size(config, processor), args, processor.resample),
        functools.partial(central_view, processor),
    )
    return make_loaders(args, accelerator, keys, images, validation_keys, fetchers, views)


# ------------------------------------------------------------------------------------------------------------ training


@torch.no_grad()  # not inference_mode: training cannot use tensors that a model caches in inference mode
def evaluate(
    accelerator: Accelerator, model: torch.nn.Module, loader: Loader, classes: int
) -> tuple[dict, torch.Tensor]:
    """Measure accuracies and the mean loss. Also returns the true and predicted classes (images, 2)."""
    model.eval()
    sums, answers = torch.zeros(4, device=accelerator.device), []
    for batch in loader:
        labels = batch["labels"]
        with accelerator.autocast():  # accelerator.prepare has not wrapped the averaged model in autocast
            logits = model(pixel_values=batch["pixel_values"]).logits.float()
        counts = labels != IGNORED
        best = logits.topk(min(5, classes)).indices
        hits = best == labels[:, None]
        loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum", ignore_index=IGNORED)
        sums += torch.stack([hits[:, 0].sum(), hits.sum(), counts.sum(), loss])
        answers.append(torch.stack([labels, best[:, 0]], 1)[counts].cpu())
    correct, among_five, images, loss = accelerator.reduce(sums, "sum").tolist()
    if not images:
        raise Problem("None of the validation images can be read.")
    measured = {
        "accuracy": correct / images,
        "top5_accuracy": among_five / images,
        "correct": int(correct),
        "images": int(images),
        "loss": loss / images,
    }
    return measured, torch.cat(gather_object([torch.cat(answers)]))


def train(args: argparse.Namespace, accelerator: Accelerator) -> None:
    log = accelerator.print
    fill_defaults(args, RECIPES[args.recipe], args.batch_size * args.accumulate * accelerator.num_processes)
    check_training(args)
    check_options(args, accelerator)
    if not needs_training(args, accelerator):
        return

    with accelerator.local_main_process_first():  # the other processes use its downloads and caches
        if args.streaming:
            train_data, validation_data, images, names = read_streams(args)
        else:
            train_data, validation_data, names = read_data(args, log)
            images = len(train_data["labels"])
    if not args.streaming and accelerator.is_local_main_process:
        report_unreadable(args, (train_data, validation_data), log)

    set_seed(args.seed)
    with accelerator.local_main_process_first():
        model, processor = build_model(args, names, log, functools.partial(set_drop_path, args))
    config = model.config
    model = prepare_model(args, model)

    train_batches, train_loader, validation_loader = labelled_loaders(
        *(args, accelerator, (train_data, validation_data), images, config, processor)
    )
    settings = result_settings(args, accelerator, images, (train_data, validation_data))
    training = begin(
        *(args, accelerator, model, train_batches, train_loader, settings),
        about=f"{len(names)} classes",
        size=input_size(config, processor),
        ema=args.ema,
        layer_decay=args.layer_decay,
    )

    class_weights = None
    if args.class_weights:
        labels = [config.label2id[name] for name in train_data["labels"]]
        class_weights = balanced_weights(labels, len(names)).to(accelerator.device)
    augmentation = Augmentation(args, processor, len(names))
    answers = None

    def measure(model: torch.nn.Module) -> dict:
        nonlocal answers
        measured, answers = evaluate(accelerator, model, validation_loader, len(names))
        return measured

    def describe(measured: dict) -> str:
        return (
            f"validation loss {measured['loss']:.3f}  accuracy {measured['accuracy']:.4f} "
            f"({measured['correct']} of {measured['images']})"
        )

    def draw_figures(folder: Path) -> None:
        draw_confusion(folder / "confusion.png", answers, [config.id2label[index] for index in range(len(names))])

    results = train_and_keep(
        *(args, accelerator, training),
        classification_loss(augmentation, args.label_smoothing, class_weights),
        measure,
        merit=lambda entry: (entry["accuracy"], -entry["loss"]),
        describe=describe,
        processor=processor,
        draw_figures=draw_figures,
        card=functools.partial(classification_card, config.model_type),
    )
    best = results["best"]
    log(f"Best: epoch {best['epoch']}, validation accuracy {best['accuracy']:.4f}. The model is in {args.output}.")
    upload(args, accelerator)


def prepare_model(args: argparse.Namespace, model: PreTrainedModel) -> torch.nn.Module:
    """Apply the options that change the model or its trainable parameters."""
    if args.freeze:
        freeze(model, args.freeze)
    if args.layer_decay != 1:
        stages_of(model, "--layer-decay")
    if args.lora:
        model = add_adapters(model, args.lora)
    # After peft, which would otherwise require gradients of the patches, which are tuples.
    apply_speed_options(args, model)
    return model


if __name__ == "__main__":
    run_training(parse_arguments(), train)
