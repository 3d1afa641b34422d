"""Semantic segmentation: images with maps of classes, the model for them, and what it says of whole images."""

import argparse
import math
import random
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import kornia.augmentation as augment
import numpy as np
import torch
from matplotlib.colors import hsv_to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image
from tqdm.auto import tqdm
from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoModelForSemanticSegmentation,
    BaseImageProcessor,
    BeitImageProcessorPil,
    PreTrainedConfig,
    PreTrainedModel,
    UperNetConfig,
    UperNetForSemanticSegmentation,
)
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from .data import hold_out, load_splits, read_names
from .loading import Images, Item
from .models import load_model, stored_processor
from .options import Problem, first_line
from .recipe import drop_path_by_size, normalize
from .reports import public, results_metadata, save_card, to_picture

NO_CLASS = 255  # what maps have at pixels that do not count
LARGEST_SHARE = 0.75  # of a crop's pixels, that one class may have
TRIES = 10  # to find such a crop
LONGEST = 4  # longest side of an image that the model sees, in shorter sides of its standard size: the paper's 2048:512
LEGEND = 24  # classes of which a picture tells the colours

# ---------------------------------------------------------------------------------------------------------------- data


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
    """The splits of what --data names, images beside maps, and the classes' names in the order of their numbers."""
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
            raise Problem(f"--data {args.data} does not tell its classes: name a file of names, one a line: --classes.")
    names = read_names(names)
    for split, rows in splits.items():
        for option, column in (("--image-column", args.image_column), ("--map-column", args.map_column)):
            if not isinstance(rows.features.get(column), datasets.Image):
                raise Problem(
                    f"The split {split} of --data {args.data} has no images in a column {column}; its columns are "
                    f"{', '.join(rows.column_names)}. Name the right one with {option}."
                )
        splits[split] = rows.select_columns([args.image_column, args.map_column])
        for column in (args.image_column, args.map_column):
            splits[split] = splits[split].cast_column(column, datasets.Image(decode=False))
    if not 2 <= len(names) < NO_CLASS:
        raise Problem(f"{len(names)} classes are named: there must be at least 2 and at most {NO_CLASS - 1}.")
    return splits, names


def choose_splits(
    args: argparse.Namespace, splits: dict[str, datasets.Dataset], say: Callable[[str], None]
) -> tuple[datasets.Dataset, datasets.Dataset]:
    """The rows to train on and to validate on."""
    if "train" not in splits:
        raise Problem(f"--data {args.data} has no split called train or training, only {', '.join(splits)}.")
    train = splits["train"]
    if args.validation_split in splits:
        return train, splits[args.validation_split]
    rows, held = hold_out([""] * len(train), args.validation_fraction, args.seed)
    if not held or not rows:
        raise Problem(f"--data {args.data} has too few images to hold some out: add a validation split.")
    say(
        f"No split called {args.validation_split}: holding out {len(held)} of {len(train)} training images, "
        f"{args.validation_fraction:.0%} of all (seed {args.seed})."
    )
    return train.select(rows), train.select(held)


def load_map(cell: dict, reduce_labels: bool) -> np.ndarray:
    """The classes (height, width) of an undecoded map.

    With `reduce_labels`, 0 becomes `NO_CLASS` and other classes count from 0, as in transformers' image processors.
    """
    classes = np.asarray(datasets.Image().decode_example(cell))
    if classes.ndim != 2:
        raise ValueError(f"expected one number for each pixel, not {classes.shape[-1]}")
    if classes.max() > NO_CLASS:
        raise ValueError(
            f"class {classes.max()}, where {NO_CLASS} is for pixels that do not count and no class is above"
        )
    classes = classes.astype("uint8")
    return np.where(classes == NO_CLASS, classes, classes - 1) if reduce_labels else classes


def check_scenes(args: argparse.Namespace, rows: datasets.Dataset, names: list[str], say: Callable, show: bool) -> None:
    """Refuse what training would come upon hours later: maps that are not readable, of another size or class."""
    scenes = Scenes(rows, args, lambda image, classes, draw: {"image": image, "map": classes})
    unreadable = []

    def wrong(row: int) -> str | None:
        name = rows[row][args.map_column]["path"] or f"The map of row {row}"
        try:
            scene = scenes[Item(row)]
        except Exception as error:  # whatever a decoder says to damaged bytes
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
                "name it, too, or mend the map."
            )
        return None

    with ThreadPoolExecutor() as pool:
        found = pool.map(wrong, range(len(rows)))
        for problem in tqdm(found, desc="checking maps", total=len(rows), unit="map", leave=False, disable=not show):
            if problem:
                pool.shutdown(cancel_futures=True)
                raise Problem(problem)
    unreadable.sort()
    if unreadable and args.strict:
        raise Problem(f"Not a readable image: {unreadable[0]}. Repair or remove it, or leave out --strict.")
    if unreadable:
        shown = ", ".join(unreadable[:5]) + (" …" if unreadable[5:] else "")
        say(f"Skipping what is no readable image ({len(unreadable)}): {shown}")


