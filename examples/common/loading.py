"""In which order images are seen, and how they get from their files to the device.

What is drawn for an image (its place in an epoch, its crop, whether it is mirrored) follows from the seed, the epoch
and that place alone. So neither the number of processes changes it, nor that of their workers, nor a break.
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
from .pictures import UnreadablePicture, load_picture, named

IGNORED = -100  # the label of an image that does not count, which is PyTorch's own mark for it


def seed_of(*parts: object) -> int:
    """A seed of 32 bits that follows from `parts`; others give another, unrelated one."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=4).digest(), "big")


class Item(NamedTuple):
    """One image to load: what `fetch` of [`Images`] takes, and the seed of its view."""

    key: Any
    seed: int = 0
    counts: bool = True


class Order:
    """The images of every training step.

    A step takes `batch_size * accumulate` images for each of `processes`, the last of an epoch what is left. There, up
    to `processes - 1` images that cannot be shared out evenly are left out, others in every epoch.

    Args:
        keys (`Callable[[int], Iterator]`):
            Given the epoch, the keys of its images in their order.
        images (`int`):
            How many those are.
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
            raise Problem(f"{images} training images are too few for {processes} processes: start fewer.")
        self.keys, self.batch_size, self.processes, self.rank, self.seed = keys, batch_size, processes, rank, seed
        self.images = images - images % processes
        self.step_size = batch_size * accumulate * processes
        self.steps = math.ceil(self.images / self.step_size)
        self.start(0, 0)

    def start(self, epoch: int, step: int) -> None:
        """Where the next pass begins; nothing before that is loaded."""
        self.epoch, self.first_step = epoch, step

    def share(self, step: int) -> int:
        """The number of images that each process has in a step."""
        return min(self.step_size, self.images - step * self.step_size) // self.processes

    def __iter__(self) -> Iterator[list[Item]]:
        """Batches of this process; a step is as many of them as hold its share."""
        keys = itertools.islice(enumerate(self.keys(self.epoch)), self.first_step * self.step_size, self.images)
        while step := list(itertools.islice(keys, self.step_size)):
            share = [
                Item(key, seed_of(self.seed, self.epoch, place)) for place, key in step[self.rank :: self.processes]
            ]
            for start in range(0, len(share), self.batch_size):
                yield share[start : start + self.batch_size]


class InTurn:
    """Batches of all images in turn, for evaluation: each image once, and as many batches for every process."""

    def __init__(self, keys: Callable[[], Iterator], batch_size: int, processes: int, rank: int):
        self.keys, self.batch_size, self.processes, self.rank = keys, batch_size, processes, rank

    def __iter__(self) -> Iterator[list[Item]]:
        keys = enumerate(self.keys())
        while together := list(itertools.islice(keys, self.batch_size * self.processes)):
            share = [Item(key, seed_of(place)) for place, key in together[self.rank :: self.processes]]
            yield share or [Item(together[0][1], counts=False)]


def shuffled(images: int, seed: int) -> Callable[[int], Iterator[int]]:
    """For every epoch the indices of all images in an order of its own."""

    def keys(epoch: int) -> Iterator[int]:
        generator = torch.Generator().manual_seed(seed_of(seed, "order", epoch))
        return iter(torch.randperm(images, generator=generator).tolist())

    return keys


def listed(rows: datasets.Dataset, labels: list[int], column: str) -> Callable[[int], tuple[dict, int]]:
    """Fetches an image that is not decoded, and its class index."""
    return functools.partial(_row, rows.cast_column(column, datasets.Image(decode=False)), labels, column)


def _row(rows: datasets.Dataset, labels: list[int], column: str, index: int) -> tuple[dict, int]:
    row = rows[index]
    return named(row[column], f"row {row.get(ROW, index)}"), labels[index]


class Images(torch.utils.data.Dataset):
    """What a model takes for an image, a class index, and what was wrong with an image that cannot be used.

    An image that cannot be read is replaced by a black one. Its label is `IGNORED`, as is that of an image without one.

    Args:
        fetch (`Callable`):
            Given a key, the undecoded image, `{"path": …, "bytes": …}`, and its class index or `None`.
        view (`Callable`):
            Given an image and a `random.Random`, tensors for the model by their names: `pixel_values` (channels,
            height, width) and what belongs to them.
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
        """The image, or a black one and what is wrong."""
        try:
            return load_picture(cell), None
        except UnreadablePicture as error:
            return Image.new("RGB", (64, 64)), str(error)

    @staticmethod
    def collate(samples: list[dict]) -> dict:
        broken = [sample.pop("broken") for sample in samples]
        return torch.utils.data.default_collate(samples) | {"broken": [name for name in broken if name]}


class Loader:
    """Batches on the device, and a list of the images that could not be read."""

    def __init__(self, images: Images, batches: Order | InTurn, workers: int, device: torch.device, strict: bool):
        self.device, self.strict, self.broken = device, strict, []
        self.loader = torch.utils.data.DataLoader(
            images,
            batch_sampler=batches,
            collate_fn=images.collate,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=device.type == "cuda",
            generator=torch.Generator(),  # to begin a pass draws from it, where else it would change a step's draws
        )

    def __iter__(self) -> Iterator[dict]:
        for batch in self.loader:
            for name in batch.pop("broken"):
                if self.strict:
                    raise not_readable(name)
                self.broken.append(name)
            yield send_to_device(batch, self.device, non_blocking=True)
