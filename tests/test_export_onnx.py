"""convert/export_onnx.py writes graphs that give the model's outputs, and a script without torch runs them."""

import re
import resource
import subprocess
import sys

import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor

import export_onnx
from conftest import ROOT
from focal_hf import FocalBackbone, FocalForImageClassification
from messages import ConversionError
from small_models import PUBLIC_PROCESSOR, TORCH_2_7, pixels, prepare, randomized, tiny

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

SMALL = {"embed_dim": 8, "depths": (1,), "num_heads": (2,), "focal_levels": (2,), "focal_windows": (3,)}
SMALL |= {"expand_sizes": (2,), "encoder_stride": 4}


@pytest.fixture
def folder(tmp_path):
    """A folder with a model of one block and its image processor."""
    prepare(tmp_path, "focal")
    model = randomized(FocalForImageClassification(tiny(**SMALL)))
    model.save_pretrained(tmp_path / "focal-tiny")
    return tmp_path / "focal-tiny"


def export(folder, *options):
    output = folder.parent / "exported"
    export_onnx.main(["--model", str(folder), "--output", str(output), *options])
    return onnxruntime.InferenceSession(output / "model.onnx")


@pytest.mark.parametrize(
    ("options", "batch", "tolerance"),
    [([], 3, 1e-5), (["--batch", "2", "--opset", "18", "--dtype", "fp16"], 2, 1e-2)],
)
def test_graphs_of_one_size(folder, options, batch, tolerance, capsys):
    session = export(folder, "--size", "40x52", *options)
    assert {file.name for file in (folder.parent / "exported").iterdir()} == {
        "model.onnx",
        "config.json",
        "preprocessor_config.json",
    }
    images = pixels(batch, 3, 40, 52)
    with torch.no_grad():
        expected = FocalForImageClassification.from_pretrained(folder)(images).logits
    (found,) = session.run(["logits"], {"pixel_values": images.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=tolerance, atol=tolerance)
    assert "onnxruntime takes" in capsys.readouterr().out


@TORCH_2_7
def test_eight_bits_are_for_linear_layers(folder):
    session = export(folder, "--size", "40x52", "--int8")
    with torch.no_grad():
        expected = FocalForImageClassification.from_pretrained(folder)(pixels(1, 3, 40, 52)).logits
    (found,) = session.run(["logits"], {"pixel_values": pixels(1, 3, 40, 52).numpy()})
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=0.2, atol=0.2)
    graph = onnx.load(folder.parent / "exported" / "model.onnx").graph
    weights = {value.name: value.data_type for value in graph.initializer}
    quantized = [node for node in graph.node if node.op_type == "MatMulInteger"]
    assert len(quantized) == 7  # four projections, two layers of the MLP, and the classifier
    assert {weights[node.input[1]] for node in quantized} == {onnx.TensorProto.INT8}
    convolutions = [node for node in graph.node if node.op_type.startswith("Conv")]
    assert {weights[node.input[1]] for node in convolutions} == {onnx.TensorProto.FLOAT}


def test_backbones_return_feature_maps(folder):
    model = randomized(FocalBackbone(tiny(**SMALL, out_features=["stem", "stage1"])))
    model.save_pretrained(folder)
    session = export(folder, "--size", "36x45")
    with torch.no_grad():
        expected = model(pixels(1, 3, 36, 45)).feature_maps
    found = session.run(["feature_maps.0", "feature_maps.1"], {"pixel_values": pixels(1, 3, 36, 45).numpy()})
    torch.testing.assert_close([torch.from_numpy(maps) for maps in found], list(expected), rtol=1e-4, atol=1e-4)


def test_numbers_that_are_not_finite_are_found(folder):
    """In any of the outputs."""
    model = randomized(FocalBackbone(tiny(**SMALL, out_features=["stem", "stage1"])))
    torch.nn.init.constant_(model.hidden_states_norms["stage1"].bias, torch.nan)
    model.save_pretrained(folder)
    with pytest.raises(ConversionError, match=r"by nan of the largest output.* The model's own outputs are not finite"):
        export(folder, "--size", "16x16")
    assert not (folder.parent / "exported").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--opset", "12"], "--opset must be from 18 to 23; got 12"),
        (
            ["--size", "3x40"],
            "--size 3x40 is too small for --model .* needs at least 4",
        ),
        (["--size", "any"], "--size any cannot be used with --model .* only if it is larger than a window"),
    ],
)
def test_bad_options(folder, options, message):
    FocalForImageClassification(tiny(**SMALL, drop_remainder=True, swin_compatible=True)).save_pretrained(folder)
    with pytest.raises(ConversionError, match=message):
        export(folder, *options)
    assert not (folder.parent / "exported").exists()


def test_models_without_an_image_processor(folder):
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(ConversionError, match="has no image processor"):
        export(folder)


def test_the_model_is_not_replaced(folder):
    with pytest.raises(ConversionError, match=r"--output .*focal-tiny holds the input .*config\.json"):
        export_onnx.main(["--model", str(folder), "--output", str(folder), "--overwrite"])
    assert (folder / "model.safetensors").exists()


def test_a_missing_package(folder, monkeypatch):
    monkeypatch.setattr(export_onnx, "PACKAGES", ("onnxruntime", "surely_not_installed"))
    with pytest.raises(ConversionError, match=r"surely_not_installed cannot be found\. Install them"):
        export(folder)


def test_a_full_disk(folder):
    """Nothing half-written remains."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(ConversionError, match=r"Exporting --model .* failed: .*File too large"):
            export(folder, "--size", "16x16")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path.name for path in folder.parent.iterdir()} == {"cat.jpg", "focal-tiny"}


@PUBLIC_PROCESSOR
def test_the_script_of_the_page_runs_without_torch(folder):
    export(folder)
    page = (ROOT / "docs" / "deploying.md").read_text(encoding="utf-8")
    (script,) = re.findall(r"```python\n(import json\n.*?)```", page, re.DOTALL)
    (folder.parent / "classify.py").write_text(
        "import sys\nsys.modules |= {'torch': None, 'transformers': None}\n" + script
    )
    command = [sys.executable, "classify.py", "exported", "cat.jpg"]
    printed = subprocess.run(command, cwd=folder.parent, check=True, capture_output=True, text=True).stdout
    found = dict(line.rsplit(" ", 1) for line in printed.splitlines())

    inputs = AutoImageProcessor.from_pretrained(folder)(Image.open(folder.parent / "cat.jpg"), return_tensors="pt")
    model = FocalForImageClassification.from_pretrained(folder)
    with torch.no_grad():
        scores = model(**inputs).logits.softmax(dim=1)[0]
    expected = {model.config.id2label[label]: score.item() for label, score in enumerate(scores)}
    assert found.keys() == expected.keys()
    for label, score in found.items():
        assert float(score) == pytest.approx(expected[label], abs=2e-3)
