"""Read images with objects, from files in COCO's format or from columns of a data set."""

import argparse
import functools
import json
import math
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
from pycocotools import mask as coco_mask

from .data import check_columns, hold_out_rows, load_splits, select_rows
from .options import Problem, first_line
from .pictures import open_picture, with_path

NOTHING = {"size": [0, 0], "counts": b""}  # the mask of an object in a picture that cannot be read

# The fields of each entry of a list in a COCO file, with their types. Fields that may be None may also be absent.
FIELDS = {
    "images": {"id": int | str, "file_name": str, "width": int | float, "height": int | float},
    "annotations": {
        "image_id": int | str,
        "category_id": int | str,
        "bbox": list,
        "area": int | float | None,
        "iscrowd": int | None,
    },
    "categories": {"id": int | str, "name": int | str},
}


def read_json(file: Path) -> dict:
    try:
        content = json.loads(file.read_bytes())
        lists = {name: list(content[name]) for name in FIELDS}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise Problem(
            f"Cannot read {file} ({first_line(error)}): expected COCO's format, with images, annotations, categories."
        ) from error
    for name, fields in FIELDS.items():
        required = [field for field, kind in fields.items() if not isinstance(None, kind)]
        for place, item in enumerate(lists[name]):
            for field, kind in fields.items():
                if not (isinstance(item, dict) and isinstance(item.get(field), kind)):
                    raise Problem(
                        f"{file} has no {field}, or a wrong one, in entry {place} of {name}: {str(item)[:200]}. Each "
                        f"needs {', '.join(required)}."
                    )
    return lists


def check_unique(values: list, what: str, file: Path) -> None:
    seen = set()
    for value in values:
        if value in seen:
            raise Problem(f"{file} has two {what} {value}: remove one.")
        seen.add(value)


def check_objects(objects: dict, where: str) -> None:
    """Raise an error if a box is not four finite numbers. `objects` has a list `bbox`, and may have others."""
    for box in objects["bbox"]:
        if (
            box is None
            or len(box) != 4
            or not all(isinstance(value, int | float) and math.isfinite(value) for value in box)
        ):
            raise Problem(f"{where} has the box {box}: expected four numbers, [left, top, width, height].")


def read_coco(folder: Path, column: str, masks: bool, split: str) -> tuple[datasets.Dataset, list[dict], list[str]]:
    """Read the images, their objects and the names of the classes from FOLDER/annotations/instances_SPLIT.json.

    The images are in column `column` of the returned data set. With `masks`, objects have masks, as run lengths.
    """
    file = folder / "annotations" / f"instances_{split}.json"
    content = read_json(file)
    categories = {category["id"]: str(category["name"]) for category in content["categories"]}
    check_unique([category["id"] for category in content["categories"]], "categories with the id", file)
    check_unique([*categories.values()], "categories called", file)
    check_unique([image["id"] for image in content["images"]], "images with the id", file)
    check_unique([image["file_name"] for image in content["images"]], "images with the file", file)

    found = {}
    for image in content["images"]:
        path = folder / split / image["file_name"]
        if not path.is_file():
            raise Problem(f"{file} lists {image['file_name']}, and there is no {path}: add it, or remove its entry.")
        found[image["id"]] = {
            "id": image["id"],
            "path": str(path),
            "size": (image["width"], image["height"]),
            **{"bbox": [], "name": [], "area": [], "iscrowd": []},
            **({"masks": []} if masks else {}),
        }
    for annotation in content["annotations"]:
        where = f"Annotation {annotation.get('id')} of {file}"
        if annotation["image_id"] not in found:
            raise Problem(f"{where} has image_id {annotation['image_id']}, which is not in images.")
        if annotation["category_id"] not in categories:
            raise Problem(f"{where} has category_id {annotation['category_id']}, which is not in categories.")
        image = found[annotation["image_id"]]
        check_objects({"bbox": [annotation["bbox"]]}, where)
        image["bbox"].append(annotation["bbox"])
        image["name"].append(categories[annotation["category_id"]])
        image["area"].append(annotation.get("area"))
        image["iscrowd"].append(annotation.get("iscrowd") or 0)
        if masks:
            image["masks"].append(run_lengths(annotation.get("segmentation"), image["size"], where))
    if not found:
        raise Problem(f"{file} lists no images.")
    images = [*found.values()]
    for image in images:
        known = zip(image["area"], object_areas(image), strict=True)
        image["area"] = [extent if area is None else area for area, extent in known]
    rows = datasets.Dataset.from_dict({column: [image.pop("path") for image in images]})
    names = [categories[number] for number in sorted(categories)]
    return rows.cast_column(column, datasets.Image()), images, names


def object_areas(image: dict) -> list[float]:
    """The areas of an image's masks, or of its boxes if there are no masks."""
    return areas(image["masks"]) if "masks" in image else [box[2] * box[3] for box in image["bbox"]]


