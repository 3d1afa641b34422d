"""Images with objects: reading them, views that keep objects and pixels together, detectors, average precision."""

import argparse
import contextlib
import functools
import inspect
import io
import itertools
import json
import math
import random
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image, ImageOps
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from transformers import (
    MODEL_FOR_OBJECT_DETECTION_MAPPING,
    AutoBackbone,
    AutoConfig,
    AutoModelForObjectDetection,
    AutoModelForUniversalSegmentation,
    BaseImageProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    RTDetrImageProcessorPil,
)
from transformers.backbone_utils import BackboneMixin
from transformers.loss import loss_for_object_detection
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING
from transformers.models.mask2former import modeling_mask2former
from transformers.models.maskformer import modeling_maskformer
from transformers.utils import logging

from .data import hold_out, load_splits
from .loading import Images, Item, Loader
from .masks import MASK_MODELS, NOTHING, areas, decode, draw_masks, found_masks, mask_loss, resize, run_lengths
from .models import check_config, decay_groups, load_model, resize_views, stored_processor
from .options import Problem, first_line
from .reports import public, results_metadata, save_card

LEFT = 0.25  # an object of which a crop leaves less than this share is none any more
SHOWN, SURE = 6, 0.5  # images that are drawn, and the score above which predictions are
METRICS = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
OF_BOXES = {f"box_{name}": name for name in ("ap", "ap50")}  # beside those of masks

# ---------------------------------------------------------------------------------------------------------------- data


# What each list of a file of COCO's must tell about each thing that it lists, and in which types.
FIELDS = {
    "images": {"id": int | str, "file_name": str, "width": int | float, "height": int | float},
    "annotations": {"image_id": int | str, "category_id": int | str, "bbox": list},
    "categories": {"id": int | str, "name": int | str},
}


def read_json(file: Path) -> dict:
    try:
        content = json.loads(file.read_bytes())
        lists = {name: list(content[name]) for name in FIELDS}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Problem(
            f"Cannot read {file} ({first_line(error)}): expected COCO's format, with images, annotations, categories."
        ) from error
    for name, fields in FIELDS.items():
        for place, item in enumerate(lists[name]):
            for field, kind in fields.items():
                if not (isinstance(item, dict) and isinstance(item.get(field), kind)):
                    raise Problem(
                        f"{file} has no {field}, or a wrong one, in entry {place} of {name}: {str(item)[:200]}. Each "
                        f"needs {', '.join(fields)}."
                    )
    return lists


def unique(values: list, what: str, file: Path) -> None:
    seen = set()
    for value in values:
        if value in seen:
            raise Problem(f"{file} has two {what} {value}: remove one.")
        seen.add(value)


def check_objects(objects: dict, where: str) -> None:
    """Refuse boxes that are none. `objects` has the lists `bbox` and `name`, and may have others."""
    for box in objects["bbox"]:
        if len(box) != 4 or not all(isinstance(value, int | float) and math.isfinite(value) for value in box):
            raise Problem(f"{where} has the box {box}: expected four numbers, [left, top, width, height].")


def read_coco(folder: Path, column: str, masks: bool, split: str) -> tuple[datasets.Dataset, list[dict], list[str]]:
    """Of FOLDER/annotations/instances_SPLIT.json the images, what is in each, and the classes' names in order.

    `column` is the name that the images' column gets. With `masks`, the objects' masks are part of it, as run lengths.
    """
    file = folder / "annotations" / f"instances_{split}.json"
    content = read_json(file)
    categories = {category["id"]: str(category["name"]) for category in content["categories"]}
    unique([category["id"] for category in content["categories"]], "categories with the id", file)
    unique([*categories.values()], "categories called", file)
    unique([image["id"] for image in content["images"]], "images with the id", file)
    unique([image["file_name"] for image in content["images"]], "images with the file", file)

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
            raise Problem(f"{where} is of image {annotation['image_id']}, which is not listed.")
        if annotation["category_id"] not in categories:
            raise Problem(f"{where} has category {annotation['category_id']}, which is not listed.")
        image = found[annotation["image_id"]]
        check_objects({"bbox": [annotation["bbox"]]}, where)
        image["bbox"].append(annotation["bbox"])
        image["name"].append(categories[annotation["category_id"]])
        image["area"].append(annotation.get("area"))
        image["iscrowd"].append(annotation.get("iscrowd", 0))
        if masks:
            image["masks"].append(run_lengths(annotation.get("segmentation"), image["size"], where))
    if not found:
        raise Problem(f"{file} lists no images.")
    images = [*found.values()]
    for image in images:
        known = zip(image["area"], extents(image), strict=True)
        image["area"] = [extent if area is None else area for area, extent in known]
    rows = datasets.Dataset.from_dict({column: [image.pop("path") for image in images]})
    names = [categories[number] for number in sorted(categories)]
    return rows.cast_column(column, datasets.Image()), images, names


