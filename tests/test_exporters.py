"""transformers' exporters for OpenVINO and ExecuTorch. Those for torch.export and ONNX are in test_export.py."""

import pytest
import torch

from extra_packages import run_tests_with
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


@pytest.mark.slow
def test_with_executorch_installed(tmp_path):
    """In a process in which executorch can be imported: its requirements would replace other packages."""
    pytest.importorskip("transformers.exporters.exporter_executorch", reason="needs transformers 5.24")
    packages = ["executorch", "flatbuffers", "ruamel.yaml", "tabulate", "torchao"]
    run = run_tests_with(packages, __file__, "images_of_one_size", tmp_path)
    assert " 1 passed" in run.stdout, run.stdout + run.stderr


def test_executorch_with_images_of_one_size(model):
    pytest.importorskip("executorch", reason="test_with_executorch_installed runs this")
    from transformers.exporters.exporter_executorch import ExecutorchConfig, ExecutorchExporter

    inputs = {"pixel_values": pixels(2, 3, 40, 45)}
    exported = ExecutorchExporter().export(model, inputs, ExecutorchConfig(backend="xnnpack"))
    with torch.no_grad():
        expected = model(**inputs).logits
    torch.testing.assert_close(exported(**inputs).logits, expected, rtol=1e-5, atol=1e-5)
