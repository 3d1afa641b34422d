"""Data sets of labelled images: loading, checks, hold-out splits, and views (the crops that a model gets)."""

import argparse
import glob
import math
import os
import random
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import datasets
import pyarrow.parquet as pq
from PIL import Image, ImageOps
from transformers import BitImageProcessorPil

from .options import Problem, first_line, format_names, not_readable
from .pictures import open_picture

ROW = "number of the row"  # a column with the original row numbers, added when rows are left out
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")  # files that `datasets` reads in folders of images


def load_splits(name: str, streaming: bool = False, **options) -> datasets.DatasetDict | datasets.IterableDatasetDict:
    """The splits of a folder of images, of a folder of Parquet or WebDataset shards, or of a data set on the Hub.

    `options` are passed to `datasets.load_dataset`, where they override the arguments that this function chooses.
    """
    folder, where = Path(name).expanduser(), "(no such folder here, nor a readable Hub data set)"
    if folder.is_file():
        raise Problem(f"--data {name} is a file: give a folder of images or the name of a data set on the Hub.")
    if folder.is_dir():
        suffixes = set()
        for file in folder.rglob("*"):
            check_name(name, file)
            suffixes.add(file.suffix.lower())
        pattern = glob.escape(str(folder))
        if suffixes & {*Image.registered_extensions(), ".zip", ".gz"}:
            # drop_labels=False: by default, labels of a single class, or of classes at different depths, are dropped.
            source, where = {"path": "imagefolder", "data_dir": pattern, "drop_labels": False}, "as a folder of images"
        elif ".parquet" in suffixes:
            source, where = {"path": "parquet", "data_dir": pattern}, "as Parquet files"
        elif ".tar" in suffixes:
            source, where = {"path": "webdataset", "data_dir": pattern}, "as WebDataset files (*.tar)"
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
        raise unreadable_data(name, where, error) from error


def check_name(name: str, file: Path) -> None:
    """Raise an error for a file name in --data that `datasets` would misread."""
    shown = ascii(str(file))[1:-1]
    try:
        str(file).encode()
    except UnicodeEncodeError as error:
        raise Problem(f"--data {name} has a file whose name is not UTF-8: {shown}. Rename it.") from error
    if os.path.expandvars(file) != str(file):
        raise Problem(f"--data {name} has a file whose name contains an environment variable: {shown}. Rename it.")
    if "::" in str(file):
        raise Problem(f"--data {name} has a file whose name contains ::, as URLs of `datasets` do: {shown}. Rename it.")


def unreadable_data(name: str, where: str, error: Exception) -> Problem:
    """An error about --data with its first cause and, if it can be found, the damaged file."""
    while error.__cause__:
        error = error.__cause__
    readers = {".zip": zipfile.ZipFile, ".tar": read_tar, ".parquet": pq.read_metadata}
    advice = ""
    for file in sorted(Path(name).expanduser().rglob("*")):
        try:
            readers.get(file.suffix.lower(), str)(file)
        except Exception as damage:
            return Problem(
                f"Cannot read --data {name}: {file} is damaged ({first_line(damage)}). Replace or remove it."
            )
        if file.name in METADATA:
            advice = f" {file} must list pictures, with a column file_name: correct it, or move it elsewhere."
    return Problem(f"Cannot read --data {name} {where}: {first_line(error).rstrip('.!')}.{advice}")


def read_tar(file: Path) -> None:
    """Read the members of a WebDataset file, and its class numbers."""
    with tarfile.open(file) as archive:
        members = archive.getmembers()
        if not members:
            raise ValueError("it has no members")
        for member in members:
            if member.name.endswith(".cls") and not archive.extractfile(member).read().strip().isdigit():
                raise ValueError(f"{member.name} must hold the number of a class; names belong into .txt")


def with_features(name: str, rows: datasets.Dataset | datasets.IterableDataset) -> datasets.Dataset:
    """The same rows with known columns. Some streams have to read their first rows to find the columns."""
    if rows.features is not None:
        return rows
    try:
        return rows._resolve_features()
    except Exception as error:
        raise unreadable_data(name, "as a stream", error) from error


