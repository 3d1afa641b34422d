"""torchvision's detectors on a Focal feature pyramid where torchvision runs, and what is said where it does not."""

import os
import subprocess
import sys


def test_message_where_torchvision_does_not_run(tmp_path):
    """As PyPI's does not beside PyTorch's CPU build: transformers then fails, and Focal says why."""
    package = tmp_path / "torchvision" / "__init__.py"
    package.parent.mkdir()
    package.write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-c", "import focal_hf"]
    run = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
    assert run.returncode != 0
    message = run.stderr.strip().splitlines()[-1]
    assert message.startswith("ImportError: torchvision is installed but does not run with PyTorch")
    assert "(operator torchvision::nms does not exist)" in message
