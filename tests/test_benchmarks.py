"""benchmarks/throughput.py: short runs, and bad input."""

import csv
import gc
import importlib.util
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from PIL import Image

from conftest import ROOT
from forked_scripts import ForkedScript

SCRIPT = ROOT / "benchmarks" / "throughput.py"
spec = importlib.util.spec_from_file_location("throughput", SCRIPT)
throughput = importlib.util.module_from_spec(spec)
spec.loader.exec_module(throughput)

# Imports what the authors' files import, and has the names and the settings of their class.
ORIGINAL = """
import torch
from timm.data import create_transform
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.data.transforms import _pil_interp
from timm.models.layers import DropPath, to_2tuple, trunc_normal_
from torchvision import transforms


class FocalTransformer(torch.nn.Module):
    def __init__(self, img_size, embed_dim, depths, num_heads, focal_levels, focal_pool, use_conv_embed, focal_topK):
        super().__init__()
        print("the original prints this")
        self.img_size = to_2tuple(img_size)
        self.patches = torch.nn.Conv2d(3, embed_dim, 4, 4)
        self.drop_path = DropPath(0.5)
        self.head = torch.nn.Linear(embed_dim, 1000)
        trunc_normal_(self.head.weight, std=0.02)

    def forward(self, x):
        assert x.shape[2:] == self.img_size, "only the size that it is built for"
        return self.head(self.drop_path(self.patches(x).mean((2, 3))))
"""


def run(*arguments: str | Path) -> subprocess.CompletedProcess:
    return ForkedScript(str(SCRIPT), *arguments, folder=ROOT).wait(timeout=1200)


