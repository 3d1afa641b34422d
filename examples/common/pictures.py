"""Opening pictures, for all scripts and app.py: one limit on their size, and one conversion to 8 bits a channel."""

import io
import os
import warnings

import datasets
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from .options import first_line

MOST_PIXELS = 100_000_000  # a file of a few kilobytes may declare more pixels than fit in memory
# Pillow raises an error above twice its limit, and warns between one and two times its limit.
Image.MAX_IMAGE_PIXELS = MOST_PIXELS // 2
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
MOST_PIXELS_ON_A_SIDE = 2**16  # Pillow stores a pointer for each row

SCALING_CHUNK = 2**20  # values scaled at a time, since float64 takes 8 bytes for each


class UnreadablePicture(Exception):
    """A picture that cannot be read. The message is the name of the picture and the reason."""


def with_path(cell: dict | None, name: str) -> dict:
    """Use `name` as the path of an undecoded picture, `{"path": …, "bytes": …}`, if it has no path.

    A missing picture, `None`, becomes a picture without bytes.
    """
    if cell and cell["path"]:
        return cell
    return {"path": name, "bytes": (cell and cell["bytes"]) or b""}


def open_picture(cell: dict) -> Image.Image:
    """Open an undecoded picture. Of a local file, only the header is read."""
    if cell["bytes"] == b"":
        raise ValueError("there is no picture")
    try:
        if cell["bytes"] is None and not os.path.isfile(cell["path"]):  # a stream may have URLs
            return datasets.Image().decode_example(cell)
        picture = Image.open(io.BytesIO(cell["bytes"]) if cell["bytes"] else cell["path"])
    except UnidentifiedImageError:  # its message contains a memory address, which differs in each run
        raise UnidentifiedImageError("cannot identify image file") from None
    if max(picture.size) > MOST_PIXELS_ON_A_SIDE:
        raise ValueError(
            f"it has {picture.width} x {picture.height} pixels, and no side may be above {MOST_PIXELS_ON_A_SIDE}"
        )
    return picture


def load_picture(cell: dict) -> Image.Image:
    """Decode a picture, rotate it upright as its EXIF data says, and convert it to RGB.

    Raises:
        UnreadablePicture: if it cannot be read.
    """
    try:
        with open_picture(cell) as picture:
            return in_colour(ImageOps.exif_transpose(picture))
    except Exception as error:  # damaged bytes may raise any error
        raise UnreadablePicture(f"{cell['path']} ({first_line(error)})") from error


def in_colour(picture: Image.Image) -> Image.Image:
    """Convert to RGB with 8 bits a channel. Wider pixels are scaled, since Pillow would clip them at 255."""
    if picture.mode == "F" or picture.mode.startswith("I"):
        picture = Image.fromarray(scaled(np.asarray(picture), 1.0 if picture.mode == "F" else 65535))
    return picture.convert("RGB")


def scaled(values: np.ndarray, white: float) -> np.ndarray:
    """Scale values from 0 … `white` to 0 … 255. If any value is outside, scale from smallest … largest instead."""
    finite = np.isfinite(values)
    if not finite.any():
        raise ValueError("its pixels are not finite numbers")
    smallest, largest = float(values[finite].min()), float(values[finite].max())
    limits = (0.0, white) if smallest >= 0 and largest <= white else (smallest, largest)
    values, shape = np.nan_to_num(values.ravel(), posinf=largest, neginf=smallest), values.shape
    parts = np.array_split(values, 1 + values.size // SCALING_CHUNK)
    return np.concatenate([np.interp(part, limits, (0, 255)).round().astype(np.uint8) for part in parts]).reshape(shape)
