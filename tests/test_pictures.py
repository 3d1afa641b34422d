"""Pictures of all kinds in examples/: those with wide pixels, those that are too large, those that are missing."""

import io
import struct
import zlib
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image
from transformers import BitImageProcessorPil

from common.batches import Batches
from common.coco import picture_size
from common.data import unreadable_pictures
from common.detection_views import picture
from common.loading import Images
from common.pictures import UnreadablePicture, load_picture
from common.segmentation_data import load_map

LEVELS = np.linspace(0, 65535, 520).round().reshape(20, 26)  # 520 grey levels of 16 bits
GREY = (LEVELS / 257).round()


def cell_of(image: Image.Image, format: str) -> dict:
    file = io.BytesIO()
    image.save(file, format)
    return {"path": None, "bytes": file.getvalue()}


def declared(width: int, height: int) -> dict:
    """A PNG of a few bytes that declares a size, and has no pixels."""
    chunks = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0), b"IDAT", b"IEND"
    chunks = [struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks]
    return {"path": None, "bytes": b"\x89PNG\r\n\x1a\n" + b"".join(chunks)}


WIDE = {
    "16 bits": (LEVELS.astype(np.uint16), "PNG", GREY),
    "16 bits, high byte first": (LEVELS.astype(">u2"), "TIFF", GREY),
    "16 bits that Pillow reads as 32": (LEVELS.astype(np.uint16), "PPM", GREY),
    "32 bits": (LEVELS.astype(np.int32), "TIFF", GREY),
    "32 bits, of another range": (10_000 * LEVELS.astype(np.int32) - 10**8, "TIFF", GREY),
    "floats from 0 to 1": ((LEVELS / 65535).astype(np.float32) / 2, "TIFF", (GREY / 2)),
    "floats of another range": ((3 * LEVELS - 1000).astype(np.float32), "TIFF", GREY),
    "floats with infinite ones": (np.where(LEVELS > 0, LEVELS, -np.inf).astype(np.float32), "TIFF", GREY),
}


@pytest.mark.parametrize("kind", WIDE)
def test_pixels_of_more_than_8_bits_are_scaled_for_all_scripts(kind):
    values, format, expected = WIDE[kind]
    cell = cell_of(Image.fromarray(values), format)
    processor = BitImageProcessorPil(do_resize=False, do_center_crop=False, do_normalize=False, do_rescale=False)
    rows = datasets.Dataset.from_dict({"image": [cell]}, features=datasets.Features({"image": datasets.Image()}))
    batches = Batches(rows, ("image", None), processor, 1, 1, [0], Path())
    seen = {
        "training": np.asarray(Images(None, None).decode(cell)[0]),
        "detection": np.asarray(picture(cell, (26, 20))),
        "evaluation": next(iter(batches))["pixel_values"][0].permute(1, 2, 0).numpy(),
    }
    for who, pixels in seen.items():
        assert pixels.shape == (20, 26, 3), who
        assert abs(pixels.astype(float) - expected[..., None]).max() <= 1, who


def test_16_bits_are_classes_in_a_map():
    """They are not brightnesses: 300 is class 300, which is none."""
    cell = cell_of(Image.fromarray(np.full((4, 5), 7, np.uint16)), "PNG")
    assert (load_map(cell, False) == 7).all()
    with pytest.raises(ValueError, match="class 300, where 255 is for"):
        load_map(cell_of(Image.fromarray(np.full((4, 5), 300, np.uint16)), "PNG"), False)


@pytest.mark.parametrize("size", [(11_000, 11_000), (1, 90_000)])
def test_pictures_of_too_many_pixels_are_unreadable(tmp_path, size):
    """They may fill the memory, whatever the size of their files."""
    cell = declared(*size)
    file = tmp_path / "large.png"
    file.write_bytes(cell["bytes"])
    assert picture_size(cell) == (0, 0)
    for read in (load_picture, lambda cell: picture(cell, size), lambda cell: load_map(cell, False)):
        with pytest.raises((UnreadablePicture, ValueError, Image.DecompressionBombError), match=r"121000000|1 x 90000"):
            read(cell)
    rows = datasets.Dataset.from_dict({"image": [str(file)]}, features=datasets.Features({"image": datasets.Image()}))
    assert [*unreadable_pictures(rows, "image")] == [str(file)]