def extents(image: dict) -> list[float]:
    """The areas of an image's objects, those of their boxes if they have no masks."""
    return areas(image["masks"]) if "masks" in image else [box[2] * box[3] for box in image["bbox"]]


def field_names(feature: object) -> dict:
    """What a column of objects has for each of them: a list of records, or a record of lists."""
    while not isinstance(feature, dict):
        feature = getattr(feature, "feature", None)
        if feature is None:
            return {}
    return {name: getattr(value, "feature", value) if name == "category" else value for name, value in feature.items()}


def picture_size(cell: dict) -> tuple[int, int]:
    """Width and height, by a look at no more than the header. Those of a picture that cannot be read are 0."""
    try:
        with Image.open(io.BytesIO(cell["bytes"]) if cell["bytes"] else cell["path"]) as image:
            return image.size
    except (OSError, Image.DecompressionBombError):
        return 0, 0


def read_rows(
    args: argparse.Namespace, masks: bool, split: datasets.Dataset
) -> tuple[datasets.Dataset, list[dict], list[str]]:
    """The same of a split of a data set that has a column of objects."""
    for option, column in (("--image-column", args.image_column), ("--objects-column", args.objects_column)):
        if column not in split.column_names:
            raise Problem(
                f"--data {args.data} has no column {column}; its columns are {', '.join(split.column_names)}. "
                f"Name the right one with {option}."
            )
    fields = field_names(split.features[args.objects_column])
    if not {"bbox", "category"} <= fields.keys():
        raise Problem(
            f"Column {args.objects_column} of --data {args.data} has no bbox and category: see --objects-column."
        )
    if masks and "segmentation" not in fields:
        raise Problem(
            f"Column {args.objects_column} of --data {args.data} has no segmentation, from which to learn masks: add "
            "it, or train a detector of boxes (--head rt_detr)."
        )
    cells = split.cast_column(args.image_column, datasets.Image(decode=False))[args.image_column]
    images = []
    for row, (cell, objects) in enumerate(zip(cells, split[args.objects_column], strict=True)):
        if isinstance(objects, list):
            objects = {name: [one[name] for one in objects] for name in fields}
        where = f"Row {row} of --data {args.data}"
        check_objects(objects, where)
        category = fields["category"]
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
        images.append(image | {"area": objects.get("area") or extents(image)})
    seen = {name for image in images for name in image["name"]}
    names = category.names if isinstance(category, datasets.ClassLabel) else sorted(seen)
    return split, images, names


