"""Checkpoints that carry their code: what loads where the package cannot be imported, and what is saved again."""

import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification, BitImageProcessorPil
from transformers.dynamic_module_utils import get_relative_imports

import convert_focal_to_hf
import focal_hf
import golden_cases
from focal_hf import FocalBackbone, FocalConfig, FocalForImageClassification, FocalModel
from hub_server import serve
from small_models import PUBLIC_PROCESSOR

SMALL = {"image_size": 32, "embed_dim": 8, "depths": (1, 2, 1), "num_heads": (1, 2, 2), "window_size": 4}
SMALL |= {"focal_levels": (2, 2, 2), "focal_windows": (3, 3, 1), "expand_sizes": (2, 2, 2), "encoder_stride": 16}
CODE = {file.name: file.read_bytes() for file in Path(focal_hf.__file__).parent.glob("*.py")}
del CODE["__init__.py"]  # transformers' registrations, which an auto_map takes the place of
for name in (
    "backbone_weights_focal",
    "growing_focal",
    "freezing",
    "torchvision_focal",
    "attention_records",
    "attention_figures",
    "visualization",
):
    del CODE[f"{name}.py"]  # no part of a model

WITHOUT_THE_PACKAGE = """
import sys, torch
sys.modules["focal_hf"] = None
try:
    import focal_hf
except ImportError:
    pass
else:
    raise AssertionError("focal_hf can be imported")
"""


def run(script: str, folder: Path) -> str:
    """Runs a script in `folder` in a process of its own, with caches of its own; gives what it printed."""
    environment = os.environ | {"HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def carried_code(folder: Path) -> set[str]:
    """The classes that config.json says are in `folder`, after a check that what lies there is this package's code."""
    assert {file.name: file.read_bytes() for file in folder.glob("*.py")} == CODE
    return set(json.loads((folder / "config.json").read_text())["auto_map"].values())


COMPLETE = {
    "configuration_focal.FocalConfig",
    "modeling_focal.FocalModel",
    "modeling_focal.FocalForImageClassification",
    "modeling_focal.FocalForMaskedImageModeling",
    "modeling_focal.FocalBackbone",
}


@pytest.fixture
def registered(monkeypatch):
    """For what is registered in a test to be forgotten after it."""
    for registering in (FocalConfig, FocalModel, FocalForImageClassification):
        monkeypatch.setattr(registering, "_auto_class", None)


def model_of(attention_type: str) -> FocalForImageClassification:
    """With weights under which every part matters."""
    model = FocalForImageClassification(FocalConfig(attention_type=attention_type, topk=11, num_labels=5, **SMALL))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2, generator=generator)
    return model


