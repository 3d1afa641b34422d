"""Fine-tune Focal, or any image classifier of transformers, on a folder of images or a data set from the Hub.

Plain Accelerate and PyTorch, the same file on a laptop, one GPU or several. See `--help` and examples/README.md.
"""

import argparse
import copy
import functools
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedType, LoggerType, ProjectConfiguration, gather_object, set_seed
from huggingface_hub import HfApi
from PIL import Image
from transformers import BitImageProcessorPil, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from common.data import random_view, read_data, unreadable_pictures
from common.engine import Training
from common.files import check_output, save_model, write_results
from common.loading import IGNORED, Images, InTurn, Loader, Order, shuffled
from common.models import add_adapters, build_model, decay_groups, freeze, input_size, stages_of
from common.options import Problem, first_line, fraction, positive, stop
from common.recipe import (
    RECIPES,
    Augmentation,
    balanced_weights,
    classification_loss,
    complete,
    defaults_of,
    schedule,
    set_drop_path,
)
from common.reports import draw_confusion, draw_curves, write_card
from common.streams import Stream, read_streams

EXAMPLES = """\
examples:
  start from a checkpoint (a converted or a fine-tuned folder, or a name on the Hub):
    accelerate launch examples/finetune.py --model focal-tiny --data my_images --output my_model

  go on after it was stopped, as if it had not been:
    accelerate launch examples/finetune.py --model focal-tiny --data my_images --output my_model --resume

  train from scratch as the paper does, the network described by a config.json ("model_type": "focal"):
    accelerate launch examples/finetune.py --recipe paper --config my_config.json --data imagenet --output my_model \\
        --batch-size 128

  a data set from the Hub that calls its columns and splits its own way:
    accelerate launch examples/finetune.py --model focal-tiny --data uoft-cs/cifar100 --output my_model \\
        --image-column img --label-column fine_label --validation-split test

  WebDataset shards (train-*.tar, validation-*.tar) that are not to be copied first:
    accelerate launch examples/finetune.py --model focal-tiny --data shards --streaming --train-images 1281167 \\
        --image-column jpg --label-column cls --classes classes.txt --output my_model

  two GPUs in bfloat16:
    accelerate launch --num_processes 2 --mixed_precision bf16 examples/finetune.py ...
"""

