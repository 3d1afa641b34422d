"""A checksum of the data set. --resume compares it to refuse other data."""

import hashlib
import itertools
import math
from collections.abc import Iterable, Iterator

import datasets
import fsspec
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from .streams import Stream

MOST_PICTURES = 1000  # pictures of a data set in the checksum
SHARDS, PICTURES_PER_SHARD = 4, 16  # shards of a stream, and pictures of each shard, in the checksum


def fingerprint(accelerator: Accelerator, parts: Iterable[dict | datasets.Dataset | Stream]) -> str:
    """A checksum of pictures and labels. Paths and dates of the files do not change it.

    For a data set, it covers all labels and at most `MOST_PICTURES` evenly spaced pictures. For a stream, it covers
    the first pictures and labels of `SHARDS` shards.
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
    """The bytes that the checksum covers."""
    if isinstance(part, Stream):
        shards = part.rows.num_shards
        for index in range(0, shards, math.ceil(shards / SHARDS) or 1):
            for cell, label in itertools.islice(part.labelled(part.rows.shard(shards, index)), PICTURES_PER_SHARD):
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
    for row in rows.select(range(0, len(rows), math.ceil(len(rows) / MOST_PICTURES) or 1)):
        yield from map(picture_bytes, row.values())


def picture_bytes(cell: dict | None) -> bytes:
    """The bytes of an undecoded picture, or b"" if its file cannot be read."""
    if not cell or cell["bytes"] is not None:
        return cell["bytes"] if cell else b""
    try:
        with fsspec.open(cell["path"]) as file:
            return file.read()
    except Exception:  # each file system has its own errors; the loader reports the picture
        return b""
