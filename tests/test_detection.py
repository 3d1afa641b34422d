"""examples/finetune_detection.py: training on plain rectangles, and its parts."""

import json
import pickle
import random
from argparse import Namespace
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import (
    AutoModelForObjectDetection,
    BertConfig,
    DeformableDetrImageProcessorPil,
    RTDetrForObjectDetection,
    RTDetrImageProcessorPil,
    SwinConfig,
    SwinForImageClassification,
    pipeline,
)

from common.dense_evaluation import average_precision, ground_truth
from common.dense_losses import detection_loss
from common.dense_models import backbone_of, build_detector, build_segmenter, segmentation_processor
from common.detection_views import ObjectImages, View, training_sizes
from common.loading import Item
from common.models import load_processor
from common.options import Problem
from detection_scenes import CLASSIFIER, NAMES, STAGES, detector_config, draw_scenes, official, read, write_scenes
from example_runs import Run, assert_same, results, run_examples_in_turn, tiny_config
from focal_hf import FocalForImageClassification
from small_models import PILLOW_PROCESSORS

pytestmark = PILLOW_PROCESSORS
SCRIPT = "finetune_detection.py"
# Half of the pictures cropped, half mirrored, in several sizes.
OPTIONS = (
    *("--config", "rt_detr", "--data", "scenes", "--image-size", 64, "--batch-size", 8, "--clip", 1),
    *("--epochs", 12, "--learning-rate", 3e-3, "--save-every", 3),
)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("detection")
    write_scenes(place)
    for name in ("rt_detr", "deformable_detr"):
        detector_config(name).save_pretrained(place / name)
    return place


def pickle_data_sets() -> None:
    """Pickles what a DataLoader sends to its workers where they are not forked: on macOS, and since Python 3.14."""
    create = torch.utils.data.DataLoader.__init__

    def pickle_and_create(self, dataset: torch.utils.data.Dataset, **options) -> None:
        pickle.dumps((dataset, options["collate_fn"]))
        create(self, dataset, **options)

    torch.utils.data.DataLoader.__init__ = pickle_and_create


@pytest.fixture(scope="module")
def trained(place) -> tuple[Path, str]:
    """The output folder of an uninterrupted run, and what the run printed."""
    said, _ = Run(place, *OPTIONS, "--output", "whole/out", script=SCRIPT, prepare=pickle_data_sets).end()
    return place / "whole" / "out", said


def test_learns_to_find_rectangles(place, trained):
    folder, said = trained
    assert "Skipped 1 training images that cannot be read: " in said
    assert "98 training images of 38 to 64 pixels" in said
    best = results(folder)["best"]
    assert best["images"] == 13
    assert best["ap50"] > 0.35
    assert [*best["classes"]] == NAMES
    assert best["ap"] == pytest.approx(np.mean([*best["classes"].values()]))
    card = (folder / "README.md").read_text()
    assert str(place) not in card
    assert "pipeline_tag: object-detection" in card
    with Image.open(folder / "detections.png") as drawn:
        assert drawn.width > 2 * drawn.height  # six pictures beside each other, what was found below the truth

    detector = pipeline("object-detection", model=str(folder))
    assert isinstance(detector.model, RTDetrForObjectDetection)
    content = json.loads((place / "scenes" / "annotations" / "instances_validation.json").read_text())
    answers = []
    for image in content["images"]:
        for found in detector(str(place / "scenes" / "validation" / image["file_name"]), threshold=0.0):
            left, top, right, bottom = (found["box"][side] for side in ("xmin", "ymin", "xmax", "ymax"))
            box = {"bbox": [left, top, right - left, bottom - top], "score": found["score"]}
            answers.append({"image_id": image["id"], "category_id": 2 * NAMES.index(found["label"]) + 7} | box)
    # The pipeline rounds boxes to whole pixels.
    assert official(content, answers)[1] == pytest.approx(best["ap50"], abs=0.05)


def test_killed_goes_on_to_the_same_bytes(place):
    """Of two epochs, in the first or the second one."""
    options = (*OPTIONS, "--epochs", 2, "--output")
    folder = place / "killed" / "out"
    Run(place, *options, place / "unbroken" / "out", script=SCRIPT).end()
    Run(place, *options, folder, script=SCRIPT).kill_after(folder / "checkpoints", random.randrange(3, 22, 3))
    said, _ = Run(place, *options, folder, "--resume", script=SCRIPT).end()
    assert "Resuming after step" in said
    assert_same(folder, place / "unbroken" / "out")