# What a run may change when it goes on: the result does not follow from it.
FREE = ("output", "overwrite", "resume", "save_every", "workers", "report_to", "push_to_hub", "strict")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    not_negative = positive(float, or_zero=True)

    group = parser.add_argument_group("model (one of the two)").add_mutually_exclusive_group(required=True)
    group.add_argument("--model", metavar="NAME", help="checkpoint to start from: a folder or a name on the Hub")
    group.add_argument("--config", metavar="PATH", help="train from scratch: a config.json, or a folder with one")

    group = parser.add_argument_group("data")
    group.add_argument(
        "--data",
        required=True,
        metavar="NAME",
        help="a folder FOLDER/train/CLASS/*.png with FOLDER/validation/CLASS/*.png, a folder of Parquet or WebDataset "
        "shards FOLDER/train-*.parquet or *.tar, or a data set's name on the Hub",
    )
    group.add_argument("--image-column", default="image", metavar="NAME", help="default: image")
    group.add_argument("--label-column", default="label", metavar="NAME", help="default: label")
    group.add_argument("--validation-split", default="validation", metavar="NAME", help="default: validation")
    group.add_argument(
        "--validation-fraction",
        type=fraction,
        default=0.1,
        metavar="F",
        help="share of the training images held out where the data has no such split (default: 0.1)",
    )
    group.add_argument(
        "--strict",
        action="store_true",
        help="stop at an image that cannot be read; without it, such are skipped and told",
    )
    group.add_argument(
        "--streaming", action="store_true", help="read shards as they go by, without a copy on this disk"
    )
    group.add_argument(
        "--train-images",
        type=positive(int),
        metavar="N",
        help="with --streaming: images of an epoch, if the data does not tell",
    )
    group.add_argument(
        "--classes", metavar="FILE", help="with --streaming: the classes' names, one a line, if the data does not tell"
    )

    group = parser.add_argument_group("result")
    group.add_argument(
        "--output",
        required=True,
        type=Path,
        metavar="FOLDER",
        help="where the best model goes; the last to FOLDER/last",
    )
    again = group.add_mutually_exclusive_group()
    again.add_argument("--overwrite", action="store_true", help="replace the model that FOLDER holds")
    again.add_argument(
        "--resume",
        action="store_true",
        help="go on from the latest checkpoint in FOLDER, as if there had been no break; start if there is none",
    )
    group.add_argument(
        "--save-every",
        type=positive(int),
        metavar="N",
        help="steps between checkpoints; there is one after each epoch in any case",
    )
    group.add_argument(
        "--report-to",
        nargs="+",
        default=[],
        metavar="NAME",
        choices=[kind.value for kind in LoggerType if kind != LoggerType.ALL],
        help=f"trackers: {', '.join(kind.value for kind in LoggerType if kind != LoggerType.ALL)}",
    )
    group.add_argument("--push-to-hub", metavar="REPO", help="upload FOLDER when it is done, as USER/NAME")

    group = parser.add_argument_group("training")
    group.add_argument(
        "--recipe",
        choices=RECIPES,
        default="fine-tuning",
        help="what options are where they are not given: paper is the original's training on ImageNet from scratch "
        "(default: fine-tuning)",
    )
    group.add_argument("--epochs", type=positive(int), metavar="N", help=defaults_of("epochs"))
    group.add_argument(
        "--batch-size", type=positive(int), default=64, metavar="N", help="images per process (default: 64)"
    )
    group.add_argument(
        "--accumulate", type=positive(int), default=1, metavar="N", help="batches per optimizer step (default: 1)"
    )
    group.add_argument(
        "--learning-rate",
        type=positive(float),
        metavar="LR",
        help="the highest, reached after the warm-up (default: 5e-5 with --model, 5e-4 with --config; paper: 5e-4 for "
        "every 512 images of a step)",
    )
    group.add_argument(
        "--min-learning-rate",
        type=not_negative,
        metavar="LR",
        help="the last (default: 0; paper: a hundredth of the highest)",
    )
    group.add_argument(
        "--warmup-epochs",
        type=not_negative,
        metavar="N",
        help="may have a fraction (default: a tenth of --epochs; paper: 20)",
    )
    group.add_argument("--weight-decay", type=not_negative, metavar="WD", help=defaults_of("weight_decay"))
    group.add_argument(
        "--clip", type=positive(float), metavar="NORM", help=f"largest gradient norm {defaults_of('clip')}"
    )
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
        help="weigh every class by the inverse of its share of the training images",
    )
    group.add_argument(
        "--ema", type=fraction, metavar="DECAY", help="keep a moving average of the weights, and evaluate and save that"
    )
    group.add_argument(
        "--layer-decay",
        type=fraction,
        default=1.0,
        metavar="F",
        help="learning rate of a block, relative to that of the block after it (default: 1)",
    )
    group.add_argument(
        "--freeze", type=positive(int), metavar="N", help="leave the stem and the first N stages as they are"
    )
    group.add_argument(
        "--lora",
        type=positive(int),
        metavar="RANK",
        help="train adapters and the classifier alone; they are merged into the saved model, and by themselves in "
        "FOLDER/adapter",
    )
    group.add_argument("--seed", type=int, default=0, metavar="N", help="default: 0")

    group = parser.add_argument_group("images in training")
    group.add_argument(
        "--crop-scale",
        type=fraction,
        metavar="F",
        help=f"the smallest share of a picture's area that a random crop keeps {defaults_of('crop_scale')}",
    )
    group.add_argument(
        "--flip",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="mirror half of the pictures; switch off for digits, letters or signs (default: on)",
    )
    group.add_argument(
        "--rand-augment",
        type=not_negative,
        metavar="M",
        help=f"up to two random operations of RandAugment, of strength M below 10 {defaults_of('rand_augment')}",
    )
    group.add_argument(
        "--color-jitter",
        type=not_negative,
        metavar="F",
        help=f"change brightness, contrast and saturation by up to F {defaults_of('color_jitter')}",
    )
    group.add_argument(
        "--erasing",
        type=not_negative,
        metavar="P",
        help=f"erase a part of a share P of the pictures {defaults_of('erasing')}",
    )
    group.add_argument(
        "--mixup",
        type=not_negative,
        metavar="A",
        help=f"blend pictures, by shares from Beta(A, A) {defaults_of('mixup')}",
    )
    group.add_argument(
        "--cutmix",
        type=not_negative,
        metavar="A",
        help="put parts of pictures into others, likewise; with --mixup, each in half of the batches "
        + defaults_of("cutmix"),
    )

    group = parser.add_argument_group("images in evaluation")
    group.add_argument(
        "--crop",
        type=fraction,
        default=0.875,
        metavar="F",
        help="the share of the shorter side that the central crop keeps, for a model that brings no image processor; "
        "1.0 where the subject fills the picture (default: 0.875)",
    )

    group = parser.add_argument_group("speed and memory")
    group.add_argument(
        "--workers",
        type=positive(int, or_zero=True),
        default=4,
        metavar="N",
        help="helpers of each process that read images, or 0 (default: 4)",
    )
    group.add_argument("--gradient-checkpointing", action="store_true", help="less memory for a third more time")
    group.add_argument("--compile", action="store_true", help="compile the model with torch.compile")
    return parser.parse_args()


