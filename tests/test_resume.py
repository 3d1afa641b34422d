"""Training runs that are stopped anywhere and go on, and their states when damaged or malicious."""

import json
import os
import pickle
import random
import re
import shutil
import signal
from argparse import Namespace
from pathlib import Path

import pytest
from accelerate import Accelerator
from transformers import ResNetConfig

from common.checkpoints import CHECKSUMS, TENSORS, VALUES, Checkpoints, checksum
from common.data import load_splits
from common.files import states_in
from common.fingerprint import fingerprint
from common.streams import Stream
from example_runs import CLASSES, assert_same, contents, draw_noise, tiny_config, write_tar
from forked_runs import ForkedRuns

OPTIONS = (
    *("--config", "config", "--data", "data", "--learning-rate", 5e-3, "--epochs", 2, "--batch-size", 4),
    *("--mixup", 0.8, "--ema", 0.9),
)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """12 training and 6 validation pictures, in folders and as shards, and a config."""
    place = tmp_path_factory.mktemp("resume")
    (place / "shards").mkdir()
    for split, count in (("train", 4), ("validation", 2)):
        draw_noise(place / "data" / split, count)
        write_tar(place / "shards" / f"{split}-0.tar", place / "data" / split)
    tiny_config(hidden_dropout_prob=0.1).save_pretrained(place / "config")
    return place


@pytest.fixture(scope="module")
def runs(place):
    return ForkedRuns(place)


@pytest.fixture(scope="module")
def whole(place, runs) -> Path:
    """A run that was never stopped."""
    ended = runs.run("finetune.py", *OPTIONS, "--output", "whole/out")
    assert ended.status == 0, ended.complained
    return place / "whole" / "out"


@pytest.fixture(scope="module")
def stopped(place, runs) -> Path:
    """A run that was killed near its end, with two states."""
    options = (*OPTIONS, "--output", "stopped/out", "--save-every", 2)
    ended = runs.run("finetune.py", *options, inside="stopped/out/last", before=2)
    assert ended.status == -signal.SIGKILL
    assert len(states_in(place / "stopped" / "out")) == 2
    return place / "stopped" / "out"


@pytest.fixture
def run(place, stopped) -> Path:
    """A copy of that run, in a folder called `out`, so that reports have the same title."""
    folder = place / "copy" / "out"
    shutil.rmtree(folder, ignore_errors=True)
    return Path(shutil.copytree(stopped, folder))


def test_killed_before_any_change_goes_on_to_the_same_bytes(place, runs, whole):
    """Again and again, the first time before anything is saved."""
    folder, options = place / "killed" / "out", (*OPTIONS, "--output", "killed/out", "--resume")
    ended = runs.run(
        "finetune.py", *options, inside="killed/out/.part/config.json", before=1
    )  # to be moved as the last
    assert ended.status == -signal.SIGKILL
    assert (folder / "model.safetensors").exists()
    assert not states_in(folder)
    said = ""
    for _ in range(100):
        ended = runs.run("finetune.py", *options, inside="killed/out", before=random.randrange(70))
        said += ended.said
        if ended.status == 0:
            break
        assert ended.status == -signal.SIGKILL, ended.complained
    assert "killed/out holds no checkpoint to resume from: starting from the beginning." in said
    assert_same(folder, whole)


def test_killed_while_it_overwrites_begins_anew(place, runs, whole, run):
    """Of the earlier result nothing is taken for the new one."""
    options = (*OPTIONS, "--output", "copy/out")
    for before in random.sample(range(30), 3):
        ended = runs.run("finetune.py", *options, "--overwrite", inside="copy/out", before=before)
        assert ended.status == -signal.SIGKILL, ended.complained
    ended = runs.run("finetune.py", *options, "--resume")
    assert ended.status == 0, ended.complained
    assert_same(run, whole)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-3])


def empty(file: Path) -> None:
    file.write_bytes(b"")


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def replace_by_a_pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def nest(file: Path) -> None:
    file.write_text("[" * 100_000)


def test_damaged_files_are_found(run):
    latest, earlier = states_in(run)
    (run / "checkpoints" / "step_zzz").mkdir()
    checkpoints = Checkpoints(Accelerator(cpu=True), run, {})
    assert checkpoints.latest_whole() == (latest, [])
    shutil.copytree(latest, run / "kept")
    for damage in (truncate, empty, flip, Path.unlink, replace_by_a_pipe, nest):
        for name in (TENSORS, VALUES, CHECKSUMS):
            damage(latest / name)
            state, (damaged,) = checkpoints.latest_whole()
            assert state == earlier
            assert damaged == latest / name or (damage, name) == (flip, CHECKSUMS)  # whose sum is wrong then
            shutil.rmtree(latest)
            shutil.copytree(run / "kept", latest)


def test_goes_on_from_the_state_before_a_damaged_one(runs, whole, run):
    latest, earlier = states_in(run)
    flip(latest / TENSORS)
    ended = runs.run("finetune.py", *OPTIONS, "--output", "copy/out", "--resume")
    assert ended.status == 0, ended.complained
    assert (
        f"{latest.name}/{TENSORS} is missing or damaged: resuming from {earlier.name}, an earlier state." in ended.said
    )
    assert_same(run, whole)


def test_tells_where_all_states_are_damaged(runs, run):
    for state in states_in(run):
        empty(state / VALUES)
    before = contents(run)
    ended = runs.run("finetune.py", *OPTIONS, "--output", "copy/out", "--resume")
    assert ended.status == 1
    (error,) = [line for line in ended.complained.splitlines() if "error" in line]
    assert f"{VALUES} is missing or damaged, and there is no other state to resume from: start again with" in error
    assert contents(run) == before