def read_objects(
    args: argparse.Namespace, say: Callable[[str], None], masks: bool = False
) -> tuple[dict, dict, list[str]]:
    """The rows and, as "labels", the objects to train on, the same to validate on, and the classes' names in order.

    With `masks`, every object has one.
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
        held_rows, held, held_names = read(args.validation_split)
        unknown = [name for name in held_names if name not in names]
        if unknown:
            raise Problem(
                f"The {args.validation_split} split has classes that the {args.train_split} split has not: "
                f"{', '.join(unknown[:5])}. Spell the classes alike in both, or remove them."
            )
    else:
        train, valid = hold_out([""] * len(images), args.validation_fraction, args.seed)
        if not train or not valid:
            raise Problem(f"--data {args.data} has too few images to hold some out: add a validation split.")
        others = [split for split in splits if split != args.train_split]
        say(
            f"No split called {args.validation_split}: holding out {len(valid)} of {len(images)} training images, "
            f"{args.validation_fraction:.0%} of all (seed {args.seed})."
            + (f" Not used: {', '.join(others)} (see --validation-split)." if others else "")
        )
        held_rows, held = rows.select(valid), [images[row] for row in valid]
        rows, images = rows.select(train), [images[row] for row in train]
    report_objects(images, say)
    if not any(image["name"] for image in images):
        raise Problem(f"--data {args.data} has no objects to train on.")
    return {"rows": rows, "labels": images}, {"rows": held_rows, "labels": held}, names


def inside(image: dict) -> tuple[np.ndarray, np.ndarray]:
    """Boxes [left, top, right, bottom] as far as they are in the image, and which of them are to be found in it."""
    boxes = np.asarray(image["bbox"], np.float32).reshape(-1, 4)
    corners = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1)
    clipped = corners.clip(0, np.tile(np.asarray(image["size"], np.float32), 2))
    kept = (clipped[:, 2:] > clipped[:, :2]).all(1) & ~np.asarray(image["iscrowd"], bool)
    return clipped, kept & (np.asarray(areas(image["masks"])) > 0) if "masks" in image else kept


def report_objects(images: list[dict], say: Callable[[str], None]) -> None:
    """Say what of the annotations is not trained on as it is."""
    clipped = empty = 0
    crowds = sum(sum(image["iscrowd"]) for image in images)
    without = sum(not image["name"] for image in images)
    for image in images:
        corners, kept = inside(image)
        boxes = np.asarray(image["bbox"], np.float32).reshape(-1, 4)
        sizes = corners[:, 2:] - corners[:, :2]
        clipped += int((kept & (boxes[:, 2:] - sizes > 0.5).any(1)).sum())  # what is below is rounding
        empty += int((~kept & ~np.asarray(image["iscrowd"], bool)).sum())
    for count, what in (
        (clipped, "boxes stick out of their images: cut off there"),
        (empty, "boxes or masks have no area within their images: left out"),
        (crowds, "boxes are of crowds: not trained on"),
        (without, "images have no objects: they are background"),
    ):
        if count:
            say(f"Training data: {count} {what}.")


# --------------------------------------------------------------------------------------------------------------- views


def picture(cell: dict, size: tuple[int, int]) -> Image.Image:
    """The image as its boxes have it; most annotators ignore that EXIF data may turn it, some do not."""
    image = Image.open(io.BytesIO(cell["bytes"]) if cell["bytes"] else cell["path"])
    if image.size != size:
        image = ImageOps.exif_transpose(image)
    if image.size != size:
        raise ValueError(
            f"it is {image.width} x {image.height} pixels, where the annotations have {size[0]} x {size[1]}"
        )
    return image.convert("RGB")


def random_part(
    image: Image.Image, boxes: np.ndarray, masks: np.ndarray | None, args: argparse.Namespace, draw: random.Random
) -> tuple[Image.Image, np.ndarray, np.ndarray | None, np.ndarray]:
    """Half of the images cropped, half mirrored: the image, boxes, masks, and which of them are still there."""

    def extent() -> np.ndarray:
        return (boxes[:, 2:] - boxes[:, :2]).prod(1) if masks is None else masks.sum((1, 2))

    left_over = np.ones(len(boxes), bool)
    if args.crop_scale < 1 and draw.random() < 0.5:
        area = image.width * image.height * draw.uniform(args.crop_scale, 1)
        ratio = image.width / image.height * math.exp(draw.uniform(math.log(3 / 4), math.log(4 / 3)))
        width = min(image.width, max(1, round(math.sqrt(area * ratio))))
        height = min(image.height, max(1, round(math.sqrt(area / ratio))))
        left, top = draw.randint(0, image.width - width), draw.randint(0, image.height - height)
        image = image.crop((left, top, left + width, top + height))
        before = extent()
        boxes = (boxes - np.float32([left, top, left, top])).clip(0, np.float32([width, height, width, height]))
        masks = None if masks is None else masks[:, top : top + height, left : left + width]
        left_over = extent() >= LEFT * before
    if args.flip and draw.random() < 0.5:
        image = ImageOps.mirror(image)
        boxes = np.stack([image.width - boxes[:, 2], boxes[:, 1], image.width - boxes[:, 0], boxes[:, 3]], 1)
        masks = None if masks is None else masks[..., ::-1]
    return image, boxes, masks, left_over


def sides(processor: BaseImageProcessor) -> dict[str, int]:
    return {name: value for name, value in dict(processor.size).items() if value}


class View:
    """An image as a detector takes it, and its objects. In training a part of it, mirrored or not, in several sizes.

    Args:
        sizes: for the image processor, of which one is drawn.
        args: the options of training; none for evaluation.
    """

    def __init__(
        self,
        processor: BaseImageProcessor,
        label2id: dict[str, int],
        sizes: list[dict[str, int]],
        args: argparse.Namespace | None = None,
    ):
        self.processor, self.label2id, self.sizes, self.args = processor, label2id, sizes, args

    def __call__(self, image: Image.Image, target: dict, draw: random.Random) -> dict:
        boxes, kept = inside(target)
        classes = np.asarray([self.label2id[name] for name in target["name"]], np.int64)
        boxes, classes = boxes[kept], classes[kept]
        masks = decode(target["masks"], target["size"])[kept] if "masks" in target else None
        if self.args:
            image, boxes, masks, kept = random_part(image, boxes, masks, self.args, draw)
            boxes, classes = boxes[kept], classes[kept]
            masks = None if masks is None else masks[kept]
        pixels = self.processor(image, size=draw.choice(self.sizes), do_pad=False, return_tensors="pt")["pixel_values"]
        if masks is not None:
            masks = resize(masks, *pixels.shape[-2:])
            kept = masks.any((1, 2))  # of the smallest no pixel may be left
            labels = {"class_labels": torch.from_numpy(classes[kept]), "masks": torch.from_numpy(masks[kept])}
            return {"pixel_values": pixels[0], "labels": labels}
        boxes = boxes / np.tile(np.float32(image.size), 2)
        boxes = np.concatenate([(boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]], 1)
        labels = {"class_labels": torch.from_numpy(classes), "boxes": torch.from_numpy(boxes.astype(np.float32))}
        return {"pixel_values": pixels[0], "labels": labels}


def training_sizes(processor: BaseImageProcessor, smallest: int, step: int) -> list[dict[str, int]]:
    """Sizes for the image processor, from `smallest` on the shorter side to its own, in multiples of `step`."""
    size = sides(processor)
    side = min(size.values())
    drawn = [*range(math.ceil(smallest / step) * step, side, step), side]
    return [{name: round(value * shorter / side) for name, value in size.items()} for shorter in drawn]


class ObjectImages(Images):
    """Images with their objects; one that cannot be read is a black one without any.

    `fetch` gives an image that is not decoded and its objects; `view` takes the image, the objects and a
    `random.Random`.
    """

    step = 1  # height and width of a batch are multiples of this

    def __getitem__(self, item: Item) -> dict:
        cell, target = self.fetch(item.key)
        draw, broken = random.Random(item.seed), None
        try:
            image = picture(cell, target["size"])
        except Exception as error:  # whatever a decoder says to damaged bytes
            broken = f"{cell['path']} ({first_line(error)})"
            image = Image.new("RGB", (64, 64))
            lists = ("bbox", "name", "iscrowd", "masks")
            target = {"size": image.size} | {name: [] for name in lists if name in target}
        index = item.key if item.counts and not broken else -1
        size = torch.tensor([image.height, image.width])
        return self.view(image, target, draw) | {"size": size, "index": index, "broken": broken}

    def collate(self, samples: list[dict]) -> dict:
        """A batch padded at right and bottom, with masks padded alike, and boxes relative to that.

        `shapes` are heights and widths of the images in it, `sizes` those of the images in their files.
        """
        shapes = torch.tensor([sample["pixel_values"].shape[-2:] for sample in samples])
        height, width = (math.ceil(side / self.step) * self.step for side in shapes.amax(0).tolist())
        pixels = torch.zeros(len(samples), 3, height, width)
        mask = torch.zeros(len(samples), height, width, dtype=torch.long)
        labels = []
        for sample, (rows, columns), image, valid in zip(samples, shapes.tolist(), pixels, mask, strict=True):
            image[:, :rows, :columns] = sample["pixel_values"]
            valid[:rows, :columns] = 1
            objects = dict(sample["labels"])
            if "masks" in objects:
                padding = (0, width - columns, 0, height - rows)
                objects["masks"] = torch.nn.functional.pad(objects["masks"], padding)
            else:
                objects["boxes"] = objects["boxes"] * torch.tensor([columns / width, rows / height]).repeat(2)
            labels.append(objects)
        return {
            "pixel_values": pixels,
            "pixel_mask": mask,
            "labels": labels,
            "shapes": shapes,
            "sizes": torch.stack([sample["size"] for sample in samples]),
            "indices": torch.tensor([sample["index"] for sample in samples]),
            "broken": [sample["broken"] for sample in samples if sample["broken"]],
        }


# -------------------------------------------------------------------------------------------------------------- models


def backbone_of(model: torch.nn.Module) -> torch.nn.Module | None:
    return next((module for module in model.modules() if isinstance(module, BackboneMixin)), None)


def stride_of(model: torch.nn.Module) -> int:
    """What the sides of a batch must be multiples of, for maps that each have half the sides of the one before."""
    config = getattr(backbone_of(model), "config", model.config)
    patch, stages = getattr(config, "patch_size", 4), len(getattr(config, "depths", range(4)))
    return (patch if isinstance(patch, int) else max(patch)) * 2 ** (stages - 1)


def kind_of(config: PreTrainedConfig) -> type | None:
    """The Auto class of models that find objects by their masks, or by their boxes."""
    if type(config) in MASK_MODELS:
        return AutoModelForUniversalSegmentation
    return AutoModelForObjectDetection if type(config) in MODEL_FOR_OBJECT_DETECTION_MAPPING else None


def detector_config(args: argparse.Namespace) -> tuple[PreTrainedConfig, PreTrainedConfig | None]:
    """The config of --config or --model; or, where --model is no detector, those of --head and of --model."""
    check_config(args)
    option, source = ("--config", args.config) if args.config else ("--model", args.model)
    try:
        given = AutoConfig.from_pretrained(source)
    except Exception as error:
        raise Problem(f"Cannot read {option} {source}: {first_line(error)}") from error
    if args.config or kind_of(given):
        return given, None
    described = Path(args.head).exists()
    try:
        config = AutoConfig.from_pretrained(args.head) if described else AutoConfig.for_model(args.head)
    except Exception as error:
        why = f" ({first_line(error)})" if described else ""  # of a name, it lists hundreds of others
        raise Problem(
            f"No such detector: --head {args.head}{why}. Name a type that transformers knows, such as "
            "rt_detr, d_fine or mask2former, or a config.json."
        ) from error
    if kind_of(config) is None or not hasattr(config, "backbone_config"):
        raise Problem(f"--head {args.head} is no detector with a backbone, such as rt_detr, d_fine or mask2former.")
    return config, given


def finds_masks(args: argparse.Namespace) -> bool:
    return type(detector_config(args)[0]) in MASK_MODELS


def add_backbone(args: argparse.Namespace, config: PreTrainedConfig, backbone: PreTrainedConfig) -> None:
    """Put the config of --model into that of --head."""
    stages = len(backbone.depths)
    levels = len(getattr(config, "encoder_in_channels", ())) or min(3, stages)
    if type(config) in MASK_MODELS:  # all, for masks as fine as the first
        levels = max(3, stages)
    if config.model_type in ("detr", "conditional_detr", "dab-detr"):  # they use the last map only
        levels = 1
    if levels > stages:
        raise Problem(f"--head {args.head} takes {levels} maps, and {args.model} has {stages} stages: choose another.")
    backbone = AutoConfig.for_model(**(backbone.to_dict() | {"out_features": None, "out_indices": None}))
    backbone.out_indices = [*range(stages - levels + 1, stages + 1)]
    config.backbone_config = backbone
    strides = [backbone.patch_size * 2 ** (index - 1) for index in backbone.out_indices]
    for name in ("use_timm_backbone", "use_pretrained_backbone"):
        if hasattr(config, name):
            setattr(config, name, False)
    if hasattr(config, "encoder_in_channels"):
        with torch.device("meta"):
            config.encoder_in_channels = AutoBackbone.from_config(backbone).channels
        config.feat_strides = strides
    if hasattr(config, "feature_strides"):
        config.feature_strides, config.common_stride = strides, strides[0]


def new_head(
    args: argparse.Namespace, config: PreTrainedConfig, labels: dict[int, str], say: Callable[[str], None]
) -> PreTrainedModel:
    """A detector whose backbone has the weights of the checkpoint --model, and whose head is new."""
    config.id2label, config.label2id = labels, {name: index for index, name in labels.items()}
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        model = kind_of(config).from_config(config)
        backbone, loading = type(backbone_of(model)).from_pretrained(
            args.model, config=config.backbone_config, output_loading_info=True, dtype=torch.float32
        )
        begin_anew(model)
        backbone_of(model).load_state_dict(backbone.state_dict())
    except Exception as error:
        raise Problem(
            f"Cannot put --model {args.model} into the detector --head {args.head}: {first_line(error)}"
        ) from error
    finally:
        logging.set_verbosity(verbosity)
    lacking = [name for name in loading["missing_keys"] if not name.startswith("hidden_states_norms.")]
    if lacking:
        say(f"{args.model} lacks weights of the backbone; these start anew: {', '.join(sorted(lacking)[:5])}.")
    say(f"{args.model} is the backbone; the head ({config.model_type}) starts anew, with the data's classes.")
    return model


def begin_anew(model: PreTrainedModel) -> None:
    """Batch norms of a head start as their papers' do; transformers gives them weights near 0, which hardly learn."""
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.ones_(module.weight)


