"""examples/extract_features.py: features equal those of the model, also after restarts. Bad input is refused."""

import os
import signal
import tarfile
import time
from pathlib import Path

import datasets
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from common.models import default_processor
from example_runs import draw_two_colours, run_example, run_examples_in_turn, tiny_config
from focal_hf import FocalBackbone, FocalForImageClassification, FocalModel
from focal_hf.compatibility_focal import AutoImageProcessor
from forked_scripts import ForkedScript


@pytest.fixture
def model(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = FocalForImageClassification(tiny_config())
    model.save_pretrained(tmp_path / "model")
    default_processor(model.config, crop=0.8).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def view_of(model: Path, file: Path) -> torch.Tensor:
    image = Image.open(file).convert("RGB")
    return AutoImageProcessor.from_pretrained(model)(image, return_tensors="pt")["pixel_values"]


def read(folder: Path) -> datasets.Dataset:
    cache = str(folder.with_name("read"))
    return datasets.load_dataset("parquet", data_dir=str(folder), split="train", cache_dir=cache).with_format("torch")


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_killed_and_run_again_on_any_number_of_processes_writes_the_same_files(model, tmp_path):
    pictures = draw_two_colours(tmp_path / "data", {"cat": 150, "dog": 101})
    (pictures / "dog" / "broken.png").write_text("no picture")
    options = ("--model", model, "--data", pictures, "--batch-size", 2, "--shards", 84)  # of 3 pictures
    whole, broken_off = tmp_path / "whole", tmp_path / "broken_off"
    run = run_example("extract_features.py", *options, "--output", whole, folder=tmp_path, processes=2)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("Not a readable image, left out: dog/broken.png") == 1
    assert f"Features of 251 images are in {whole}; 1 left out." in run.stdout

    run = ForkedScript(*("extract_features.py", "--workers", 0, *options, "--output", broken_off), folder=tmp_path)
    deadline = time.monotonic() + 120
    while len(list(broken_off.glob("features-*"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.002)
    run.kill()
    assert run.poll() == -signal.SIGKILL
    finished = {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in broken_off.glob("features-*")}
    assert 3 <= len(finished) < 84
    (broken_off / ".features-00083-of-00084.parquet.part").write_text("half a fi")  # as if killed while it wrote

    run = run_example("extract_features.py", *options, "--output", broken_off, folder=tmp_path)
    assert run.returncode == 0, run.stderr
    assert f"84 shard(s), {len(finished)} already there" in run.stdout
    assert {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in finished} == finished
    assert contents(broken_off) == contents(whole)
    assert sorted(contents(whole)) == [f"features-{number:05}-of-00084.parquet" for number in range(84)]

    rows = read(whole)
    assert rows.features["label"].names == ["cat", "dog"]
    files = sorted(file for file in pictures.glob("*/*.png") if file.name != "broken.png")
    assert rows["path"][:] == [str(file.relative_to(pictures)) for file in files]
    assert rows["label"][:].tolist() == [0] * 150 + [1] * 101
    focal = FocalModel.from_pretrained(model).eval()
    for place in (0, 100, 250):
        with torch.no_grad():
            expected = focal(view_of(model, files[place])).pooler_output[0]
        torch.testing.assert_close(rows[place]["pooled"], expected, atol=1e-5, rtol=0)
    assert pq.read_schema(next(whole.iterdir())).field("pooled").type.list_size == 16


def test_stages_of_streamed_tar_files(model, tmp_path):
    """Two processes read WebDataset files, and write one file of features for each tar file."""
    pictures = draw_two_colours(tmp_path / "drawn", {"all": 7})
    files = sorted(pictures.glob("*/*.png"))
    (tmp_path / "tars").mkdir()
    for tar, members in (("a", files[:2]), ("b", files[2:5]), ("c", files[5:])):
        with tarfile.open(tmp_path / "tars" / f"{tar}.tar", "w") as archive:
            for file in members:
                label = file.with_suffix(".cls")
                label.write_text(str(100 + int(file.stem)))
                archive.add(file, f"{file.stem}.png")
                archive.add(label, f"{file.stem}.cls")
    options = ("--streaming", "--image-column", "png", "--label-column", "cls", "--features", "stage2", "stage1")
    run = run_example(
        *("extract_features.py", "--model", model, "--data", "tars", "--output", "out", *options),
        *("--image-size", 24, "--batch-size", 2),
        folder=tmp_path,
        processes=2,
    )
    assert run.returncode == 0, run.stderr
    assert [pq.read_metadata(tmp_path / "out" / name).num_rows for name in sorted(os.listdir(tmp_path / "out"))] == [
        *(2, 3, 2)
    ]

    rows = read(tmp_path / "out")
    backbone = FocalBackbone.from_pretrained(model, out_features=["stage1", "stage2"]).eval()
    processor = AutoImageProcessor.from_pretrained(model)
    sizes = {"size": {"shortest_edge": 30}, "crop_size": {"height": 24, "width": 24}}
    for row, file in zip(rows, files, strict=True):
        assert (row["path"], row["label"]) == (file.name, 100 + int(file.stem))
        pixels = processor(Image.open(file), return_tensors="pt", **sizes)
        with torch.no_grad():
            maps = backbone(**pixels).feature_maps
        for name, feature_map in zip(("stage1", "stage2"), maps, strict=True):
            torch.testing.assert_close(row[name], feature_map[0].mean((1, 2)), atol=1e-5, rtol=0)


def test_bad_input_is_one_clear_line_and_keeps_existing_files(model, tmp_path):
    pictures = draw_two_colours(tmp_path / "data", {"cat": 3})
    (pictures / "cat" / "9.png").write_text("no picture")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "1.png").write_text("no picture")
    good = ["--model", model, "--data", pictures, "--output", "out"]
    options = [
        ["--output", "none", "--features", "stage3"],
        ["--output", "none", "--shards", 5],
        ["--output", "none", "--label-column", "kind"],
        ["--output", "none", "--data", "./nowhere"],
        ["--output", "none", "--strict"],
        ["--output", "none", "--data", "broken"],
        ["--output", model / "config.json" / "none"],
        [],
        ["--features", "stage2"],
        ["--shards", 2],
        ["--features", "stage2", "--overwrite"],
    ]
    answers = run_examples_in_turn("extract_features.py", [[*good, *line] for line in options], tmp_path)
    messages = [
        f"--model {model} has no stage3: it has stem, stage1, stage2.",
        f"--data {pictures} has 4 image(s), which cannot be cut into 5 shard(s).",
        "has no column kind; its columns are image.",  # one class alone is no label
        "No such folder: --data ./nowhere.",
        "Not a readable image: cat/9.png (UnidentifiedImageError",
        "No readable images in --data broken: 1.png (UnidentifiedImageError: cannot identify image file).",
        "config.json: Not a directory): name another folder.",
        None,
        "out/features-00000-of-00001.parquet was made with other settings (features, weights): name another --output",
        "out/features-00000-of-00001.parquet was made with other settings (shards): name another --output, or add",
        None,
    ]
    for (status, said, errors), message in zip(answers, messages, strict=True):
        lines = [line for line in errors.splitlines() if line.startswith("error: ")]
        assert "Traceback" not in errors
        if message:
            assert (status, len(lines)) == (1, 1), errors
            assert message in lines[0]
            assert "Features of" not in said
        else:
            assert (status, lines) == (0, []), errors
            assert "Features of 3 images are in out; 1 left out." in said
    assert not list((tmp_path / "none").glob("*"))
    assert read(tmp_path / "out").column_names == ["path", "stage2"]
