"""A name for the data that a run reads, by which --resume knows it again."""

import hashlib
import itertools
import math
from collections.abc import Iterable, Iterator

import datasets
import fsspec
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from .streams import Stream

PICTURES = 1000  # of a data set that are read, or all
SHARDS, OF_SHARD = 4, 16  # of a stream, and pictures of each


def fingerprint(accelerator: Accelerator, parts: Iterable[dict | datasets.Dataset | Stream]) -> str:
    """Follows from the pictures and labels in `parts`, wherever they lie and whenever they were written.

    Of a data set, all labels count, and up to 1000 pictures in equal distances; of a stream, the first ones of some
    shards.
    """
    if not accelerator.is_main_process:
        return broadcast_object_list([None])[0]
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        for content in sample(part):
            digest.update(len(content).to_bytes(8))
            digest.update(content)
    return broadcast_object_list([digest.hexdigest()])[0]


def sample(part: dict | datasets.Dataset | Stream) -> Iterator[bytes]:
    if isinstance(part, Stream):
        shards = part.rows.num_shards
        for index in range(0, shards, math.ceil(shards / SHARDS) or 1):
            for cell, label in itertools.islice(part.labelled(part.rows.shard(shards, index)), OF_SHARD):
                yield from (repr(label).encode(), picture_bytes(cell))
        return
    rows, labels = (part["rows"], part["labels"]) if isinstance(part, dict) else (part, ())
    yield len(rows).to_bytes(8)
    for label in labels:
        yield repr(label).encode()
    columns = [name for name, feature in rows.features.items() if isinstance(feature, datasets.Image)]
    rows = rows.select_columns(columns)
    for column in columns:
        rows = rows.cast_column(column, datasets.Image(decode=False))
    for row in rows.select(range(0, len(rows), math.ceil(len(rows) / PICTURES) or 1)):
        yield from map(picture_bytes, row.values())


def picture_bytes(cell: dict | None) -> bytes:
    """An undecoded picture's file, or nothing where that cannot be read."""
    if not cell or cell["bytes"] is not None:
        return cell["bytes"] if cell else b""
    try:
        with fsspec.open(cell["path"]) as file:
            return file.read()
    except Exception:  # each file system has its own; the loader names the picture
        return b""