def check_options(args: argparse.Namespace, accelerator: Accelerator) -> None:
    """Refuse what contradicts itself, before anything is read."""
    for name, limit in (("rand_augment", 10), ("label_smoothing", 1), ("drop_path", 1), ("erasing", 1.0001)):
        value = getattr(args, name)
        if value is not None and value >= limit:
            raise Problem(f"--{name.replace('_', '-')} {value:g} is too much: it must be below {limit:g}.")
    if args.warmup_epochs > args.epochs:
        raise Problem(f"--warmup-epochs {args.warmup_epochs:g} is longer than --epochs {args.epochs}.")
    if args.min_learning_rate > args.learning_rate:
        raise Problem(
            f"--min-learning-rate {args.min_learning_rate:g} is above --learning-rate {args.learning_rate:g}."
        )
    if args.lora and args.freeze:
        raise Problem("--lora fixes all weights of the model by itself: leave out --freeze.")
    if args.lora and accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise Problem(f"--lora is not merged under {accelerator.distributed_type.value}: use one or the other.")
    if args.freeze and args.config:
        raise Problem("--freeze keeps weights as they are, and --config starts from random ones: use --model.")
    if not args.streaming and (args.train_images or args.classes):
        raise Problem("--train-images and --classes are for --streaming: leave them out, or add that.")
    if args.streaming and args.class_weights:
        raise Problem("--class-weights counts the images of each class, which --streaming cannot: leave one out.")
    if args.classes and not Path(args.classes).is_file():
        raise Problem(f"No such file: --classes {args.classes}. It holds the classes' names, one a line.")
    available = [tracker.value for tracker in get_available_trackers()]
    for tracker in args.report_to:
        if tracker not in available:
            raise Problem(f"--report-to {tracker}: that tracker is not installed here. Install it, or name another.")


# ---------------------------------------------------------------------------------------------------------------- data


def training_view(
    size: tuple[int, int], args: argparse.Namespace, resample: int, image: Image.Image, draw: random.Random
) -> torch.Tensor:
    """Whole numbers: normalising comes after augmentation, on the device."""
    image = random_view(image, size, args.crop_scale, args.flip, resample, draw)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def central_view(
    processor: BitImageProcessorPil, image: Image.Image, draw: random.Random | None = None
) -> torch.Tensor:
    return processor(image, return_tensors="pt")["pixel_values"][0]