def test_processes_divide_the_same_work(place):
    """Without batch norms, and with pictures of one size, nothing depends on the other images of a batch.

    It hardly learns, so that no box is matched to another object because of a rounding.
    """
    options = ("--config", "deformable_detr", "--data", "scenes", "--image-size", 64, "--smallest-size", 64)
    options += ("--epochs", 1, "--learning-rate", 1e-7, "--crop-scale", 1)
    Run(place, *options, "--output", "one", "--batch-size", 8, script=SCRIPT).end()
    Run(place, *options, "--output", "two", "--batch-size", 4, processes=2, script=SCRIPT).end()
    assert results(place / "two")["processes"] == 2
    (one,), (two,) = (results(place / name)["history"] for name in ("one", "two"))
    assert two["images"] == one["images"] == 13
    for name in ("train_loss", "gradient_norm", "ap"):
        assert two[name] == pytest.approx(one[name], rel=1e-3, abs=1e-4)


def test_loss_of_a_batch_is_the_mean_of_its_parts(place, trained):
    """This holds for any division of images with more and fewer objects among batches and processes."""
    model = AutoModelForObjectDetection.from_pretrained(trained[0]).eval()
    loss = detection_loss(model, objects=1.2)
    draw = torch.Generator().manual_seed(0)
    labels = [
        {"class_labels": torch.arange(count) % 3, "boxes": torch.rand(count, 4, generator=draw) * 0.5 + 0.2}
        for count in (3, 0, 1, 5)
    ]
    pixels = torch.randn(4, 3, 64, 64, generator=draw)
    batch = {"pixel_values": pixels, "pixel_mask": torch.ones(4, 64, 64, dtype=torch.long), "labels": labels}
    parts = [{name: values[part] for name, values in batch.items()} for part in (slice(0, 1), slice(2, 4))]
    parts += [{name: values[1:2] for name, values in batch.items()}]
    weights = [1, 2, 1]
    divided = sum(weight * loss(model, part) for weight, part in zip(weights, parts, strict=True)) / 4
    torch.testing.assert_close(divided, loss(model, batch))