def field_names(feature: object) -> dict:
    """The fields of an object, and their types, in a column of lists of records or records of lists."""
    while not isinstance(feature, dict):
        feature = getattr(feature, "feature", None)
        if feature is None:
            return {}
    return {name: getattr(value, "feature", value) if name == "category" else value for name, value in feature.items()}


def picture_size(cell: dict) -> tuple[int, int]:
    """Width and height, read from the header of a picture. Both are 0 if it cannot be read."""
    try:
        with open_picture(with_path(cell, "")) as image:
            return image.size
    except Exception:  # damaged bytes may raise any error
        return 0, 0


def read_rows(
    args: argparse.Namespace, masks: bool, split: datasets.Dataset
) -> tuple[datasets.Dataset, list[dict], list[str]]:
    """The same as [`read_coco`], from a split of a data set that has a column of objects."""
    check_columns(args, split.features, others=("objects",))
    fields = field_names(split.features[args.objects_column])
    if not {"bbox", "category"} <= fields.keys():
        raise Problem(
            f"Column {args.objects_column} of --data {args.data} has no bbox and category: see --objects-column."
        )
    if masks and "segmentation" not in fields:
        raise Problem(
            f"Column {args.objects_column} of --data {args.data} has no segmentation, which masks are "
            "trained on: add it, or train a detector of boxes (--head rt_detr)."
        )
    cells = split.cast_column(args.image_column, datasets.Image(decode=False))[args.image_column]
    images = []
    for row, (cell, objects) in enumerate(zip(cells, split[args.objects_column], strict=True)):
        if isinstance(objects, list):
            objects = {name: [one[name] for one in objects] for name in fields}
        where = f"Row {row} of --data {args.data}"
        if not objects or None in (objects["bbox"], objects["category"]):
            raise Problem(
                f"{where} has nothing in column {args.objects_column}: expected a list of objects, which may be empty."
            )
        check_objects(objects, where)
        category = fields["category"]
        # `datasets` has -1 for a missing class.
        if None in objects["category"] or (isinstance(category, datasets.ClassLabel) and -1 in objects["category"]):
            raise Problem(f"{where} has an object without a category: add it, or remove the object.")
        image = {
            "id": row,
            "size": picture_size(cell),
            "bbox": objects["bbox"],
            "name": [
                category.names[value] if isinstance(category, datasets.ClassLabel) else str(value)
                for value in objects["category"]
            ],
            "iscrowd": [int(value) for value in objects.get("iscrowd") or [0] * len(objects["bbox"])],
        }
        if masks:
            image["masks"] = [
                run_lengths(segmentation, image["size"], where) if any(image["size"]) else NOTHING
                for segmentation in objects["segmentation"]
            ]
        images.append(image | {"area": objects.get("area") or object_areas(image)})
    seen = {name for image in images for name in image["name"]}
    names = category.names if isinstance(category, datasets.ClassLabel) else sorted(seen)
    return split, images, names


def read_objects(
    args: argparse.Namespace, log: Callable[[str], None], masks: bool = False
) -> tuple[dict, dict, list[str]]:
    """The training data, the validation data, and the names of the classes in order.

    Both are a dict with the images as "rows" and their objects as "labels". With `masks`, every object has a mask.
    """
    folder = Path(args.data).expanduser()
    if (folder / "annotations").is_dir():
        splits = [file.stem.removeprefix("instances_") for file in sorted(folder.glob("annotations/instances_*.json"))]
        read = functools.partial(read_coco, folder, args.image_column, masks)
    elif folder.is_dir() and not any(folder.rglob("*.parquet")):
        raise Problem(
            f"--data {args.data} has no annotations: expected images in {args.data}/{args.train_split} with "
            f"{args.data}/annotations/instances_{args.train_split}.json, or Parquet files."
        )
    else:
        splits = load_splits(args.data)

        def read(split: str) -> tuple:
            return read_rows(args, masks, splits[split])

    if args.train_split not in splits:
        raise Problem(
            f"--data {args.data} has no split called {args.train_split}, only {', '.join(splits)}: see --train-split."
        )
    rows, images, names = read(args.train_split)
    if args.validation_split in splits:
        held_out_rows, held_out, held_out_names = read(args.validation_split)
        unknown = [name for name in held_out_names if name not in names]
        if unknown:
            raise Problem(
                f"The {args.validation_split} split has classes that are missing in the {args.train_split} split: "
                f"{', '.join(unknown[:5])}. Use the same names in both splits, or remove these classes."
            )
    else:
        others = [split for split in splits if split != args.train_split]
        train, valid = hold_out_rows(args, [""] * len(images), others, log)
        held_out_rows, held_out = select_rows(rows, valid), [images[row] for row in valid]
        rows, images = select_rows(rows, train), [images[row] for row in train]
    report_objects(images, log)
    if not any(image["name"] for image in images):
        raise Problem(f"--data {args.data} has no objects to train on.")
    return {"rows": rows, "labels": images}, {"rows": held_out_rows, "labels": held_out}, names