def listed(rows: datasets.Dataset, labels: list[int], column: str, index: int) -> tuple[dict, int]:
    return rows[index][column], labels[index]


def streamed(label2id: dict[str, int], row: tuple[dict, str]) -> tuple[dict, int]:
    cell, name = row
    return cell, label2id[name]


def make_loaders(
    args: argparse.Namespace,
    accelerator: Accelerator,
    data: tuple[dict, dict] | tuple[Stream, Stream],
    images: int,
    config: PreTrainedConfig,
    processor: BitImageProcessorPil,
) -> tuple[Order, Loader, Loader]:
    """The order of training and the batches to train on and to validate on, of `data` for both."""
    processes, rank = accelerator.num_processes, accelerator.process_index
    if args.streaming:
        keys, in_turn = data[0].epoch, data[1].once
        fetchers = [functools.partial(streamed, config.label2id)] * 2
    else:
        keys, in_turn = shuffled(images, args.seed), functools.partial(range, len(data[1]["labels"]))
        fetchers = []
        for part in data:
            rows = part["rows"].cast_column(args.image_column, datasets.Image(decode=False))
            labels = [config.label2id[name] for name in part["labels"]]
            fetchers.append(functools.partial(listed, rows, labels, args.image_column))

    size = input_size(config)
    views = (
        functools.partial(training_view, size, args, processor.resample),
        functools.partial(central_view, processor),
    )
    order = Order(keys, images, args.batch_size, args.accumulate, processes, rank, args.seed)
    every = InTurn(in_turn, args.batch_size, processes, rank)
    train_loader, validation_loader = (
        Loader(
            Images(fetch, view, blank=torch.zeros_like(view(Image.new("RGB", size[::-1]), random.Random(0)))),
            *(batches, args.workers, accelerator.device, args.strict),
        )
        for fetch, view, batches in zip(fetchers, views, (order, every), strict=True)
    )
    return order, train_loader, validation_loader


def report_unreadable(args: argparse.Namespace, data: dict, say: Callable[[str], None]) -> None:
    """What can be known of a local folder before training."""
    broken = [*unreadable_pictures(data["rows"], args.image_column)]
    if broken and args.strict:
        raise Problem(f"Not a readable image: {broken[0]}. Repair or remove it, or leave out --strict.")
    if broken:
        say(f"Skipping what is no readable image ({len(broken)}): {', '.join(broken[:5])}{' …' if broken[5:] else ''}")


# ------------------------------------------------------------------------------------------------------------ training


@torch.no_grad()  # not inference_mode: tensors that a model caches there could not be used in training later
def evaluate(
    accelerator: Accelerator, model: torch.nn.Module, loader: Loader, classes: int
) -> tuple[dict, torch.Tensor]:
    """Accuracies and mean loss, each image counted once; and (images, 2) true and predicted classes."""
    model.eval()
    sums, answers = torch.zeros(4, device=accelerator.device), []
    for batch in loader:
        labels = batch["labels"]
        with accelerator.autocast():  # an average of the weights has not been prepared for it
            logits = model(pixel_values=batch["pixel_values"]).logits.float()
        counts = labels != IGNORED
        best = logits.topk(min(5, classes)).indices
        hits = best == labels[:, None]
        loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum", ignore_index=IGNORED)
        sums += torch.stack([hits[:, 0].sum(), hits.sum(), counts.sum(), loss])
        answers.append(torch.stack([labels, best[:, 0]], 1)[counts].cpu())
    correct, among_five, images, loss = accelerator.reduce(sums, "sum").tolist()
    if not images:
        raise Problem("Not one of the validation images can be read.")
    measured = {
        "accuracy": correct / images,
        "top5_accuracy": among_five / images,
        "correct": int(correct),
        "images": int(images),
        "loss": loss / images,
    }
    return measured, torch.cat(gather_object([torch.cat(answers)]))