class Scenes(Images):
    """Images with their maps; one that cannot be read, or does not count, has a map without a class.

    Args:
        rows: undecoded images and maps.
        view (`Callable`):
            Given an image, its classes (height, width) and a `random.Random`, tensors for the model by their names.
    """

    def __init__(self, rows: datasets.Dataset, args: argparse.Namespace, view: Callable):
        self.rows, self.view = rows, view
        self.columns, self.reduce_labels = (args.image_column, args.map_column), args.reduce_labels

    def __getitem__(self, item: Item) -> dict:
        image, classes = (self.rows[item.key][column] for column in self.columns)
        image, broken = self.decode(image)
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
    draw: random.Random,
) -> dict[str, torch.Tensor]:
    """A crop of the image, resized at random, and the same crop of its map; whole numbers, to be normalised later.

    The crop is drawn anew where one class has nearly all of it. What is outside the image has the mean colour.
    """
    side = args.crop_size
    shorter = side * draw.uniform(*args.resize)
    scale = min(shorter / min(image.size), LONGEST * shorter / max(image.size))
    width, height = (max(1, round(length * scale)) for length in image.size)
    resized = np.asarray(Image.fromarray(classes).resize((width, height), Image.Resampling.NEAREST))
    for _ in range(TRIES):
        left, top = (draw.randint(0, max(0, length - side)) for length in (width, height))
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
    if args.flip and draw.random() < 0.5:
        pixels, labels = pixels[:, ::-1].copy(), labels[:, ::-1].copy()
    return {"pixel_values": torch.from_numpy(pixels).permute(2, 0, 1), "labels": torch.from_numpy(labels)}


def whole_view(
    scales: list[float],
    processor: BaseImageProcessor,
    image: Image.Image,
    classes: np.ndarray,
    draw: random.Random | None = None,
) -> dict[str, torch.Tensor]:
    """What the model's image processor makes of the image, at each of some scales; and the map as it is."""
    views = {
        f"view{number}": processor(
            image, size={name: round(side * scale) for name, side in dict(processor.size).items()}, return_tensors="pt"
        )["pixel_values"][0]
        for number, scale in enumerate(scales)
    }
    return views | {"labels": torch.from_numpy(classes)}


# --------------------------------------------------------------------------------------------------------------- model


def build_segmenter(args: argparse.Namespace, names: list[str], say: Callable[[str], None]) -> PreTrainedModel:
    """UperNet for these classes, of --config or --model.

    What a checkpoint for another task has goes into the backbone, and the heads are new.
    """
    source = args.config or args.model
    same_labels = False

    def set_drop_path(config: PreTrainedConfig) -> None:
        if args.drop_path is None and hasattr(config, "depths") and hasattr(config, "embed_dim"):
            args.drop_path = drop_path_by_size(config)
        if args.drop_path is not None:
            config.drop_path_rate = args.drop_path

    def set_labels(config: PreTrainedConfig) -> None:
        nonlocal same_labels
        same_labels = bool(args.model) and config.id2label == dict(enumerate(names))
        config.id2label = dict(enumerate(names))
        config.label2id = {name: index for index, name in enumerate(names)}
        config.loss_ignore_index = NO_CLASS
        set_drop_path(config.backbone_config)

    try:
        config = AutoConfig.from_pretrained(source)
    except Exception as error:
        raise Problem(
            f"Cannot read {'--config' if args.config else '--model'} {source}: {first_line(error)}"
        ) from error
    heads = ("decode_head.classifier", "auxiliary_head.classifier")
    if isinstance(config, UperNetConfig):
        what = "a segmentation model"
        model, loading = load_model(args, AutoModelForSemanticSegmentation, what, heads, say, set_labels)
        if args.model and not same_labels:
            say(f"{source} knows other classes: its classifiers start anew, with the {len(names)} classes of the data.")
            if not loading["mismatched_keys"]:  # as many, but other
                for name, module in model.named_modules():
                    if name in heads:
                        torch.nn.init.normal_(module.weight, std=config.initializer_range)
                        torch.nn.init.zeros_(module.bias)
        return model

    if not hasattr(config, "stage_names"):
        raise Problem(f"{source} ({config.model_type}) is no backbone with stages, as Focal and Swin are.")
    weights = {}

    def set_stages(config: PreTrainedConfig) -> None:
        config.out_features = config.stage_names[1:]
        set_drop_path(config)

    set_stages(config)
    try:
        if args.model:
            kind = type(AutoBackbone.from_config(config))
            # Each map gets a norm of its own, which other checkpoints have not.
            backbone, _ = load_model(args, kind, "a backbone", ("hidden_states_norms.",), say, set_stages)
            weights = backbone.state_dict()
        settings = {"hidden_size": args.head_channels, "auxiliary_channels": args.head_channels // 2}
        # Small networks start from larger weights, and so should their heads.
        settings["initializer_range"] = config.initializer_range
        config = UperNetConfig(backbone_config=config, **settings)
        set_labels(config)
        model = UperNetForSemanticSegmentation(config)
    except (ValueError, IndexError, TypeError) as error:
        raise Problem(f"Cannot build a segmentation model on {source}: {first_line(error)}") from error
    if weights:
        model.backbone.load_state_dict(weights)
    return model


def fix_unused(model: PreTrainedModel, side: int) -> None:
    """Fix parameters that get no gradient, such as the last norm of Swin's backbone: with them, DDP would stop."""
    model.eval()
    try:
        loss = model(torch.zeros(1, 3, side, side), labels=torch.zeros(1, side, side, dtype=torch.long)).loss
    except Exception as error:
        raise Problem(f"This model cannot take crops of {side} x {side} pixels: {first_line(error)}") from error
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True):
        parameter.requires_grad_(gradient is not None)


