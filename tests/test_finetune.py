"""examples/: real processes that train a tiny Focal on pictures in folders, and what they say to bad input."""

import json
import random
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest
import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    ConvNextImageProcessorPil,
    ResNetConfig,
    ResNetForImageClassification,
    pipeline,
)

from common.data import random_view
from common.files import save_model
from common.models import decay_groups, default_processor
from common.options import Problem
from example_runs import (
    COLOURS,
    LAUNCH,
    draw_pictures,
    results,
    run_example,
    run_examples_in_turn,
    tiny_config,
)
from focal_hf import FocalForImageClassification
from focal_hf.compatibility_focal import AutoImageProcessor
from hub_server import serve
from small_models import PILLOW_PROCESSORS


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Three colours to train on; 7 pictures to validate on, an odd number."""
    draw_pictures(tmp_path / "data" / "train", {"red": 9, "green": 8, "blue": 8})
    draw_pictures(tmp_path / "data" / "validation", {"red": 3, "green": 2, "blue": 2})
    return tmp_path / "data"


@pytest.fixture
def config(tmp_path: Path) -> Path:
    tiny_config().save_pretrained(tmp_path / "config")
    return tmp_path / "config"


@pytest.fixture
def finetune(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess]:
    """Runs examples/finetune.py with tmp_path as working folder."""

    def run(*arguments: object, **options) -> subprocess.CompletedProcess:
        return run_example("finetune.py", *arguments, folder=tmp_path, **options)

    return run


def validation_loss(folder: Path, data: Path) -> float:
    """Mean loss of a saved model over the validation pictures, one by one."""
    model = AutoModelForImageClassification.from_pretrained(folder).eval()
    processor = AutoImageProcessor.from_pretrained(folder)
    losses = []
    for file in data.glob("validation/*/*.png"):
        pixels = processor(Image.open(file), return_tensors="pt")
        label = torch.tensor([model.config.label2id[file.parent.name]])
        losses.append(model(**pixels, labels=label).loss.item())
    return sum(losses) / len(losses)


def test_trained_model_loads_and_predicts(finetune, data, config, tmp_path):
    output = tmp_path / "runs" / "colours"
    run = finetune(
        *("--config", config, "--data", data, "--output", output, "--batch-size", 4),
        *("--epochs", 6, "--learning-rate", 5e-3, "--accumulate", 2),
    )
    assert run.returncode == 0, run.stderr

    model = AutoModelForImageClassification.from_pretrained(output)
    assert isinstance(model, FocalForImageClassification)
    assert model.config.id2label == {0: "blue", 1: "green", 2: "red"}
    assert model.config.label2id == {"blue": 0, "green": 1, "red": 2}
    processor = AutoImageProcessor.from_pretrained(output)
    assert processor(Image.new("RGB", (90, 60)), return_tensors="pt")["pixel_values"].shape == (1, 3, 16, 16)
    classify = pipeline("image-classification", model=str(output))
    files = sorted(data.glob("validation/*/*.png"))
    answers = [answer[0]["label"] for answer in classify([str(file) for file in files], top_k=1)]
    correct = sum(answer == file.parent.name for answer, file in zip(answers, files, strict=True))

    written = results(output)
    assert len(written["history"]) == 6
    assert written["best"]["accuracy"] == max(epoch["accuracy"] for epoch in written["history"])
    assert written["best"]["correct"] == correct  # what is saved is the best model, with the pictures as it saw them
    assert written["best"]["accuracy"] > 0.7  # plain colours: a third by chance
    assert "24 steps" in run.stdout  # ceil(25 / 4) = 7 batches, two a step: 4 steps, 6 times
    assert "18/24" in run.stderr or "24/24" in run.stderr  # the progress bar
    assert [path.name for path in output.parent.iterdir()] == ["colours"]  # nothing left that was written aside


def test_two_processes_count_every_image_once(finetune, data, config, tmp_path):
    run = finetune(
        *("--config", config, "--data", data, "--output", tmp_path / "two", "--batch-size", 2, "--epochs", 2),
        processes=2,
    )
    assert run.returncode == 0, run.stderr
    written = results(tmp_path / "two")
    assert written["processes"] == 2
    assert [epoch["images"] for epoch in written["history"]] == [7, 7]  # not 8, what two equal shares come to

    assert validation_loss(tmp_path / "two", data) == pytest.approx(written["best"]["loss"], abs=1e-5)


def test_keeps_the_best_epoch_not_the_last(finetune, data, config, tmp_path):
    """Validation pictures under wrong names: the more is learnt, the worse it gets."""
    for old, new in (("red", "spare"), ("green", "red"), ("blue", "green"), ("spare", "blue")):
        (data / "validation" / old).rename(data / "validation" / new)
    run = finetune(
        *("--config", config, "--data", data, "--output", tmp_path / "out", "--batch-size", 4),
        *("--epochs", 4, "--learning-rate", 5e-3),
    )
    assert run.returncode == 0, run.stderr
    written = results(tmp_path / "out")
    assert written["best"]["epoch"] < 4
    assert written["best"]["loss"] < written["history"][-1]["loss"]
    assert len(written["history"]) == 4
    assert validation_loss(tmp_path / "out", data) == pytest.approx(written["best"]["loss"], abs=1e-5)
    assert validation_loss(tmp_path / "out" / "last", data) == pytest.approx(written["history"][-1]["loss"], abs=1e-5)
    for folder, entry in ((tmp_path / "out", written["best"]), (tmp_path / "out" / "last", written["history"][-1])):
        assert f"| Cross-entropy | {entry['loss']:.4f} |" in (folder / "README.md").read_text()


def test_same_seed_same_result(finetune, data, config, tmp_path):
    losses = []
    for name, seed in (("first", 1), ("second", 1), ("third", 2)):
        run = finetune(
            *("--config", config, "--data", data, "--output", tmp_path / name, "--epochs", 1, "--seed", seed)
        )
        assert run.returncode == 0, run.stderr
        losses.append(results(tmp_path / name)["history"][0]["train_loss"])
    assert losses[0] == losses[1] != losses[2]


class TestStartingFromACheckpoint:
    @pytest.fixture
    def checkpoint(self, tmp_path: Path) -> Callable[..., Path]:
        """Saves a tiny model with the given classes; its processor halves the brightness, to be told from another."""

        def save(*names: str) -> Path:
            model = FocalForImageClassification(tiny_config(id2label=dict(enumerate(names))))
            torch.nn.init.constant_(model.classifier.bias, 7.0)
            model.save_pretrained(tmp_path / "start")
            AutoImageProcessor.from_pretrained(self.write_processor(tmp_path)).save_pretrained(tmp_path / "start")
            return tmp_path / "start"

        return save

    @staticmethod
    def write_processor(folder: Path) -> Path:
        (folder / "processor").mkdir()
        settings = {
            "image_processor_type": "BitImageProcessor",
            "size": {"shortest_edge": 18},
            "crop_size": {"height": 16, "width": 16},
            "rescale_factor": 1 / 510,
            "image_mean": [0.5] * 3,
            "image_std": [0.5] * 3,
        }
        (folder / "processor" / "preprocessor_config.json").write_text(json.dumps(settings))
        return folder / "processor"

    def one_epoch(self, finetune, start: Path, data: Path) -> tuple[FocalForImageClassification, str]:
        """The model after training with steps too small to change anything, and what was printed."""
        output = start.with_name("output")
        run = finetune("--model", start, "--data", data, "--output", output, "--epochs", 1, "--learning-rate", 1e-12)
        assert run.returncode == 0, run.stderr
        assert AutoImageProcessor.from_pretrained(output).rescale_factor == 1 / 510
        return AutoModelForImageClassification.from_pretrained(output), run.stdout

    def test_with_the_same_classes_keeps_the_classifier_and_their_order(self, finetune, checkpoint, data):
        model, said = self.one_epoch(finetune, checkpoint("red", "blue", "green"), data)
        assert model.config.id2label == {0: "red", 1: "blue", 2: "green"}
        assert model.classifier.bias.tolist() == pytest.approx([7.0] * 3)
        assert "newly initialized" not in said

    @pytest.mark.parametrize("names", [("cat", "dog", "cow"), ("cat", "dog")], ids=["as_many", "fewer"])
    def test_with_other_classes_makes_a_new_classifier(self, finetune, checkpoint, data, names):
        start = checkpoint(*names)
        model, said = self.one_epoch(finetune, start, data)
        assert model.config.id2label == {0: "blue", 1: "green", 2: "red"}
        assert model.classifier.weight.shape == (3, 16)
        assert model.classifier.bias.abs().max() < 1
        assert model.classifier.weight.std() > 0
        assert "its classifier is newly initialized for the 3 classes of the data" in said
        before = FocalForImageClassification.from_pretrained(start)
        torch.testing.assert_close(model.focal.state_dict(), before.focal.state_dict())


@PILLOW_PROCESSORS
def test_a_model_that_tells_no_size_has_that_of_its_image_processor(finetune, data, tmp_path):
    """A classifier of other layers, too: a linear one behind others."""
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3)
    ResNetForImageClassification(config).save_pretrained(tmp_path / "resnet")
    ConvNextImageProcessorPil(size={"shortest_edge": 24}).save_pretrained(tmp_path / "resnet")
    run = finetune("--model", "resnet", "--data", data, "--output", tmp_path / "out", "--epochs", 1)
    assert run.returncode == 0, run.stderr
    assert "resnet has other classes: its classifier is newly initialized for the 3 classes of the data." in run.stdout
    assert "25 training images of 24 x 24 pixels" in run.stdout
    assert type(AutoModelForImageClassification.from_pretrained(tmp_path / "out")) is ResNetForImageClassification


def test_without_a_validation_split_holds_out_a_share_of_each_class(finetune, config, tmp_path):
    folder = draw_pictures(tmp_path / "flat", {"red": 20, "green": 12, "blue": 2})
    options = ("--config", config, "--data", folder, "--validation-fraction", 0.25, "--epochs", 1)
    run = finetune(*options, "--output", tmp_path / "out")
    assert run.returncode == 0, run.stderr
    assert "No split called validation: holding out 9 of 34 training images, 25% of each class" in run.stdout
    assert results(tmp_path / "out")["best"]["images"] == 5 + 3 + 1


def test_reads_labels_that_are_text_from_a_column_of_its_own(finetune, config, tmp_path):
    (tmp_path / "table").mkdir()
    lines = ["file_name,colour"]
    for name in COLOURS:
        for number in range(4):
            Image.new("RGB", (16, 16), COLOURS[name]).save(tmp_path / "table" / f"{name}{number}.png")
            lines.append(f"{name}{number}.png,{name}")
    (tmp_path / "table" / "metadata.csv").write_text("\n".join(lines))
    run = finetune(
        *("--config", config, "--data", "table", "--label-column", "colour", "--output", tmp_path / "out"),
        *("--epochs", 1),
    )
    assert run.returncode == 0, run.stderr
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    assert model.config.id2label == {0: "blue", 1: "green", 2: "red"}


def test_reads_a_data_set_and_a_model_from_the_hub_and_pushes_the_best(finetune, data, config, tmp_path):
    """By name, from a server in the Hub's place, with columns and splits of its own."""
    folders = datasets.load_dataset("imagefolder", data_dir=str(data), cache_dir=str(tmp_path / "arrow"))
    (tmp_path / "repository" / "data").mkdir(parents=True)
    for split, name in (("train", "train"), ("validation", "test")):
        renamed = folders[split].rename_columns({"image": "img", "label": "colour"})
        renamed.to_parquet(tmp_path / "repository" / "data" / f"{name}-00000-of-00001.parquet")
    columns = ("--image-column", "img", "--label-column", "colour", "--validation-split", "test")
    with serve(tmp_path / "repository", "org/colours", "datasets"):
        arguments = ("--config", config, "--data", "org/colours", *columns, "--output", tmp_path / "one")
        run = finetune(*arguments, "--epochs", "1", online=True)
    assert run.returncode == 0, run.stderr
    assert results(tmp_path / "one")["best"]["images"] == 7
    assert AutoConfig.from_pretrained(tmp_path / "one").id2label == {0: "blue", 1: "green", 2: "red"}

    # A run that reads a model from the Hub pushes the best model there.
    with serve(tmp_path / "one", "org/focal"):
        options = ("--model", "org/focal", "--data", data, "--output", tmp_path / "two", "--epochs", "1")
        run = finetune(*options, "--push-to-hub", "org/focal", online=True)
    assert run.returncode == 0, run.stderr
    assert "newly initialized" not in run.stdout
    written, on_the_hub = (
        {file.name: file.read_bytes() for file in (tmp_path / output).iterdir() if file.is_file()}
        for output in ("two", "one")
    )
    assert on_the_hub == written
    assert {"model.safetensors", "config.json", "preprocessor_config.json", "README.md"} <= written.keys()
    assert 'model="org/focal"' in written["README.md"].decode()


