"""Tests with the last release of each minor version of transformers that setup.cfg allows.

`make versions` runs this script, which writes the table of docs/versions.md. `python tests/versions.py 5.24.0` measures
only the given versions. Each one is installed in a temporary environment, in front of the packages of the environment
that runs the script.
"""

import configparser
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

from conftest import ROOT

PAGE = ROOT / "docs" / "versions.md"
MODELS = ["focal", "topk_conv", "swin"]  # the columns of the table, as tests/conformance.py names them
TESTS = [f"tests/test_{name}.py" for name in ("golden", "config", "remote_code")]


def supported() -> Requirement:
    """Returns the requirement of transformers in setup.cfg."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    requirements = map(Requirement, setup["options"]["install_requires"].split())
    return next(requirement for requirement in requirements if requirement.name == "transformers")


def releases() -> list[str]:
    """Returns the last release of each supported minor version, oldest first."""
    command = [sys.executable, "-m", "pip", "index", "versions", "transformers"]
    listing = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    versions = map(Version, re.search(r"Available versions: (.*)", listing)[1].split(", "))
    last = {version.release[:2]: str(version) for version in sorted(versions) if version in supported().specifier}
    return list(last.values())


def install(version: str, folder: str) -> str:
    """Installs a version of transformers, and what it requires in other versions. Returns the path of its Python."""
    venv.create(folder)
    packages = Path(sysconfig.get_path("purelib", "venv", {"base": folder}))
    (packages / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    python = os.path.join(folder, "bin", "python")
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet"]
    subprocess.run([*pip, f"transformers=={version}"], check=True, stderr=subprocess.PIPE)
    return python


def run_tests(python: str, *arguments: str) -> str:
    """Returns what pytest printed."""
    command = [python, "-m", "pytest", "-q", "-W", "ignore", "-p", "no:cacheprovider", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True).stdout


def counts(line: str) -> str:
    """Returns the numbers of passed, failed and skipped tests in a line of pytest's or test_conformance.py's output."""
    found = {word: number for number, word in re.findall(r"(\d+) (passed|failed|skipped)", line)}
    return " / ".join(found.get(word, "0") for word in ("passed", "failed", "skipped"))


def results(version: str) -> list[str]:
    """Returns the columns of the table for a version."""
    with tempfile.TemporaryDirectory() as folder:
        python = install(version, folder)
        conformance = run_tests(python, "-rfP", "--swin", "tests/test_conformance.py")
        others = run_tests(python, "-m", "not slow", "-rfE", *TESTS)
    print(*re.findall(r"(?m)^(?:FAILED|ERROR) .*", conformance + others), sep="\n", flush=True)
    by_model = [re.search(rf"(?m)^{model}: .*", conformance)[0] for model in MODELS]
    return list(map(counts, [*by_model, others.splitlines()[-1]]))


def update(version: str, results: list[str]) -> None:
    """Adds or replaces the row of a version in the table of the page."""
    text = PAGE.read_text()
    table = re.search(r"(?m)^\| transformers \| Focal \|.*\n(\|.*\n)*", text)[0]
    head, rows = table.splitlines()[:2], table.splitlines()[2:]
    by_version = {Version(row.split("|")[1].strip()): row for row in rows}
    by_version[Version(version)] = f"| {' | '.join([version, *results])} |"
    lines = [*head, *(by_version[key] for key in sorted(by_version))]
    PAGE.write_text(text.replace(table, "\n".join(lines) + "\n"))


def main() -> None:
    for version in sys.argv[1:] or releases():
        print(f"transformers {version}", flush=True)
        update(version, results(version))


if __name__ == "__main__":
    main()