def save(folder: Path, attention_type: str) -> Path:
    """A folder with a model, its image processor and its code. The caller forgets what is registered."""
    FocalConfig.register_for_auto_class()
    model_of(attention_type).save_pretrained(folder)
    BitImageProcessorPil(size={"shortest_edge": 36}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    assert carried_code(folder) == COMPLETE
    return folder


def answers(name, backbone_from_pretrained, **trust):
    """What every class gives for fixed input: in evaluation, its gradients in training, and what pipelines make of it.

    Heads that the checkpoint lacks start from a seed.
    """
    import torch
    from PIL import Image
    from torch.utils._pytree import tree_leaves
    from transformers import AutoModel, AutoModelForImageClassification, AutoModelForMaskedImageModeling, pipeline

    found = {}
    loaders = {
        auto.__name__: auto.from_pretrained
        for auto in (AutoModel, AutoModelForImageClassification, AutoModelForMaskedImageModeling)
    }
    if backbone_from_pretrained is not None:
        loaders["AutoBackbone"] = backbone_from_pretrained
    for auto, from_pretrained in loaders.items():
        torch.manual_seed(0)
        model = from_pretrained(name, **trust).eval()
        inputs = {"pixel_values": torch.randn(2, 3, 40, 52)}
        if "Masked" in auto:
            inputs["bool_masked_pos"] = torch.rand(2, 130) < 0.5
        with torch.no_grad():
            found[auto, "eval"] = model(**inputs).to_tuple()
        sum(map(torch.sum, tree_leaves(model.train()(**inputs).to_tuple()))).backward()
        found[auto, "gradients"] = {name: weight.grad for name, weight in model.named_parameters()}
        found[auto, "from"] = type(model).__module__.partition(".")[0]
    image = Image.linear_gradient("L").convert("RGB")
    for task in ("image-classification", "image-feature-extraction"):
        found[task] = pipeline(task, model=name, **trust)([image, image.rotate(90)])
    return found


def assert_same(found: dict, expected: dict) -> None:
    """Bit for bit, from code of the checkpoint's in place of the installed."""
    assert found.keys() <= expected.keys()
    for key, answer in found.items():
        if "from" in key:
            assert (answer, expected[key]) == ("transformers_modules", "focal_hf")
        elif isinstance(key, tuple):
            torch.testing.assert_close(answer, expected[key], rtol=0, atol=0)
        else:  # a pipeline's
            assert answer == expected[key]


SAVE_AGAIN = """
torch.save(answers("saved", None, trust_remote_code=True), "from_folder")

from transformers import AutoBackbone, AutoConfig, AutoModelForImageClassification, pipeline
AutoModelForImageClassification.from_pretrained("saved", trust_remote_code=True).save_pretrained("again")
AutoConfig.from_pretrained("saved", trust_remote_code=True).save_pretrained("config")
pipeline("image-classification", model="saved", trust_remote_code=True).save_pretrained("pipeline")

torch.save(answers("org/focal", AutoBackbone.from_pretrained, trust_remote_code=True), "from_hub")
"""


def test_without_the_package(tmp_path, registered):
    """From a folder, and what that process saved again from a server in the Hub's place."""
    folder = save(tmp_path / "saved", "topk")
    expected = answers(folder, FocalBackbone.from_pretrained)

    with serve(tmp_path / "pipeline", "org/focal"):
        run(WITHOUT_THE_PACKAGE + inspect.getsource(answers) + SAVE_AGAIN, tmp_path)
    assert_same(torch.load(tmp_path / "from_folder"), expected)
    for again in ("again", "config", "pipeline"):
        assert carried_code(tmp_path / again) == COMPLETE
    found = torch.load(tmp_path / "from_hub")
    assert ("AutoBackbone", "eval") in found
    assert_same(found, expected)


@pytest.mark.parametrize("registering", [FocalConfig, FocalModel, FocalForImageClassification])
def test_with_the_package(registering, tmp_path, registered, monkeypatch):
    """The package's code is used, whatever a folder carries; and what is saved carries all code or does not say so."""
    model = model_of("focal")
    model = model.focal if registering is FocalModel else model
    model.save_pretrained(tmp_path / "without")
    assert "auto_map" not in json.loads((tmp_path / "without" / "config.json").read_text())
    assert not list((tmp_path / "without").glob("*.py"))

    registering.register_for_auto_class()
    model.save_pretrained(tmp_path / "with")
    assert carried_code(tmp_path / "with") == COMPLETE

    monkeypatch.undo()  # as in a later process
    auto = AutoModel if registering is FocalModel else AutoModelForImageClassification
    loaded = auto.from_pretrained(tmp_path / "with")
    assert type(loaded) is type(model)
    for name, saved in (("model", loaded), ("config", AutoConfig.from_pretrained(tmp_path / "with"))):
        saved.save_pretrained(tmp_path / name)
        assert carried_code(tmp_path / name) == COMPLETE


@pytest.mark.parametrize("top", ["configuration_focal", "modeling_focal"])
def test_the_modules_that_transformers_loads_name_all_others(top):
    """Up to 5.12, transformers copies only these from a folder."""
    named = get_relative_imports(Path(focal_hf.__file__).with_name(f"{top}.py"))
    assert {f"{name}.py" for name in {*named, top}} == CODE.keys()


COPIES = """
import torch
from transformers import AutoModelForImageClassification

load = AutoModelForImageClassification.from_pretrained
models = [load("first", trust_remote_code=True), load("second", trust_remote_code=True)]
import focal_hf
models.append(load("first"))
assert len({type(model) for model in models}) == 3

pixel_values, found = torch.rand(2, 3, 40, 52), []
for model in models:
    with torch.no_grad():
        logits = model.eval()(pixel_values).logits
    model(pixel_values).logits.sum().backward()
    found.append([logits, *(weight.grad for weight in model.parameters())])
torch.save(found, "found")
"""


def test_copies_of_the_code_keep_apart(tmp_path, registered):
    """In one process, the code of two folders and the package's. One folder's is of another version."""
    for name in ("first", "second"):
        save(tmp_path / name, "focal")
    changed = tmp_path / "second" / "cpu_attention_focal.py"
    changed.write_text(changed.read_text().replace("scale=scaling", "scale=scaling / 2"))
    run(COPIES, tmp_path)
    first, second, installed = torch.load(tmp_path / "found")
    torch.testing.assert_close(first, installed, rtol=0, atol=0)
    assert not torch.equal(second[0], installed[0])


@PUBLIC_PROCESSOR
def test_the_converter_writes_code(tmp_path, registered):
    """The use that the model card shows, where the package cannot be imported."""
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(golden_cases.case("base").config))
    arguments = ["--checkpoint", golden_cases.FOLDER / "base_released.pth", "--config", tmp_path / "config.yaml"]
    arguments += ["--output", tmp_path / "model", "--with-code"]
    convert_focal_to_hf.main(list(map(str, arguments)))
    assert carried_code(tmp_path / "model") == COMPLETE

    Image.new("RGB", (60, 40), "red").save(tmp_path / "picture.jpg")
    (snippet,) = re.findall(r"```python\n(.*?)```", (tmp_path / "model" / "README.md").read_text(), flags=re.DOTALL)
    assert run(WITHOUT_THE_PACKAGE + snippet, tmp_path).startswith("LABEL_")