def test_repository_is_created_after_all_checks_and_before_training(finetune, data, config, tmp_path):
    options = ("--config", config, "--output", tmp_path / "out", "--push-to-hub")
    with serve(tmp_path / "repository", "org/focal"):
        run = finetune(*options, "org/focal", "--data", "./nowhere", online=True)
        assert "error: No such folder: --data ./nowhere" in run.stderr
        run = finetune(*options, "other/focal", "--data", data, online=True)
        assert "error: Cannot create the repository --push-to-hub other/focal: HfHubHTTPError: " in run.stderr
    assert not (tmp_path / "repository").exists()
    assert not (tmp_path / "out").exists()


def test_stopped_while_saving_leaves_the_earlier_model_whole(tmp_path):
    class FullDisk:
        def save_pretrained(self, folder: Path):
            raise OSError("No space left on device")

    model = FocalForImageClassification(tiny_config(num_labels=3))
    processor = default_processor(model.config, crop=1.0)
    save_model(tmp_path / "out", model, processor, {"epoch": 1})
    kept = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    torch.nn.init.ones_(model.classifier.weight)
    with pytest.raises(Problem, match="No space left"):
        save_model(tmp_path / "out", model, FullDisk(), {"epoch": 2})
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == kept

    save_model(tmp_path / "out", model, processor, {"epoch": 3})
    assert results(tmp_path / "out") == {"epoch": 3}
    assert FocalForImageClassification.from_pretrained(tmp_path / "out").classifier.weight.eq(1).all()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_decays_matrices_only():
    model = FocalForImageClassification(tiny_config(use_absolute_embeddings=True))
    decayed, spared = decay_groups(model, weight_decay=0.3)
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.3, 0.0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert len(decayed["params"]) + len(spared["params"]) == len(names)
    tables = ("position_embeddings", "relative_position_bias_table")
    assert {id(parameter) for parameter in spared["params"]} == {
        key for key, name in names.items() if name.endswith("bias") or "norm" in name or any(t in name for t in tables)
    }
    for table in tables:
        assert any(table in names[id(parameter)] for parameter in spared["params"])