def segmentation_processor(args: argparse.Namespace, say: Callable[[str], None]) -> BaseImageProcessor:
    """For whole images, with the colours' statistics of the checkpoint, or ImageNet's."""
    statistics = {"image_mean": IMAGENET_DEFAULT_MEAN, "image_std": IMAGENET_DEFAULT_STD}
    if args.model:
        try:
            known = stored_processor(args.model)
            names = ("image_mean", "image_std", "do_normalize", "do_rescale", "rescale_factor")
            statistics = {name: getattr(known, name) for name in names}
        except OSError:
            say(f"{args.model} brings no image processor: using ImageNet's statistics.")
    # Segformer's does the same, but in transformers 5.18 it asks for torchvision.
    processor = BeitImageProcessorPil(
        **statistics,
        resample=Image.Resampling.BILINEAR,
        do_center_crop=False,
        do_reduce_labels=args.reduce_labels,
    )
    set_size(processor, args.image_size or args.crop_size)
    return processor


def set_size(processor: BaseImageProcessor, side: int) -> None:
    """Make the shorter side of whole images `side` pixels, as far as the longer one allows."""
    processor.size = {"shortest_edge": side, "longest_edge": LONGEST * side}


def segmentation_loss(
    processor: BaseImageProcessor, distortion: bool
) -> Callable[[torch.nn.Module, dict], torch.Tensor]:
    """The mean loss over all pixels of a batch, those that do not count having none.

    So it is the mean over images, too, whatever counts in each. Colours are distorted as in mmsegmentation's recipes.
    """
    operations = torch.nn.Sequential(
        augment.RandomBrightness((1 - 32 / 255, 1 + 32 / 255), p=0.5),  # which adds up to 32 of 255
        augment.RandomContrast((0.5, 1.5), p=0.5),
        augment.RandomSaturation((0.5, 1.5), p=0.5),
        augment.RandomHue((-0.05, 0.05), p=0.5),
    )

    def loss(model: torch.nn.Module, batch: dict) -> torch.Tensor:
        pixels, labels = batch["pixel_values"].float() / 255, batch["labels"].long()
        with torch.no_grad():
            pixels = normalize(processor, operations(pixels) if distortion else pixels)
        counts = labels != NO_CLASS
        # Of no pixel at all, the model's mean would not be a number.
        labels = labels.where(counts.any(), 0)
        return model(pixel_values=pixels, labels=labels).loss * counts.float().mean()

    return loss


# ---------------------------------------------------------------------------------------------------------- evaluation


def starts(length: int, window: int, stride: int) -> list[int]:
    """Where windows begin that cover a length; the last one ends where it does."""
    last = max(0, length - window)
    return [min(number * stride, last) for number in range(math.ceil(last / stride) + 1)]


def window_logits(
    model: torch.nn.Module, pixel_values: torch.Tensor, window: int | None, stride: int, together: int
) -> torch.Tensor:
    """Logits (1, classes, height, width) of one image: its windows' mean where they overlap; or of it as a whole."""
    height, width = pixel_values.shape[-2:]
    if not window or window >= max(height, width):
        return model(pixel_values=pixel_values).logits.float()
    corners = [(top, left) for top in starts(height, window, stride) for left in starts(width, window, stride)]
    total, covered = 0, torch.zeros(height, width, device=pixel_values.device)
    for start in range(0, len(corners), together):
        some = corners[start : start + together]
        parts = [pixel_values[..., top : top + window, left : left + window] for top, left in some]
        logits = model(pixel_values=torch.cat(parts)).logits.float()
        if start == 0:
            total = logits.new_zeros(1, logits.shape[1], height, width)
        for (top, left), part in zip(some, logits, strict=True):
            total[0, :, top : top + window, left : left + window] += part
            covered[top : top + window, left : left + window] += 1
    return total / covered


