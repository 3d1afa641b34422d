"""The built package installs and works outside this checkout."""

import subprocess
import sys
from importlib import metadata

import pytest

import focal_hf
from conftest import ROOT

USE = """
import pathlib, sys, torch, focal_hf
from transformers import AutoConfig, AutoModel
assert pathlib.Path(focal_hf.__file__).is_relative_to(sys.argv[1]), focal_hf.__file__
assert (pathlib.Path(focal_hf.__file__).parent / "py.typed").exists()
config = AutoConfig.for_model("focal", embed_dim=24)
print(list(AutoModel.from_config(config)(torch.zeros(1, 3, 40, 40)).pooler_output.shape), focal_hf.__version__)
"""


def test_version():
    assert focal_hf.__version__ == metadata.version("focal_hf")


@pytest.mark.slow
def test_wheel_and_sdist_install_and_work(tmp_path):
    """`build` makes the wheel from the source distribution, as pip does when it installs one."""
    run = {"check": True, "cwd": tmp_path, "capture_output": True, "text": True}
    subprocess.run([sys.executable, "-m", "build", "--outdir", str(tmp_path), str(ROOT)], **run)
    (wheel,), (_,) = tmp_path.glob("*.whl"), tmp_path.glob("*.tar.gz")
    target = tmp_path / "installed"
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--target", str(target), str(wheel)]
    subprocess.run(install, **run)
    use = subprocess.run([sys.executable, "-c", USE, str(target)], env={"PYTHONPATH": str(target)}, **run)
    assert use.stdout.split("\n")[0] == f"[1, 192] {focal_hf.__version__}"