def test_average_precision_equals_pycocotools(place, tmp_path):
    content = draw_scenes(tmp_path, "train", 30)
    content["annotations"][0]["iscrowd"] = 1
    content["annotations"][1]["bbox"][0] = -3
    (tmp_path / "annotations" / "instances_train.json").write_text(json.dumps(content))
    draw_scenes(tmp_path, "validation", 2)
    data, _, names, said = read(tmp_path)
    assert said[0] == "Training data: 1 box(es) extend beyond the image: clipped."
    assert said[1] == "Training data: 1 box(es) mark crowds: left out."
    id2label = dict(enumerate(names))
    truth = ground_truth(data["labels"], {name: label for label, name in id2label.items()})

    draw = np.random.default_rng(0)
    predictions, answers = {}, []
    for image in content["images"]:
        found = [one for one in content["annotations"] if one["image_id"] == image["id"] and draw.random() < 0.8]
        boxes = [np.array(one["bbox"]) + draw.normal(0, 1.5, 4) for one in found]
        labels = [(one["category_id"] - 7) // 2 if draw.random() < 0.8 else int(draw.integers(3)) for one in found]
        scores = draw.random(len(found))
        corners = [[*box[:2], *(box[:2] + box[2:])] for box in boxes]
        predictions[image["id"]] = {"boxes": np.reshape(corners, (-1, 4)), "labels": labels, "scores": scores}
        for box, label, score in zip(boxes, labels, scores.tolist(), strict=True):
            category = {"image_id": image["id"], "category_id": 2 * label + 7}
            answers.append(category | {"bbox": box.tolist(), "score": score})
    measured = average_precision(truth, predictions, id2label)
    expected = official(content, answers)
    assert 0.2 < measured["ap"] < 0.9
    for name, value in zip(("ap", "ap50", "ap75", "ap_small"), expected, strict=False):
        assert measured[name] == pytest.approx(value, abs=1e-9)
    assert expected[4:6] == [-1, -1]
    assert measured["ap_medium"] is measured["ap_large"] is None
    assert np.mean([*measured["classes"].values()]) == pytest.approx(measured["ap"])

    perfect = {}
    for index, image in enumerate(data["labels"]):
        boxes = np.reshape(image["bbox"], (-1, 4))
        corners = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1)
        labels = [names.index(name) for name in image["name"]]
        perfect[index] = {"boxes": corners, "labels": labels, "scores": np.ones(len(labels))}
    assert average_precision(truth, perfect, id2label)["ap"] == pytest.approx(1)
    nothing = {index: {"boxes": np.zeros((0, 4)), "labels": [], "scores": []} for index in perfect}
    assert average_precision(truth, nothing, id2label)["ap"] == 0


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    width=st.integers(40, 90),
    height=st.integers(40, 90),
    place=st.tuples(*[st.floats(0, 0.6)] * 2),
    size=st.tuples(*[st.floats(0.3, 0.9)] * 2),
    seed=st.integers(0, 2**32),
    shorter=st.sampled_from([None, 64]),
)
def test_boxes_stay_around_their_pixels(width, height, place, size, seed, shorter):
    """A box fits its red rectangle after cropping, mirroring, resizing and padding."""
    left, top = (round(share * side) for share, side in zip(place, (width, height), strict=True))
    right, bottom = min(width, left + round(size[0] * width)), min(height, top + round(size[1] * height))
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[top:bottom, left:right] = (255, 0, 0)
    target = {
        "bbox": [[left, top, right - left, bottom - top]],
        "name": ["red"],
        "iscrowd": [0],
        "size": (width, height),
    }
    sizes = {"shortest_edge": shorter, "longest_edge": 100} if shorter else {"height": 64, "width": 96}
    kind = DeformableDetrImageProcessorPil if shorter else RTDetrImageProcessorPil
    processor = kind(size=sizes, do_normalize=False)
    args = Namespace(crop_scale=0.3, flip=True)
    view = View(processor, {"red": 0}, training_sizes(processor, 32, 8), args)
    samples = [
        view(Image.fromarray(pixels), target, random.Random(seed + number))
        | {"size": torch.tensor([height, width]), "index": number, "broken": None}
        for number in range(2)
    ]
    batch = ObjectImages(None, None, step=32).collate(samples)
    rows, columns = batch["pixel_values"].shape[-2:]
    assert rows % 32 == columns % 32 == 0
    for image, mask, labels in zip(batch["pixel_values"], batch["pixel_mask"], batch["labels"], strict=True):
        assert not image[:, mask == 0].any()
        found = (image[0] > 0.5).nonzero()
        for centre_x, centre_y, box_width, box_height in labels["boxes"].tolist():
            low, high = found.amin(0), found.amax(0) + 1
            box = [
                centre_x - box_width / 2,
                centre_y - box_height / 2,
                centre_x + box_width / 2,
                centre_y + box_height / 2,
            ]
            drawn = [low[1] / columns, low[0] / rows, high[1] / columns, high[0] / rows]
            assert np.abs(np.array(box) - drawn).max() * max(rows, columns) <= 1.5


@pytest.mark.parametrize("kind", ["focal", "swin"])
def test_classifier_becomes_the_backbone(place, tmp_path, kind):
    torch.manual_seed(0)
    if kind == "focal":
        classifier = FocalForImageClassification(tiny_config(**CLASSIFIER))
    else:
        classifier = SwinForImageClassification(SwinConfig(**STAGES, image_size=64))
    classifier.save_pretrained(tmp_path / "classifier")
    args = Namespace(model=str(tmp_path / "classifier"), config=None, head=str(place / "rt_detr"), image_size=96)
    said = []
    model, processor = build_detector(args, NAMES, said.append)
    assert said[0].startswith(
        f"{args.model} has weights that the model does not use: classifier.bias, classifier.weight"
    )
    assert said[1:] == [f"{args.model} is the backbone. The head (rt_detr) is new, for the classes of the data."]
    assert (model.config.id2label, dict(processor.size)["height"]) == (dict(enumerate(NAMES)), 96)
    weights, backbone = classifier.base_model.state_dict(), backbone_of(model).state_dict()
    same = [name for name in backbone if any(name.endswith(other) for other in weights)]
    assert len(same) > 0.9 * len(weights) - 4
    assert not any("hidden_states_norms" in name for name in same)
    for name in same:
        (other,) = [other for other in weights if name.endswith(other)]
        torch.testing.assert_close(backbone[name], weights[other])
    model.train()
    labels = [{"class_labels": torch.tensor([0]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.2]])}]
    batch = {"pixel_values": torch.randn(1, 3, 96, 96), "pixel_mask": torch.ones(1, 96, 96), "labels": labels}
    detection_loss(model, 1)(model, batch).backward()
    assert [name for name, weight in model.named_parameters() if weight.grad is None] == []