def read_csv(folder: Path) -> list[dict[str, str]]:
    with (folder / "results.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


def workloads(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> list:
    monkeypatch.setattr(sys, "argv", ["throughput.py", *arguments])
    return throughput.list_workloads(throughput.parse_arguments())


def write_checkout(folder: Path) -> Path:
    (folder / "checkout" / "classification").mkdir(parents=True)
    for source in throughput.SOURCES.values():
        (folder / "checkout" / source).write_text(ORIGINAL)
    return folder / "checkout"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    return write_checkout(tmp_path)


def modified(folder: Path) -> dict[Path, int]:
    return {file: file.stat().st_mtime_ns for file in folder.rglob("*")}


@pytest.fixture(scope="module")
def profiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess]:
    """Runs one small row, FocalNet, which takes images of any size, and what stands for the authors' code."""
    folder = tmp_path_factory.mktemp("benchmark") / "new" / "folder"
    checkout = write_checkout(folder.parents[1])
    before = modified(checkout)
    small = ("--device", "cpu", "--sizes", "96", "--batch-size", "2", "--threads", "1", "--seconds", "0.1")
    done = run(*small, "--peer", "focalnet", "--original", checkout, "--profile", "--output", folder)
    assert modified(checkout) == before
    return folder, done


def test_files_of_a_run(profiled):
    folder, done = profiled
    assert done.returncode == 0, done.stderr
    assert sorted(file.name for file in folder.iterdir()) == ["results.csv", "throughput.png"]
    with Image.open(folder / "throughput.png") as picture:
        assert min(picture.size) > 500
        assert len(picture.convert("RGB").getcolors(10**6)) > 10


def test_csv_agrees_with_itself(profiled):
    ours, peer, _ = read_csv(profiled[0])
    assert (ours["model"], peer["model"]) == ("focal_hf", "focalnet")
    assert float(peer["ratio"]) == pytest.approx(float(peer["median_ms"]) / float(ours["median_ms"]), rel=1e-3)
    assert ours["ratio"] == ""
    for line in (ours, peer):
        asked = {"size": "tiny", "attention": "focal", "task": "inference", "image_size": "96", "batch_size": "2"}
        asked |= {"threads": "1", "dtype": "float32", "compile": "False", "torch": torch.__version__}
        assert {key: line[key] for key in asked} == asked
        lower, median, upper = (float(line[f"{name}_ms"]) for name in ("lower_quartile", "median", "upper_quartile"))
        assert 1 < lower <= median <= upper
        assert int(line["rounds"]) >= throughput.MIN_ROUNDS
        assert float(line["images_per_s"]) == pytest.approx(2 / (median / 1e3), rel=1e-3)
        assert float(line["ns_per_pixel"]) == pytest.approx(median * 1e6 / (2 * 96**2), rel=1e-3)
        # The hidden layer of the first MLP alone takes 1.7 MiB; all parameters, which must not be counted, 110.
        assert 1 < float(line["peak_mib"]) < 60
        assert float(line["bytes_per_pixel"]) == pytest.approx(float(line["peak_mib"]) * 2**20 / (2 * 96**2), rel=1e-3)


def test_profile(profiled):
    for line in read_csv(profiled[0])[:2]:
        shares = {key: float(share) for key, share in line.items() if key.startswith("share_")}
        assert sum(shares.values()) == pytest.approx(1, abs=1e-3)
        assert shares["share_matrix_products"] > 0.2
        assert (shares["share_attention"] > 0.01) == (line["model"] == "focal_hf")  # FocalNet has none
        rate = float(line["gflop"]) / (float(line["median_ms"]) / 1e3)
        assert float(line["gflop_per_s"]) == pytest.approx(rate, rel=1e-2)
        assert 0 < rate < 1.2 * float(line["matmul_gflop_per_s"])


def test_tables(profiled):
    folder, done = profiled
    speed, profile = ([], [])
    for text in done.stdout.splitlines():
        if text.startswith("|"):
            (profile if profile or "GFLOP" in text else speed).append([cell.strip() for cell in text.split("|")[1:-1]])
    assert (
        [row[0] for row in speed[2:]]
        == [row[0] for row in profile[2:]]
        == [
            "Focal-Tiny",
            "FocalNet-Tiny",
            "original Focal-Tiny",
        ]
    )
    assert {len(row) for row in speed} == {8}
    assert all(set(cell) <= set("-:") for cell in speed[1] + profile[1])
    peer = dict(zip(speed[0], speed[3], strict=True))
    written = read_csv(folder)[1]
    # Each is rounded from the whole number.
    assert float(peer["time / Focal"]) == pytest.approx(float(written["ratio"]), rel=0.01)
    median = float(peer["ms (quartiles)"].split()[0].replace(",", ""))
    assert median == pytest.approx(float(written["median_ms"]), rel=0.01)


def test_original_is_timed(profiled):
    """As the other models are, and the folder of the checkout is not in the results."""
    folder, done = profiled
    assert "the original prints this" not in done.stdout
    ours, _, original = read_csv(folder)
    assert (ours["model"], original["model"]) == ("focal_hf", "original")
    assert float(original["ratio"]) < 1  # a single layer
    assert str(folder.parents[1]) not in (folder / "results.csv").read_text()


def test_backbones_see_the_images_of_detectors(tmp_path, monkeypatch):
    """In training. The memory of one of them is measured, which takes a process."""
    names = [throughput.OURS, "swin", throughput.CONVERTED]
    small = ("--device", "cpu", "--backbone", "--sizes", "48", "--task", "training", "--seconds", "0.1")
    (work,) = workloads(monkeypatch, *small, "--peer", *names[1:], "--output", str(tmp_path))
    peak_memory = throughput.peak_memory
    measured = {throughput.CONVERTED}
    monkeypatch.setattr(throughput, "peak_memory", lambda one: peak_memory(one) if one.name in measured else None)
    setting = throughput.Setting("cpu", "float32", False, 1, None)
    lines = throughput.measure(names, work, setting, 0.1, None)
    assert [line["model"] for line in lines] == names
    table = throughput.speed_table(lines, per_pixel=False)
    assert table.count("-Tiny backbone ") == table.count(" 48x80 |") == 3
    for line in lines:
        assert line["task"] == "training"
        assert line["ns_per_pixel"] == pytest.approx(line["median_ms"] * 1e6 / (48 * 80), rel=1e-3)
    assert lines[-1]["peak_mib"] > 100  # the gradients of 27.5 million parameters


def test_a_frozen_model_is_timed(monkeypatch):
    monkeypatch.setattr(throughput, "peak_memory", lambda contender: None)
    work = throughput.Workload("tiny", "topk", "inference", 32, 1)
    names = [throughput.OURS, throughput.FROZEN]
    lines = throughput.measure(names, work, throughput.Setting("cpu", "float32", False, 1, None), 0.01, None)
    assert [line["model"] for line in lines] == names
    assert "frozen Focal-Tiny topk" in throughput.speed_table(lines, per_pixel=False)


def test_stubs_are_removed_after_the_import(checkout):
    before = {name: module for name, module in sys.modules.items() if name.split(".")[0] in ("timm", "torchvision")}
    model = throughput.original_class(str(checkout), "topk")(32, 96, (1,), (1,), (1,), "fc", True, 128)
    assert model.img_size == (32, 32)
    after = {name: module for name, module in sys.modules.items() if name.split(".")[0] in ("timm", "torchvision")}
    assert after == before


def test_a_model_that_fails_does_not_stop_the_others(checkout, monkeypatch, capsys):
    source = checkout / throughput.SOURCES["focal"]
    source.write_text(source.read_text().replace("assert", "raise RuntimeError('too large')  #"))
    monkeypatch.setattr(throughput, "peak_memory", lambda contender: None)
    work = throughput.Workload("tiny", "focal", "inference", 32, 1)
    setting = throughput.Setting("cpu", "float32", False, 1, str(checkout))
    lines = throughput.measure(["original", "focal_hf"], work, setting, 0.01, None)
    assert [line["model"] for line in lines] == ["focal_hf"]
    assert "original Focal-Tiny did not run: RuntimeError: too large" in capsys.readouterr().err
    assert "?" in throughput.speed_table(lines, per_pixel=True)  # memory that could not be measured


def test_models_take_turns():
    class Runner:
        def __init__(self, name):
            self.name = name

        def step(self):
            order.append((self.name, gc.isenabled()))
            return 0.5

    order = []
    times = throughput.time_in_turns([Runner("ours"), Runner("peer")], seconds=1e-9)
    warm_up, timed = order[:2], order[2:]
    assert [name for name, _ in warm_up] == ["ours", "peer"]
    assert timed == [("ours", False), ("peer", False)] * throughput.MIN_ROUNDS
    assert times == [[0.5] * throughput.MIN_ROUNDS] * 2
    assert gc.isenabled()


# Published: 4.9, 4.5 and 4.5 billion multiplications with additions.
@pytest.mark.parametrize(("name", "published"), [("focal_hf", 4.9), ("swin", 4.5), ("focalnet", 4.5)])
def test_operation_counts_equal_the_published_ones(name, published):
    work = throughput.Workload("tiny", "focal", "inference", 224, 1)
    contender = throughput.Contender(name, work, throughput.Setting("cpu", "float32", False, 1, None))
    assert throughput.count_gflop(contender) == pytest.approx(2 * published, rel=0.03)


def test_the_default_rows(monkeypatch, tmp_path):
    rows = workloads(monkeypatch, "--device", "cpu", "--output", str(tmp_path))
    assert len(rows) == 9
    assert [(row.image_size, row.batch_size) for row in rows[:4]] == [(224, 8), (224, 1), (448, 1), (896, 1)]
    assert [row.size for row in rows[-2:]] == ["small", "base"]


def test_chosen_rows_are_all_combinations(monkeypatch, tmp_path):
    output = ("--device", "cpu", "--output", str(tmp_path))
    rows = workloads(monkeypatch, *output, "--models", "small", "base", "--sizes", "64", "96", "--batch-size", "3")
    assert {(row.size, row.image_size) for row in rows} == {(m, s) for m in ("small", "base") for s in (64, 96)}
    assert {(row.attention, row.task, row.batch_size) for row in rows} == {("focal", "inference", 3)}
    rows = workloads(monkeypatch, *output, "--growth")
    assert [row.image_size for row in rows] == 2 * [224, 448, 896, 1792]
    assert [row.attention for row in rows] == 4 * ["focal"] + 4 * ["topk"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--models", "huge"], "invalid choice: 'huge' (choose from"),
        (["--peer", "resnet"], "invalid choice: 'resnet'"),
        (["--sizes", "0"], "argument --sizes: 0 is not above zero"),
        (["--sizes", "224.5"], "argument --sizes: invalid int value: '224.5'"),
        (["--seconds", "-1"], "argument --seconds: -1 is not above zero"),
        (["--device", "tpu"], "--device tpu is not supported; use cpu, cuda or cuda:N"),
        (["--device", "cuda:99"], "--device cuda:99: PyTorch sees"),
        (["--growth", "--sizes", "224"], "omit --sizes"),
        (["--original", "{tmp}/empty"], "it has no classification/focal_transformer.py. Clone https://github.com/"),
        (["--output", "{tmp}/file"], "/file is not a writable folder: "),
        (["--compile"], "--compile needs a C++ compiler: absent-compiler was not found"),
    ],
)
def test_bad_input_is_one_line(arguments, expected, monkeypatch, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    monkeypatch.setenv("CXX", "absent-compiler")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        workloads(monkeypatch, *(argument.format(tmp=tmp_path) for argument in arguments))
    assert stop.value.code == 2
    usage, line = capsys.readouterr().err.split("throughput.py: error: ")
    assert usage.startswith("usage: ")
    assert expected in line
    assert line.count("\n") == 1


def test_files_are_replaced_completely_or_not_at_all(tmp_path):
    file = tmp_path / "results.csv"
    file.write_text("earlier")

    def interrupted() -> None:
        with throughput.replacing(file) as part:
            part.write_text("hal")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert file.read_text() == "earlier"
    assert os.listdir(tmp_path) == ["results.csv"]
    throughput.write_csv(file, [{"a": 1, "b": 0.123456789}, {"a": 2, "b": None}])
    assert file.read_text().splitlines() == ["a,b", "1,0.1235", "2,"]
    assert os.listdir(tmp_path) == ["results.csv"]


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "?"), (0.0, "0"), (0.01234, "0.0123"), (1.0, "1.00"), (99.94, "99.9"), (1234, "1,234")],
)
def test_numbers_have_three_digits(value, text):
    assert throughput.number(value) == text


