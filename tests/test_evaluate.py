"""examples/evaluate.py: its numbers against those computed one picture at a time, and what it says to bad input."""

import csv
import json
import math
import random
from collections import Counter
from pathlib import Path

import datasets
import pytest
import torch
from PIL import Image
from transformers import (
    AutoModelForImageClassification,
    PreTrainedConfig,
    SwinConfig,
    ViTImageProcessorPil,
)

from common.models import default_processor
from example_runs import draw_two_colours, run_example, run_examples_in_turn, tiny_config
from focal_hf.compatibility_focal import AutoImageProcessor
from hub_server import serve


def save_classifier(folder: Path, config: PreTrainedConfig) -> Path:
    """Saves a model with random weights that are large enough for its logits to differ between pictures."""
    torch.manual_seed(0)
    config.initializer_range = 0.1
    AutoModelForImageClassification.from_config(config).save_pretrained(folder)
    default_processor(config, crop=0.8).save_pretrained(folder)
    return folder


@torch.no_grad()
def logits_of(model: Path, files: list[Path], **processing) -> torch.Tensor:
    """Computes the logits of one picture at a time."""
    processor = AutoImageProcessor.from_pretrained(model)
    model = AutoModelForImageClassification.from_pretrained(model).eval()
    views = (processor(Image.open(file).convert("RGB"), return_tensors="pt", **processing) for file in files)
    return torch.cat([model(**view).logits for view in views])


def read_report(folder: Path) -> tuple[dict, list[dict]]:
    assert {file.name for file in folder.iterdir()} == {"results.json", "classes.csv", "classes.png"}
    with Image.open(folder / "classes.png") as picture:
        assert picture.width > 1000
    with (folder / "classes.csv").open(newline="") as file:
        return json.loads((folder / "results.json").read_text()), list(csv.DictReader(file))


def test_results_do_not_depend_on_batches_and_processes(tmp_path):
    """The data has some of the model's classes in another order, and a broken picture. The last batch is smaller."""
    pictures = draw_two_colours(tmp_path / "data [1]*" / "val", {"cat": 9, "dog": 5, "train": 7})
    (pictures / "dog" / "broken.png").write_text("no picture")
    names = ["train", "cat", "a", "dog", "b", "c", "d", "e"]
    model = save_classifier(tmp_path / "model", tiny_config(id2label=dict(enumerate(names))))

    options = ("--model", model, "--data", tmp_path / "data [1]*", "--batch-size", 4)
    run = run_example("evaluate.py", *options, "--report", "one", folder=tmp_path)
    assert run.returncode == 0, run.stderr
    results, table = read_report(tmp_path / "one")

    files = sorted(file for file in pictures.glob("*/*.png") if file.name != "broken.png")
    truths = [names.index(file.parent.name) for file in files]
    ranked = logits_of(model, files).argsort(descending=True).tolist()
    top1 = [answers[0] == truth for answers, truth in zip(ranked, truths, strict=True)]
    top5 = [truth in answers[:5] for answers, truth in zip(ranked, truths, strict=True)]
    assert 0 < sum(top1) < sum(top5) < 21  # neither all right nor all wrong
    loss = torch.nn.functional.cross_entropy(logits_of(model, files), torch.tensor(truths)).item()
    assert (results["images"], results["top1"], results["top5"]) == (21, sum(top1) / 21, sum(top5) / 21)
    assert results["loss"] == pytest.approx(loss, abs=1e-5)
    assert results["image_size"] == [16, 16]
    assert [item.split(" (")[0] for item in results["unreadable"]] == [str(Path("val", "dog", "broken.png"))]
    assert "Not a readable image, left out: val/dog/broken.png" in run.stdout
    assert f"top-1 {100 * sum(top1) / 21:.2f} %, top-5 {100 * sum(top5) / 21:.2f} %" in run.stdout

    for row, name in zip(table, ["train", "cat", "dog"], strict=True):  # in the model's order
        own = [place for place, truth in enumerate(truths) if names[truth] == name]
        wrong = Counter(ranked[place][0] for place in own if not top1[place])
        assert (row["class"], int(row["images"])) == (name, len(own))
        assert float(row["top1"]) == sum(top1[place] for place in own) / len(own)
        assert float(row["top5"]) == sum(top5[place] for place in own) / len(own)
        frequent = {names[answer] for answer, count in wrong.items() if count == max(wrong.values())}
        assert row["most frequent wrong answer"] in (frequent or {""})

    run = run_example("evaluate.py", *options, "--report", "two", folder=tmp_path, processes=2)
    assert run.returncode == 0, run.stderr
    together, same_table = read_report(tmp_path / "two")
    assert together.pop("processes") == 2
    assert math.isclose(together["loss"], results["loss"], rel_tol=0)
    assert {key: results[key] for key in together if key != "images_per_second"} == {
        key: value for key, value in together.items() if key != "images_per_second"
    }
    assert same_table == table


