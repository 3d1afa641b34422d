"""transformers' exporters for OpenVINO and ExecuTorch. Those for torch.export and ONNX are in test_export.py."""

import os
import subprocess
import sys

import pytest
import torch

from conftest import ROOT
from focal_hf import FocalForImageClassification
from small_models import pixels, randomized, tiny

BLOCK = {"embed_dim": 8, "depths": (1,), "num_heads": (2,), "focal_levels": (2,), "focal_windows": (3,)}
BLOCK |= {"expand_sizes": (2,), "window_size": 5}


@pytest.fixture
def model():
    return randomized(FocalForImageClassification(tiny(**BLOCK)))


def test_openvino_with_images_of_any_size(model, without_default_device):
    openvino = pytest.importorskip("openvino")
    exporters = pytest.importorskip("transformers.exporters.exporter_openvino", reason="needs transformers 5.24")
    exporter = exporters.OpenVINOExporter()
    exported = exporter.export(model, {"pixel_values": pixels(2, 3, 40, 45)}, exporters.OpenVINOConfig(dynamic=True))
    # Without the hint, OpenVINO computes in bfloat16 where the processor can.
    run = openvino.compile_model(exported.program, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for shape in [(2, 3, 40, 45), (3, 3, 61, 57), (1, 3, 1, 90)]:
        images = pixels(*shape)
        with torch.no_grad():
            expected = model(images).logits
        found = torch.from_numpy(run([images.numpy()])["logits"])
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_with_executorch_installed(tmp_path):
    """In a process in which executorch can be imported: its requirements would replace other packages."""
    pytest.importorskip("transformers.exporters.exporter_executorch", reason="needs transformers 5.24")
    packages = ["executorch", "flatbuffers", "ruamel.yaml", "tabulate", "torchao"]
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(tmp_path), *packages]
    run = subprocess.run(pip, capture_output=True, text=True)
    if run.returncode:
        pytest.skip(f"pip cannot get {', '.join(packages)}: {run.stderr.strip()}")
    path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(tmp_path)]))
    environment = os.environ | {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-o", "addopts=", "-p", "no:cacheprovider", __file__]
    run = subprocess.run(
        [*command, "-k", "images_of_one_size"], env=environment, capture_output=True, text=True, cwd=ROOT
    )
    assert " 1 passed" in run.stdout, run.stdout + run.stderr


def test_executorch_with_images_of_one_size(model):
    pytest.importorskip("executorch", reason="test_with_executorch_installed runs this")
    from transformers.exporters.exporter_executorch import ExecutorchConfig, ExecutorchExporter

    inputs = {"pixel_values": pixels(2, 3, 40, 45)}
    exported = ExecutorchExporter().export(model, inputs, ExecutorchConfig(backend="xnnpack"))
    with torch.no_grad():
        expected = model(**inputs).logits
    torch.testing.assert_close(exported(**inputs).logits, expected, rtol=1e-5, atol=1e-5)