def test_random_view_shows_a_part_of_the_size_asked_for():
    """Red grows from left to right and green downwards, so that a view's corners tell what it shows."""
    rng = random.Random(0)
    slope = Image.linear_gradient("L")
    picture = Image.merge("RGB", (slope.rotate(90), slope, slope))
    shares, mirrored = [], 0
    for _ in range(200):
        view = random_view(picture, (32, 32), 0.4, flip=True, resample=Image.Resampling.BILINEAR, rng=rng)
        assert view.size == (32, 32)
        (left, top, _), (right, bottom, _) = view.getpixel((0, 0)), view.getpixel((31, 31))
        mirrored += left > right
        shares.append(abs(right - left) * (bottom - top) / 255**2 * (32 / 31) ** 2)  # from centres to edges of pixels
    assert 0.37 < min(shares) < 0.5
    assert 0.8 < max(shares) < 1.01
    assert 60 < mirrored < 140
    unmirrored = [random_view(picture, (8, 8), 0.4, False, 2, rng) for _ in range(20)]
    assert all(view.getpixel((0, 0))[0] < view.getpixel((7, 0))[0] for view in unmirrored)


def test_overwrite_replaces_the_model_and_nothing_else(finetune, data, config, tmp_path):
    output = tmp_path / "out"
    tiny_config(embed_dim=4).save_pretrained(output)
    (output / "confusion.png").write_text("of the earlier model")
    (output / "model-00001-of-00002.safetensors").write_text("of the earlier model")
    options = ("--config", config, "--data", data, "--output", output, "--epochs", 1)
    run = finetune(*options, "--overwrite")
    assert run.returncode == 0, run.stderr
    assert AutoModelForImageClassification.from_pretrained(output).config.embed_dim == 8
    assert not (output / "model-00001-of-00002.safetensors").exists()
    assert (output / "confusion.png").read_bytes() != b"of the earlier model"

    other = tmp_path / "other"
    shutil.copytree(output, other)
    (other / "config.json").unlink()
    lines = [
        ["--model", output, *options[2:], "--overwrite"],
        [*options, "--output", other, "--overwrite"],
    ]
    itself, no_model = run_examples_in_turn("finetune.py", lines, tmp_path)
    assert (itself[0], no_model[0]) == (1, 1)
    assert f"--output {output} contains the --model of this run" in itself[2]
    assert "holds no model (a config.json with a model_type of transformers)" in no_model[2]
    assert (output / "model.safetensors").exists()
    assert (other / "model.safetensors").exists()


