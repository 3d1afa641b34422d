"""Data sets of labelled images: reading them, checking them, and the views of an image that a model is shown."""

import argparse
import glob
import math
import os
import random
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import datasets
from PIL import Image, ImageOps
from transformers import BitImageProcessorPil

from .options import Problem, first_line
from .pictures import open_picture


def load_splits(name: str, streaming: bool = False, **options) -> datasets.DatasetDict | datasets.IterableDatasetDict:
    """The splits of a folder of images, of Parquet or WebDataset shards, or of a data set on the Hub.

    `options` go to `datasets.load_dataset` and outweigh what is chosen here.
    """
    folder = Path(name).expanduser()
    if folder.is_file():
        raise Problem(f"--data {name} is a file: give a folder of images or the name of a data set on the Hub.")
    if folder.is_dir():
        suffixes = {file.suffix.lower() for file in folder.rglob("*")}
        pattern = glob.escape(str(folder))
        if suffixes & {*Image.registered_extensions(), ".zip", ".gz"}:
            # drop_labels=False: by default, one class alone or classes at different depths would silently lose them.
            source = {"path": "imagefolder", "data_dir": pattern, "drop_labels": False}
        elif suffixes & {".parquet", ".tar"}:
            source = {"path": "parquet" if ".parquet" in suffixes else "webdataset", "data_dir": pattern}
        else:
            raise Problem(
                f"No images found in --data {name}: expected {name}/train/CLASS/*.png, *.jpg or the like, or shards, "
                f"{name}/train-*.parquet or *.tar (WebDataset)."
            )
    elif name.count("/") > 1 or name.startswith((".", "/", "~")):
        raise Problem(f"No such folder: --data {name}. Give an existing folder or the name of a data set on the Hub.")
    else:
        source = {"path": name}
    try:
        return datasets.load_dataset(**source | options, streaming=streaming)
    except Exception as error:
        where = "as a folder of images" if folder.is_dir() else "(no such folder here, nor a readable Hub data set)"
        raise Problem(f"Cannot read --data {name} {where}: {first_line(error)}") from error


def label_names(split: datasets.Dataset, column: str | None) -> list[str]:
    """The class of every row, as text; without such a column, one class for all."""
    if column is None:
        return [""] * len(split)
    feature = split.features[column]
    if isinstance(feature, datasets.ClassLabel):
        return [feature.names[index] for index in split[column]]
    return [str(value) for value in split[column]]


def read_names(file: Path, option: str = "") -> list[str]:
    """The classes' names in a file, one a line, in the order of their numbers. `option` is the one that named it."""
    shown = f"{option} {file}".strip()
    if not file.is_file():
        raise Problem(f"No such file: {shown}. It holds the classes' names, one a line, in the order of their numbers.")
    try:
        names = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise Problem(
            f"Cannot read {shown} ({first_line(error)}). It should hold the classes' names, one a line, in the order "
            "of their numbers, as text in UTF-8."
        ) from error
    if not names:
        raise Problem(f"{shown} names no classes: write one a line, in the order of their numbers.")
    return names


def hold_out(labels: list[str], share: float, seed: int) -> tuple[list[int], list[int]]:
    """Rows to train on and rows to hold out, `share` of each class (at least one image of any class that has two)."""
    rows: dict[str, list[int]] = {}
    for row, label in enumerate(labels):
        rows.setdefault(label, []).append(row)
    train, held = [], []
    shuffle = random.Random(seed).shuffle
    for _, members in sorted(rows.items()):
        shuffle(members)
        count = min(max(1, round(share * len(members))), len(members) - 1)
        held += members[:count]
        train += members[count:]
    return sorted(train), sorted(held)


def unreadable_pictures(split: datasets.Dataset, column: str) -> Iterator[str]:
    """Open every file of a local folder as far as its header, so that a broken one is found now and not hours later."""
    for cell in split.cast_column(column, datasets.Image(decode=False))[column]:
        if cell and cell["path"] and os.path.isfile(cell["path"]):
            try:
                open_picture(cell).close()
            except Exception:  # whatever a decoder says to damaged bytes
                yield cell["path"]


