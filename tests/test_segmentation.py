"""examples/finetune_segmentation.py: training on coloured rectangles, and evaluation."""

import random
import re
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoModelForSemanticSegmentation,
    BeitImageProcessorPil,
    SwinConfig,
    SwinForImageClassification,
    pipeline,
)

from common.dense_evaluation import probabilities
from common.segmentation_data import NO_CLASS, training_view, whole_view
from example_runs import Run, results, run_examples_in_turn, tiny_config
from focal_hf import FocalForImageClassification
from focal_hf.compatibility_focal import AutoImageProcessor
from small_models import PILLOW_PROCESSORS

pytestmark = PILLOW_PROCESSORS
SCRIPT = "finetune_segmentation.py"
NAMES = ["ground", "red", "blue"]
COLOURS = np.array([(90, 110, 90), (220, 50, 40), (50, 60, 210)])
STAGES = {
    "depths": (1, 1, 1),
    "num_heads": (1, 2, 2),
    "image_size": 32,
    "focal_levels": (2, 2, 2),
    "focal_windows": (3, 3, 1),
    "expand_sizes": (2, 2, 2),
}
SMALL = ("--crop-size", 32, "--head-channels", 16)
# 25 images to train on, of which one cannot be read, in steps of 8, and 5 to validate on.
OPTIONS = (
    *("--config", "config", "--data", "scenes", "--reduce-labels", *SMALL, "--batch-size", 4, "--accumulate", 2),
    *("--epochs", 16, "--save-every", 2),
)


def draw_scene(size: tuple[int, int], draw: np.random.Generator) -> tuple[Image.Image, np.ndarray]:
    """Draws rectangles on noise, and a map with the class of every pixel."""
    width, height = size
    classes = np.zeros((height, width), "uint8")
    for number in (1, 2):
        side = draw.integers(10, 16, 2)
        top, left = draw.integers(0, (height, width) - side)
        classes[top : top + side[0], left : left + side[1]] = number
    pixels = COLOURS[classes] + draw.integers(-30, 30, (height, width, 3))
    return Image.fromarray(pixels.clip(0, 255).astype("uint8")), classes