def no_such_folder(tmp_path: Path) -> list[str]:
    return ["--data", "./nowhere"]


def no_such_hub_name(tmp_path: Path) -> list[str]:
    return ["--data", "nobody/nothing"]


def no_images(tmp_path: Path) -> list[str]:
    (tmp_path / "texts" / "train" / "red").mkdir(parents=True)
    (tmp_path / "texts" / "train" / "red" / "notes.txt").write_text("no picture")
    return ["--data", "texts"]


def one_class(tmp_path: Path) -> list[str]:
    draw_pictures(tmp_path / "single" / "train", {"red": 3})
    return ["--data", "single"]


def class_without_training_images(tmp_path: Path) -> list[str]:
    draw_pictures(tmp_path / "odd" / "train", {"red": 2, "green": 2})
    draw_pictures(tmp_path / "odd" / "validation", {"red": 1, "blue": 1})
    return ["--data", "odd"]


def broken_image(tmp_path: Path) -> list[str]:
    draw_pictures(tmp_path / "broken" / "train", {"red": 2, "green": 2})
    (tmp_path / "broken" / "train" / "red" / "broken.png").write_text("no picture")
    return ["--data", "broken", "--strict"]


def unknown_label_column(tmp_path: Path) -> list[str]:
    return ["--label-column", "species"]