def clipped_boxes(image: dict) -> tuple[np.ndarray, np.ndarray]:
    """Boxes [left, top, right, bottom] clipped to the image, and which of them have an area and are no crowds."""
    boxes = np.asarray(image["bbox"], np.float32).reshape(-1, 4)
    corners = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1)
    clipped = corners.clip(0, np.tile(np.asarray(image["size"], np.float32), 2))
    kept = (clipped[:, 2:] > clipped[:, :2]).all(1) & ~np.asarray(image["iscrowd"], bool)
    return clipped, kept & (np.asarray(areas(image["masks"])) > 0) if "masks" in image else kept


def report_objects(images: list[dict], log: Callable[[str], None]) -> None:
    """Print how many annotations are changed or left out in training."""
    clipped = empty = 0
    crowds = sum(sum(image["iscrowd"]) for image in images)
    without = sum(not image["name"] for image in images)
    for image in images:
        corners, kept = clipped_boxes(image)
        boxes = np.asarray(image["bbox"], np.float32).reshape(-1, 4)
        sizes = corners[:, 2:] - corners[:, :2]
        clipped += int((kept & (boxes[:, 2:] - sizes > 0.5).any(1)).sum())  # smaller differences are rounding
        empty += int((~kept & ~np.asarray(image["iscrowd"], bool)).sum())
    for count, what in (
        (clipped, "box(es) extend beyond the image: clipped"),
        (empty, "box(es) or mask(s) have no area within the image: left out"),
        (crowds, "box(es) mark crowds: left out"),
        (without, "image(s) have no objects: used as background"),
    ):
        if count:
            log(f"Training data: {count} {what}.")


def run_lengths(segmentation: object, size: tuple[int, int], where: str) -> dict:
    """COCO's polygons or run lengths, compressed or not, as compressed run lengths.

    Invalid input raises an error here, since pycocotools may take a polygon for a box, or read beyond the end of run
    lengths that are too short.

    Args:
        size: width and height of the image.
        where: the name of the annotation in error messages.
    """
    width, height = size
    try:
        if isinstance(segmentation, dict):
            if list(segmentation["size"]) != [height, width]:
                raise ValueError(f"it is for {segmentation['size']}, [height, width]")
            counts = segmentation["counts"]
            counts = list(counts) if isinstance(counts, list | tuple) else decompressed(counts)
            if min(counts, default=0) < 0 or sum(counts) != height * width:
                raise ValueError("its run lengths do not add up to the image's pixels")
            return coco_mask.frPyObjects({"size": [height, width], "counts": counts}, height, width)
        polygons = [[float(value) for value in polygon] for polygon in segmentation]
        if not polygons:
            raise ValueError("it has no polygon")
        for polygon in polygons:
            if len(polygon) < 6 or len(polygon) % 2:
                raise ValueError(f"it has a polygon of {len(polygon)} numbers")
            for values, side in ((polygon[::2], width), (polygon[1::2], height)):
                if not all(-side <= value <= 2 * side for value in values):
                    raise ValueError("it has a polygon with a point that is not a number, or is far outside the image")
        return coco_mask.merge(coco_mask.frPyObjects(polygons, height, width))
    except (ValueError, TypeError, KeyError, OverflowError) as error:
        what = "it has none" if segmentation is None else str(error)
        raise Problem(
            f"{where} has no usable segmentation ({what}): expected polygons, [[x, y, x, y, x, y, ...], ...], or run "
            f"lengths, {{'size': [{height}, {width}], 'counts': ...}}. Add it, remove the annotation, or train a "
            "detector of boxes (--head rt_detr)."
        ) from error


def decompressed(counts: str | bytes) -> list[int]:
    """Decode COCO's compressed run lengths: six bits a character, as differences from the number two before."""
    numbers, value, shift = [], 0, 0
    for character in counts.encode() if isinstance(counts, str) else counts:
        bits = character - 48
        if not 0 <= bits < 64:
            raise ValueError("it has characters that do not occur in compressed run lengths")
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            value -= (bits & 16) << (shift - 4)  # the sign
            numbers.append(value + (numbers[-2] if len(numbers) > 2 else 0))
            value = shift = 0
    return numbers


def areas(codes: list[dict]) -> list[int]:
    return [int(area) for area in coco_mask.area(codes)]


def decode(codes: list[dict], size: tuple[int, int]) -> np.ndarray:
    """Decode run lengths to masks (objects, height, width). `size` is the width and height of the image."""
    if not codes:
        return np.zeros((0, *size[::-1]), bool)
    return coco_mask.decode(codes).transpose(2, 0, 1).astype(bool)
