"""One model under transformers' own common tests of models, backbones and configurations: Focal, or Swin as yardstick.

test_conformance.py gets those tests and runs this file once for each of `SUBJECTS`, which the environment names.
"""

import copy
import os
import unittest

from torch import nn
from transformers import SwinConfig
from transformers.models.auto import modeling_auto
from transformers_tests.test_backbone_common import BackboneTesterMixin
from transformers_tests.test_configuration_common import ConfigTester
from transformers_tests.test_modeling_common import ModelTesterMixin, floats_tensor

from focal_hf import FocalConfig


class Subject:
    """A small model, and what the common tests ask about it, by the names that they use."""

    is_training = True
    batch_size = 3
    image_size = 64
    patch_size = 4
    map_size = image_size // patch_size
    seq_length = map_size**2
    num_masks = seq_length // 2
    depths = (1, 1, 2, 1)
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
            num_heads=[self.num_attention_heads, 2, 4, 4],
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


FOCAL = {"window_size": 4, "focal_windows": [3, 3, 1, 1], "expand_sizes": [1, 1, 1, 1], "keys": (4 + 2 * 1) ** 2 + 3**2}
TOPK = {"window_size": 4, "attention_type": "topk", "topk": 8, "keys": 8 + 8}
SUBJECTS = {
    "swin": Subject(SwinConfig, window_size=2, keys=2**2),
    "focal": Subject(FocalConfig, **FOCAL),
    "topk_conv": Subject(FocalConfig, **TOPK, use_conv_embed=True),
}
SUBJECT = SUBJECTS[os.environ["SUBJECT"]]

CLASSES = {}
for purpose in ("", "FOR_BACKBONE_", "FOR_IMAGE_CLASSIFICATION_", "FOR_MASKED_IMAGE_MODELING_"):
    classes = getattr(modeling_auto, f"MODEL_{purpose}MAPPING")
    CLASSES[purpose] = classes[SUBJECT.config_class]
    # Here the common tests look up what a class is for: whether it takes labels, say.
    getattr(modeling_auto, f"MODEL_{purpose}MAPPING_NAMES")[FocalConfig.model_type] = classes[FocalConfig].__name__
BACKBONE = CLASSES["FOR_BACKBONE_"]


class ModelTest(ModelTesterMixin, unittest.TestCase):
    """What is overridden assumes words, or maps that are of one size and leave the model as tokens."""

    all_model_classes = tuple(CLASSES.values())
    test_resize_embeddings = False
    test_can_init_all_missing_weights_before_2023 = True

    def setUp(self):
        self.model_tester = copy.copy(SUBJECT)

    def test_config(self):
        ConfigTester(
            self,
            config_class=SUBJECT.config_class,
            has_text_modality=False,
            common_properties=["image_size", "patch_size", "num_channels", "hidden_size", "num_attention_heads"],
            embed_dim=48,
        ).run_common_tests()

    def test_model_get_set_embeddings(self):
        for model_class in self.all_model_classes:
            model = model_class(SUBJECT.get_config())
            assert isinstance(model.get_input_embeddings(), nn.Module)
            other = nn.Identity()
            model.set_input_embeddings(other)
            assert model.get_input_embeddings() is other
            assert model.get_output_embeddings() is None

    def test_attention_outputs(self):
        self.model_tester.num_hidden_layers = len(SUBJECT.depths)  # that return theirs: the last of each stage
        self.model_tester.encoder_seq_length = SUBJECT.window_size**2
        self.model_tester.key_length = SUBJECT.keys
        for model_class in CLASSES.values():
            self.all_model_classes = (model_class,)
            self.model_tester.num_hidden_states_types = 1 if model_class is BACKBONE else 2  # tokens, and maps
            super().test_attention_outputs()

    def test_hidden_states_output(self):
        self.model_tester.num_hidden_layers = len(SUBJECT.depths)
        self.all_model_classes = tuple(set(CLASSES.values()) - {BACKBONE})
        super().test_hidden_states_output()
        self.all_model_classes = (BACKBONE,)
        # Maps, of which the common test sees the last two dimensions.
        self.model_tester.seq_length = self.model_tester.hidden_size = SUBJECT.map_size
        super().test_hidden_states_output()

    def test_reverse_loading_mapping(self):
        # Focal's conversions change weights, not names.
        super().test_reverse_loading_mapping(check_keys_were_modified=SUBJECT.config_class is SwinConfig)


class BackboneTest(BackboneTesterMixin, unittest.TestCase):
    all_model_classes = (BACKBONE,)
    config_class = SUBJECT.config_class

    def setUp(self):
        self.model_tester = SUBJECT
