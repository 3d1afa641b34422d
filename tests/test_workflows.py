"""The workflows of continuous integration call targets of the Makefile, with the versions that setup.cfg allows."""

import re
import shlex
from configparser import ConfigParser

import pytest
import yaml

from conftest import ROOT

FILES = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
WORKFLOWS = {file.stem: yaml.load(file.read_text(), yaml.BaseLoader) for file in FILES}  # BaseLoader: `on` is no bool
STEPS = [step for flow in WORKFLOWS.values() for job in flow["jobs"].values() for step in job.get("steps", [])]
MAKEFILE = (ROOT / "Makefile").read_text()


@pytest.fixture(scope="module")
def setup_cfg() -> ConfigParser:
    config = ConfigParser()
    config.read(ROOT / "setup.cfg")
    return config


def test_commands_are_targets_of_the_makefile():
    targets = set(re.findall(r"^([a-z]+):", MAKEFILE, re.M))
    variables = set(re.findall(r"^([A-Z]+) \?=", MAKEFILE, re.M))
    called = set()
    for step in STEPS:
        if step.get("run", "").startswith("make "):
            # An expression may contain spaces.
            target, *settings = shlex.split(re.sub(r"\$\{\{.*?\}\}", "value", step["run"]))[1:]
            called.add(target)
            assert {setting.partition("=")[0] for setting in settings} <= variables
    assert {"test", "docs", "build"} <= called <= targets


def test_versions_are_those_of_setup_cfg(setup_cfg):
    pythons = re.findall(r"Programming Language :: Python :: (3\.\d+)$", setup_cfg["metadata"]["classifiers"], re.M)
    matrix = WORKFLOWS["tests"]["jobs"]["test"]["strategy"]["matrix"]["include"]
    oldest, *others = matrix
    assert oldest["python"] == pythons[0] == setup_cfg["options"]["python_requires"].removeprefix(">=")
    assert pythons[-1] in {job["python"] for job in others} <= set(pythons)
    assert {job["transformers"] for job in others} == {job["torch"] for job in others} == {""}
    floors = dict(re.findall(r"^(torch|transformers)>=([\d.]+)", setup_cfg["options"]["install_requires"], re.M))
    assert oldest["torch"] == f"torch=={floors['torch']}.0"
    assert oldest["transformers"] == f"{floors['transformers']}.0"
    for step in STEPS:
        if step.get("uses", "").startswith("actions/setup-python@"):
            assert step["with"]["python-version"] in {"${{ matrix.python }}", pythons[-1]}


def test_actions_have_versions():
    used = [step["uses"] for step in STEPS if "uses" in step]
    assert len(used) > 5
    assert not [action for action in used if not re.search(r"@(release/)?v\d+$|@[0-9a-f]{40}$", action)]
    called = [job["uses"] for flow in WORKFLOWS.values() for job in flow["jobs"].values() if "uses" in job]
    assert called
    assert not [file for file in called if not (ROOT / file).is_file()]


def test_release_is_tested_and_has_no_password():
    """Only a tag publishes, after the tests, from an environment, with an identity token that no other job has."""
    release = WORKFLOWS["release"]
    assert release["on"] == {"push": {"tags": ["v*"]}}
    jobs = release["jobs"]
    assert jobs["tests"]["uses"] == "./.github/workflows/tests.yml"
    assert (jobs["build"]["needs"], jobs["publish"]["needs"]) == ("tests", "build")
    assert jobs["publish"]["environment"]
    assert "pypa/gh-action-pypi-publish" in jobs["publish"]["steps"][-1]["uses"]
    for name, flow in WORKFLOWS.items():
        assert flow["permissions"] == {"contents": "read"}
        assert "secrets." not in (ROOT / ".github" / "workflows" / f"{name}.yml").read_text()
    writers = [name for flow in WORKFLOWS.values() for name, job in flow["jobs"].items() if "permissions" in job]
    assert writers == ["publish"]
    assert jobs["publish"]["permissions"] == {"id-token": "write"}


def test_hooks_lint_with_the_version_of_the_tests(setup_cfg):
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    ruff = config["repos"][0]
    assert [hook["id"] for hook in ruff["hooks"]] == ["ruff-check", "ruff-format"]
    assert f"ruff=={ruff['rev'].removeprefix('v')}" in setup_cfg["options.extras_require"]["test"].split()
