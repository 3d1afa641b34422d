"""Command lines: argument types, options that several scripts share, and errors that the user can fix."""

import argparse
import itertools
import math
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import datasets
from accelerate import Accelerator
from accelerate.utils import LoggerType
from transformers.utils import logging

# A square with longer sides has more pixels than any picture that the scripts read (`MOST_PIXELS` in pictures.py).
LONGEST_SIDE = 10_000


class Problem(Exception):
    """An error that only the user can fix. It is shown as one line, without a traceback."""


def positive(kind: type, or_zero: bool = False) -> Callable[[str], int | float]:
    """An argparse type: an int or a float above zero. With `or_zero`, zero is allowed."""

    def parse(text: str) -> int | float:
        value = kind(text)
        if not (math.isfinite(value) and (value > 0 or (or_zero and value == 0))):
            raise argparse.ArgumentTypeError(f"{text} is not {'zero or ' if or_zero else ''}above zero")
        return value

    parse.__name__ = kind.__name__  # argparse shows this name in "invalid int value"
    return parse


def between(kind: type, lowest: float, highest: float) -> Callable[[str], int | float]:
    """An argparse type: an int or a float from `lowest` to `highest`."""

    def parse(text: str) -> int | float:
        value = kind(text)
        if not lowest <= value <= highest:
            raise argparse.ArgumentTypeError(f"{text} is not from {lowest} to {highest}")
        return value

    parse.__name__ = kind.__name__
    return parse


def fraction(text: str) -> float:
    """An argparse type: a number above 0 and at most 1."""
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and at most 1")
    return value


def repository_name(text: str) -> str:
    """An argparse type: the name of a repository on the Hub. The Hub itself checks all but an empty name."""
    if not text.strip():
        raise argparse.ArgumentTypeError(f"expected a repository name such as me/focal-tiny; got {text!r}")
    return text


def script_parser(description: str, examples: str) -> argparse.ArgumentParser:
    """A parser whose help begins with the first line of a script's docstring and ends with examples, as written."""
    return argparse.ArgumentParser(
        description=description.splitlines()[0],
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def model_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model (one of the two)").add_mutually_exclusive_group(required=True)
    group.add_argument("--model", metavar="NAME", help="checkpoint to start from: a folder or a name on the Hub")
    group.add_argument("--config", metavar="PATH", help="train from scratch: a config.json, or a folder with one")


def data_options(parser: argparse.ArgumentParser, pictures: str, streaming: bool = True) -> argparse._ArgumentGroup:
    """Options about the data set. `pictures` is the expected layout of a folder, for the help text."""
    shards = "Parquet or WebDataset shards FOLDER/train-*.parquet or *.tar" if streaming else "Parquet files"
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data",
        required=True,
        metavar="NAME",
        help=f"a folder {pictures}, a folder of {shards}, or a data set's name on the Hub",
    )
    group.add_argument("--image-column", default="image", metavar="NAME", help="default: image")
    group.add_argument("--validation-split", default="validation", metavar="NAME", help="default: validation")
    group.add_argument(
        "--validation-fraction",
        type=fraction,
        default=0.1,
        metavar="F",
        help="share of the training images held out if the data has no validation split (default: 0.1)",
    )
    group.add_argument(
        "--strict",
        action="store_true",
        help="stop at an image that cannot be read (default: skip the image and print its name)",
    )
    if not streaming:
        parser.set_defaults(streaming=False, train_images=None)
        return group
    group.add_argument(
        "--streaming", action="store_true", help="read shards while training, without a copy on this disk"
    )
    group.add_argument(
        "--train-images",
        type=positive(int),
        metavar="N",
        help="with --streaming: number of images in an epoch, if the data set does not state it",
    )
    return group


def result_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("result")
    group.add_argument(
        "--output",
        required=True,
        type=Path,
        metavar="FOLDER",
        help="folder for the best model; the last model is saved in FOLDER/last",
    )
    again = group.add_mutually_exclusive_group()
    again.add_argument("--overwrite", action="store_true", help="replace the model in FOLDER")
    again.add_argument(
        "--resume",
        action="store_true",
        help="continue from the latest checkpoint in FOLDER, with the same result as without the interruption; start "
        "from the beginning if FOLDER has no checkpoint",
    )
    group.add_argument(
        "--save-every",
        type=positive(int),
        metavar="N",
        help="steps between checkpoints within an epoch; a checkpoint is always saved after each epoch",
    )
    group.add_argument(
        "--report-to",
        nargs="+",
        default=[],
        metavar="NAME",
        choices=[kind.value for kind in LoggerType if kind != LoggerType.ALL],
        help=f"trackers: {', '.join(kind.value for kind in LoggerType if kind != LoggerType.ALL)}",
    )
    group.add_argument(
        "--push-to-hub", type=repository_name, metavar="REPO", help="upload FOLDER to the Hub as USER/NAME when done"
    )


