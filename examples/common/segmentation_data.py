"""Read and check images with maps of classes, and crop and resize both alike."""

import argparse
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm.auto import tqdm
from transformers import BaseImageProcessor

from .data import ROW, check_columns, hold_out_rows, load_splits, read_names, select_rows, skip_unreadable
from .loading import Images, Item
from .options import Problem, first_line
from .pictures import open_picture, with_path

NO_CLASS = 255  # the value of ignored pixels in maps
LARGEST_SHARE = 0.75  # largest share of the pixels of a crop that one class may have
TRIES = 10  # largest number of crops that are drawn to find one below LARGEST_SHARE
LONGEST = 4  # largest ratio of the longer side to the standard shorter side: 2048 to 512 in the paper


def read_folder(args: argparse.Namespace, folder: Path) -> dict[str, datasets.Dataset]:
    """The splits of FOLDER/annotations, each with the images of FOLDER/SPLIT or FOLDER/images/SPLIT."""
    features = datasets.Features({args.image_column: datasets.Image(), args.map_column: datasets.Image()})
    splits = {}
    for maps in sorted(place for place in (folder / "annotations").iterdir() if place.is_dir()):
        places = folder / maps.name, folder / "images" / maps.name
        images = next((place for place in places if place.is_dir()), None)
        if images is None:
            raise Problem(f"The maps in {maps} have no images: expected a folder {places[0]} or {places[1]}.")
        files = [file for file in sorted(images.iterdir()) if file.suffix.lower() in Image.registered_extensions()]
        map_of = {file.stem: file for file in maps.glob("*.png")}
        lacking = [file for file in files if file.stem not in map_of]
        if lacking:
            raise Problem(
                f"{len(lacking)} images in {images} have no map: {lacking[0].name} needs "
                f"{maps / lacking[0].stem}.png. Add it, or remove the image."
            )
        pairs = {
            args.image_column: [str(file) for file in files],
            args.map_column: [str(map_of[file.stem]) for file in files],
        }
        splits["train" if maps.name == "training" else maps.name] = datasets.Dataset.from_dict(pairs, features)
    return splits


def read_pairs(args: argparse.Namespace) -> tuple[dict[str, datasets.Dataset], list[str]]:
    """The splits of --data, with undecoded images and maps, and the names of the classes in order."""
    folder = Path(args.data).expanduser()
    names = Path(args.classes) if args.classes else folder / "annotations" / "classes.txt"
    if (folder / "annotations").is_dir():
        splits = read_folder(args, folder)
    elif folder.is_dir() and not any(folder.rglob("*.parquet")):
        raise Problem(
            f"--data {args.data} has no maps: expected FOLDER/train/*.jpg or *.png with a map for each in "
            "FOLDER/annotations/train/*.png, and the same of FOLDER/validation."
        )
    else:
        splits = load_splits(args.data)
        if not args.classes:
            raise Problem(f"--data {args.data} does not name its classes: add --classes FILE, with one name a line.")
    names = read_names(names)
    for split, rows in splits.items():
        check_columns(args, rows.features, images=("image", "map"))
        splits[split] = rows.select_columns([args.image_column, args.map_column])
        for column in (args.image_column, args.map_column):
            splits[split] = splits[split].cast_column(column, datasets.Image(decode=False))
    if not 2 <= len(names) < NO_CLASS:
        raise Problem(f"The file of classes has {len(names)} names: expected 2 to {NO_CLASS - 1}.")
    return splits, names


def choose_splits(
    args: argparse.Namespace, splits: dict[str, datasets.Dataset], log: Callable[[str], None]
) -> tuple[datasets.Dataset, datasets.Dataset]:
    """The rows to train on and to validate on."""
    if "train" not in splits:
        raise Problem(f"--data {args.data} has no split called train or training, only {', '.join(splits)}.")
    train = splits["train"]
    if args.validation_split in splits:
        return train, splits[args.validation_split]
    others = [split for split in splits if split != "train"]
    rows, held_out = hold_out_rows(args, [""] * len(train), others, log)
    return select_rows(train, rows), select_rows(train, held_out)


def load_map(cell: dict, reduce_labels: bool) -> np.ndarray:
    """The classes (height, width) of an undecoded map.

    With `reduce_labels`, 0 becomes `NO_CLASS` and other classes count from 0, as in transformers' image processors.
    """
    with open_picture(with_path(cell, "")) as picture:
        classes = np.asarray(ImageOps.exif_transpose(picture))
    if classes.ndim != 2:
        raise ValueError(f"expected one number for each pixel, not {classes.shape[-1]}")
    if classes.max() > NO_CLASS:
        raise ValueError(f"it has class {classes.max()}, but the highest value is {NO_CLASS}, for ignored pixels")
    classes = classes.astype("uint8")
    return np.where(classes == NO_CLASS, classes, classes - 1) if reduce_labels else classes