def streamed(name: str, rows: Iterable) -> Iterator:
    """Iterate over a stream of --data. Errors become a [`Problem`]."""
    try:
        yield from rows
    except Exception as error:
        raise unreadable_data(name, "as a stream", error) from error


def select_rows(rows: datasets.Dataset, numbers: list[int]) -> datasets.Dataset:
    """Some rows of a data set, with their original row numbers in the column `ROW`."""
    if ROW not in rows.column_names:
        rows = rows.add_column(ROW, range(len(rows)))
    return rows.select(numbers)


def check_columns(
    args: argparse.Namespace,
    features: datasets.Features,
    images: tuple[str, ...] = ("image",),
    others: tuple[str, ...] = (),
) -> None:
    """Raise an error if a column option names a column that --data does not have, or an image column without images.

    `images` and `others` are names of options without their ending "-column".
    """
    for kind in (*images, *others):
        column = getattr(args, f"{kind}_column")
        if column is not None and column not in features:
            raise Problem(
                f"--data {args.data} has no column {column}; its columns are {', '.join(features)}. "
                f"Choose one of them with --{kind}-column."
            )
        if kind in images and not (isinstance(features[column], datasets.Image) or "binary" in str(features[column])):
            raise Problem(
                f"Column {column} of --data {args.data} holds no images: name another column with --{kind}-column."
            )


def labelled_rows(
    args: argparse.Namespace, split: str, rows: datasets.Dataset, log: Callable[[str], None]
) -> tuple[datasets.Dataset, list[str]]:
    """The rows that have a label, and their classes as text. Without a label column, the class of every row is ""."""
    if args.label_column is None:
        return rows, [""] * len(rows)
    feature, values = rows.features[args.label_column], rows[args.label_column]
    if isinstance(feature, datasets.ClassLabel):  # stores a missing class as -1
        labels = [None if value in (None, -1) else feature.names[value] for value in values]
    else:
        labels = [None if value is None else str(value) for value in values]
    without = [row for row, label in enumerate(labels) if label is None]
    if not without:
        return rows, labels
    if args.strict:
        raise Problem(f"Row {without[0]} of the {split} split has no label. Add or remove it, or leave out --strict.")
    log(f"Skipping rows of the {split} split that have no label ({len(without)}): {format_names(map(str, without))}")
    kept = [row for row, label in enumerate(labels) if label is not None]
    return select_rows(rows, kept), [labels[row] for row in kept]


def read_names(file: Path, option: str = "") -> list[str]:
    """The names of the classes in a file, one a line in the order of their numbers.

    `option` is the option with the name of the file, for error messages.
    """
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
    if repeated := next((name for name in names if names.count(name) > 1), None):
        raise Problem(f"{shown} has the name {repeated} more than once: give each class a name of its own.")
    return names


def hold_out_rows(
    args: argparse.Namespace, labels: list[str], others: Iterable[str], log: Callable[[str], None]
) -> tuple[list[int], list[int]]:
    """Divide the rows of the training split into training and validation rows, and print a line about it.

    `others` are the names of splits that are not used.
    """
    rows, held_out = hold_out(labels, args.validation_fraction, args.seed)
    if not held_out or not rows:
        raise Problem(f"--data {args.data} has too few images to hold some out for validation: add a validation split.")
    of_what = "each class" if len(set(labels)) > 1 else "all"
    not_used = f" Not used: {', '.join(others)} (see --validation-split)." if others else ""
    log(
        f"No split called {args.validation_split}: holding out {len(held_out)} of {len(labels)} training images, "
        f"{args.validation_fraction:.0%} of {of_what} (seed {args.seed}).{not_used}"
    )
    return rows, held_out


def hold_out(labels: list[str], share: float, seed: int) -> tuple[list[int], list[int]]:
    """Training rows and held-out rows: `share` of each class, at least one row of each class with two rows or more."""
    rows: dict[str, list[int]] = {}
    for row, label in enumerate(labels):
        rows.setdefault(label, []).append(row)
    train, held_out = [], []
    shuffle = random.Random(seed).shuffle
    for _, members in sorted(rows.items()):
        shuffle(members)
        count = min(max(1, round(share * len(members))), len(members) - 1)
        held_out += members[:count]
        train += members[count:]
    return sorted(train), sorted(held_out)