class Gadget:
    def __init__(self, file: Path):
        self.command = f"touch {file}"

    def __reduce__(self):
        return os.system, (self.command,)


def test_states_execute_nothing(place, runs, run):
    """Pickles in each of its files, with the right checksums, and in all that Accelerate and PyTorch would read."""
    ran = place / "ran"
    gadget = pickle.dumps(Gadget(ran))
    latest, earlier = states_in(run)
    shutil.rmtree(earlier)
    whole = {name: (latest / name).read_bytes() for name in (TENSORS, VALUES, CHECKSUMS)}
    for name in whole:
        for other, content in whole.items():
            (latest / other).write_bytes(gadget if other == name else content)
        if name != CHECKSUMS:
            sums = {other: checksum(latest / other) for other in (TENSORS, VALUES)}
            (latest / CHECKSUMS).write_text(json.dumps(sums))
        ended = runs.run("finetune.py", *OPTIONS, "--output", "copy/out", "--resume")
        assert ended.status == 1
        assert "Traceback" not in ended.complained
        (error,) = [line for line in ended.complained.splitlines() if "error" in line]
        assert re.search("Cannot resume from .*: start again with|is missing or damaged, and there is no other", error)
    for name, content in whole.items():
        (latest / name).write_bytes(content)
    for name in (
        *("custom_checkpoint_0.pkl", "optimizer.bin", "scheduler.bin", "scaler.pt", "random_states_0.pkl"),
        *("pytorch_model.bin", "pytorch_model_fsdp.bin", ".metadata", "sampler.bin"),
    ):
        (latest / name).write_bytes(gadget)
    ended = runs.run("finetune.py", *OPTIONS, "--output", "copy/out", "--resume")
    assert ended.status == 0, ended.complained
    assert not ran.exists()
    pickle.loads(gadget)
    assert ran.exists()  # it would have


@pytest.mark.parametrize("streaming", [False, True], ids=["folder", "stream"])
def test_fingerprint_is_that_of_the_pictures(place, tmp_path, streaming):
    """The same for copies of another age, another for other pictures or labels."""
    accelerator = Accelerator(cpu=True)
    folder = Path(shutil.copytree(place / "data", tmp_path / "data"))

    def read() -> str:
        (tmp_path / "shards").mkdir(exist_ok=True)
        source = folder
        if streaming:
            source = tmp_path / "shards"
            write_tar(source / "train-0.tar", folder / "train")
        rows = load_splits(str(source), streaming, cache_dir=str(tmp_path / "cache"))["train"]
        if streaming:
            return fingerprint(accelerator, [Stream(rows, columns, list(CLASSES))])
        return fingerprint(accelerator, [{"rows": rows, "labels": rows["label"]}])

    columns = Namespace(image_column="png", label_column="cls", seed=0, data="shards")
    first = read()
    for file in folder.rglob("*.png"):
        os.utime(file, (0, 0))
    assert read() == first
    shutil.move(folder, tmp_path / "moved")
    folder = tmp_path / "moved"
    assert read() == first
    one, two = folder / "train" / "red" / "0.png", folder / "train" / "blue" / "0.png"
    contents = one.read_bytes(), two.read_bytes()
    for file, content in zip((two, one), contents, strict=True):
        file.write_bytes(content)
    assert read() != first


def test_does_not_go_on_with_other_pictures(place, runs, run):
    picture = place / "data" / "train" / "red" / "0.png"
    kept = picture.read_bytes()
    shutil.copy(place / "data" / "train" / "red" / "1.png", picture)
    ended = runs.run("finetune.py", *OPTIONS, "--output", "copy/out", "--resume")
    picture.write_bytes(kept)
    assert ended.status == 1
    assert "cannot be resumed with other settings: the fingerprint of pictures and labels was " in ended.complained


def test_ctrl_c_is_told_in_one_line(runs):
    ended = runs.run(
        *("finetune.py", *OPTIONS, "--output", "interrupted"),
        inside="interrupted/checkpoints/part",
        before=2,
        by=signal.SIGINT,
    )
    assert ended.status == 130
    assert "Stopped by Ctrl-C. To continue, run the same command with --resume.\n" in ended.complained
    assert "Traceback" not in ended.complained


def test_bad_values_are_told_in_one_line(place, runs):
    ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], image_size=16).save_pretrained(place / "resnet")
    for message, options in {
        "The weights became infinite in epoch 1: lower --learning-rate": (
            "--learning-rate",
            1e38,
            "--warmup-epochs",
            0,
        ),
        "The validation loss became nan in epoch 1: lower --learning-rate": (
            *("--learning-rate", 1e20, "--warmup-epochs", 0, "--batch-size", 12),
        ),
        "argument --push-to-hub: expected a repository name such as me/focal-tiny; got ''": ("--push-to-hub", ""),
        "depends on depths and embed_dim, which the config (resnet) does not have: add --drop-path.": (
            *("--recipe", "paper", "--config", "resnet", "--warmup-epochs", 1),
        ),
    }.items():
        ended = runs.run("finetune.py", *OPTIONS, "--output", "bad", *options)
        assert ended.status in (1, 2)
        (error,) = [line for line in ended.complained.splitlines() if "error: " in line]
        assert message in error
        assert "Traceback" not in ended.complained
        assert not (place / "bad" / "config.json").exists()
        shutil.rmtree(place / "bad", ignore_errors=True)
