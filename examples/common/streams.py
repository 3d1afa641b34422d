"""Streams: data sets that are read without a copy on the disk, for data that is larger than the disk."""

import argparse
import itertools
import zlib
from collections.abc import Iterator
from pathlib import Path

import datasets

from .data import check_columns, load_splits, read_names, streamed, with_features
from .loading import seed_of
from .options import Problem
from .pictures import with_path

SHUFFLE_BUFFER = 1000  # images


class Stream:
    """Undecoded images with the names of their classes, in the order of the shards or shuffled.

    Without a label column, the class of every image is "". The class of an image without a label is None.
    """

    def __init__(self, rows: datasets.IterableDataset, args: argparse.Namespace, names: list[str]):
        self.rows = rows.cast_column(args.image_column, datasets.Image(decode=False))
        self.columns, self.names, self.seed = (args.image_column, args.label_column), names, args.seed
        # `datasets` stores a missing class as -1.
        self.no_label = (None, -1) if isinstance(rows.features.get(args.label_column), datasets.ClassLabel) else (None,)
        self.source = args.data

    def labelled(self, rows: datasets.IterableDataset) -> Iterator[tuple[dict, str | None]]:
        image, label = self.columns
        for row in streamed(self.source, rows):
            value = row[label] if label else ""
            if isinstance(value, int) and 0 <= value < len(self.names):
                value = self.names[value]
            value = None if value in self.no_label else value
            if value is not None and value not in self.names:
                raise Problem(f"The stream has a label that its classes do not include: {value}. See --classes.")
            content = (row[image] and row[image]["bytes"]) or b""
            yield with_path(row[image], row.get("__key__") or f"image with the CRC-32 {zlib.crc32(content):08x}"), value

    def once(self) -> Iterator[tuple[dict, str | None]]:
        return self.labelled(self.rows)

    def epoch(self, epoch: int) -> Iterator[tuple[dict, str | None]]:
        """An endless iterator: after the last image, the stream is read again in another order."""
        for again in itertools.count():
            seed = seed_of(self.seed, "order", epoch, again)
            yield from self.labelled(self.rows.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER))


def class_names(args: argparse.Namespace, rows: datasets.IterableDataset) -> list[str]:
    """The names of the classes, in the order of their indices."""
    feature = rows.features[args.label_column]
    if args.classes:
        names = read_names(Path(args.classes), "--classes")
    elif isinstance(feature, datasets.ClassLabel):
        names = feature.names
    else:
        raise Problem(
            f"Column {args.label_column} of --data {args.data} does not state the names of its classes, and a stream "
            "is not read in advance: write the names to a file, one a line in the order of their numbers, and add "
            "--classes FILE."
        )
    if len(names) < 2:
        raise Problem(f"--data {args.data} has only one class ({names[0]}): a classifier needs at least two.")
    return names


def read_streams(args: argparse.Namespace) -> tuple[Stream, Stream, int, list[str]]:
    """The training stream, the validation stream, the number of training images, and the names of the classes.

    If `args.label_column` is None, all images have the same class.
    """
    splits = load_splits(args.data, streaming=True)
    for split in ("train", args.validation_split):
        if split not in splits:
            raise Problem(
                f"--data {args.data} has no split called {split}, only {', '.join(splits)}. Images cannot be held "
                "out of a stream: name the split with --validation-split."
            )
    train, validation = (with_features(args.data, splits[split]) for split in ("train", args.validation_split))
    for rows in (train, validation):
        check_columns(args, rows.features, others=("label",))
    names = [""] if args.label_column is None else class_names(args, train)
    known = (train.info.splits or {}).get("train")
    images = args.train_images or (known and known.num_examples)
    if not images:
        raise Problem(f"--data {args.data} does not state its number of images: add --train-images N.")
    streams = Stream(train, args, names), Stream(validation, args, names)
    for stream, split in zip(streams, ("train", args.validation_split), strict=True):
        if next(stream.once(), None) is None:  # an epoch of an empty stream would never end
            raise Problem(f"--data {args.data} has no images in its {split} split.")
    return *streams, images, names
