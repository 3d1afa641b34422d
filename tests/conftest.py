import os
import sys
from collections import Counter
from pathlib import Path

import hub_server

# Before anything imports huggingface_hub: no test reaches the Hub itself.
os.environ |= {"HF_ENDPOINT": hub_server.ADDRESS, "HF_HUB_DISABLE_XET": "1"}

# Before anything imports PyTorch: the C++ that torch.compile writes is compiled without optimization, and has no
# vectors, whose headers take long to compile.
os.environ |= {"TORCHINDUCTOR_VEC_ISA_OK": "0", "TORCHINDUCTOR_DEBUG_COMPILE": "1"}

import pytest
import torch

ROOT = Path(__file__).parent.parent
# Like running `python convert/….py` or `python examples/….py`: the scripts there import each other by name.
sys.path[:0] = [str(ROOT / "convert"), str(ROOT / "examples")]

# Before anything imports Triton: where there is no GPU, its kernels are interpreted. Nothing else here asks for Triton.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_addoption(parser):
    files = "test_golden.py, test_model.py, test_attention.py and test_export.py"
    parser.addoption("--device", help=f"device of the models in {files}, such as cuda (default: PyTorch's, the CPU)")
    parser.addoption("--swin", action="store_true", help="run all common tests of transformers on Swin, too")


def pytest_configure(config):
    """With --device, every tensor is created on that device unless a test names another."""
    if device := config.getoption("--device"):
        torch.set_default_device(device)
        torch.backends.cudnn.allow_tf32 = False  # in convolutions; in matrix products it is off by default


@pytest.fixture
def without_default_device(pytestconfig):
    """For what torch.compile traces, because it cannot trace the choice of a default device."""
    device = pytestconfig.getoption("--device")
    if device is None:  # torch 2.9 and older cannot set it to None twice
        yield
        return
    torch.set_default_device(None)
    yield
    torch.set_default_device(device)


def pytest_terminal_summary(terminalreporter):
    """Says how many tests were skipped for each reason."""
    skipped = terminalreporter.stats.get("skipped", [])
    reasons = Counter(report.longrepr[2].removeprefix("Skipped: ") for report in skipped)
    if reasons:
        terminalreporter.section("skipped tests")
        for reason, count in reasons.most_common():
            terminalreporter.line(f"{count:4} x {reason}")