def test_wordnet_ids_are_mapped_to_imagenet_classes(tmp_path):
    identifiers = [f"n{number:08}" for number in random.Random(0).sample(range(10**8), 1000)]
    counts = dict.fromkeys(identifiers, 1) | {identifiers[3]: 2, identifiers[70]: 3, identifiers[800]: 4}
    pictures = draw_two_colours(tmp_path / "data", counts)
    model = save_classifier(tmp_path / "model", tiny_config(num_labels=1000))
    run = run_example("evaluate.py", "--model", model, "--data", pictures, "--report", "report", folder=tmp_path)
    assert run.returncode == 0, run.stderr
    _, table = read_report(tmp_path / "report")
    expected = [(f"LABEL_{number}", counts[name]) for number, name in enumerate(sorted(identifiers))]
    assert [(row["class"], int(row["images"])) for row in table] == expected


def test_measures_swin_on_a_streamed_hub_data_set_at_another_size(tmp_path):
    """The data set has other columns, splits and class names. Each of two processes reads one of two files."""
    pictures = draw_two_colours(tmp_path / "drawn", {"x": 5, "y": 4, "z": 2})
    folder = datasets.load_dataset("imagefolder", data_dir=str(pictures), cache_dir=str(tmp_path / "arrow"))["train"]
    renamed = folder.rename_columns({"image": "img", "label": "kind"}).cast_column("kind", folder.features["label"])
    (tmp_path / "repository" / "data").mkdir(parents=True)
    for number, rows in enumerate((renamed.select(range(7)), renamed.select(range(7, 11)))):
        rows.to_parquet(tmp_path / "repository" / "data" / f"test-0000{number}-of-00002.parquet")

    model = save_classifier(
        tmp_path / "swin",
        SwinConfig(
            image_size=16, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=4, num_labels=3
        ),
    )
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(model)
    with serve(tmp_path / "repository", "org/kinds", "datasets"):
        run = run_example(
            *("evaluate.py", "--model", model, "--data", "org/kinds", "--streaming", "--labels-by-number"),
            *("--image-column", "img", "--label-column", "kind", "--image-size", 24, "--report", "report"),
            *("--batch-size", 3),
            folder=tmp_path,
            processes=2,
            online=True,
        )
    assert run.returncode == 0, run.stderr
    results, _ = read_report(tmp_path / "report")
    logits = logits_of(model, sorted(pictures.glob("*/*.png")), size={"height": 24, "width": 24})
    truths = torch.tensor([0] * 5 + [1] * 4 + [2] * 2)
    assert (results["images"], results["image_size"], results["top5"]) == (11, [24, 24], None)
    assert results["top1"] == (logits.argmax(-1) == truths).double().mean()
    assert results["loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, truths).item(), abs=1e-5)


def test_bad_input_is_one_clear_line_and_nothing_is_written(tmp_path):
    model = save_classifier(tmp_path / "model", tiny_config(id2label={0: "cat", 1: "dog"}))
    headless = tmp_path / "headless"
    AutoModelForImageClassification.from_pretrained(model).focal.save_pretrained(headless)
    AutoImageProcessor.from_pretrained(model).save_pretrained(headless)
    good = draw_two_colours(tmp_path / "good", {"cat": 1, "dog": 1})
    broken = draw_two_colours(tmp_path / "broken", {"cat": 1, "dog": 1})
    (broken / "dog" / "1.png").write_text("no picture")
    cows = draw_two_colours(tmp_path / "cows", {"cat": 1, "cow": 1})
    identifiers = draw_two_colours(tmp_path / "ids", {"n00000001": 1, "n00000002": 1})
    expected = {
        ("--data", "./nowhere"): "No such folder: --data ./nowhere.",
        ("--data", good, "--split", "val"): "has no folder called val: see --split.",
        ("--data", good, "--model", "./nothing"): "Cannot load --model ./nothing and its image processor: ",
        ("--data", good, "--model", headless): "lacks weights that FocalForImageClassification needs: classifier.bias",
        ("--data", good, "--report", model): f"--report {model} exists and is not an empty folder: name another one.",
        ("--data", good, "--report", headless / "config.json" / "out"): "config.json: Not a directory): name another",
        ("--data", good, "--label-column", "kind"): "has no column kind; its columns are image, label.",
        ("--data", good, "--image-column", "label"): "Column label of --data ",
        ("--data", cows): f"1 of the 2 classes of --data {cows} are not among those of --model {model}: cow;",
        ("--data", identifiers): "are 2 WordNet ids, and ",
        ("--data", broken, "--strict"): "Not a readable image: dog/1.png (UnidentifiedImageError",
    }
    lines = [["--model", model, "--report", "out", *options] for options in expected]
    answers = run_examples_in_turn("evaluate.py", lines, tmp_path)
    for (status, said, errors), message in zip(answers, expected.values(), strict=True):
        assert status == 1, errors
        lines = [line for line in errors.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1
        assert message in lines[0]
        assert "Traceback" not in errors
        assert "top-1" not in said
    assert not (tmp_path / "out").exists()
