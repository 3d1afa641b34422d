"""Batches that several processes share out among them, of any data set."""

import argparse
import datetime
import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import datasets
import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from transformers import BaseImageProcessor

from .data import load_splits, streamed, with_features
from .options import Problem, not_readable, run_script
from .pictures import UnreadablePicture, load_picture, named


def run_apart(args: argparse.Namespace, act: Callable[[argparse.Namespace, Accelerator], None]) -> None:
    """A script whose processes share the pictures out and meet at the end."""
    # Waiting is no failure here: a process that is done waits for the slowest.
    accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=datetime.timedelta(days=1))])
    run_script(accelerator, functools.partial(act, args, accelerator))


def load_split(
    name: str, split: str | None, preferred: tuple[str, ...] = (), streaming: bool = False, **options
) -> datasets.Dataset | datasets.IterableDataset:
    """One split of what --data names; `options` are those of `datasets` for folders of images.

    Without `split`, the first of the `preferred` that is there; else all of a folder of images, or the only split.
    """
    folder = Path(name).expanduser()
    if folder.is_dir() and not any(file.suffix in (".parquet", ".tar") for file in folder.rglob("*")):
        if split and not (folder / split).is_dir():
            raise Problem(f"--data {name} has no folder called {split}: see --split.")
        found = [split] if split else [choice for choice in preferred if (folder / choice).is_dir()]
        # Named as one split: a class called "train" would otherwise be taken for one.
        options = {"data_files": {"images": "**"}} | options
        rows = load_splits(str(folder.joinpath(*found[:1])), streaming, **options)["images"]
        return with_features(name, rows)

    splits = load_splits(name, streaming)
    if split and split not in splits:
        raise Problem(f"--data {name} has no split called {split}, only {', '.join(splits)}: see --split.")
    found = [split] if split else [choice for choice in preferred if choice in splits]
    if not found and len(splits) > 1:
        raise Problem(f"--data {name} has several splits: choose one of {', '.join(splits)} with --split.")
    return with_features(name, splits[found[0] if found else next(iter(splits))])


class Batches(torch.utils.data.IterableDataset):
    """Batches of pictures, each picture in exactly one, and the same for any number of processes and workers.

    The data is cut into `count` pieces, a stream at the borders of its files, and a batch is of one piece only. This
    yields the batches of some `pieces`; those of a piece come in order, the last one marked. A picture that cannot be
    read, or has no label where `needs_label`, is left out and named. Of data that cannot be read, the last of all is a
    `Problem`.
    """

    def __init__(
        self,
        data: datasets.Dataset | datasets.IterableDataset,
        columns: tuple[str, str | None],
        processor: BaseImageProcessor,
        batch_size: int,
        count: int,
        pieces: list[int],
        source: str,
        needs_label: bool = False,
    ):
        self.image_column, self.label_column = columns
        self.data = data.cast_column(self.image_column, datasets.Image(decode=False))
        self.processor, self.batch_size, self.count, self.pieces = processor, batch_size, count, pieces
        self.source, self.folder = source, f"{Path(source).expanduser().resolve()}{os.sep}"
        self.needs_label = needs_label

    def bounds(self, piece: int) -> tuple[int, int]:
        """The rows of a piece where the data is no stream."""
        return len(self.data) * piece // self.count, len(self.data) * (piece + 1) // self.count

    def __iter__(self) -> Iterator[dict | Problem]:
        try:
            yield from self.read()
        except Problem as problem:  # raised in a worker, it would come with a traceback for its text
            yield problem

    def read(self) -> Iterator[dict]:
        worker = torch.utils.data.get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        if isinstance(self.data, datasets.IterableDataset):  # its pieces can only be read one after the other
            for piece in self.pieces[first::step]:
                start = 0
                shard = self.data.shard(num_shards=self.count, index=piece)
                for rows in streamed(self.source, shard.iter(self.batch_size)):
                    yield self.batch(piece, start, rows)
                    start += self.batch_size
                yield self.batch(piece, start, {self.image_column: []}, last=True)
        else:
            ranges = [
                (piece, start, min(start + self.batch_size, self.bounds(piece)[1]))
                for piece in self.pieces
                for start in range(*self.bounds(piece), self.batch_size)
            ]
            for piece, start, stop in ranges[first::step]:
                yield self.batch(piece, start, self.data[start:stop], last=stop == self.bounds(piece)[1])

    def batch(self, piece: int, start: int, rows: dict, last: bool = False) -> dict:
        names, views, labels, unreadable = [], [], [], []
        for row, cell in enumerate(rows[self.image_column]):
            cell = named(cell, f"{piece}:{start + row}")
            label = rows[self.label_column][row] if self.label_column else None
            try:
                image = load_picture(cell)
                if label is None and self.needs_label:
                    raise UnreadablePicture(f"{cell['path']} (there is no label)")
            except UnreadablePicture as error:
                unreadable.append(str(error).removeprefix(self.folder))
                continue
            names.append(cell["path"].removeprefix(self.folder))
            views.append(self.processor(image, return_tensors="pt")["pixel_values"][0])
            if self.label_column:
                labels.append(label)
        pixels = {"pixel_values": torch.stack(views)} if views else {}
        return {"piece": piece, "last": last, "names": names, "labels": labels, "unreadable": unreadable, **pixels}


def load_batches(
    args: argparse.Namespace, accelerator: Accelerator, batches: Batches, unreadable: list[str]
) -> Iterator[dict]:
    """Batches that --workers load. What is left out is added to `unreadable` or, with --strict, refused."""
    loader = torch.utils.data.DataLoader(
        batches, batch_size=None, num_workers=args.workers, pin_memory=accelerator.device.type == "cuda"
    )
    for batch in loader:
        if isinstance(batch, Problem):
            raise batch
        if args.strict and batch["unreadable"]:
            raise not_readable(batch["unreadable"][0])
        unreadable += batch["unreadable"]
        yield batch