def train(args: argparse.Namespace, accelerator: Accelerator) -> None:
    say = accelerator.print
    processes = accelerator.num_processes
    complete(args, args.batch_size * args.accumulate * processes)
    check_options(args, accelerator)
    check_output(args)
    if args.resume and (args.output / "last").is_dir() and not (args.output / "checkpoints").is_dir():
        return say(f"Training is complete: {args.output} holds the best model, {args.output / 'last'} the last.")
    if args.push_to_hub and accelerator.is_main_process:
        try:
            HfApi().create_repo(args.push_to_hub, exist_ok=True)
        except Exception as error:
            raise Problem(f"Cannot make --push-to-hub {args.push_to_hub}: {first_line(error)}") from error

    with accelerator.local_main_process_first():  # the others find what it downloaded and prepared
        if args.streaming:
            train_data, validation_data, images, names = read_streams(args)
        else:
            train_data, validation_data, names = read_data(args, say)
            images = len(train_data["labels"])
    if not args.streaming and accelerator.is_local_main_process and Path(args.data).expanduser().is_dir():
        report_unreadable(args, train_data, say)
        report_unreadable(args, validation_data, say)

    set_seed(args.seed)
    with accelerator.local_main_process_first():
        model, processor = build_model(args, names, say, functools.partial(set_drop_path, args))
    config = model.config
    model = prepare_model(args, model)

    order, train_loader, validation_loader = make_loaders(
        *(args, accelerator, (train_data, validation_data), images, config, processor)
    )
    optimizer = torch.optim.AdamW(
        decay_groups(model, args.weight_decay, args.learning_rate, args.layer_decay), lr=args.learning_rate
    )
    settings = {f"--{name.replace('_', '-')}": value for name, value in vars(args).items() if name not in FREE}
    settings |= {
        "the number of processes": processes,
        "the precision": accelerator.mixed_precision,
        "the number of training images": images,
    }
    training = Training(
        *(accelerator, model, optimizer, functools.partial(schedule, args), order, train_loader),
        epochs=args.epochs,
        output=args.output,
        settings=settings,
        clip=args.clip,
        ema=args.ema,
        save_every=args.save_every,
    )
    resumed = args.resume and training.checkpoints.load()
    if args.overwrite and accelerator.is_main_process:
        shutil.rmtree(args.output, ignore_errors=True)
    accelerator.wait_for_everyone()
    if args.report_to:
        written = {name: value for name, value in settings.items() if isinstance(value, int | float | str)}
        accelerator.init_trackers(args.output.resolve().name, written)

    alone = accelerator.distributed_type == DistributedType.NO
    engine = "" if alone else f" ({accelerator.distributed_type.value})"
    parameters = sum(parameter.numel() for parameter in model.parameters())
    learning = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    say(
        f"{config.model_type}, {parameters / 1e6:.2f} M parameters"
        + (f" ({learning / 1e6:.2f} M learn)" if learning < parameters else "")
        + f", {len(names)} classes; {images} training images of {' x '.join(map(str, input_size(config)))} pixels; "
        f"{processes} process(es) on {accelerator.device.type}{engine}, precision {accelerator.mixed_precision}; "
        f"{args.epochs} epochs, {order.steps * args.epochs} steps."
    )
    if resumed:
        say(f"Going on after step {training.progress.step} of epoch {training.progress.epoch + 1}.")

    class_weights = None
    if args.class_weights:
        labels = [config.label2id[name] for name in train_data["labels"]]
        class_weights = balanced_weights(labels, len(names)).to(accelerator.device)
    augmentation = Augmentation(args, processor, len(names))
    answers, told = None, set()

    def measure(model: torch.nn.Module) -> dict:
        nonlocal answers
        measured, answers = evaluate(accelerator, model, validation_loader, len(names))
        return measured

    def describe(measured: dict) -> str:
        return (
            f"validation loss {measured['loss']:.3f}  accuracy {measured['accuracy']:.4f} "
            f"({measured['correct']} of {measured['images']})"
        )

    def add_reports(folder: Path, results: dict) -> None:
        draw_curves(folder / "curves.png", results["history"])
        draw_confusion(folder / "confusion.png", answers, [config.id2label[index] for index in range(len(names))])
        on_hub = {"base_model": args.model} if args.model and not Path(args.model).exists() else {}
        if not Path(args.data).expanduser().exists():
            on_hub["datasets"] = args.data
        name = args.push_to_hub or args.output.resolve().name
        write_card(
            *(folder / "README.md", name, config.model_type, args.data, args.model),
            *(results["history"][-1], settings, on_hub),
        )

    def write(folder: Path, results: dict) -> None:
        module, weights = training.weights()
        if accelerator.is_main_process:
            add = functools.partial(add_reports, results=results)
            if args.lora:
                adapted, weights = module, None
                module = copy.deepcopy(adapted).merge_and_unload()

                def add(folder: Path) -> None:
                    add_reports(folder, results)
                    adapted.save_pretrained(folder / "adapter")

            save_model(folder, module, processor, results, weights, add)

    def save(results: dict, better: bool) -> None:
        if better:
            write(args.output, results)
        elif accelerator.is_main_process:
            write_results(args.output, results)
        if new := [name for name in training.unreadable() if name not in told]:
            told.update(new)
            say(
                f"Skipped {len(new)} training images that cannot be read: {', '.join(new[:5])}{' …' if new[5:] else ''}"
            )

    training.run(
        classification_loss(augmentation, args.label_smoothing, class_weights),
        measure,
        merit=lambda entry: (entry["accuracy"], -entry["loss"]),
        describe=describe,
        save=save,
    )
    results = json.loads((args.output / "results.json").read_text())
    if answers is None:  # this process found all epochs done
        measure(training.trained)
    write(args.output / "last", results)
    if accelerator.is_main_process:
        draw_curves(args.output / "curves.png", results["history"])
    training.checkpoints.remove()
    accelerator.wait_for_everyone()
    best = results["best"]
    say(f"Best: epoch {best['epoch']}, validation accuracy {best['accuracy']:.4f}. The model is in {args.output}.")
    if args.push_to_hub and accelerator.is_main_process:
        push(args, say)