def report_unreadable(args: argparse.Namespace, parts: Iterable[dict], say: Callable[[str], None]) -> None:
    """What can be known of a local folder before training."""
    if Path(args.data).expanduser().is_dir():
        for data in parts:
            broken = [*unreadable_pictures(data["rows"], args.image_column)]
            if broken and args.strict:
                raise Problem(f"Not a readable image: {broken[0]}. Repair or remove it, or leave out --strict.")
            if broken:
                shown = ", ".join(broken[:5]) + (" …" if broken[5:] else "")
                say(f"Skipping what is no readable image ({len(broken)}): {shown}")


def read_data(args: argparse.Namespace, say: Callable[[str], None]) -> tuple[dict, dict, list[str]]:
    """The rows and labels to train on, the same to validate on, and the classes' names in order.

    Where `args.label_column` is None, all images have one class, whatever the data says.
    """
    splits = load_splits(args.data)
    if "train" not in splits:
        raise Problem(f"--data {args.data} has no split called train, only {', '.join(splits)}.")
    train = splits["train"]
    for option, column in (("--image-column", args.image_column), ("--label-column", args.label_column)):
        if column is not None and column not in train.column_names:
            raise Problem(
                f"--data {args.data} has no column {column}; its columns are {', '.join(train.column_names)}. "
                f"Name the right one with {option}."
            )
    if not isinstance(train.features[args.image_column], datasets.Image):
        raise Problem(f"Column {args.image_column} of --data {args.data} holds no images: see --image-column.")

    labels = label_names(train, args.label_column)
    feature = train.features.get(args.label_column)
    names = feature.names if isinstance(feature, datasets.ClassLabel) else sorted(set(labels))
    if args.label_column is not None and len(set(labels)) < 2:
        raise Problem(
            f"--data {args.data} has only one class ({labels[0]}) to train on: a classifier needs at least two, "
            f"each in a folder of its own, as in {args.data}/train/CLASS/*.png."
        )

    if args.validation_split in splits:
        validation = splits[args.validation_split]
        validation_labels = label_names(validation, args.label_column)
        unknown = sorted(set(validation_labels) - set(labels))
        if unknown:
            raise Problem(
                f"The {args.validation_split} split has classes that have no training images: {', '.join(unknown[:5])}."
                " Spell the classes alike in both, or remove them."
            )
    else:
        others = [split for split in splits if split != "train"]
        rows, held = hold_out(labels, args.validation_fraction, args.seed)
        if not held or not rows:
            raise Problem(f"--data {args.data} has too few images to hold some out: add a validation split.")
        say(
            f"No split called {args.validation_split}: holding out {len(held)} of {len(labels)} training images, "
            f"{args.validation_fraction:.0%} of {'all' if args.label_column is None else 'each class'} "
            f"(seed {args.seed})." + (f" Not used: {', '.join(others)} (see --validation-split)." if others else "")
        )
        validation, validation_labels = train.select(held), [labels[row] for row in held]
        train, labels = train.select(rows), [labels[row] for row in rows]
    return {"rows": train, "labels": labels}, {"rows": validation, "labels": validation_labels}, names


def random_view(
    image: Image.Image, size: tuple[int, int], scale: float, flip: bool, resample: int, random: random.Random = random
) -> Image.Image:
    """A random part of the image, resized to (height, width) and at most 4:3 out of its shape.

    Its area is `scale` to 1 of the image's, or what fits into the image of a part so large.
    """
    area = image.width * image.height * random.uniform(scale, 1)
    ratio = size[1] / size[0] * math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
    width, height = min(image.width, math.sqrt(area * ratio)), min(image.height, math.sqrt(area / ratio))
    left, top = random.uniform(0, image.width - width), random.uniform(0, image.height - height)
    box = (left, top, min(left + width, image.width), min(top + height, image.height))
    image = image.resize((size[1], size[0]), resample, box=box)
    return ImageOps.mirror(image) if flip and random.random() < 0.5 else image


def central_view(processor: BitImageProcessorPil, image: Image.Image, draw: random.Random | None = None) -> dict:
    """What the model's image processor makes of it."""
    return {"pixel_values": processor(image, return_tensors="pt")["pixel_values"][0]}