def build_detector(
    args: argparse.Namespace, names: list[str], say: Callable[[str], None]
) -> tuple[PreTrainedModel, BaseImageProcessor]:
    """The detector, its id2label being the data's classes, and the image processor that goes with it."""
    config, backbone = detector_config(args)

    def set_labels(config: PreTrainedConfig) -> None:
        if kind_of(config) is None:
            raise ValueError(f"{config.model_type} is no detector")
        if not args.model or set(config.id2label.values()) != set(names):
            if args.model:
                say(f"{args.model} knows other classes: what scores them starts anew where their number differs.")
            config.id2label = dict(enumerate(names))
        config.label2id = {name: index for index, name in config.id2label.items()}

    if backbone is None:
        model, _ = load_model(args, kind_of(config), "a detector", (), say, set_labels)
        if args.config:
            begin_anew(model)
    else:
        add_backbone(args, config, backbone)
        model = new_head(args, config, dict(enumerate(names)), say)

    processor = None
    if args.model and backbone is None:
        with contextlib.suppress(OSError):
            processor = stored_processor(args.model)
    if processor is None:  # types without one of their own, such as D-FINE, use that of RT-DETR
        kinds = IMAGE_PROCESSOR_MAPPING.get(type(model.config), {})
        processor = (kinds.get("pil") or RTDetrImageProcessorPil)(do_normalize=True)
    if args.image_size:
        resize_views(processor, args.image_size)
    return model, processor