def unknown_image_column(tmp_path: Path) -> list[str]:
    return ["--image-column", "img"]


def no_such_config(tmp_path: Path) -> list[str]:
    return ["--config", "missing.json"]


def contradictory_config(tmp_path: Path) -> list[str]:
    settings = tiny_config().to_dict() | {"num_heads": [3, 2]}
    (tmp_path / "wrong.json").write_text(json.dumps(settings))
    return ["--config", "wrong.json"]


def grey_config(tmp_path: Path) -> list[str]:
    tiny_config(num_channels=1).save_pretrained(tmp_path / "grey")
    return ["--config", "grey"]


def config_without_a_size(tmp_path: Path) -> list[str]:
    ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1]).save_pretrained(tmp_path / "resnet")
    return ["--config", "resnet"]


def classes_of_another_encoding(tmp_path: Path) -> list[str]:
    (tmp_path / "names.txt").write_bytes("grün".encode("latin-1"))
    return ["--streaming", "--classes", "names.txt"]


def no_classes(tmp_path: Path) -> list[str]:
    (tmp_path / "none.txt").write_text("\n")
    return ["--streaming", "--classes", "none.txt"]


def classes_of_one_name(tmp_path: Path) -> list[str]:
    (tmp_path / "twice.txt").write_text("crane\nheron\ncrane\n")
    return ["--streaming", "--classes", "twice.txt"]


