"""Focal passes every common test of transformers that Swin passes.

So Swin runs only the tests that Focal skips, and with --swin, all.
They are in transformers' source distribution, which is downloaded once for each version and kept in the user's cache.
"""

import contextlib
import os
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter, defaultdict
from pathlib import Path
from xml.etree import ElementTree

import pytest
import transformers

from conftest import ROOT

SUBJECTS = ["focal", "topk_conv", "swin"]  # of conformance.py

# What the common tests import and the distribution leaves out.
STAND_INS = {
    "__init__.py": "",
    "exporters/test_export.py": "class ExportTesterMixin: pass",
    "generation/test_utils.py": "class GenerationTesterMixin: pass",
    # Settings that every config takes.
    "utils/test_configuration_utils.py": """config_common_kwargs = {
        "return_dict": False, "output_hidden_states": True, "chunk_size_feed_forward": 5, "dtype": "float16",
        "architectures": ["Model"], "id2label": {0: "cat"}, "problem_type": "regression",
    }""",
}


def download(version: str, folder: Path) -> Path:
    """Downloads the source distribution of a version of transformers, and extracts its tests."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary=transformers", "--retries=1"]
    run = subprocess.run(
        [*command, f"--dest={folder}", f"transformers=={version}"], capture_output=True, text=True, cwd=folder
    )
    if run.returncode:
        pytest.skip(f"pip cannot get the source distribution of transformers {version}: {run.stderr.strip()}")
    with tarfile.open(folder / f"transformers-{version}.tar.gz") as archive:
        tests = f"transformers-{version}/tests"
        archive.extractall(folder, [file for file in archive if file.name.startswith(tests)], filter="data")
    return folder / tests


@pytest.fixture(scope="module")
def common_tests():
    """Returns the folder from which `transformers_tests` can be imported."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "focal_hf"
    package = cache / f"transformers-{transformers.__version__}" / "transformers_tests"
    if not package.exists():
        package.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as partial:
            tests = download(transformers.__version__, Path(partial))
            with contextlib.suppress(OSError):  # another process was faster
                tests.rename(package)
    for name, text in STAND_INS.items():
        (package / name).parent.mkdir(exist_ok=True)
        (package / name).write_text(text + "\n")
    return package.parent


@pytest.fixture(scope="module")
def outcomes(common_tests, tmp_path_factory, pytestconfig) -> dict[str, dict[str, tuple[str, str]]]:
    """Returns the outcome of each test for each model: "passed", "skipped" or "failed", and the reason."""
    report = tmp_path_factory.mktemp("reports") / "report.xml"
    options = ["-o", "addopts=", "-p", "no:cacheprovider", "-W", "ignore", "--tb=short", f"--junitxml={report}"]
    path = os.pathsep.join(filter(None, [str(common_tests), os.environ.get("PYTHONPATH")]))
    environment = {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [
            sys.executable,
            str(ROOT / "tests" / "conformance.py"),
            "all" if pytestconfig.getoption("--swin") else "where Focal skips",
            *options,
        ],
        capture_output=True,
        text=True,
        env=os.environ | environment,
    )
    assert run.returncode in (0, 1), run.stdout + run.stderr  # all passed, or some failed
    outcomes = defaultdict(dict)
    for case in ElementTree.parse(report).iter("testcase"):
        # One for each part of a test that did not pass.
        reasons = {tag: [node.text for node in case.iter(tag)] for tag in ("failure", "error", "skipped")}
        failures = reasons["failure"] + reasons["error"]
        outcome = "failed" if failures else "skipped" if reasons["skipped"] else "passed"
        # Such as "tests.conformance.ModelTests_swin".
        kind, subject = case.get("classname").rpartition(".")[2].split("_", 1)
        outcomes[subject][f"{kind}.{case.get('name')}"] = outcome, "\n".join(failures or reasons["skipped"])
    return outcomes


@pytest.mark.slow
@pytest.mark.parametrize("subject", SUBJECTS)
def test_passes_what_swin_passes(outcomes, subject, pytestconfig):
    if subject == "swin" and not pytestconfig.getoption("--swin"):
        pytest.skip("Swin runs all common tests only with --swin")
    swin, ours = outcomes["swin"], outcomes[subject]
    counts = Counter(outcome for outcome, _ in ours.values())
    print(f"{subject}: {counts['passed']} passed, {counts['failed']} failed, {counts['skipped']} skipped")
    assert swin.keys() == ours.keys()
    if subject == "swin":  # fails some tests in older versions of transformers
        assert counts["passed"] >= 50
        return
    assert counts["passed"] >= 100
    worse = [
        f"{test} {outcome}: {reason}"
        for test, (outcome, reason) in ours.items()
        if outcome == "failed" or (outcome == "skipped" and swin[test][0] != "skipped")
    ]
    if worse:
        pytest.fail("\n".join(worse), pytrace=False)