def rate_groups(model: torch.nn.Module, args: argparse.Namespace) -> list[dict]:
    """Those of `decay_groups`, with a learning rate of its own for the backbone."""
    backbone = backbone_of(model)
    inside = {id(parameter) for parameter in backbone.parameters()} if backbone is not None else set()
    groups = []
    for group, within in itertools.product(decay_groups(model, args.weight_decay), (True, False)):
        parameters = [parameter for parameter in group["params"] if (id(parameter) in inside) == within]
        rate = args.learning_rate * (args.backbone_rate if within else 1)
        if parameters:
            groups.append(group | {"params": parameters, "lr": rate})
    return groups


def inputs_of(model: torch.nn.Module) -> tuple[str, ...]:
    """Of a batch, what goes into the model."""
    known = inspect.signature(model.forward).parameters
    return tuple(name for name in ("pixel_values", "pixel_mask") if name in known)


def divide_by_own_objects() -> None:
    """Have DETR and its like, and Mask2Former, divide their loss by the objects of their batch, as RT-DETR does.

    With several processes, transformers takes the mean number of objects of all, and divides it by the number of
    processes once more: the loss would grow with that.
    """
    for module in (loss_for_object_detection, modeling_mask2former, modeling_maskformer):
        module.is_accelerate_available = lambda: False


