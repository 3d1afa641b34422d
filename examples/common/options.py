"""Command lines: kinds of values, options that scripts share, and what only the user can put right."""

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


class Problem(Exception):
    """Something only the user can put right: shown as one line, without a traceback."""


def positive(kind: type, or_zero: bool = False) -> Callable[[str], int | float]:
    """An argparse type: an int or a float above zero, or zero where that has a meaning."""

    def parse(text: str) -> int | float:
        value = kind(text)
        if not (math.isfinite(value) and (value > 0 or (or_zero and value == 0))):
            raise argparse.ArgumentTypeError(f"{text} is not {'zero or ' if or_zero else ''}above zero")
        return value

    parse.__name__ = kind.__name__  # argparse puts it into "invalid int value"
    return parse


def fraction(text: str) -> float:
    """An argparse type: above 0, at most 1."""
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
    """Where the images are, in folders such as `pictures`, and whether they may be read as a stream."""
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
        help="share of the training images held out where the data has no such split (default: 0.1)",
    )
    group.add_argument(
        "--strict",
        action="store_true",
        help="stop at an image that cannot be read; without it, such are skipped and told",
    )
    if not streaming:
        parser.set_defaults(streaming=False, train_images=None)
        return group
    group.add_argument(
        "--streaming", action="store_true", help="read shards as they go by, without a copy on this disk"
    )
    group.add_argument(
        "--train-images",
        type=positive(int),
        metavar="N",
        help="with --streaming: images of an epoch, if the data does not tell",
    )
    return group


def result_options(parser: argparse.ArgumentParser) -> None:
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
    group.add_argument(
        "--push-to-hub", type=repository_name, metavar="REPO", help="upload FOLDER when it is done, as USER/NAME"
    )


def image_size_option(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--image-size",
        type=positive(int),
        metavar="N",
        help="shorter side of what the model sees, in pixels (default: what its image processor says)",
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
        help="helpers of each process that read images, or 0 (default: 4)",
    )


def training_options(group: argparse._ArgumentGroup, told: Callable[[str], str], batch_size: int = 64) -> None:
    """How the weights change. `told` gives the default of an option in words, for its help."""
    not_negative = positive(float, or_zero=True)
    group.add_argument("--epochs", type=positive(int), metavar="N", help=told("epochs"))
    batch_size_option(group, batch_size)
    group.add_argument(
        "--accumulate", type=positive(int), default=1, metavar="N", help="batches per optimizer step (default: 1)"
    )
    group.add_argument(
        "--learning-rate",
        type=positive(float),
        metavar="LR",
        help=f"the highest, reached after the warm-up {told('learning_rate')}",
    )
    group.add_argument(
        "--min-learning-rate", type=not_negative, metavar="LR", help=f"the last {told('min_learning_rate')}"
    )
    group.add_argument(
        "--warmup-epochs", type=not_negative, metavar="N", help=f"may have a fraction {told('warmup_epochs')}"
    )
    group.add_argument("--weight-decay", type=not_negative, metavar="WD", help=told("weight_decay"))
    group.add_argument("--clip", type=positive(float), metavar="NORM", help=f"largest gradient norm {told('clip')}")
    group.add_argument("--seed", type=positive(int, or_zero=True), default=0, metavar="N", help="default: 0")


def view_options(group: argparse._ArgumentGroup, told: Callable[[str], str]) -> None:
    """What part of a picture is shown in training."""
    group.add_argument(
        "--crop-scale",
        type=fraction,
        metavar="F",
        help=f"the smallest share of a picture's area that a random crop keeps {told('crop_scale')}",
    )
    flip_option(group)


def flip_option(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--flip",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="mirror half of the pictures; switch off for digits, letters or signs (default: on)",
    )


def preparing_options(parser: argparse.ArgumentParser) -> None:
    """How images are prepared in evaluation, and by whom."""
    group = parser.add_argument_group("images in evaluation")
    group.add_argument(
        "--crop",
        type=fraction,
        default=0.875,
        metavar="F",
        help="the share of the shorter side that the central crop keeps, for a model that brings no image processor; "
        "1.0 where the subject fills the picture (default: 0.875)",
    )
    speed_options(parser)


def speed_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("speed and memory")
    workers_option(group)
    group.add_argument("--gradient-checkpointing", action="store_true", help="less memory for a third more time")
    group.add_argument("--compile", action="store_true", help="compile the model with torch.compile")


def few(names: Iterable[str]) -> str:
    """The first five of some names."""
    first = list(itertools.islice(names, 6))
    return ", ".join(first[:5]) + (" …" if first[5:] else "")


def not_readable(name: str) -> Problem:
    return Problem(f"Not a readable image: {name}. Repair or remove it, or leave out --strict.")


def no_readable_images(data: str, unreadable: list[str]) -> Problem:
    return Problem(f"No readable images in --data {data}: {few(unreadable) or 'it is empty'}.")


def first_line(error: Exception) -> str:
    """An error's first line of text: what libraries write after it is advice that does not fit here."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def run_script(accelerator: Accelerator, act: Callable[[], None], advice: str = "") -> None:
    """What a script does in each of its processes; what only the user can put right ends it with one line.

    `advice` is given to those who stop it by Ctrl-C.
    """
    logging.disable_progress_bar()  # its bars, one for every file, would break up those of the script
    if not accelerator.is_local_main_process:
        datasets.disable_progress_bars()
    try:
        act()
    except Problem as problem:
        # All processes meet the same problem and one should report it. It ends the others by failing; where it is not
        # the one in trouble, the others speak for themselves.
        if not accelerator.is_main_process:
            time.sleep(5)
        print(f"error: {problem}", file=sys.stderr, flush=True)
        sys.exit(1)
    except KeyboardInterrupt:
        if accelerator.is_main_process:
            print(f"Stopped by Ctrl-C.{advice}", file=sys.stderr, flush=True)
        sys.exit(130)
    accelerator.end_training()
