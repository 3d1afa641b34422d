"""Runs scripts of examples/ in processes of their own, on small pictures and a tiny Focal."""

import json
import os
import random
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from focal_hf import FocalConfig
from forked_scripts import EXAMPLES, ForkedScript

BIN = Path(sys.executable).parent
LAUNCH = [str(BIN / "accelerate"), "launch", "--quiet", "--cpu", "--num_processes", "1"]

CLASSES = ("blue", "green", "red")
COLOURS = {"red": (220, 40, 30), "green": (30, 200, 50), "blue": (40, 60, 210)}


def draw_pictures(folder: Path, counts: dict[str, int]) -> Path:
    """Plain pictures of 20 x 26 pixels, FOLDER/CLASS/NUMBER.png."""
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for number in range(count):
            shade = tuple(min(255, channel + 3 * number) for channel in COLOURS[name])
            Image.new("RGB", (20, 26), shade).save(folder / name / f"{number}.png")
    return folder


def draw_noise(folder: Path, count: int) -> None:
    """FOLDER/CLASS/NUMBER.png, no two alike, with no symmetry, each class brighter in a colour of its own."""
    generator = np.random.default_rng(count)
    for channel, name in enumerate(CLASSES):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            pixels = generator.integers(0, 160, (20, 24, 3), dtype=np.uint8)
            pixels[..., 2 - channel] += 90
            Image.fromarray(pixels).save(folder / name / f"{number}.png")


def draw_two_colours(folder: Path, counts: dict[str, int]) -> Path:
    """Pictures that differ, FOLDER/CLASS/NUMBER.png, of one colour with a stripe of another."""
    draw = random.Random(0).randrange
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for number in range(count):
            picture = Image.new("RGB", (20, 26), (draw(256), draw(256), draw(256)))
            picture.paste((draw(256), draw(256), draw(256)), (draw(10), 0, 10 + draw(10), 26))
            picture.save(folder / name / f"{number}.png")
    return folder


def write_tar(file: Path, pictures: Path) -> None:
    """A WebDataset shard: NUMBER.png beside NUMBER.cls, the index of its class."""
    with tarfile.open(file, "w") as tar:
        for number, picture in enumerate(sorted(pictures.glob("*/*.png"), key=lambda picture: picture.name)):
            label = file.with_suffix(".cls")
            label.write_text(str(CLASSES.index(picture.parent.name)))
            tar.add(picture, f"{number}.png")
            tar.add(label, f"{number}.cls")
            label.unlink()


def tiny_config(**changes) -> FocalConfig:
    settings = {
        "image_size": 16,
        "patch_size": 2,
        "embed_dim": 8,
        "depths": (1, 1),
        "num_heads": (1, 2),
        "window_size": 4,
        "focal_levels": (2, 2),
        "focal_windows": (3, 1),
        "expand_sizes": (2, 2),
        "encoder_stride": 4,
    }
    return FocalConfig(**settings | changes)


def without_helpers(script: str) -> list[str]:
    """The option with which a script starts no processes that read images, if it has any."""
    has_none = script in ("app.py", "make_scenes.py", "quickstart.py", "visualize_attention.py")
    return [] if has_none else ["--workers", "0"]


def example_command(script: str, *arguments: object, folder: Path, launcher: tuple | list = (sys.executable,)) -> dict:
    """What `subprocess` needs to run examples/SCRIPT offline in `folder`."""
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(folder / "cache"),
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
    }
    command = [*launcher, str(EXAMPLES / script), *without_helpers(script), *map(str, arguments)]
    return {"args": command, "env": environment, "cwd": folder}


def run_example(
    script: str,
    *arguments: object,
    folder: Path,
    launcher: tuple | list = (),
    **options,
) -> subprocess.CompletedProcess:
    """Runs examples/SCRIPT in a process of its own: one that starts anew only if there is a launcher."""
    if launcher:
        command = example_command(script, *arguments, folder=folder, launcher=launcher)
        return subprocess.run(**command, capture_output=True, text=True, timeout=300)
    return ForkedScript(script, *without_helpers(script), *arguments, folder=folder, **options).wait()


def run_examples_in_turn(script: str, command_lines: list[list], folder: Path) -> list[tuple[int, str, str]]:
    """For each command line, the exit status of the script and what it wrote to stdout and stderr."""
    runs = [run_example(script, *line, folder=folder) for line in command_lines]
    return [(run.returncode, run.stdout, run.stderr) for run in runs]


class Run(ForkedScript):
    """Training in processes of its own."""

    def __init__(self, place: Path, *arguments: object, script: str = "finetune.py", **options):
        super().__init__(script, "--workers", 0, "--learning-rate", "5e-3", *arguments, folder=place, **options)

    def end(self, code: int = 0) -> tuple[str, str]:
        """What it wrote."""
        ended = self.wait()
        assert ended.returncode == code, ended.stderr
        return ended.stdout, ended.stderr

    def kill_after(self, checkpoints: Path, step: int) -> None:
        """SIGKILL to all its processes, some time after it has saved that step."""
        deadline = time.monotonic() + 200
        while not any(int(folder.name[5:]) >= step for folder in checkpoints.glob("step_*")):
            assert self.poll() is None, self.written("stderr")
            assert time.monotonic() < deadline
            time.sleep(0.002)
        time.sleep(random.uniform(0, 0.1))
        self.kill()
        assert self.processes[0].exitcode == -signal.SIGKILL


def results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def assert_same(first: Path, second: Path) -> None:
    first, second = contents(first), contents(second)
    assert first.keys() == second.keys()
    assert [name for name in first if first[name] != second[name]] == []


def curve(folder: Path) -> list[float]:
    names = "train_loss", "loss", "gradient_norm"
    return [entry[name] for entry in results(folder)["history"] for name in names]
