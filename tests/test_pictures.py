"""Pictures of all kinds in examples/: those with wide pixels, those that are too large, those that are missing."""

import functools
import io
import os
import struct
import tarfile
import zlib
from argparse import Namespace
from itertools import islice
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from transformers import BitImageProcessorPil

from common.batches import Batches, load_batches, load_split
from common.coco import picture_size, read_objects
from common.data import check_columns, read_data, report_unreadable, unreadable_pictures
from common.detection_views import picture
from common.loading import IGNORED, Images, Item, row_fetcher
from common.options import Problem, run_script
from common.pictures import UnreadablePicture, load_picture
from common.segmentation_data import check_scenes, load_map
from common.streams import read_streams
from finetune import with_label_index

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
    batches = Batches(rows, ("image", None), processor, 1, 1, [0], "")
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
    with pytest.raises(ValueError, match="class 300, but the highest value is 255"):
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


# ------------------------------------------------------------------------- what is missing or damaged in a data set


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def png(number: int) -> bytes:
    return cell_of(Image.new("RGB", (8, 9), (20 * number, 30, 40)), "PNG")["bytes"]


def arguments(folder: Path, **changes) -> Namespace:
    options = {"image_column": "image", "label_column": "label", "validation_split": "validation"}
    options |= {"validation_fraction": 0.25, "seed": 0, "strict": False, "classes": None, "train_images": 10}
    return Namespace(data=str(folder), **options | changes)


def write_parquet(folder: Path, split: str = "train", images: dict | None = None, labels: dict | None = None) -> None:
    """Ten images of two classes but for some changes, by the number of the row; no rows where `images` is `None`."""
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    rows = {"image": [], "label": []}
    if images is not None:
        rows = {
            "image": [images.get(row, {"path": None, "bytes": png(row)}) for row in range(10)],
            "label": [(labels or {}).get(row, row % 2) for row in range(10)],
        }
    folder.mkdir(exist_ok=True)
    datasets.Dataset.from_dict(rows, features).to_parquet(folder / f"{split}-0.parquet")


def write_tar(file: Path, changes: dict[str, bytes | None]) -> None:
    """Eight samples, each a picture and its class number, but for members that are left out or of other content."""
    file.parent.mkdir(exist_ok=True)
    with tarfile.open(file, "w") as archive:
        for number in range(8):
            for name, content in ((f"{number}.png", png(number)), (f"{number}.cls", str(number % 2).encode())):
                content = changes.get(name, content)
                if content is not None:
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))


def tar_arguments(folder: Path) -> Namespace:
    names = folder / "names.txt"
    names.write_text("a\nb")
    return arguments(folder, classes=str(names), image_column="png", label_column="cls", train_images=8)


def fine(image: Image.Image, draw: object) -> dict:
    return {"size": image.size}


def skipped(samples: list[dict]) -> set[str]:
    """What is said of the samples that do not count."""
    assert all((sample["labels"] == IGNORED) == bool(sample["broken"]) for sample in samples)
    return {sample["broken"] for sample in samples if sample["broken"]}


def test_rows_without_image_or_label_are_skipped_and_told(tmp_path):
    """By the numbers that they have in the file, in every epoch the same."""
    images = {2: None, 5: {"path": None, "bytes": b"no picture"}}
    write_parquet(tmp_path / "data", images=images, labels={0: None, 7: -1})
    said = []
    train, validation, names = read_data(arguments(tmp_path / "data"), said.append)
    report_unreadable(arguments(tmp_path / "data", strict=True), (train, validation), said.append)
    assert names == ["a", "b"]
    assert said[0] == "Skipping rows of the train split that have no label (2): 0, 7"
    told = []
    for _ in range(2):
        samples = []
        for data in (train, validation):
            classes = [names.index(label) for label in data["labels"]]
            loaded = Images(row_fetcher(data["rows"], classes, "image"), fine)
            samples += [loaded[Item(row)] for row in range(len(classes))]
        assert len(samples) == 8
        told.append(skipped(samples))
    assert told == 2 * [
        {
            "row 2 (ValueError: there is no picture)",
            "row 5 (UnidentifiedImageError: cannot identify image file)",
        }
    ]
    with pytest.raises(Problem, match=r"Row 0 of the train split has no label\. Add or remove it"):
        read_data(arguments(tmp_path / "data", strict=True), said.append)