def image_size_option(group: argparse._ArgumentGroup, default: str = "the image processor's size") -> None:
    group.add_argument(
        "--image-size",
        type=between(int, 1, LONGEST_SIDE),
        metavar="N",
        help=f"shorter side of the model's input, in pixels (default: {default})",
    )


def batch_size_option(group: argparse._ArgumentGroup, default: int = 64) -> None:
    group.add_argument(
        "--batch-size",
        type=positive(int),
        default=default,
        metavar="N",
        help=f"images per process (default: {default})",
    )


def workers_option(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--workers",
        type=positive(int, or_zero=True),
        default=4,
        metavar="N",
        help="DataLoader workers per process; 0 reads images in the process itself (default: 4)",
    )


def training_options(group: argparse._ArgumentGroup, default_help: Callable[[str], str], batch_size: int = 64) -> None:
    """Options of the optimizer. `default_help` returns the help text about the default of an option."""
    not_negative = positive(float, or_zero=True)
    group.add_argument("--epochs", type=positive(int), metavar="N", help=default_help("epochs"))
    batch_size_option(group, batch_size)
    group.add_argument(
        "--accumulate", type=positive(int), default=1, metavar="N", help="batches per optimizer step (default: 1)"
    )
    group.add_argument(
        "--learning-rate",
        type=positive(float),
        metavar="LR",
        help=f"highest learning rate, reached after the warm-up {default_help('learning_rate')}",
    )
    group.add_argument(
        "--min-learning-rate",
        type=not_negative,
        metavar="LR",
        help=f"learning rate of the last step {default_help('min_learning_rate')}",
    )
    group.add_argument(
        "--warmup-epochs",
        type=not_negative,
        metavar="N",
        help=f"epochs of warm-up; fractions are allowed {default_help('warmup_epochs')}",
    )
    group.add_argument("--weight-decay", type=not_negative, metavar="WD", help=default_help("weight_decay"))
    group.add_argument(
        "--clip", type=positive(float), metavar="NORM", help=f"largest gradient norm {default_help('clip')}"
    )
    seed_option(group)


def seed_option(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--seed", type=between(int, 0, 2**32 - 1), default=0, metavar="N", help="default: 0")


def view_options(group: argparse._ArgumentGroup, default_help: Callable[[str], str]) -> None:
    """Options about random crops and mirroring in training."""
    group.add_argument(
        "--crop-scale",
        type=fraction,
        metavar="F",
        help=f"smallest area of a random crop, as a share of the picture's area {default_help('crop_scale')}",
    )
    flip_option(group)


def flip_option(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--flip",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="mirror half of the pictures; use --no-flip for digits, letters or signs (default: on)",
    )


def preparing_options(parser: argparse.ArgumentParser) -> None:
    """Options about the preparation of images in evaluation, and about speed."""
    group = parser.add_argument_group("images in evaluation")
    group.add_argument(
        "--crop",
        type=fraction,
        default=0.875,
        metavar="F",
        help="size of the central crop, as a share of the picture's shorter side, for a model without an image "
        "processor; use 1.0 if the subject fills the picture (default: 0.875)",
    )
    speed_options(parser)


def speed_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("speed and memory")
    workers_option(group)
    group.add_argument(
        "--gradient-checkpointing", action="store_true", help="use less memory; training takes a third longer"
    )
    group.add_argument("--compile", action="store_true", help="compile the model with torch.compile")


def printable(text: str) -> str:
    """Escape control characters, which names in files may have and terminals obey."""
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in text)


def format_names(names: Iterable[str]) -> str:
    """The first five names, printable, with an ellipsis if there are more."""
    first = [printable(name) for name in itertools.islice(names, 6)]
    return ", ".join(first[:5]) + (" …" if first[5:] else "")


def not_readable(name: str) -> Problem:
    return Problem(f"Not a readable image: {name}. Repair or remove it, or leave out --strict.")


def no_readable_images(data: str, unreadable: list[str]) -> Problem:
    return Problem(f"No readable images in --data {data}: {format_names(unreadable) or 'it is empty'}.")


def first_line(error: Exception) -> str:
    """The type and first line of an error. The later lines are often advice that does not apply here."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def run_script(accelerator: Accelerator, act: Callable[[], None], advice: str = "") -> None:
    """Run `act` in each process of a script. A [`Problem`] ends the script with one line.

    `advice` is printed when the user stops the script with Ctrl-C.
    """
    logging.disable_progress_bar()  # transformers shows a progress bar for each file
    if not accelerator.is_local_main_process:
        datasets.disable_progress_bars()
    try:
        act()
    except Problem as problem:
        # Usually all processes have the same problem. The main process reports it and ends, which ends the others. If
        # only another process has a problem, that process reports it after the pause.
        if not accelerator.is_main_process:
            time.sleep(5)
        print(printable(f"error: {problem}"), file=sys.stderr, flush=True)
        sys.exit(1)
    except KeyboardInterrupt:
        if accelerator.is_main_process:
            print(f"Stopped by Ctrl-C.{advice}", file=sys.stderr, flush=True)
        sys.exit(130)
    accelerator.end_training()