def unreadable_pictures(split: datasets.Dataset, column: str) -> Iterator[str]:
    """Read the header of each local file, so that unreadable files are found before training."""
    for cell in split.cast_column(column, datasets.Image(decode=False))[column]:
        if cell and cell["path"] and os.path.isfile(cell["path"]):
            try:
                open_picture(cell).close()
            except Exception:  # damaged bytes may raise any error
                yield cell["path"]


def skip_unreadable(args: argparse.Namespace, names: list[str], log: Callable[[str], None]) -> None:
    """Print the names of unreadable images, or raise an error with --strict."""
    if names and args.strict:
        raise not_readable(names[0])
    if names:
        log(f"Skipping {len(names)} image{'s' * (len(names) > 1)} that cannot be read: {format_names(names)}")


def report_unreadable(args: argparse.Namespace, parts: Iterable[dict], log: Callable[[str], None]) -> None:
    """Report the unreadable images of a local folder before training."""
    if Path(args.data).expanduser().is_dir():
        for data in parts:
            skip_unreadable(args, [*unreadable_pictures(data["rows"], args.image_column)], log)


def read_data(args: argparse.Namespace, log: Callable[[str], None]) -> tuple[dict, dict, list[str]]:
    """The training rows and labels, the validation rows and labels, and the names of the classes in order.

    If `args.label_column` is None, all images have the same class.
    """
    splits = load_splits(args.data)
    if "train" not in splits:
        raise Problem(f"--data {args.data} has no split called train, only {', '.join(splits)}.")
    check_columns(args, splits["train"].features, others=("label",))
    train, labels = labelled_rows(args, "train", splits["train"], log)
    feature = train.features.get(args.label_column)
    names = feature.names if isinstance(feature, datasets.ClassLabel) else sorted(set(labels))
    if not labels:
        raise Problem(
            f"--data {args.data} has no labels in column {args.label_column}: name another column with --label-column."
        )
    if args.label_column is not None and len(set(labels)) < 2:
        raise Problem(
            f"--data {args.data} has only one class ({labels[0]}) to train on: a classifier needs at least two, "
            f"each in a folder of its own, as in {args.data}/train/CLASS/*.png."
        )

    if args.validation_split in splits:
        check_columns(args, splits[args.validation_split].features, others=("label",))
        validation, validation_labels = labelled_rows(args, args.validation_split, splits[args.validation_split], log)
        unknown = sorted(set(validation_labels) - set(labels))
        if unknown:
            raise Problem(
                f"The {args.validation_split} split has classes that have no training images: {', '.join(unknown[:5])}."
                " Use the same names in both splits, or remove these classes."
            )
    else:
        rows, held_out = hold_out_rows(args, labels, [split for split in splits if split != "train"], log)
        validation, validation_labels = select_rows(train, held_out), [labels[row] for row in held_out]
        train, labels = select_rows(train, rows), [labels[row] for row in rows]
    return {"rows": train, "labels": labels}, {"rows": validation, "labels": validation_labels}, names


def random_view(
    image: Image.Image, size: tuple[int, int], scale: float, flip: bool, resample: int, rng: random.Random
) -> Image.Image:
    """A random crop, resized to `size`, (height, width), and mirrored with probability 1/2 if `flip`.

    The area of the crop is between `scale` and 1 of the image's area, unless the image is too narrow for it. Resizing
    changes the aspect ratio by a factor of 4/3 at most.
    """
    area = image.width * image.height * rng.uniform(scale, 1)
    ratio = size[1] / size[0] * math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
    width, height = min(image.width, math.sqrt(area * ratio)), min(image.height, math.sqrt(area / ratio))
    left, top = rng.uniform(0, image.width - width), rng.uniform(0, image.height - height)
    box = (left, top, min(left + width, image.width), min(top + height, image.height))
    image = image.resize((size[1], size[0]), resample, box=box)
    return ImageOps.mirror(image) if flip and rng.random() < 0.5 else image


def central_view(processor: BitImageProcessorPil, image: Image.Image, rng: random.Random | None = None) -> dict:
    """The output of the image processor, as in evaluation."""
    return {"pixel_values": processor(image, return_tensors="pt")["pixel_values"][0]}
