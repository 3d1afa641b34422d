"""Scripts of examples/ in processes of their own, and what they are given: small pictures, a tiny Focal."""

import json
import os
import subprocess
import sys
from pathlib import Path

from PIL import Image

from focal_hf import FocalConfig

EXAMPLES = Path(__file__).parents[1] / "examples"
BIN = Path(sys.executable).parent
LAUNCH = [str(BIN / "accelerate"), "launch", "--quiet", "--cpu", "--num_processes", "1"]
TWO_PROCESSES = [str(BIN / "torchrun"), "--nproc_per_node", "2", "--master_port", "0", "--standalone"]

COLOURS = {"red": (220, 40, 30), "green": (30, 200, 50), "blue": (40, 60, 210)}


def draw_pictures(folder: Path, counts: dict[str, int]) -> Path:
    """Plain pictures of 20 x 26 pixels, FOLDER/CLASS/NUMBER.png."""
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for number in range(count):
            shade = tuple(min(255, channel + 3 * number) for channel in COLOURS[name])
            Image.new("RGB", (20, 26), shade).save(folder / name / f"{number}.png")
    return folder


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
    return [] if script in ("app.py", "make_scenes.py", "visualize_attention.py") else ["--workers", "0"]


def example_command(
    script: str, *arguments: object, folder: Path, launcher: tuple | list = (sys.executable,), hub: str | None = None
) -> dict:
    """What `subprocess` needs to run examples/SCRIPT offline, or with a server in the Hub's place, in `folder`."""
    network = {"HF_ENDPOINT": hub, "HF_HOME": str(folder / "hub")} if hub else {"HF_HUB_OFFLINE": "1"}
    environment = os.environ | {
        **network,
        "HF_DATASETS_CACHE": str(folder / "cache"),
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
    }
    command = [*launcher, str(EXAMPLES / script), *without_helpers(script), *map(str, arguments)]
    return {"args": command, "env": environment, "cwd": folder}


def run_example(script: str, *arguments: object, **options) -> subprocess.CompletedProcess:
    command = example_command(script, *arguments, **options)
    return subprocess.run(**command, capture_output=True, text=True, timeout=300)


def run_examples_in_turn(script: str, command_lines: list[list], folder: Path) -> list[tuple[int, str, str]]:
    """The exit status and what went to stdout and stderr, of one process that runs a script once for each line.

    To start Python and import everything takes longer than to find out what is wrong with an option.
    """
    program = (
        "import contextlib, io, json, runpy, sys, traceback\n"
        "script, lines, answers = sys.argv[1], json.loads(sys.argv[2]), []\n"
        "sys.path.insert(0, script.rpartition('/')[0])\n"
        "for sys.argv in lines:\n"
        "    out, err, status = io.StringIO(), io.StringIO(), 0\n"
        "    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):\n"
        "        try: runpy.run_path(script, run_name='__main__')\n"
        "        except SystemExit as end: status = end.code\n"
        "        except BaseException: status = traceback.format_exc()\n"
        "    answers.append((status, out.getvalue(), err.getvalue()))\n"
        "print(json.dumps(answers))\n"
    )
    command = example_command(script, folder=folder)
    lines = [[script, *without_helpers(script), *map(str, line)] for line in command_lines]
    command["args"] = [sys.executable, "-c", program, str(EXAMPLES / script), json.dumps(lines)]
    run = subprocess.run(**command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    return [tuple(answer) for answer in json.loads(run.stdout.splitlines()[-1])]
