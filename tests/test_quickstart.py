"""`make quickstart`, and the notebook, which uses the quickstart's model where no published one can be downloaded."""

import json
import subprocess
import sys

import nbformat
import pytest
from nbclient import NotebookClient
from PIL import Image

from example_runs import EXAMPLES, run_example
from small_models import PUBLIC_PROCESSOR

NOTEBOOK = EXAMPLES / "focal_hf.ipynb"


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory) -> subprocess.CompletedProcess:
    """`make quickstart`, in another folder, which is the attribute `folder`."""
    folder = tmp_path_factory.mktemp("quickstart") / "quickstart"
    command = [sys.executable, str(EXAMPLES / "quickstart.py"), "--folder", str(folder)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stdout + run.stderr
    run.folder = folder
    return run


@pytest.mark.slow
def test_quickstart_learns_the_digits(quickstart):
    result = json.loads((quickstart.folder / "result.json").read_text())
    assert result["accuracy"] >= 0.95
    assert f"Accuracy on {result['images']} unseen pictures: {result['accuracy']:.4f}" in quickstart.stdout

    splits = {split: set() for split in ("train", "validation", "test")}
    for split, seen in splits.items():
        seen.update(file.name for file in (quickstart.folder / "digits" / split).glob("*/*.png"))
    assert sum(map(len, splits.values())) == len(set.union(*splits.values())) == 1797  # no picture in two splits
    assert result["images"] == len(splits["test"])
    with Image.open(quickstart.folder / "predictions.png") as picture:
        assert picture.width > 1000


def test_quickstart_leaves_folders_of_others_alone(tmp_path):
    for name in ("digits", "model", "thesis"):
        (tmp_path / name).mkdir()
    run = run_example("quickstart.py", "--folder", tmp_path, folder=tmp_path)
    assert run.returncode == 1
    assert run.stderr.splitlines()[-1].startswith(f"error: --folder {tmp_path} holds something else than")
    assert "(thesis)" in run.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"digits", "model", "thesis"}


def printed(cell: nbformat.NotebookNode) -> str:
    return "".join(output.text for output in cell.outputs if output.output_type == "stream")


def figures(cells: list[nbformat.NotebookNode]) -> int:
    """Number of pictures among the outputs of the cells."""
    return sum("image/png" in output.get("data", {}) for cell in cells for output in cell.outputs)


@PUBLIC_PROCESSOR
@pytest.mark.slow
def test_notebook_runs_from_the_first_cell_to_the_last(quickstart, tmp_path, monkeypatch):
    for path in ("convert", "examples"):
        (tmp_path / path).symlink_to(EXAMPLES.parent / path)
    (tmp_path / "quickstart").symlink_to(quickstart.folder)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_ASSETS_CACHE", str(tmp_path / "cache"))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    committed = [cell.copy() for cell in notebook.cells if cell.cell_type == "code"]

    # A cell that raises an error raises it here as well. A command in a cell does not, so the results are checked.
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()

    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert "Model: quickstart/model" in printed(cells[1])
    assert "Best: epoch" in "".join(map(printed, cells))
    answers = cells[3].outputs[-1].data["text/plain"]
    assert answers.startswith("[{'label': '3'")
    assert figures(cells) == figures(committed) == 5
    assert (tmp_path / "even_or_odd_model" / "model.safetensors").is_file()