def detection_loss(model: PreTrainedModel, objects: float) -> Callable[[torch.nn.Module, dict], torch.Tensor]:
    """The model's own loss, such that a step does not depend on how its images are shared out.

    The model divides by the objects of a batch. Here a batch counts by its objects, so that they are divided by those
    that its images have on average, `objects` an image.
    """
    names = inputs_of(model)
    divide_by_own_objects()

    def loss(trained: torch.nn.Module, batch: dict) -> torch.Tensor:
        inputs, labels = {name: batch[name] for name in names}, batch["labels"]
        if type(model.config) in MASK_MODELS:
            loss = mask_loss(model, trained(**inputs, output_auxiliary_logits=True), labels, objects)
        else:
            count = max(1, sum(len(target["class_labels"]) for target in labels))
            loss = trained(**inputs, labels=labels).loss * (count / (objects * len(labels)))
        # DDP waits for a gradient of every parameter: Swin's last norm has none, nor what learns from objects alone.
        return loss + 0 * sum(parameter.sum() for parameter in trained.parameters() if parameter.requires_grad)

    return loss


# ---------------------------------------------------------------------------------------------------------- evaluation


def ground_truth(images: list[dict], label2id: dict[str, int]) -> COCO:
    """The annotations as they are, crowds included, the images numbered in order."""
    annotations = []
    for index, image in enumerate(images):
        for place, name in enumerate(image["name"]):
            annotation = {"id": len(annotations) + 1, "image_id": index, "category_id": label2id[name]}
            annotation |= {key: image[key][place] for key in ("bbox", "area", "iscrowd")}
            if "masks" in image:
                annotation["segmentation"] = image["masks"][place]
            annotations.append(annotation)
    truth = COCO()
    truth.dataset = {
        "images": [
            {"id": index, "width": image["size"][0], "height": image["size"][1]} for index, image in enumerate(images)
        ],
        "annotations": annotations,
        "categories": [{"id": index, "name": name} for name, index in label2id.items()],
    }
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
    return truth