def write_scenes(images: Path, maps: Path, count: int, seed: int, first: int = 0) -> None:
    """Draws scenes of different sizes. `first` is the first class in the maps. If it is 1, the top rows are 0."""
    draw = np.random.default_rng(seed)
    for folder in (images, maps):
        folder.mkdir(parents=True)
    for number in range(count):
        image, classes = draw_scene((40 + 4 * (number % 3), 36 + 8 * (number % 2)), draw)
        classes += first
        if first:
            classes[:3] = 0
        image.save(images / f"{number:02}.png")
        Image.fromarray(classes).save(maps / f"{number:02}.png")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Writes scenes in the layout of ADE20K, where 0 is no class."""
    place = tmp_path_factory.mktemp("segmentation")
    for seed, (split, count) in enumerate({"training": 25, "validation": 5}.items()):
        folders = place / "scenes" / "images" / split, place / "scenes" / "annotations" / split
        write_scenes(*folders, count, seed, first=1)
    broken = place / "scenes" / "images" / "training" / "03.png"
    broken.write_bytes(broken.read_bytes()[:1000])
    (place / "scenes" / "annotations" / "classes.txt").write_text("\n".join(NAMES))
    tiny_config(**STAGES).save_pretrained(place / "config")
    return place


@pytest.fixture(scope="module")
def trained(place) -> tuple[Path, str]:
    """The output folder of an uninterrupted run, and what the run printed."""
    said, _ = Run(place, *OPTIONS, "--output", "whole/out", script=SCRIPT).end()
    return place / "whole" / "out", said


def by_hand(folder: Path, place: Path) -> dict[str, float]:
    """Computes the intersection over union of each class from predictions of the pipeline for all validation images."""
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")  # torchvision's resizes otherwise
    assert isinstance(processor, BeitImageProcessorPil)
    segment = pipeline("image-segmentation", model=str(folder), image_processor=processor)
    common, either = dict.fromkeys(NAMES, 0), dict.fromkeys(NAMES, 0)
    for file in sorted((place / "scenes" / "annotations" / "validation").glob("*.png")):
        truth = np.asarray(Image.open(file))
        masks = {
            part["label"]: np.asarray(part["mask"]) > 0
            for part in segment(str(place / "scenes/images/validation" / file.name))
        }
        for number, name in enumerate(NAMES, 1):
            predicted = masks.get(name, np.zeros_like(truth, bool)) & (truth > 0)
            common[name] += int((predicted & (truth == number)).sum())
            either[name] += int((predicted | (truth == number)).sum())
    return {name: common[name] / either[name] for name in NAMES}


def test_trained_model_has_the_metrics_of_a_computation_by_hand(place, trained):
    folder, said = trained
    assert "upernet, " in said
    assert "on focal, 3 classes; 25 training images of 32 x 32 pixels" in said
    assert "Skipping 1 image that cannot be read: " in said
    measured = results(folder)
    assert measured["best"]["mean_iou"] == max(entry["mean_iou"] for entry in measured["history"])
    assert measured["best"]["mean_iou"] > 0.65
    assert {entry["images"] for entry in measured["history"]} == {5}

    last = measured["history"][-1]
    expected = by_hand(folder / "last", place)
    assert last["iou"] == pytest.approx(expected, abs=1e-4)
    assert last["mean_iou"] == pytest.approx(sum(expected.values()) / 3, abs=1e-4)
    card = (folder / "last" / "README.md").read_text()
    assert f"| Mean IoU | {last['mean_iou']:.4f} |" in card
    assert str(place) not in card
    with Image.open(folder / "predictions.png") as drawn:
        assert drawn.width > 800


def test_two_processes_do_the_work_of_one(place):
    """Batch normalization sees the same in a half of a batch where all images are the same. Swin's backbone has a norm
    that gets no gradient, which DDP would not stand."""
    folder = place / "alike"
    write_scenes(folder / "validation", folder / "annotations" / "validation", 5, 2)
    for kind in (folder / "train", folder / "annotations" / "train"):
        kind.mkdir()
    image, classes = draw_scene((32, 32), np.random.default_rng(0))
    for number in range(8):
        image.save(folder / "train" / f"{number}.png")
        Image.fromarray(classes).save(folder / "annotations" / "train" / f"{number}.png")
    (folder / "annotations" / "classes.txt").write_text("\n".join(NAMES))
    settings = {"image_size": 32, "patch_size": 2, "embed_dim": 8, "depths": [1, 1, 1], "num_heads": [1, 2, 2]}
    SwinConfig(**settings, window_size=4).save_pretrained(place / "swin_config")
    options = (
        *("--config", "swin_config", "--data", "alike", *SMALL, "--resize", 1, 1, "--no-flip", "--no-distortion"),
        *("--drop-path", 0, "--epochs", 6),
    )
    curves, found = [], []
    for name, size, launcher in (("one", 4, {}), ("two", 2, {"processes": 2})):
        Run(place, *options, "--output", name, "--batch-size", size, script=SCRIPT, **launcher).end()
        history = results(place / name)["history"]
        assert [entry["images"] for entry in history] == [5] * 6
        curves.append([entry[key] for entry in history for key in ("train_loss", "gradient_norm", "loss")])
        found.append(history[-1]["mean_iou"])
    assert results(place / "two")["processes"] == 2
    assert curves[0][0] > 1.2 * curves[0][-3]
    assert curves[1] == pytest.approx(curves[0], abs=2e-3)
    assert found[1] == pytest.approx(found[0], abs=1e-2)


def test_finished_model_is_evaluated_again(place, trained):
    """Two processes evaluate an odd number of images. One window covers the image, or several smaller ones do."""
    options = ("--evaluate-only", "--model", trained[0], "--data", "scenes", "--reduce-labels")
    Run(place, *options, "--output", "report", "--window", 50, script=SCRIPT, processes=2).end()
    best = results(trained[0])["best"]
    report = results(place / "report")
    assert report == {name: pytest.approx(best[name], abs=1e-6) for name in report}
    assert (place / "report" / "predictions.png").is_file()

    windows = ("--window", 20, "--stride", 12, "--scales", 0.75, 1, "--flip-test")
    said, _ = Run(place, *options, "--output", "windows", *windows, script=SCRIPT).end()
    assert results(place / "windows")["mean_iou"] > 0.6
    assert results(place / "windows")["loss"] != pytest.approx(best["loss"], abs=1e-3)
    assert "5 images: validation loss " in said


def test_starts_from_classifiers_and_segmenters(place, trained):
    """The classifiers are trained on Parquet files, the segmenter on the data that it was trained on before."""
    (place / "parquet").mkdir()
    for split in ("training", "validation"):
        files = sorted((place / "scenes" / "annotations" / split).glob("*.png"))[4:]
        columns = {
            "picture": [str(file).replace("annotations", "images") for file in files],
            "classes": [str(file) for file in files],
        }
        features = datasets.Features(dict.fromkeys(columns, datasets.Image()))
        rows = datasets.Dataset.from_dict(columns, features)
        rows.to_parquet(place / "parquet" / f"{split.replace('training', 'train')}-0.parquet")
    FocalForImageClassification(tiny_config(**STAGES, num_labels=5)).save_pretrained(place / "focal")
    swin = SwinConfig(image_size=32, patch_size=2, embed_dim=8, depths=[1, 1, 1], num_heads=[1, 2, 2], window_size=4)
    SwinForImageClassification(swin).save_pretrained(place / "swin")
    columns = ("--image-column", "picture", "--map-column", "classes", "--classes", "scenes/annotations/classes.txt")
    options = (*SMALL, "--reduce-labels", "--learning-rate", 1e-12, "--epochs", 1)
    runs = run_examples_in_turn(
        SCRIPT,
        [
            ["--model", "focal", "--data", "parquet", *columns, "--output", "from_focal", *options],
            ["--model", "swin", "--data", "parquet", *columns, "--output", "from_swin", *options],
            ["--model", trained[0], "--data", "scenes", "--output", "on", *options],
        ],
        folder=place,
    )
    assert [status for status, *_ in runs] == [0] * 3, runs
    for name, (_, said, _) in zip(("focal", "swin"), runs[:2], strict=True):
        assert f"{name} has weights that the model does not use: classifier.bias, classifier.weight" in said
        model = AutoModelForSemanticSegmentation.from_pretrained(place / f"from_{name}")
        before = (FocalForImageClassification if name == "focal" else SwinForImageClassification).from_pretrained(
            place / name
        )
        after = getattr(model.backbone, name).state_dict()
        before = {key: value for key, value in getattr(before, name).state_dict().items() if key in after}
        assert len(before) > 30
        torch.testing.assert_close({key: after[key] for key in before}, before, atol=1e-9, rtol=0)

    assert "anew" not in runs[2][1]
    before, after = (
        dict(AutoModelForSemanticSegmentation.from_pretrained(folder).named_parameters())
        for folder in (trained[0], place / "on")
    )
    torch.testing.assert_close(after, before, atol=1e-9, rtol=0)


class Pointwise(torch.nn.Module):
    """Classifies each pixel by its own value, so that windows, scales and mirroring change nothing."""

    def forward(self, pixel_values: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=torch.cat([pixel_values, -pixel_values], 1))


@pytest.mark.parametrize(("window", "stride"), [(8, 5), (8, 8), (16, 3), (100, 1)])
def test_windows_cover_an_image_once(window, stride):
    pixels = torch.randn(1, 3, 19, 30)
    expected = probabilities(Pointwise(), [pixels], (19, 30))
    torch.testing.assert_close(expected.sum(0), torch.ones(19, 30))
    answer = probabilities(Pointwise(), [pixels], (19, 30), window=window, stride=stride, flip=True, batch_size=3)
    torch.testing.assert_close(answer, expected)


def test_views_and_mirrors_are_one_mean(trained):
    model = AutoModelForSemanticSegmentation.from_pretrained(trained[0]).eval()
    processor = AutoImageProcessor.from_pretrained(trained[0])
    image, classes = draw_scene((60, 40), np.random.default_rng(5))
    with torch.no_grad():
        plain = model(**processor(image, return_tensors="pt")).logits
        plain = torch.nn.functional.interpolate(plain, (40, 60), mode="bilinear")[0].softmax(0)
        seen = whole_view([1.0, 1.5], processor, image, classes)
        views = [seen[name][None] for name in ("view0", "view1")]
        assert [tuple(view.shape[2:]) for view in views] == [(32, 48), (48, 72)]
        torch.testing.assert_close(probabilities(model, views[:1], (40, 60)), plain)
        torch.testing.assert_close(probabilities(model, views[:1], (40, 60), window=48, stride=7), plain)

        both = probabilities(model, views, (40, 60), flip=True)
        parts = [probabilities(model, [view], (40, 60), flip=True) for view in views]
        torch.testing.assert_close(both, sum(parts) / 2)
        mirrored = probabilities(model, [view.flip(-1) for view in views], (40, 60), flip=True)
        torch.testing.assert_close(mirrored.flip(-1), both)
        assert (both - probabilities(model, views, (40, 60))).abs().max() > 1e-3


def test_crops_of_image_and_map_go_together():
    args = Namespace(crop_size=32, resize=(0.5, 2.0), flip=True)
    processor = BeitImageProcessorPil()
    _, classes = draw_scene((60, 40), np.random.default_rng(1))
    classes[:, -8:] = NO_CLASS
    clean = Image.fromarray(COLOURS[classes % NO_CLASS].astype("uint8"))
    padded, agreeing, crops = 0, [], set()
    for seed in range(100):
        view = training_view(args, processor, clean, classes, random.Random(seed))
        pixels, labels = view["pixel_values"].permute(1, 2, 0).float(), view["labels"].long()
        assert pixels.shape == (32, 32, 3)
        assert labels.shape == (32, 32)
        counts = labels != NO_CLASS
        nearest = (pixels[:, :, None] - torch.tensor(COLOURS)).norm(dim=-1).argmin(-1)
        agreeing.append((nearest == labels)[counts].float().mean())
        grey = (pixels - 255 * torch.tensor(processor.image_mean)).abs().amax(-1) < 1
        padded += bool(grey.any())
        assert not counts[grey].any()
        crops.add(tuple(labels.flatten().tolist()))
    assert min(agreeing) > 0.9
    assert sum(agreeing) / 100 > 0.97
    assert 15 < padded < 60  # a third of the sizes is less than the crop's
    assert len(crops) > 60


def test_wrong_data_is_one_clear_line_before_training(place, trained):

    def spoilt(name: str) -> Path:
        folder = place / name
        for split in ("train", "validation"):
            write_scenes(folder / split, folder / "annotations" / split, 4, 3)
        (folder / "annotations" / "classes.txt").write_text("\n".join(NAMES))
        return folder / "annotations" / "validation" / "02.png"

    spoilt("lacking").unlink()
    Image.new("L", (9, 7)).save(spoilt("small"))
    Image.fromarray(np.full((36, 48), 3, "uint8")).save(spoilt("unnamed"))
    Image.new("RGB", (48, 36)).save(spoilt("coloured"))
    spoilt("nameless").parents[1].joinpath("classes.txt").unlink()
    spoilt("good")
    (place / "mapless" / "train").mkdir(parents=True)
    Image.new("RGB", (9, 9)).save(place / "mapless" / "train" / "0.png")
    (place / "other").mkdir()
    (place / "other" / "names.txt").write_text("\n".join([*NAMES, "green"]))

    start = ("--config", "config", *SMALL, "--output", "none")
    finished = ("--evaluate-only", "--model", trained[0], "--output", "none")
    cases = {
        ("--data", "lacking", *start): "1 images in .*/validation have no map: 02.png needs .*/validation/02.png.",
        ("--data", "small", *start): r"/02.png has 9 x 7 pixels, and its image 48 x 36: a map must be as large",
        ("--data", "unnamed", *start): r"/02.png has class 3, and the 3 named classes are 0 to 2: add a name for it",
        ("--data", "coloured", *start): r"02.png is not a readable map: .*expected one number for each pixel, not 3",
        ("--data", "nameless", *start): r"No such file: .*/annotations/classes.txt. It holds the classes' names",
        ("--data", "mapless", *start): r"--data mapless has no maps: expected FOLDER/train/",
        ("--data", "good", *start, "--batch-size", 1): "Batch normalization needs two images, .* --batch-size 1 and 4",
        ("--data", "good", *start, "--resize", 2, 1): "--resize 2 1: the smaller factor comes first",
        ("--data", "good", *start, "--evaluate-only"): "--evaluate-only measures a finished model",
        ("--data", "good", *start, "--stride", 9): "--stride is for --window",
        ("--data", "good", *finished, "--window", 9, "--stride", 10): "--stride 10 leaves gaps between windows of 9",
        ("--data", "good", *finished, "--classes", "other/names.txt"): r"has 3 classes, but --data good has 4\.",
    }  # fmt: skip
    runs = run_examples_in_turn(SCRIPT, [list(case) for case in cases], folder=place)
    for (case, expected), (status, _, complained) in zip(cases.items(), runs, strict=True):
        assert status == 1, (case, complained)
        errors = [line for line in complained.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1, complained
        assert re.search(expected, errors[0])
        assert "Traceback" not in complained
    assert not (place / "none").exists()
