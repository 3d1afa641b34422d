"""The package builds. It can be published, and it installs and works outside this checkout."""

import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_bytes
from email.message import Message
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

import focal_hf
from conftest import ROOT

pytestmark = pytest.mark.slow

USE = """
import pathlib, sys, torch, focal_hf
from importlib import metadata
from transformers import AutoConfig, AutoModel
assert pathlib.Path(focal_hf.__file__).is_relative_to(sys.argv[1]), focal_hf.__file__
assert (pathlib.Path(focal_hf.__file__).parent / "py.typed").exists()
config = AutoConfig.for_model("focal", embed_dim=24)
print(list(AutoModel.from_config(config)(torch.zeros(1, 3, 40, 40)).pooler_output.shape), metadata.version("focal-hf"))
"""


def run(*command, **options) -> str:
    done = subprocess.run([sys.executable, "-m", *map(str, command)], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> dict[str, Path]:
    """The source distribution, the wheel that `build` makes from it, and the wheel that it makes from the checkout.

    They are built from a copy, because setuptools reads what it wrote into the folder before.
    """
    folder = tmp_path_factory.mktemp("built")
    ignored = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "quickstart", "_build")
    tree = shutil.copytree(ROOT, folder / "tree", ignore=ignored)
    run("build", "--outdir", folder / "dist", tree)
    run("build", "--wheel", "--outdir", folder / "direct", tree)
    (sdist,), (wheel,), (direct,) = (folder.glob(name) for name in ("dist/*.tar.gz", "dist/*.whl", "direct/*.whl"))
    return {"sdist": sdist, "wheel": wheel, "direct": direct}


@pytest.fixture(scope="module")
def metadata(built) -> Message:
    with zipfile.ZipFile(built["wheel"]) as wheel:
        (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
        return message_from_bytes(wheel.read(name))


def test_versions_agree(metadata):
    citation = re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), re.M)[1]
    latest = re.search(r"^## \[(.+)\] - \d{4}-\d\d-\d\d$", (ROOT / "CHANGELOG.md").read_text(), re.M)[1]
    assert metadata["Version"] == focal_hf.__version__ == citation == latest


def test_distributions_can_be_published(built):
    run("twine", "check", "--strict", built["sdist"], built["wheel"])


def test_description_has_no_relative_links(metadata):
    """The index of packages shows the README alone. Each link into the repository is to a file that exists."""
    page = MarkdownIt("commonmark").enable("table").render(metadata.get_payload(decode=True).decode())
    links = re.findall(r'(?:href|src)="([^"]*)"', page)
    assert len(links) > 10
    assert not [link for link in links if not link.startswith("https://")]
    repository = metadata["Home-page"]
    files = [link.split("/", 7)[7].partition("#")[0] for link in links if link.startswith(f"{repository}/")]
    assert len(files) > 10
    assert not [file for file in files if not (ROOT / file).is_file()]


def test_source_distribution_builds_the_same_wheel(built):
    def contents(wheel: Path) -> dict[str, bytes]:
        with zipfile.ZipFile(wheel) as archive:
            return {name: archive.read(name) for name in archive.namelist()}

    assert contents(built["wheel"]) == contents(built["direct"])
    packaged = {name.removeprefix("focal_hf/") for name in contents(built["wheel"]) if name.startswith("focal_hf/")}
    assert packaged == {file.name for file in (ROOT / "src" / "focal_hf").iterdir() if file.is_file()}
    with tarfile.open(built["sdist"]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"CHANGELOG.md", "LICENSE", "README.md", "setup.py"} <= names
    assert not [name for name in names if name.startswith("tests")]  # they need files that are not in it


def test_wheel_installs_and_works(built, tmp_path):
    target = tmp_path / "installed"
    run("pip", "install", "--no-deps", "--target", target, built["wheel"])
    use = [sys.executable, "-c", USE, str(target)]
    used = subprocess.run(use, env={"PYTHONPATH": str(target)}, cwd=tmp_path, capture_output=True, text=True)
    assert used.stdout.split("\n")[0] == f"[1, 192] {focal_hf.__version__}", used.stderr