def probabilities(
    model: torch.nn.Module,
    views: Iterable[torch.Tensor],
    size: tuple[int, int],
    *,
    window: int | None = None,
    stride: int = 1,
    flip: bool = False,
    together: int = 1,
) -> torch.Tensor:
    """The probability (classes, height, width) of each class at each pixel of an image of a size.

    Args:
        views: the image (1, channels, height, width) at each scale, over which the answer is the mean.
        window, stride: side and distance of windows, in pixels of a view; without them a view is seen as a whole.
        flip: whether mirrored views are seen, too.
        together: windows in a batch.
    """

    def answers() -> Iterator[torch.Tensor]:
        for view in views:
            for mirrored in (False, True)[: 1 + flip]:
                logits = window_logits(model, view.flip(-1) if mirrored else view, window, stride, together)
                logits = logits.flip(-1) if mirrored else logits
                logits = torch.nn.functional.interpolate(logits, size, mode="bilinear", align_corners=False)
                yield logits[0].softmax(0)

    total, count = 0, 0
    for answer in answers():
        total, count = total + answer, count + 1
    return total / count


# ------------------------------------------------------------------------------------------------------------- reports


def draw_scenes(
    file: Path,
    scenes: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]],
    processor: BaseImageProcessor,
    names: list[str],
) -> None:
    """Pixel values (channels, height, width) of some images above their true and their predicted classes."""
    numbers = np.arange(len(names))
    # Hues a golden section apart, so that no two classes with near numbers look alike; the first, which often is the
    # background, is dark, and what is no class is white.
    colours = hsv_to_rgb(
        np.stack([numbers * 0.618 % 1, 0.9 - 0.3 * (numbers % 2), 0.95 - 0.25 * (numbers % 3 == 1)], 1)
    )
    colours[0] = 0.2
    palette = np.ones((NO_CLASS + 1, 3))
    palette[: len(names)] = colours
    figure = Figure(figsize=(0.4 + 1.8 * len(scenes), 6.2), layout="constrained")
    grid = figure.subplots(3, len(scenes), squeeze=False)
    for column, (pixels, truth, predicted) in zip(grid.T, scenes, strict=True):
        picture = to_picture(processor, pixels).clamp(0, 1).permute(1, 2, 0).numpy()
        for axes, content in zip(column, (picture, palette[truth.numpy()], palette[predicted.numpy()]), strict=True):
            axes.imshow(content, interpolation="nearest")
            axes.set(xticks=[], yticks=[])
    for axes, name in zip(grid[:, 0], ("image", "truth", "predicted"), strict=True):
        axes.set_ylabel(name)
    seen = sorted({int(number) for _, *maps in scenes for part in maps for number in part.unique()} - {NO_CLASS})
    if len(seen) <= LEGEND:
        patches = [Patch(color=colours[number], label=names[number]) for number in seen]
        figure.legend(handles=patches, loc="outside lower center", ncols=min(len(seen), 2 + 2 * len(scenes)))
    figure.savefig(file, dpi=100)


def write_segmentation_card(
    file: Path, name: str, model_type: str, data: str, base: str | None, entry: dict, settings: dict, on_hub: dict
) -> None:
    """A model card with the results as metadata, as the Hub shows them."""
    data, base = public(data), public(base)
    titles = {"mean_iou": "Mean IoU", "mean_accuracy": "Mean accuracy", "pixel_accuracy": "Pixel accuracy"}
    measures = {key: (title, entry[key]) for key, title in titles.items()}
    tags = ["upernet", model_type]
    metadata = results_metadata("image-segmentation", tags, name, data, measures, settings, on_hub)
    rows = "\n".join(f"| {title.lower().replace('iou', 'IoU')} | {value:.4f} |" for title, value in measures.values())
    text = f"""\
A semantic segmentation model (UperNet on {model_type}), trained on {data} {"from " + base if base else "from scratch"}
with Focal's `examples/finetune_segmentation.py`.

| | |
|---|---|
{rows}
| validation images | {entry["images"]} |
| epoch | {entry["epoch"]} |

```python
import focal_hf  # pip install focal-hf
from transformers import pipeline

pipeline("image-segmentation", model="{name}")("picture.jpg")
```

![Curves](curves.png)
![Predictions](predictions.png)
"""
    save_card(file, name, metadata, text, settings)
