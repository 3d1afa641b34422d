"""The common tests of transformers for models, backbones and configurations, on Focal and, for comparison, Swin.

test_conformance.py gets those tests and runs this file as a script, in a process of its own.
"""

import copy
import sys
import unittest

import pytest
import torch
from torch import nn
from transformers import SwinConfig
from transformers.models.auto import modeling_auto
from transformers_tests.test_backbone_common import BackboneTesterMixin
from transformers_tests.test_configuration_common import ConfigTester
from transformers_tests.test_modeling_common import ModelTesterMixin, floats_tensor

from focal_hf import FocalConfig


class Subject:
    """A small model, with the attributes that the common tests read."""

    is_training = True
    batch_size = 3
    image_size = 32
    patch_size = 4
    map_size = image_size // patch_size
    seq_length = map_size**2
    num_masks = seq_length // 2
    depths = (1, 1)
    num_attention_heads = 2
    embed_dim = hidden_size = 8

    def __init__(self, config_class: type, keys: int, window_size: int, **settings):
        self.config_class = config_class
        self.keys = keys  # that a query of the first stage attends to
        self.window_size = window_size
        self.settings = settings

    def get_config(self):
        return self.config_class(
            image_size=self.image_size,
            patch_size=self.patch_size,
            embed_dim=self.embed_dim,
            depths=self.depths,
            num_heads=[self.num_attention_heads, 4],
            encoder_stride=self.patch_size * 2,
            window_size=self.window_size,
            mlp_ratio=2.0,
            use_absolute_embeddings=True,
            out_features=["stage1", "stage2"],
            **self.settings,
        )

    def prepare_config_and_inputs_for_common(self):
        return self.get_config(), {
            "pixel_values": floats_tensor([self.batch_size, 3, self.image_size, self.image_size])
        }


GEOMETRY = {"window_size": 4, "focal_levels": [2, 2], "focal_windows": [3, 1], "expand_sizes": [1, 1]}
FOCAL = GEOMETRY | {"keys": (4 + 2 * 1) ** 2 + 3**2}
TOPK = GEOMETRY | {"attention_type": "topk", "topk": 4, "keys": 4 + 4}
SUBJECTS = {
    "focal": Subject(FocalConfig, **FOCAL),
    "topk_conv": Subject(FocalConfig, **TOPK, use_conv_embed=True),
    # Last, for `SwinWhereFocalSkips`.
    "swin": Subject(SwinConfig, window_size=2, keys=2**2),
}


def classes_of(subject: Subject) -> dict[str, type]:
    """Returns the model classes by task, under names from which the common tests recognize the task."""
    found = {}
    for purpose in ("", "FOR_BACKBONE_", "FOR_IMAGE_CLASSIFICATION_", "FOR_MASKED_IMAGE_MODELING_"):
        found[purpose] = getattr(modeling_auto, f"MODEL_{purpose}MAPPING")[subject.config_class]
        names = getattr(modeling_auto, f"MODEL_{purpose}MAPPING_NAMES")
        names[subject.config_class.model_type] = found[purpose].__name__
    return found


torch.set_printoptions(threshold=0, edgeitems=1)  # some tests write a message for each weight, even if they pass


class ModelTests(ModelTesterMixin):
    """Overrides tests that assume text, or maps of one size that are returned as tokens."""

    subject: Subject
    test_resize_embeddings = False
    test_can_init_all_missing_weights_before_2023 = True

    def setUp(self):
        self.model_tester = copy.copy(self.subject)
        self.backbone = classes_of(self.subject)["FOR_BACKBONE_"]

    def test_config(self):
        ConfigTester(
            self,
            config_class=self.subject.config_class,
            has_text_modality=False,
            common_properties=["image_size", "patch_size", "num_channels", "hidden_size", "num_attention_heads"],
            embed_dim=48,
        ).run_common_tests()

    def test_model_get_set_embeddings(self):
        for model_class in self.all_model_classes:
            model = model_class(self.subject.get_config())
            assert isinstance(model.get_input_embeddings(), nn.Module)
            other = nn.Identity()
            model.set_input_embeddings(other)
            assert model.get_input_embeddings() is other
            assert model.get_output_embeddings() is None

    def test_attention_outputs(self):
        self.model_tester.num_hidden_layers = len(self.subject.depths)  # that return theirs: the last of each stage
        self.model_tester.encoder_seq_length = self.subject.window_size**2
        self.model_tester.key_length = self.subject.keys
        for model_class in type(self).all_model_classes:
            self.all_model_classes = (model_class,)
            # Tokens, and maps; the backbone has maps alone.
            self.model_tester.num_hidden_states_types = 1 if model_class is self.backbone else 2
            super().test_attention_outputs()

    def test_hidden_states_output(self):
        self.model_tester.num_hidden_layers = len(self.subject.depths)
        self.all_model_classes = tuple(set(type(self).all_model_classes) - {self.backbone})
        super().test_hidden_states_output()
        self.all_model_classes = (self.backbone,)
        # Maps, of which the common test sees the last two dimensions.
        self.model_tester.seq_length = self.model_tester.hidden_size = self.subject.map_size
        super().test_hidden_states_output()

    def test_reverse_loading_mapping(self):
        # Focal's conversions change weights, not names.
        super().test_reverse_loading_mapping(check_keys_were_modified=self.subject.config_class is SwinConfig)


class BackboneTests(BackboneTesterMixin):
    subject: Subject

    def setUp(self):
        self.model_tester = self.subject


class SwinWhereFocalSkips:
    """A plugin for pytest: skips the tests of Swin, except those that a Focal model has skipped before."""

    def __init__(self):
        self.skipped = set()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.skipped:
            self.skipped.add(name_without_model(report.nodeid))

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        if "_swin::" in item.nodeid and name_without_model(item.nodeid) not in self.skipped:
            pytest.skip("no Focal model skips this test")


def name_without_model(nodeid: str) -> str:
    """Returns "ModelTests.test_x" for "conformance.py::ModelTests_swin::test_x"."""
    class_name, test = nodeid.split("::")[1:]
    return f"{class_name.split('_', 1)[0]}.{test}"


# pytest collects the classes `ModelTests_swin`, `BackboneTests_swin` and so on.
for subject_name, subject in SUBJECTS.items():
    classes = classes_of(subject)
    options = {"subject": subject, "all_model_classes": tuple(classes.values())}
    name = f"ModelTests_{subject_name}"
    globals()[name] = type(name, (ModelTests, unittest.TestCase), options)
    options |= {"all_model_classes": (classes["FOR_BACKBONE_"],), "config_class": subject.config_class}
    name = f"BackboneTests_{subject_name}"
    globals()[name] = type(name, (BackboneTests, unittest.TestCase), options)

if __name__ == "__main__":
    whole, *arguments = sys.argv[1:]
    sys.exit(pytest.main([*arguments, __file__], plugins=[] if whole == "all" else [SwinWhereFocalSkips()]))
