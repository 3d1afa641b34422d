"""Folders that training scripts accept as --output, and files that --overwrite and --resume replace in them."""

import re
from argparse import Namespace
from pathlib import Path

import pytest

from common.files import check_output, clear_output
from common.options import Problem
from example_runs import contents


def arguments(folder: Path, **given) -> Namespace:
    return Namespace(**{"output": folder, "data": "/nowhere", "overwrite": False, "resume": False} | given)


REPLACEABLE = {
    "a finished run": ["config.json", "model.safetensors", "README.md", "results.json", "last/config.json"],
    "a pre-trained or converted model": ["config.json", "model-00001-of-00002.safetensors"],
    "killed before its first state": ["logs/out/events.out.tfevents.1.host.2", "logs/out/1.5/hparams.yml"],
    "hung up while saving its first model": [".part/config.json", ".part/adapter/README.md"],
    "killed at its end": ["config.json", ".part/step_000000004/state.json", "last/model.safetensors"],
}
KEPT = {
    "config.json of a server": ("holds no model", {"config.json": '{"port": 8080}'}),
    "config.json that is a list": ("holds no model", {"config.json": "[1]"}),
    "config.json that is no JSON": ("holds no model", {"config.json": "[" * 100_000}),
    "README alone": ("holds no model", {"README.md": ""}),
    "thesis": ("holds thesis.tex, which this script does not write", {"thesis.tex": ""}),
    "version control": ("holds .git, which", {".git/config": ""}),
    "hidden file": ("holds .env, which", {".env": ""}),
    "file in a folder of ours": ("holds last/notes.txt, which", {"last/notes.txt": ""}),
    "file among states": ("holds checkpoints/step_000000001/x.py, which", {"checkpoints/step_000000001/x.py": ""}),
    "folder that is called like a file of ours": ("holds results.json, which", {"results.json/data.csv": ""}),
    "checkpoint of another library": ("holds checkpoint-500, which", {"checkpoint-500/model.safetensors": ""}),
}


def write(folder: Path, files: dict[str, str]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)


@pytest.mark.parametrize("name", REPLACEABLE)
@pytest.mark.parametrize("linked", [False, True], ids=["", "through_a_link"])
def test_overwrite_replaces_results(tmp_path, monkeypatch, name, linked):
    """All result files are deleted. The folder itself is kept, also if it is a link or the working folder."""
    folder = tmp_path / "out"
    write(folder, dict.fromkeys(REPLACEABLE[name], '{"model_type": "focal"}'))
    output = tmp_path / "link" if linked else Path()
    (tmp_path / "link").symlink_to(folder)
    monkeypatch.chdir(folder)
    with pytest.raises(Problem, match="exists and is not empty: name another folder, or add --overwrite"):
        check_output(arguments(output))
    check_output(arguments(output, overwrite=True))
    clear_output(output)
    assert [path.name for path in folder.iterdir()] == ["checkpoints"]
    assert (tmp_path / "link").is_symlink()
    assert list((folder / "checkpoints").iterdir()) == []


@pytest.mark.parametrize("name", KEPT)
def test_overwrite_deletes_no_other_files(tmp_path, name):
    message, files = KEPT[name]
    folder = tmp_path / "out"
    write(folder, files if message == "holds no model" else {"config.json": '{"model_type": "swin"}'} | files)
    before = contents(folder)
    for act in (lambda: check_output(arguments(folder, overwrite=True)), lambda: clear_output(folder)):
        with pytest.raises(Problem, match=re.escape(message)):
            act()
    if "checkpoints/" not in message and "last/" not in message:
        with pytest.raises(Problem, match="holds nothing to --resume: name the folder of the stopped run"):
            check_output(arguments(folder, resume=True))
    assert contents(folder) == before


def test_links_in_an_output_folder_are_kept(tmp_path):
    """The files of a model in the cache of the Hub are links."""
    write(tmp_path, {"blob": "", "out/config.json": '{"model_type": "focal"}'})
    (tmp_path / "out" / "model.safetensors").symlink_to(tmp_path / "blob")
    with pytest.raises(Problem, match=r"holds model.safetensors, which"):
        check_output(arguments(tmp_path / "out", overwrite=True))
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    with pytest.raises(Problem, match="is a link to a folder that does not exist"):
        check_output(arguments(tmp_path / "dangling"))


@pytest.mark.parametrize("output", ["pictures", "pictures/cat/out", "link/out"])
def test_output_is_outside_of_the_data(tmp_path, output):
    """Curves, for instance, would be pictures of one more class."""
    (tmp_path / "pictures").mkdir()
    (tmp_path / "link").symlink_to("pictures")
    with pytest.raises(Problem, match=r"is in --data .*: the next run would read its files as data"):
        check_output(arguments(tmp_path / output, data=str(tmp_path / "pictures")))
    check_output(arguments(tmp_path / "pictures_out", data=str(tmp_path / "pictures")))