@pytest.mark.parametrize("kind", ["parquet", "tar"])
def test_a_stream_skips_what_has_no_image_or_label(tmp_path, kind):
    for split in ("train", "validation"):
        if kind == "parquet":
            images = {2: None, 5: {"path": None, "bytes": b"none"}}
            write_parquet(tmp_path / "data", split, images, {0: None, 7: -1})
        else:
            write_tar(tmp_path / "data" / f"{split}-0.tar", {"6.png": None, "5.png": b"none", "7.cls": None})
    wanted = {
        "6 (ValueError: there is no picture)",
        "5.png (UnidentifiedImageError: cannot identify image file)",
        "7.png (there is no label)",
    }
    if kind == "parquet":
        wanted = {
            "image with the CRC-32 00000000 (ValueError: there is no picture)",
            f"image with the CRC-32 {zlib.crc32(b'none'):08x} (UnidentifiedImageError: cannot identify image file)",
            *(f"image with the CRC-32 {zlib.crc32(png(row)):08x} (there is no label)" for row in (0, 7)),
        }
    args = arguments(tmp_path / "data") if kind == "parquet" else tar_arguments(tmp_path / "data")
    train, validation, images, names = read_streams(args)
    loaded = Images(functools.partial(with_label_index, {name: index for index, name in enumerate(names)}), fine)
    for rows in (validation.once(), islice(train.epoch(0), images)):
        samples = [loaded[Item(row)] for row in rows]
        assert len(samples) == images
        assert skipped(samples) == wanted


def empty_parquet(folder: Path) -> Namespace:
    write_parquet(folder)
    write_parquet(folder, "validation", {})
    return arguments(folder)


def empty_tar(folder: Path) -> Namespace:
    write_tar(folder / "train-0.tar", {f"{number}.{kind}": None for number in range(8) for kind in ("png", "cls")})
    write_tar(folder / "validation-0.tar", {})
    return tar_arguments(folder)


def cut_tar(folder: Path) -> Namespace:
    for split in ("train", "validation"):
        write_tar(folder / f"{split}-0.tar", {})
    whole = (folder / "train-0.tar").read_bytes()
    (folder / "train-0.tar").write_bytes(whole[: 13 * 512 + 100])
    return tar_arguments(folder)


def label_of_text(folder: Path) -> Namespace:
    for split in ("train", "validation"):
        write_tar(folder / f"{split}-0.tar", {"6.cls": b"cat"})
    return tar_arguments(folder)


def folder_of_pictures(folder: Path) -> Path:
    for name in ("a", "b"):
        (folder / "train" / name).mkdir(parents=True)
        for number in range(4):
            (folder / "train" / name / f"{number}.png").write_bytes(png(number))
    return folder / "train"


def name_that_is_not_utf8(folder: Path) -> Namespace:
    file = folder_of_pictures(folder) / "a" / "0.png"
    os.rename(os.fsencode(file), os.fsencode(file.parent) + b"/caf\xe9.png")
    return arguments(folder)


def class_like_a_variable(folder: Path) -> Namespace:
    file = folder_of_pictures(folder) / "a"
    file.rename(file.with_name("$HOME"))
    return arguments(folder)


def class_like_an_address(folder: Path) -> Namespace:
    file = folder_of_pictures(folder) / "a"
    file.rename(file.with_name("zip::a"))
    return arguments(folder)


def stray_metadata(folder: Path) -> Namespace:
    (folder_of_pictures(folder) / "metadata.csv").write_text("name,age\nRex,3\n")
    return arguments(folder)


def corrupt_zip(folder: Path) -> Namespace:
    (folder_of_pictures(folder) / "more.zip").write_bytes(b"PK\x03\x04 and no more")
    return arguments(folder)


DAMAGED = {  # what is said of files, and of the same as a stream where that differs
    empty_parquet: ("corresponds to no data", "has no images in its train split."),
    empty_tar: (
        "train-0.tar is damaged (ValueError: it has no members). Replace or remove it.",
        "has no images in its train split.",
    ),
    cut_tar: ("train-0.tar is damaged (ReadError: unexpected end of data). Replace or remove it.",),
    label_of_text: (
        "train-0.tar is damaged (ValueError: 6.cls must hold the number of a class; names belong into .txt)",
    ),
    name_that_is_not_utf8: (r"has a file whose name is not UTF-8: ",),
    class_like_a_variable: ("has a file whose name contains an environment variable: ",),
    class_like_an_address: ("has a file whose name contains ::, ",),
    stray_metadata: ("metadata.csv must list pictures, with a column file_name: correct it, or move it elsewhere.",),
    corrupt_zip: ("more.zip is damaged (BadZipFile: File is not a zip file). Replace or remove it.",),
}


@pytest.mark.parametrize("damage", DAMAGED)
@pytest.mark.parametrize("streaming", [False, True])
def test_damaged_data_is_one_clear_line(tmp_path, damage, streaming):
    args = damage(tmp_path / "data")

    def read() -> None:
        if streaming:
            train, _, images, _ = read_streams(args)
            list(islice(train.epoch(0), 3 * images))
        else:
            read_data(args, print)

    with pytest.raises(Problem) as error:
        read()
    assert DAMAGED[damage][-1 if streaming else 0] in str(error.value)
    assert str(error.value).isprintable()


def test_names_do_not_command_the_terminal(tmp_path, capsys):
    """A name in a file may hold control characters."""
    (folder_of_pictures(tmp_path / "data") / "a" / "\x1b[2J.png").write_bytes(b"none")
    train = datasets.load_dataset("imagefolder", data_dir=str(tmp_path / "data"))["train"]
    said = []
    report_unreadable(arguments(tmp_path / "data"), [{"rows": train}], said.append)
    assert said[0].endswith("/data/train/a/\\x1b[2J.png")

    def act() -> None:
        raise Problem("No such folder: \x1b[2J")

    with pytest.raises(SystemExit):
        run_script(Accelerator(cpu=True), act)
    assert capsys.readouterr().err.endswith("error: No such folder: \\x1b[2J\n")