def output_below_a_file(tmp_path: Path) -> list[str]:
    (tmp_path / "file").touch()
    return ["--output", "file/out"]


def output_not_empty(tmp_path: Path) -> list[str]:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("three years of work")
    return ["--output", "full"]


ERRORS = {
    no_such_folder: "No such folder: --data ./nowhere. Give an existing folder or the name of a data set on the Hub.",
    no_such_hub_name: "Cannot read --data nobody/nothing (no such folder here, nor a readable Hub data set)",
    no_images: "No images found in --data texts: expected texts/train/CLASS/*.png",
    one_class: "--data single has only one class (red) to train on: a classifier needs at least two",
    class_without_training_images: "The validation split has classes that have no training images: blue.",
    broken_image: "Not a readable image: ",
    unknown_label_column: "has no column species; its columns are image, label. Choose one of them with --label-column",
    unknown_image_column: "has no column img; its columns are image, label. Choose one of them with --image-column",
    no_such_config: "No such file or folder: --config missing.json",
    contradictory_config: "Cannot build an image classifier from --config wrong.json: ",
    grey_config: "grey takes 1 channels; this script feeds colour images (3 channels).",
    config_without_a_size: "The config (resnet) has no image_size, and there is no image processor that has a size",
    classes_of_another_encoding: "Cannot read --classes names.txt (UnicodeDecodeError: ",
    no_classes: "--classes none.txt names no classes: write one a line",
    classes_of_one_name: "--classes twice.txt has the name crane more than once: give each class a name of its own.",
    output_below_a_file: "file: Not a directory): name another folder.",
    output_not_empty: "--output full exists and is not empty: name another folder, or add --overwrite.",
}


def test_bad_input_is_one_clear_line_before_training(data, config, tmp_path):
    """Of an option given twice, the last counts."""
    good = ["--config", config, "--data", data, "--output", "out"]
    lines = [[*good, *prepare(tmp_path)] for prepare in ERRORS]
    files = set(tmp_path.rglob("*"))
    answers = run_examples_in_turn("finetune.py", lines, tmp_path)
    for prepare, (status, out, err) in zip(ERRORS, answers, strict=True):
        assert status == 1, (prepare, err)
        errors = [line for line in err.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1, prepare
        assert ERRORS[prepare] in errors[0]
        assert len(errors[0]) < 400
        assert "Traceback" not in err
        assert "epoch" not in out
    assert not (tmp_path / "out").exists()
    assert files <= set(tmp_path.rglob("*"))


def test_launcher_passes_an_error_on(finetune, config):
    run = finetune("--config", config, "--data", "./nowhere", "--output", "out", launcher=LAUNCH)
    assert run.returncode != 0
    assert "error: No such folder: --data ./nowhere." in run.stderr
    assert "Traceback" not in run.stderr


def test_two_processes_report_an_error_once(finetune, config):
    run = finetune("--config", config, "--data", "./nowhere", "--output", "out", processes=2)
    assert run.returncode != 0
    assert run.stderr.count("error: No such folder: --data ./nowhere.") == 1


def test_model_and_config_exclude_each_other(finetune, config):
    run = finetune("--config", config, "--model", config, "--data", "data", "--output", "out")
    assert run.returncode == 2
    assert "not allowed with argument" in run.stderr