def check_scenes(args: argparse.Namespace, rows: datasets.Dataset, names: list[str], log: Callable, show: bool) -> None:
    """Raise an error before training if a map is unreadable, or has another size or an unknown class."""
    scenes = Scenes(rows, args, lambda image, classes, rng: {"image": image, "map": classes})
    unreadable = []

    def find_problem(row: int) -> str | None:
        name = with_path(rows[row][args.map_column], f"The map of row {row}")["path"]
        try:
            scene = scenes[Item(row)]
        except Exception as error:  # damaged bytes may raise any error
            return f"{name} is not a readable map: {first_line(error)}."
        if scene["broken"]:
            unreadable.append(scene["broken"])
            return None
        image, classes = scene["image"], scene["map"]
        if image.size != classes.shape[::-1]:
            sizes = f"{classes.shape[1]} x {classes.shape[0]} pixels, and its image {image.width} x {image.height}"
            return f"{name} has {sizes}: a map must be as large as its image."
        highest = classes[classes != NO_CLASS].max(initial=0)
        if highest >= len(names):
            reduced = " (after --reduce-labels)" if args.reduce_labels else ""
            return (
                f"{name} has class {highest}{reduced}, and the {len(names)} named classes are 0 to {len(names) - 1}: "
                "add a name for it, or correct the map."
            )
        return None

    with ThreadPoolExecutor() as pool:
        found = pool.map(find_problem, range(len(rows)))
        for problem in tqdm(found, desc="checking maps", total=len(rows), unit="map", leave=False, disable=not show):
            if problem:
                pool.shutdown(cancel_futures=True)
                raise Problem(problem)
    skip_unreadable(args, sorted(unreadable), log)


class Scenes(Images):
    """Images with their maps. The map of an image that is unreadable or does not count has only ignored pixels.

    Args:
        rows: undecoded images and maps.
        view (`Callable`):
            Given an image, its classes (height, width) and a `random.Random`, returns a dict of tensors.
    """

    def __init__(self, rows: datasets.Dataset, args: argparse.Namespace, view: Callable):
        self.rows, self.view = rows, view
        self.columns, self.reduce_labels = (args.image_column, args.map_column), args.reduce_labels

    def __getitem__(self, item: Item) -> dict:
        row = self.rows[item.key]
        image, classes = (row[column] for column in self.columns)
        image, broken = self.decode(with_path(image, f"row {row.get(ROW, item.key)}"))
        if broken or not item.counts:
            classes = np.full((image.height, image.width), NO_CLASS, "uint8")
        else:
            classes = load_map(classes, self.reduce_labels)
        return self.view(image, classes, random.Random(item.seed)) | {"broken": broken}


def training_view(
    args: argparse.Namespace,
    processor: BaseImageProcessor,
    image: Image.Image,
    classes: np.ndarray,
    rng: random.Random,
) -> dict[str, torch.Tensor]:
    """A random crop of the resized image, and the same crop of its map. Pixels are integers and not normalized yet.

    A crop is drawn again if one class covers nearly all of it. Pixels outside the image have the mean colour.
    """
    side = args.crop_size
    shorter = side * rng.uniform(*args.resize)
    scale = min(shorter / min(image.size), LONGEST * shorter / max(image.size))
    width, height = (max(1, round(length * scale)) for length in image.size)
    resized = np.asarray(Image.fromarray(classes).resize((width, height), Image.Resampling.NEAREST))
    for _ in range(TRIES):
        left, top = (rng.randint(0, max(0, length - side)) for length in (width, height))
        part = resized[top : top + side, left : left + side]
        counts = np.bincount(part[part != NO_CLASS], minlength=1)
        if counts.max() < LARGEST_SHARE * counts.sum():
            break
    right, bottom = left + part.shape[1], top + part.shape[0]
    across, down = image.width / width, image.height / height
    box = (left * across, top * down, min(right * across, image.width), min(bottom * down, image.height))
    pixels = np.empty((side, side, 3), "uint8")
    pixels[:] = np.round(255 * np.array(processor.image_mean))
    pixels[: part.shape[0], : part.shape[1]] = image.resize(part.shape[::-1], processor.resample, box=box)
    labels = np.full((side, side), NO_CLASS, "uint8")
    labels[: part.shape[0], : part.shape[1]] = part
    if args.flip and rng.random() < 0.5:
        pixels, labels = pixels[:, ::-1].copy(), labels[:, ::-1].copy()
    return {"pixel_values": torch.from_numpy(pixels).permute(2, 0, 1), "labels": torch.from_numpy(labels)}


def whole_view(
    scales: list[float],
    processor: BaseImageProcessor,
    image: Image.Image,
    classes: np.ndarray,
    rng: random.Random | None = None,
) -> dict[str, torch.Tensor]:
    """The image as the image processor prepares it, at each of the scales, and the map unchanged."""
    views = {
        f"view{number}": processor(
            image, size={name: round(side * scale) for name, side in dict(processor.size).items()}, return_tensors="pt"
        )["pixel_values"][0]
        for number, scale in enumerate(scales)
    }
    return views | {"labels": torch.from_numpy(classes)}