def average_precision(truth: COCO, predictions: dict[int, dict], names: dict[int, str], kind: str = "bbox") -> dict:
    """COCO's average precisions, of all and of each class, on the images that have predictions.

    Args:
        predictions: for the number of an image `boxes` [left, top, right, bottom], `scores` and `labels`; and `masks`,
            as run lengths.
        kind: of boxes, or of masks: "segm".

    Returns:
        By name; a number without an object to find is None.
    """
    results = []
    for index, found in predictions.items():
        if kind == "segm":
            places = [{"segmentation": code} for code in found["masks"]]
        else:
            corners = np.asarray(found["boxes"]).tolist()
            places = [{"bbox": [left, top, right - left, bottom - top]} for left, top, right, bottom in corners]
        numbers = (np.asarray(found[key]).tolist() for key in ("labels", "scores"))
        for place, label, score in zip(places, *numbers, strict=True):
            results.append({"image_id": index, "category_id": label, "score": score} | place)
    with contextlib.redirect_stdout(io.StringIO()):
        answers = truth.loadRes(results) if results else COCO()
        evaluation = COCOeval(truth, answers, kind)
        evaluation.params.imgIds = sorted(predictions)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()

    def mean(values: np.ndarray) -> float | None:
        return float(values[values > -1].mean()) if (values > -1).any() else None

    precision = evaluation.eval["precision"][:, :, :, 0, -1]  # of thresholds, recalls, classes
    classes = {names[label]: mean(precision[:, :, place]) for place, label in enumerate(evaluation.params.catIds)}
    measured = {
        name: value if value > -1 else None for name, value in zip(METRICS, evaluation.stats[:6].tolist(), strict=True)
    }
    return measured | {"images": len(predictions), "classes": classes}


@torch.no_grad()  # not inference_mode: tensors that a model caches there could not be used in training later
def predict(
    accelerator: Accelerator,
    model: torch.nn.Module,
    names: tuple[str, ...],
    processor: BaseImageProcessor,
    loader: Loader,
) -> dict[int, dict]:
    """For the number of each image that can be read, what all processes found in it."""
    model.eval()
    found = {}
    for batch in loader:
        with accelerator.autocast():
            outputs = model(**{name: batch[name] for name in names})
        padded, shapes, sizes = batch["pixel_values"].shape[-2:], batch["shapes"], batch["sizes"]
        if "masks_queries_logits" in outputs:
            answers = found_masks(outputs, padded, shapes.tolist(), sizes.tolist())
        else:
            outputs.logits, outputs.pred_boxes = outputs.logits.float(), outputs.pred_boxes.float()
            sizes = sizes * sizes.new_tensor(padded) / shapes  # what the padded batch is in the files' pixels
            answers = processor.post_process_object_detection(outputs, threshold=0.0, target_sizes=sizes)
            answers = [{name: value.cpu().numpy() for name, value in answer.items()} for answer in answers]
        for index, answer in zip(batch["indices"].tolist(), answers, strict=True):
            if index >= 0:
                found[index] = answer
    everything = gather_object([found])
    return {index: answer for part in everything for index, answer in part.items()}