def evaluated(args: Namespace, workers: int, needs_label: bool = True) -> tuple[list, list[str], list[str]]:
    """The labels and names of what evaluate.py is given of a stream, and what is left out."""
    data = load_split(args.data, "validation", streaming=True)
    check_columns(args, data.features, others=("label",))
    processor = BitImageProcessorPil(size={"height": 4, "width": 4})
    batches = Batches(data, (args.image_column, args.label_column), processor, 3, 1, [0], args.data, needs_label)
    options = Namespace(workers=workers, strict=args.strict)
    unreadable = []
    loaded = [*load_batches(options, Namespace(device=torch.device("cpu")), batches, unreadable)]
    return *([value for batch in loaded for value in batch[key]] for key in ("labels", "names")), unreadable


def test_evaluation_leaves_out_what_has_no_image_or_label(tmp_path):
    write_parquet(tmp_path / "data", "validation", {2: None, 5: {"path": None, "bytes": b"none"}}, {0: None})
    labels, names, unreadable = evaluated(arguments(tmp_path / "data"), workers=0)
    assert labels == [1, 1, 0, 0, 1, 0, 1]
    assert names == ["0:1", "0:3", "0:4", "0:6", "0:7", "0:8", "0:9"]
    assert unreadable == [
        "0:0 (there is no label)",
        "0:2 (ValueError: there is no picture)",
        "0:5 (UnidentifiedImageError: cannot identify image file)",
    ]
    labels, _, unreadable = evaluated(arguments(tmp_path / "data"), workers=0, needs_label=False)
    assert (labels[0], len(labels), len(unreadable)) == (None, 8, 2)
    with pytest.raises(Problem, match=r"Not a readable image: 0:0 \(there is no label\)\. Repair or remove it"):
        evaluated(arguments(tmp_path / "data", strict=True), workers=0)


@pytest.mark.parametrize("workers", [0, 1])
def test_what_a_worker_finds_damaged_is_one_clear_line(tmp_path, workers):
    args = cut_tar(tmp_path / "data")
    (tmp_path / "data" / "train-0.tar").rename(tmp_path / "data" / "validation-0.tar")
    with pytest.raises(Problem) as error:
        evaluated(args, workers)
    assert str(error.value).endswith(
        "validation-0.tar is damaged (ReadError: unexpected end of data). Replace or remove it."
    )


def test_scenes_without_an_image_are_skipped_and_without_a_map_refused():
    picture, classes = cell_of(Image.new("RGB", (8, 9)), "PNG"), cell_of(Image.new("L", (8, 9)), "PNG")
    features = datasets.Features(dict.fromkeys(("image", "map"), datasets.Image(decode=False)))
    args = Namespace(image_column="image", map_column="map", reduce_labels=False, strict=False)
    rows = datasets.Dataset.from_dict({"image": [picture, None], "map": [classes, classes]}, features)
    said = []
    check_scenes(args, rows, ["a", "b"], said.append, show=False)
    assert said == ["Skipping 1 image that cannot be read: row 1 (ValueError: there is no picture)"]
    rows = datasets.Dataset.from_dict({"image": [picture, picture], "map": [classes, None]}, features)
    with pytest.raises(Problem, match=r"The map of row 1 is not a readable map: ValueError: there is no picture\."):
        check_scenes(args, rows, ["a", "b"], said.append, show=False)


LACKING = {
    "objects": (None, r"Row 1 of --data .* has nothing in column objects: expected a list"),
    "box": ({"bbox": [None], "category": [0]}, r"Row 1 of --data .* has the box None: expected four numbers"),
    "category": ({"bbox": [[1, 1, 2, 2]], "category": [None]}, r"Row 1 of --data .* has an object without a category"),
    "class": ({"bbox": [[1, 1, 2, 2]], "category": [-1]}, r"Row 1 of --data .* has an object without a category"),
}


@pytest.mark.parametrize("lacking", LACKING)
def test_objects_that_are_missing_are_one_clear_line(tmp_path, lacking):
    objects, message = LACKING[lacking]
    boxes, category = datasets.List(datasets.List(datasets.Value("float32"))), datasets.ClassLabel(names=["a", "b"])
    features = {"image": datasets.Image(), "objects": {"bbox": boxes, "category": datasets.List(category)}}
    whole = {"bbox": [[1, 1, 2, 2]], "category": [0]}
    rows = {"image": 3 * [{"path": None, "bytes": png(0)}], "objects": [whole, objects, whole]}
    (tmp_path / "data").mkdir()
    datasets.Dataset.from_dict(rows, datasets.Features(features)).to_parquet(tmp_path / "data" / "train-0.parquet")
    with pytest.raises(Problem, match=message):
        read_objects(arguments(tmp_path / "data", train_split="train", objects_column="objects"), print)
