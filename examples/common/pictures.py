"""Opening pictures: one limit on their size and one way to 8 bits a channel, for all scripts and the page."""

import io
import os
import warnings

import datasets
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from .options import first_line

MOST_PIXELS = 100_000_000  # of one picture: a file of a few kilobytes may declare more than the memory holds
# Pillow refuses what has more than twice its limit, and warns of what is in between.
Image.MAX_IMAGE_PIXELS = MOST_PIXELS // 2
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
MOST_ROWS = 2**16  # Pillow keeps an address for each

MOST_VALUES = 2**20  # that are scaled at a time, in double precision


class UnreadablePicture(Exception):
    """A picture that cannot be read: its name, and what is wrong with it."""


def named(cell: dict | None, name: str) -> dict:
    """An undecoded picture, `{"path": …, "bytes": …}`, with `name` for its path if it has none.

    A missing picture, `None`, becomes one without any bytes.
    """
    if cell and cell["path"]:
        return cell
    return {"path": name, "bytes": (cell and cell["bytes"]) or b""}


def open_picture(cell: dict) -> Image.Image:
    """An undecoded picture, read as far as its header where it is a file of this machine."""
    if cell["bytes"] == b"":
        raise ValueError("there is no picture")
    try:
        if cell["bytes"] is None and not os.path.isfile(cell["path"]):  # a stream has addresses of files elsewhere
            return datasets.Image().decode_example(cell)
        picture = Image.open(io.BytesIO(cell["bytes"]) if cell["bytes"] else cell["path"])
    except UnidentifiedImageError:  # which tells an address in memory, another one each time
        raise UnidentifiedImageError("cannot identify image file") from None
    if max(picture.size) > MOST_ROWS:
        raise ValueError(f"it has {picture.width} x {picture.height} pixels, and no side may be above {MOST_ROWS}")
    return picture


def load_picture(cell: dict) -> Image.Image:
    """An undecoded picture upright and in colour.

    Raises:
        UnreadablePicture: if it cannot be read.
    """
    try:
        with open_picture(cell) as picture:
            return in_colour(ImageOps.exif_transpose(picture))
    except Exception as error:  # whatever a decoder says to damaged bytes
        raise UnreadablePicture(f"{cell['path']} ({first_line(error)})") from error


def in_colour(picture: Image.Image) -> Image.Image:
    """Red, green and blue of 8 bits each. Of wider pixels, which Pillow would cut off at 255, the values are scaled."""
    if picture.mode == "F" or picture.mode.startswith("I"):
        picture = Image.fromarray(scaled(np.asarray(picture), 1.0 if picture.mode == "F" else 65535))
    return picture.convert("RGB")


def scaled(values: np.ndarray, white: float) -> np.ndarray:
    """Values from 0 to `white` as 0 to 255; if there are others, those from the smallest to the largest."""
    finite = np.isfinite(values)
    if not finite.any():
        raise ValueError("its pixels are not finite numbers")
    smallest, largest = float(values[finite].min()), float(values[finite].max())
    limits = (0.0, white) if smallest >= 0 and largest <= white else (smallest, largest)
    values, shape = np.nan_to_num(values.ravel(), posinf=largest, neginf=smallest), values.shape
    parts = np.array_split(values, 1 + values.size // MOST_VALUES)
    return np.concatenate([np.interp(part, limits, (0, 255)).round().astype(np.uint8) for part in parts]).reshape(shape)
