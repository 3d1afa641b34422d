"""Batches of any data set, divided among processes, for scripts that do not train."""

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
from .pictures import UnreadablePicture, load_picture, with_path


def run_inference(args: argparse.Namespace, act: Callable[[argparse.Namespace, Accelerator], None]) -> None:
    """Run a script whose processes divide the pictures and gather results at the end."""
    # A long timeout: the first process that finishes waits for the last.
    accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=datetime.timedelta(days=1))])
    run_script(accelerator, functools.partial(act, args, accelerator))


def load_split(
    name: str, split: str | None, preferred: tuple[str, ...] = (), streaming: bool = False, **options
) -> datasets.Dataset | datasets.IterableDataset:
    """One split of --data.

    Without `split`, the split is the first of `preferred` that exists. Otherwise it is the whole folder of images, or
    the only split of a data set. `options` are passed to `datasets.load_dataset` for folders of images.
    """
    folder = Path(name).expanduser()
    if folder.is_dir() and not any(file.suffix in (".parquet", ".tar") for file in folder.rglob("*")):
        if split and not (folder / split).is_dir():
            raise Problem(f"--data {name} has no folder called {split}: see --split.")
        found = [split] if split else [choice for choice in preferred if (folder / choice).is_dir()]
        # All files in one split: `datasets` would take a class called "train" for a split.
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
    """Batches of pictures. They do not depend on the number of processes and workers.

    The data is divided into `count` pieces: ranges of rows, or groups of files in a stream. Each batch belongs to one
    piece. The iterator yields the batches of the given `pieces`. The batches of a piece are in order, and the last
    batch has `last=True`. A picture that cannot be read is left out and listed in `unreadable`, and so is a picture
    without a label if `needs_label`. If the data cannot be read, the iterator ends with a [`Problem`].
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
        """The first row of a piece and the row after its last, for data that is not a stream."""
        return len(self.data) * piece // self.count, len(self.data) * (piece + 1) // self.count

    def __iter__(self) -> Iterator[dict | Problem]:
        try:
            yield from self.read()
        except Problem as problem:  # an error raised in a worker has a traceback as its message
            yield problem

    def read(self) -> Iterator[dict]:
        worker = torch.utils.data.get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        if isinstance(self.data, datasets.IterableDataset):  # a worker reads a piece of a stream from start to end
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
            cell = with_path(cell, f"{piece}:{start + row}")
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
    """Load batches in --workers. Unreadable pictures are added to `unreadable`, or raise an error with --strict."""
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
