"""Versions of torch and transformers that lack a name, or have a model type `focal`."""

import os
import re
import subprocess
import sys
from argparse import Namespace

import pytest

from common.dense_models import segmentation_processor
from common.options import Problem
from conftest import ROOT
from focal_hf.compatibility_focal import NEWEST_TRANSFORMERS, OLDEST_TRANSFORMERS
from small_models import PROCESSORS_NEED_TORCHVISION
from versions import supported


def run(script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-W", "ignore", "-c", script, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)


def test_versions_of_transformers_are_the_same_everywhere():
    assert str(supported().specifier) == f"<6,>={OLDEST_TRANSFORMERS}"
    rows = re.findall(r"(?m)^\| (\d+\.\d+)\.\d+ \|", (ROOT / "docs" / "versions.md").read_text())
    assert (rows[0], rows[-1]) == (OLDEST_TRANSFORMERS, NEWEST_TRANSFORMERS)
    assert f"| transformers | {OLDEST_TRANSFORMERS} or newer, below 6 |" in (ROOT / "README.md").read_text()


WITHOUT_NAMES = """
import importlib, sys
import transformers.models.auto.image_processing_auto
for argument in sys.argv[1:]:
    module, _, name = argument.rpartition(".")
    module = importlib.import_module(module)
    value = getattr(module, name)
    delattr(module, name)
    try:
        import focal_hf
    except ImportError as error:
        print(error)
    setattr(module, name, value)
    for imported in [imported for imported in sys.modules if imported.startswith("focal_hf")]:
        del sys.modules[imported]
import focal_hf
"""


def test_a_missing_name_of_transformers_is_named():
    names = [
        "transformers.backbone_utils.filter_output_hidden_states",
        "transformers.conversion_mapping.register_checkpoint_conversion_mapping",
        "transformers.core_model_loading.WeightConverter",
        "transformers.utils.generic.merge_with_config_defaults",
        "transformers.utils.output_capturing.capture_outputs",
    ]
    ended = run(WITHOUT_NAMES, *names)
    assert ended.returncode == 0, ended.stderr
    messages = ended.stdout.splitlines()
    for message, name in zip(messages, names, strict=True):
        module, _, attribute = name.rpartition(".")
        assert re.fullmatch(
            rf"focal_hf cannot be used with transformers \S+: cannot import name '{attribute}' from '{module}' .*\. "
            rf"focal_hf is tested with transformers {OLDEST_TRANSFORMERS} to {NEWEST_TRANSFORMERS}\. Install .*",
            message,
        ), message


def test_an_older_transformers_is_refused(tmp_path):
    package = tmp_path / "transformers-5.3.0.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: transformers\nVersion: 5.3.0\n")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    ended = run("import focal_hf.compatibility_focal", PYTHONPATH=path)
    assert f"transformers>={OLDEST_TRANSFORMERS}" in ended.stderr
    assert "found transformers==5.3.0" in ended.stderr
    assert "or a newer focal_hf." in ended.stderr.splitlines()[-1]


WITHOUT_TORCHS_NAMES = """
import sys, torch
import transformers.conversion_mapping, transformers.modeling_utils  # which need these names, too
names = {"torch._guards": "detect_fake_mode", "torch.fx.experimental.symbolic_shapes": "has_static_value"}
values = {}
for module, name in names.items():
    __import__(module)
    values[module] = vars(sys.modules[module]).pop(name, None)
import focal_hf
for module, name in names.items():
    setattr(sys.modules[module], name, values[module])

from focal_hf.run_state_focal import can_cache
from small_models import pixels, randomized, tiny
model = randomized(focal_hf.FocalForImageClassification(tiny()))
with torch.no_grad():
    found = model(pixels(1, 3, 40, 52)).logits
    model.set_attn_implementation("eager")
    torch.testing.assert_close(found, model(pixels(1, 3, 40, 52)).logits)
assert not can_cache()
"""


def test_without_a_name_of_torch_that_only_makes_it_faster():
    ended = run(WITHOUT_TORCHS_NAMES, PYTHONPATH=os.pathsep.join([*map(str, sys.path), str(ROOT / "tests")]))
    assert ended.returncode == 0, ended.stderr
    (warning,) = [line for line in ended.stderr.splitlines() if "focal_hf" in line]
    assert "focal_hf runs without caches and custom operators" in warning
    assert "detect_fake_mode" in warning


# A release of transformers with a model type "focal", as far as the Auto classes go.
TYPE_TAKEN = """
import sys, types
from transformers.models.auto import configuration_auto
configuration_auto.CONFIG_MAPPING_NAMES["focal"] = "FocalConfig"
vars(configuration_auto).get("MODEL_NAMES_MAPPING", {})["focal"] = "Focal"  # up to transformers 5.5
from transformers.models.auto import modeling_auto
import transformers
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel

class FocalConfig(PreTrainedConfig):
    model_type = "focal"

class FocalModel(PreTrainedModel):
    config_class = FocalConfig

module = types.ModuleType("transformers.models.focal")
for taken in (FocalConfig, FocalModel):
    taken.__module__ = module.__name__
    setattr(module, taken.__name__, taken)
sys.modules[module.__name__] = transformers.models.focal = module
transformers.FocalConfig, transformers.FocalModel = FocalConfig, FocalModel
modeling_auto.MODEL_MAPPING_NAMES["focal"] = "FocalModel"

import torch
import focal_hf
from small_models import pixels, randomized, tiny

folder = sys.argv[1]
model = randomized(focal_hf.FocalForImageClassification(tiny(image_size=32)))
model.save_pretrained(folder)
for loaded in (model, focal_hf.FocalForImageClassification.from_pretrained(folder)):
    assert torch.equal(loaded.eval()(pixels(1, 3, 40, 52)).logits, model(pixels(1, 3, 40, 52)).logits)
larger = focal_hf.FocalForImageClassification.from_pretrained(folder, image_size=64, window_size=8)
assert larger(pixels(1, 3, 64, 64)).logits.isfinite().all()
assert type(AutoModel.from_config(focal_hf.FocalConfig())) is focal_hf.FocalModel
assert type(AutoConfig.for_model("focal")) is FocalConfig
assert type(AutoModel.from_config(FocalConfig())) is FocalModel
"""


def test_a_model_type_of_transformers_keeps_its_name(tmp_path):
    ended = run(TYPE_TAKEN, str(tmp_path), PYTHONPATH=os.pathsep.join([*map(str, sys.path), str(ROOT / "tests")]))
    assert ended.returncode == 0, ended.stderr
    (warning,) = [line for line in ended.stderr.splitlines() if "focal_hf" in line]
    assert "has a model type 'focal' of its own" in warning
    assert "FocalForImageClassification.from_pretrained" in warning


@pytest.mark.skipif(not PROCESSORS_NEED_TORCHVISION, reason="this message is for transformers 5.4 without torchvision")
def test_an_image_processor_that_needs_torchvision_is_one_clear_line():
    with pytest.raises(Problem, match=r"needs torchvision with transformers 5\.4\.\d\. Install"):
        segmentation_processor(Namespace(model=None, reduce_labels=False), print)
