"""examples/make_scenes.py: masks, boxes and class maps that agree with each other and with the pixels."""

import json
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from example_runs import run_examples_in_turn
from forked_scripts import ForkedScript

OPTIONS = ("--train", 30, "--validation", 4, "--size", 64)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("scenes")
    runs = [["strokes", *OPTIONS], ["scans", *OPTIONS, "--scans"], ["again", *OPTIONS, "--scans"], ["again", *OPTIONS]]
    answers = run_examples_in_turn("make_scenes.py", runs, place)
    assert [status for status, *_ in answers] == [0, 0, 0, 1]
    assert answers[3][2] == "error: again exists: name a new folder.\n"
    return place


@pytest.mark.parametrize("kind", ["strokes", "scans"])
def test_masks_boxes_and_classes_agree(place, kind):
    covered = []
    for split, count in (("train", 30), ("validation", 4)):
        content = json.loads((place / kind / "annotations" / f"instances_{split}.json").read_text())
        names = {category["id"]: category["name"] for category in content["categories"]}
        lines = (place / kind / "annotations" / "classes.txt").read_text().split()
        assert len(content["images"]) == count
        for image in content["images"]:
            pixels = np.asarray(Image.open(place / kind / split / image["file_name"]))
            classes = np.asarray(Image.open(place / kind / "annotations" / split / image["file_name"]))
            assert pixels.shape == (64, 64, 3)
            expected = np.zeros((64, 64), "uint8")
            for one in content["annotations"]:
                if one["image_id"] != image["id"]:
                    continue
                mask = coco_mask.decode(one["segmentation"]).astype(bool)
                rows, cols = np.nonzero(mask)
                left, top = cols.min(), rows.min()
                assert one["bbox"] == [left, top, cols.max() + 1 - left, rows.max() + 1 - top]
                assert one["area"] == mask.sum()
                assert lines[one["category_id"]] == names[one["category_id"]]
                assert not expected[mask].any()  # no pixel is of two digits
                expected[mask] = one["category_id"]
                covered.append(mask.sum() / (one["bbox"][2] * one["bbox"][3]))
                if kind == "scans":  # as scanned: grey on a photograph in colour
                    assert np.ptp(pixels[mask].astype(int), axis=1).max() == 0
            np.testing.assert_array_equal(classes, expected)
    # Of a scan's square, others cover three tenths at most; a digit's strokes leave much of their box free.
    assert (np.mean(covered) > 0.9) == (min(covered) > 0.69) == (kind == "scans")


def test_equal_options_give_equal_scenes(place):
    files = sorted(file.relative_to(place / "scans") for file in (place / "scans").rglob("*.*"))
    assert len(files) == 2 * 34 + 3
    for file in files:
        assert (place / "scans" / file).read_bytes() == (place / "again" / file).read_bytes()


def test_a_killed_run_leaves_no_scenes(tmp_path):
    killed = ForkedScript("make_scenes.py", "scenes", "--train", 10**6, folder=tmp_path)
    while not any(tmp_path.rglob("*.png")):
        assert killed.poll() is None
        time.sleep(0.01)
    killed.kill()
    assert not (tmp_path / "scenes").exists()
    ((status, *_),) = run_examples_in_turn("make_scenes.py", [["scenes", *OPTIONS]], tmp_path)
    assert status == 0
    assert [path.name for path in tmp_path.iterdir()] == ["scenes"]


def test_folder_below_a_file_is_one_clear_line(tmp_path):
    (tmp_path / "file").touch()
    ((status, _, complained),) = run_examples_in_turn("make_scenes.py", [["file/scenes", *OPTIONS]], tmp_path)
    assert status == 1
    assert "error: Cannot write file/scenes: NotADirectoryError: " in complained
    assert "Traceback" not in complained
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