def push(args: argparse.Namespace, say: Callable[[str], None]) -> None:
    repository = args.push_to_hub
    try:
        HfApi().upload_folder(repo_id=repository, folder_path=args.output, ignore_patterns=["last/*", "logs/*"])
    except Exception as error:
        raise Problem(
            f"Cannot upload {args.output}, which is complete: {first_line(error)}. To try again: "
            f"hf upload {repository} {args.output}"
        ) from error
    say(f"It is on the Hub as {repository}.")


def prepare_model(args: argparse.Namespace, model: PreTrainedModel) -> torch.nn.Module:
    """What options change in it."""
    if args.freeze:
        freeze(model, args.freeze)
    if args.layer_decay != 1:
        stages_of(model, "--layer-decay")
    if args.lora:
        model = add_adapters(model, args.lora)
    if args.gradient_checkpointing:  # after that: peft would ask patches, which are tuples, for gradients
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if args.compile:
        model.compile()
    return model


def main() -> None:
    args = parse_arguments()
    accelerator = Accelerator(
        gradient_accumulation_steps=args.accumulate,
        log_with=args.report_to or None,
        project_config=ProjectConfiguration(str(args.output), logging_dir=str(args.output / "logs")),
    )
    logging.disable_progress_bar()  # its bars, one for every file saved, would break up the bar of the training
    if not accelerator.is_local_main_process:
        datasets.disable_progress_bars()
    try:
        train(args, accelerator)
    except Problem as problem:
        stop(problem, accelerator.is_main_process)
    accelerator.end_training()


if __name__ == "__main__":
    main()
