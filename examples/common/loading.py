"""The order of images, and the path of an image from its file to the device.

All random choices for an image (its place in the epoch, its crop, its mirroring) depend only on the seed, the epoch and
the place. They do not depend on the number of processes or workers, or on whether the run was stopped and resumed.
"""

import functools
import hashlib
import itertools
import math
import random
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import datasets
import torch
from accelerate.utils import send_to_device
from PIL import Image

from .data import ROW
from .options import Problem, not_readable
from .pictures import UnreadablePicture, load_picture, with_path

IGNORED = -100  # the label of an ignored image: the default ignore_index of PyTorch's losses


def seed_of(*parts: object) -> int:
    """A 32-bit seed that is a hash of `parts`."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=4).digest(), "big")


class Item(NamedTuple):
    """One image to load.

    Args:
        key: the argument of `fetch` in [`Images`].
        seed: the seed of the view.
        counts: whether the image counts in losses and measures. Images that only fill up a batch do not.
    """

    key: Any
    seed: int = 0
    counts: bool = True


class TrainingBatches:
    """The batches of this process in an epoch of training, as a batch sampler.

    A step has `batch_size * accumulate` images for each of `processes`. The last step of an epoch has the remaining
    images, except up to `processes - 1` images that cannot be divided evenly. Each epoch leaves out other images.

    Args:
        keys (`Callable[[int], Iterator]`):
            Given the epoch, the keys of its images in order.
        images (`int`):
            The number of images in an epoch.
    """

    def __init__(
        self,
        keys: Callable[[int], Iterator],
        images: int,
        batch_size: int,
        accumulate: int,
        processes: int,
        rank: int,
        seed: int,
    ):
        if images < processes:
            raise Problem(
                f"{images} training images are too few for {processes} processes: start at most {images} process(es)."
            )
        self.keys, self.batch_size, self.processes, self.rank, self.seed = keys, batch_size, processes, rank, seed
        self.images = images - images % processes
        self.step_size = batch_size * accumulate * processes
        self.steps = math.ceil(self.images / self.step_size)
        self.start(0, 0)

    def start(self, epoch: int, step: int) -> None:
        """Let the next iteration begin at a step of an epoch. Earlier images are not loaded."""
        self.epoch, self.first_step = epoch, step

    def share(self, step: int) -> int:
        """The number of images of each process in a step."""
        return min(self.step_size, self.images - step * self.step_size) // self.processes

    def __iter__(self) -> Iterator[list[Item]]:
        """The batches of this process. A step has `share` images, in one or more batches."""
        keys = itertools.islice(enumerate(self.keys(self.epoch)), self.first_step * self.step_size, self.images)
        while step := list(itertools.islice(keys, self.step_size)):
            share = [
                Item(key, seed_of(self.seed, self.epoch, place)) for place, key in step[self.rank :: self.processes]
            ]
            for start in range(0, len(share), self.batch_size):
                yield share[start : start + self.batch_size]


class EvaluationBatches:
    """The batches of this process in an evaluation, as a batch sampler.

    Each image is in one batch of one process. All processes have the same number of batches.
    """

    def __init__(self, keys: Callable[[], Iterator], batch_size: int, processes: int, rank: int):
        self.keys, self.batch_size, self.processes, self.rank = keys, batch_size, processes, rank

    def __iter__(self) -> Iterator[list[Item]]:
        keys = enumerate(self.keys())
        while items := list(itertools.islice(keys, self.batch_size * self.processes)):
            share = [Item(key, seed_of(place)) for place, key in items[self.rank :: self.processes]]
            yield share or [Item(items[0][1], counts=False)]


def shuffled(images: int, seed: int) -> Callable[[int], Iterator[int]]:
    """A function that returns the indices of all images in a random order, another for each epoch."""

    def keys(epoch: int) -> Iterator[int]:
        generator = torch.Generator().manual_seed(seed_of(seed, "order", epoch))
        return iter(torch.randperm(images, generator=generator).tolist())

    return keys


def row_fetcher(rows: datasets.Dataset, labels: list[int], column: str) -> Callable[[int], tuple[dict, int]]:
    """A function that returns the undecoded image and the class index of a row."""
    return functools.partial(_row, rows.cast_column(column, datasets.Image(decode=False)), labels, column)


def _row(rows: datasets.Dataset, labels: list[int], column: str, index: int) -> tuple[dict, int]:
    row = rows[index]
    return with_path(row[column], f"row {row.get(ROW, index)}"), labels[index]


class Images(torch.utils.data.Dataset):
    """The inputs of a model for each image, with the class index and the error of an unreadable image.

    An unreadable image is replaced by a black image. The label of such an image, or of an image without a label, is
    `IGNORED`.

    Args:
        fetch (`Callable`):
            Given a key, the undecoded image, `{"path": …, "bytes": …}`, and its class index or `None`.
        view (`Callable`):
            Given an image and a `random.Random`, the inputs of the model by name: `pixel_values` (channels, height,
            width) and further tensors.
    """

    def __init__(self, fetch: Callable, view: Callable[[Image.Image, random.Random], dict]):
        self.fetch, self.view = fetch, view

    def __getitem__(self, item: Item) -> dict:
        cell, label = self.fetch(item.key)
        image, broken = self.decode(cell)
        if label is None:
            broken = broken or f"{cell['path']} (there is no label)"
        inputs = self.view(image, random.Random(item.seed))
        return inputs | {"labels": label if item.counts and not broken else IGNORED, "broken": broken}

    def decode(self, cell: dict) -> tuple[Image.Image, str | None]:
        """The decoded image and `None`, or a black image and the error."""
        try:
            return load_picture(cell), None
        except UnreadablePicture as error:
            return Image.new("RGB", (64, 64)), str(error)

    @staticmethod
    def collate(samples: list[dict]) -> dict:
        broken = [sample.pop("broken") for sample in samples]
        return torch.utils.data.default_collate(samples) | {"broken": [name for name in broken if name]}


class Loader:
    """A DataLoader that moves batches to the device and lists unreadable images in `broken`."""

    def __init__(
        self,
        images: Images,
        batches: TrainingBatches | EvaluationBatches,
        workers: int,
        device: torch.device,
        strict: bool,
    ):
        self.device, self.strict, self.broken = device, strict, []
        self.loader = torch.utils.data.DataLoader(
            images,
            batch_sampler=batches,
            collate_fn=images.collate,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=device.type == "cuda",
            generator=torch.Generator(),  # draws for each iteration, not from PyTorch's global state
        )

    def __iter__(self) -> Iterator[dict]:
        for batch in self.loader:
            for name in batch.pop("broken"):
                if self.strict:
                    raise not_readable(name)
                self.broken.append(name)
            yield send_to_device(batch, self.device, non_blocking=True)