def load_benchmark(name: str, monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module(name)


def test_growing_compares_all_starts(tmp_path, monkeypatch):
    """With some of the digits."""
    growing = load_benchmark("growing", monkeypatch)
    images, labels, *test = growing.digits_data()
    monkeypatch.setattr(growing, "digits_data", lambda: (images[:16], labels[:16], *(part[:30] for part in test)))
    monkeypatch.setattr(growing.logging, "set_verbosity_error", lambda: None)  # which other tests would notice
    command = ["growing.py", "--folder", str(tmp_path), "--task", "digits", "--seeds", "0"]
    monkeypatch.setattr(sys, "argv", [*command, "--first", "1", "--second", "2"])
    growing.main()
    table = (tmp_path / "growing.md").read_text()
    for name in (*growing.starts("digits"), "Swin from scratch", "Focal from scratch"):
        assert table.count(f"\n| {name} | ") == 1
    assert "nan" not in table
    files = {file: file.stat().st_mtime_ns for file in tmp_path.glob("*.json")}
    assert len(files) == 7
    growing.main()  # reuses the finished runs
    assert {file: file.stat().st_mtime_ns for file in tmp_path.glob("*.json")} == files
    assert (tmp_path / "growing.md").read_text() == table

    monkeypatch.setattr(sys, "argv", [*command, "--first", "2", "--second", "1"])
    growing.main()  # runs with other numbers of epochs are other runs
    assert len([*tmp_path.glob("*.json")]) == 14


def test_finished_runs_are_reused_if_they_have_as_many_epochs(tmp_path, monkeypatch):
    learning_runs = load_benchmark("learning_runs", monkeypatch)
    (tmp_path / "out" / "last").mkdir(parents=True)
    history = [{"epoch": 1, "accuracy": 0.25}, {"epoch": 2, "accuracy": 0.5}]
    (tmp_path / "out" / "results.json").write_text(json.dumps({"history": history}))
    assert learning_runs.run_example("finetune.py", tmp_path, "out", 2) == history
    with pytest.raises(SystemExit, match=r"error: .*out has a run of 2 epochs, not 3: remove it"):
        learning_runs.run_example("finetune.py", tmp_path, "out", 3)


def test_streaming_needs_two_shards(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["streaming.py", "--shards", "1"])
    with pytest.raises(SystemExit):
        load_benchmark("streaming", monkeypatch).main()
    assert "error: --shards must be at least 2" in capsys.readouterr().err


def test_table_of_epochs_has_means_and_deviations(monkeypatch):
    learning_runs = load_benchmark("learning_runs", monkeypatch)
    rows = {"Focal": (1234, [{1: 0.25, 5: 0.5}, {1: 0.35, 5: 0.5}]), "Swin": (99, [{1: 0.1, 5: 1.0}])}
    assert learning_runs.table_by_epoch("network", rows, [1, 5]) == [
        "| network | parameters | 1 | 5 |",
        "|---|---:|---:|---:|",
        "| Focal | 1,234 | 30.0 ± 7.1 | 50.0 ± 0.0 |",
        "| Swin | 99 | 10.0 | 100.0 |",
    ]