# ------------------------------------------------------------------------------------------------------------- reports


def colour_of(label: int) -> str:
    return f"C{label % 10}"


def draw_objects(
    axes, boxes: np.ndarray, masks: list[dict] | None, labels: list[int], texts: list[str], size: tuple[int, int]
) -> None:
    if masks is not None:
        draw_masks(axes, decode(masks, size), [colour_of(label) for label in labels])
    for (left, top, right, bottom), label, text in zip(boxes.tolist(), labels, texts, strict=True):
        colour = colour_of(label)
        axes.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, color=colour, linewidth=1.5))
        axes.text(
            left, top, text, fontsize=7, color="white", va="bottom", bbox={"facecolor": colour, "lw": 0, "pad": 0.8}
        )


def draw_detections(file: Path, data: dict, column: str, predictions: dict[int, dict], names: dict[int, str]) -> None:
    """The first images, with what is in them above, and below what was found with a score above SURE."""
    label2id = {name: label for label, name in names.items()}
    shown = sorted(predictions)[:SHOWN]
    if not shown:
        return
    figure = Figure(figsize=(0.4 + 2.4 * len(shown), 5), layout="constrained")
    grid = figure.subplots(2, len(shown), squeeze=False)
    rows = data["rows"].cast_column(column, datasets.Image(decode=False))
    for index, (upper, lower) in zip(shown, grid.T, strict=True):
        target, found = data["labels"][index], predictions[index]
        image = picture(rows[index][column], target["size"])
        for axes in (upper, lower):
            axes.imshow(image)
            axes.set(xticks=[], yticks=[])
        boxes, kept = inside(target)
        truth = [name for name, keep in zip(target["name"], kept, strict=True) if keep]
        masks = [*itertools.compress(target["masks"], kept)] if "masks" in target else None
        draw_objects(upper, boxes[kept], masks, [label2id[name] for name in truth], truth, image.size)
        sure = found["scores"] > SURE
        labels = found["labels"][sure].tolist()
        texts = [f"{names[label]} {score:.2f}" for label, score in zip(labels, found["scores"][sure], strict=True)]
        boxes = found["boxes"][sure].clip(0, np.tile(np.float32(image.size), 2))
        masks = [*itertools.compress(found["masks"], sure)] if "masks" in found else None
        draw_objects(lower, boxes, masks, labels, texts, image.size)
    grid[0, 0].set_ylabel("truth")
    grid[1, 0].set_ylabel(f"found, score > {SURE}")
    figure.savefig(file, dpi=100)


def write_detection_card(
    file: Path, name: str, model_type: str, data: str, base: str | None, best: dict, settings: dict, on_hub: dict
) -> None:
    """A model card with the results as metadata, as the Hub shows them."""
    data, base = public(data), public(base)
    masks = "box_ap" in best
    what, task, where = (
        ("A model for instance segmentation", "image-segmentation", "masks")
        if masks
        else ("A detector", "object-detection", "boxes")
    )
    options = ', subtask="instance", threshold=0.5' if masks else ""
    titles = ("AP", "AP50", "AP75", "AP small", "AP medium", "AP large", "AP of boxes", "AP50 of boxes")
    titles = dict(zip((*METRICS, *OF_BOXES), titles, strict=True))
    measures = {key: (title, best[key]) for key, title in titles.items() if best.get(key) is not None}
    metadata = results_metadata(task, [model_type], name, data, measures, settings, on_hub)
    rows = "\n".join(f"| {title} | {value:.4f} |" for title, value in measures.values())
    classes = "\n".join(f"| {label} | {value:.4f} |" for label, value in best["classes"].items() if value is not None)
    text = f"""\
{what} ({model_type}), trained on {data} {"from " + base if base else "from scratch"} with Focal's
`examples/finetune_detection.py`. COCO's average precisions of {where}, on {best["images"]} validation images, epoch
{best["epoch"]}:

| | |
|---|---|
{rows}

```python
import focal_hf  # pip install focal-hf
from transformers import pipeline

pipeline("{task}", model="{name}")("picture.jpg"{options})
```

![Detections](detections.png)
![Curves](curves.png)

| class | AP |
|---|---|
{classes}
"""
    save_card(file, name, metadata, text, settings)