def test_coco_images_are_in_the_column_that_the_user_names(place):
    train, held, _, _ = read(place / "scenes", image_column="picture")
    assert train["rows"].column_names == held["rows"].column_names == ["picture"]


@pytest.mark.parametrize("build", [build_detector, build_segmenter])
def test_network_without_stages_is_refused(tmp_path, build):
    BertConfig().save_pretrained(tmp_path / "bert")
    args = Namespace(model=str(tmp_path / "bert"), config=None, head="rt_detr", drop_path=None)
    with pytest.raises(Problem, match=r"/bert \(bert\) is no backbone with stages, as Focal and Swin are\.$"):
        build(args, NAMES, print)


def test_network_of_two_stages_is_refused(tmp_path):
    tiny_config().save_pretrained(tmp_path)
    args = Namespace(config=str(tmp_path), model=None, head_channels=16, drop_path=None)
    with pytest.raises(Problem, match="has 2 stages, but UperNet takes at least 3: use another model"):
        build_segmenter(args, NAMES, print)


@pytest.mark.parametrize("content", ['{"size": ', "[]", '{"image_processor_type": "Absent"}'])
def test_damaged_image_processor_is_no_missing_one(tmp_path, content):
    """A checkpoint without an image processor gets a default one, and an unusable one is an error."""
    config = detector_config("rt_detr")
    RTDetrForObjectDetection(config).save_pretrained(tmp_path)
    args = Namespace(config=None, model=str(tmp_path), crop=0.875, image_size=None, crop_size=32, reduce_labels=False)
    loaders = (
        lambda: load_processor(args, config.backbone_config, print),
        lambda: build_detector(args, NAMES, print)[1],
        lambda: segmentation_processor(args, print),
    )
    for load in loaders:
        assert load().do_normalize
    (tmp_path / "preprocessor_config.json").write_text(content)
    for load in loaders:
        with pytest.raises(Problem, match=r"Cannot load the image processor of --model .*: repair its preprocessor_"):
            load()


def test_data_set_with_a_column_of_objects_is_read_as_coco_is(place, tmp_path):
    coco, _, names, _ = read(place / "scenes")
    category = datasets.ClassLabel(names=NAMES)
    objects = datasets.List({"bbox": datasets.List(datasets.Value("float64"), 4), "category": category})
    rows = {"image": [], "objects": []}
    for row, image in zip(coco["rows"].cast_column("image", datasets.Image(decode=False)), coco["labels"], strict=True):
        rows["image"].append({"path": None, "bytes": Path(row["image"]["path"]).read_bytes()})
        found = zip(image["bbox"], image["name"], strict=True)
        rows["objects"].append([{"bbox": box, "category": NAMES.index(name)} for box, name in found])
    features = datasets.Features({"image": datasets.Image(), "objects": objects})
    datasets.Dataset.from_dict(rows, features).to_parquet(tmp_path / "train-00000.parquet")
    train, held, found, said = read(tmp_path)
    assert found == names == NAMES
    assert said[0].startswith("No split called validation: holding out 24 of 98 training images, 25% of all (seed 0).")
    rest = [row for row in range(98) if row not in {image["id"] for image in held["labels"]}]
    assert train["labels"] == [coco["labels"][row] for row in rest]


