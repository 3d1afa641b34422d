"""Tests in a process in which packages can be imported that are not installed elsewhere."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT


def run_tests_with(packages: list[str], file: str, tests: str, folder: Path) -> subprocess.CompletedProcess:
    """Runs the tests of a file that match `-k tests`, with packages that pip puts into a folder."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile", "--target", str(folder)]
    run = subprocess.run([*pip, *packages], capture_output=True, text=True)
    if run.returncode:
        pytest.skip(f"pip cannot get {', '.join(packages)}: {run.stderr.strip()}")
    path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(folder)]))
    environment = os.environ | {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-o", "addopts=", "-p", "no:cacheprovider", "-k", tests, file]
    return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