def change(content: dict, kind: str) -> None:
    """Makes an annotation file wrong."""
    images, annotations = content["images"], content["annotations"]
    if kind == "lost":
        images[3]["file_name"] = "lost.png"
    elif kind == "category":
        annotations[2]["category_id"] = 99
    elif kind == "nan":
        annotations[2]["bbox"][2] = float("nan")
    elif kind == "twice":
        images[4]["file_name"] = images[3]["file_name"]
    elif kind == "unlisted":
        annotations[2]["image_id"] = 77
    elif kind == "three":
        annotations[2]["bbox"].pop()
    elif kind == "boxless":
        del annotations[2]["bbox"]
    elif kind == "area":
        annotations[2]["area"] = "12"
    elif kind == "crowd":
        annotations[2]["iscrowd"] = "0"
    elif kind == "unnamed":
        content["categories"] = [1, 2]


WRONG = {
    "lost": "lists lost.png, and there is no ",
    "category": "has category_id 99, which is not in categories.",
    "nan": ", nan, ",
    "twice": "has two images with the file 3.png: remove one.",
    "unlisted": "has image_id 77, which is not in images.",
    "three": "expected four numbers, [left, top, width, height].",
    "boxless": "has no bbox, or a wrong one, in entry 2 of annotations: {",
    "area": "has no area, or a wrong one, in entry 2 of annotations: {",
    "crowd": "Each needs image_id, category_id, bbox.",
    "unnamed": "has no id, or a wrong one, in entry 0 of categories: 1. Each needs id, name.",
}


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_annotations_are_found_before_training(tmp_path, kind):
    content = draw_scenes(tmp_path, "train", 8)
    change(content, kind)
    (tmp_path / "annotations" / "instances_train.json").write_text(json.dumps(content))
    with pytest.raises(Problem) as error:
        read(tmp_path)
    assert WRONG[kind] in str(error.value)
    assert "instances_train.json" in str(error.value)


def test_errors_are_one_line(place):
    lines = [
        (
            ["--config", "rt_detr", "--data", "scenes", "--train-split", "train2017"],
            "no split called train2017, only tr",
        ),
        (
            ["--config", "rt_detr", "--data", "rt_detr"],
            "--data rt_detr has no annotations: expected images in rt_detr/",
        ),
        (["--config", "nothing", "--data", "scenes"], "No such file or folder: --config nothing."),
        (["--model", "rt_detr", "--data", "scenes"], "Cannot build a detector from --model rt_detr"),
        (
            ["--config", "rt_detr", "--data", "scenes", "--image-size", 64, "--smallest-size", 65],
            "--smallest-size 65 is above the 64 pixels of --image-size.",
        ),
        (
            ["--model", "none", "--head", "rt_detr", "--data", "scenes", "--output", "rt_detr", "--overwrite"],
            "--output rt_detr contains the --head of this run: name another folder.",
        ),
    ]
    answers = run_examples_in_turn(SCRIPT, [["--output", "none", *line] for line, _ in lines], place)
    for (line, expected), (status, _, complained) in zip(lines, answers, strict=True):
        errors = [text for text in complained.splitlines() if text.startswith("error: ")]
        assert status == 1, (line, complained)
        assert len(errors) == 1
        assert expected in errors[0]
    assert not (place / "none").exists()


def test_unreadable_and_turned_pictures(tmp_path):
    """EXIF data may rotate a picture. The size in the annotations shows whether they are for the rotated picture."""
    draw_scenes(tmp_path, "train", 4)
    draw_scenes(tmp_path, "validation", 1)
    data, _, names, _ = read(tmp_path)
    processor = RTDetrImageProcessorPil(size={"height": 48, "width": 64})
    view = View(processor, {name: label for label, name in enumerate(names)}, [{"height": 48, "width": 64}])
    file = tmp_path / "train" / "0.jpg"
    image = Image.open(tmp_path / "train" / "0.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    image.save(file, exif=exif)
    for size, broken in (((64, 48), False), ((48, 64), False), ((64, 50), True)):
        target = data["labels"][0] | {"size": size}
        images = ObjectImages(lambda key, target=target: ({"path": str(file), "bytes": None}, target), view, step=1)
        sample = images[Item(0)]
        assert bool(sample["broken"]) == broken
        assert sample["index"] == (-1 if broken else 0)
        assert sample["size"].tolist() == ([64, 64] if broken else [*size[::-1]])
