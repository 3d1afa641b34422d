import json
import math

import pytest
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from focal_hf import FocalConfig, FocalModel

TINY = {"image_size": 32, "embed_dim": 8, "depths": (1, 1), "num_heads": (1, 2), "window_size": 4, "encoder_stride": 8}
TINY |= {"focal_levels": (2, 2), "focal_windows": (3, 1), "expand_sizes": (2, 2)}


def test_defaults_are_focal_tiny():
    config = FocalConfig()
    assert (config.embed_dim, config.depths, config.num_heads) == (96, (2, 2, 6, 2), (3, 6, 12, 24))
    assert (config.focal_levels, config.focal_windows, config.expand_sizes) == ((2,) * 4, (7, 5, 3, 1), (3,) * 4)
    assert (config.focal_stages, config.focal_pool, config.topk) == (None, "fc", 128)
    assert config.hidden_size == 768
    assert config.num_hidden_layers == config.num_layers == 4
    assert config.stage_names == ["stem", "stage1", "stage2", "stage3", "stage4"]
    assert config.out_features == ["stage4"]
    assert config.out_indices == [4]


CONTRADICTIONS = {
    "num_heads must hold one value for each of the 2 stages": {"num_heads": (1, 2, 4)},
    "focal_levels must hold one value": {"focal_levels": (2, 2, 2, 2)},
    "focal_windows must hold one value": {"focal_windows": (3,)},
    "expand_sizes must hold one value": {"expand_sizes": ()},
    "depths must name at least one stage": {"depths": ()},
    "every value of depths must be at least 1": {"depths": (1, 0)},
    "every value of expand_sizes must be at least 0": {"expand_sizes": (2, -1)},
    "must divide among its heads; stage 0": {"num_heads": (3, 2)},
    "attention_type must be one of focal, topk; got 'focalv2'": {"attention_type": "focalv2"},
    "focal_pool must be one of fc, conv, mean, max, none; got 'avg'": {"focal_pool": "avg"},
    "expand_layer must be one of all, even, odd": {"expand_layer": "first"},
    "hidden_act must be one of": {"hidden_act": "gellu"},
    "focal_windows must be odd": {"focal_windows": (4, 1)},
    "has one level \\(fine\\) or two": {"attention_type": "topk", "focal_levels": (3, 2)},
    "stage 1 does not pool": {"attention_type": "topk", "focal_stages": (0,)},
    "focal_stages must be distinct indices": {"focal_stages": (1, 2)},
    "Use fewer levels": {"focal_levels": (5, 2)},
    "expand_sizes must be at most window_size": {"expand_sizes": (5, 2)},
    "patch_size must be 4": {"use_conv_embed": True, "patch_size": 2},
    "drop_path_rate must be at least 0 and below 1": {"drop_path_rate": 1.0},
    "qk_scale must be positive": {"qk_scale": 0},
    "window_size must be at least 1": {"window_size": 0},
    "image_size must be at least 1 pixel": {"image_size": (32, 0)},
    "image_size must be one side or": {"image_size": [32]},
    "embed_dim must be at least 1 and at most 65536": {"embed_dim": 10**9},
    "the last stage must have at most 65536 channels": {"embed_dim": 2**16},
    "every value of depths must be at least 1 and at most 1024": {"depths": (10**9, 1)},
    "every value of focal_levels must be at least 0 and at most 16": {"focal_levels": (10**12, 1)},
    "depths must name at most 16 stages; got 20000": {"depths": (1,) * 20000},
    "image_size must be at most 65536 pixels a side": {"image_size": (1, 10**9)},
    "at most 67108864 tokens can be listed": {"attention_type": "topk", "image_size": 2**16},
    "mlp_ratio must be at most 1024": {"mlp_ratio": 1e9},
    "mlp_ratio must be positive and finite": {"mlp_ratio": math.inf},
    "qk_scale must be positive and finite; got nan": {"qk_scale": math.nan},
    "layer_norm_eps must be positive and finite": {"layer_norm_eps": math.inf},
    "initializer_range must be at least 0 and finite; got nan": {"initializer_range": math.nan},
    "layerscale_value must be finite; got -inf": {"layerscale_value": -math.inf},
    "image_size must be at least 8 pixels a side with drop_remainder": {"image_size": 7, "drop_remainder": True},
}


@pytest.mark.parametrize(("message", "changes"), CONTRADICTIONS.items())
def test_contradictions_are_refused(message, changes, tmp_path):
    """Both FocalConfig and `from_pretrained` refuse them. The latter changes a config that is already made."""
    with pytest.raises(StrictDataclassError, match=message):
        FocalConfig(**TINY | changes)

    FocalModel(FocalConfig(**TINY)).save_pretrained(tmp_path)
    with pytest.raises(StrictDataclassError, match=message if "[32]" not in str(changes) else "image_size"):
        FocalModel.from_pretrained(tmp_path, **changes)


@pytest.mark.parametrize("changes", [{"depths": 2}, {"embed_dim": "96"}, {"use_shift": "yes"}, {"mlp_ratio": None}])
def test_wrong_types_are_refused(changes):
    with pytest.raises(StrictDataclassError, match=next(iter(changes))):
        FocalConfig(**TINY | changes)


def test_unused_settings_may_have_any_value():
    """Some settings are ignored for an attention type, or for a stage without pooling."""
    FocalConfig(**TINY | {"attention_type": "topk", "focal_windows": (4, 2)})
    FocalConfig(**TINY | {"focal_stages": (1,), "focal_windows": (4, 1)})
    FocalConfig(**TINY | {"focal_levels": (0, 1), "focal_windows": (4, 2)})
    FocalConfig(**TINY | {"attention_type": "topk", "window_size": 2, "expand_sizes": (3, 3)})
    FocalConfig(**TINY | {"focal_levels": (0, 0), "window_size": 2, "expand_sizes": (3, 3)})


def test_derived_settings_may_be_given_if_they_agree():
    config = FocalConfig(**TINY, hidden_size=16, num_layers=2, stage_names=["stem", "stage1", "stage2"])
    assert config.to_dict() == FocalConfig(**TINY).to_dict()
    with pytest.raises(ValueError, match="hidden_size follows from embed_dim and depths, and is 16; got 4"):
        FocalConfig(**TINY, hidden_size=4)
    with pytest.raises(ValueError, match="num_hidden_layers follows from"):
        FocalConfig(**TINY, num_hidden_layers=3)


@pytest.mark.parametrize("name", ["image_sides", "stage_grids", "least_side", "block_geometry", "validate"])
def test_names_of_properties_and_methods_are_refused(name, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "focal", name: [1, 2]}))
    with pytest.raises(ValueError, match=f"{name} is not a setting"):
        AutoConfig.from_pretrained(tmp_path)


def test_number_of_labels_is_bounded(tmp_path):
    """transformers makes a name for each label if a file holds their number."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "focal", "num_labels": 2**20 + 1}))
    with pytest.raises(ValueError, match="num_labels must be at most 1048576; got 1048577"):
        AutoConfig.from_pretrained(tmp_path)


def test_config_is_saved_and_loaded(tmp_path):
    config = FocalConfig(**TINY, out_features=["stem", "stage2"], id2label={0: "cat", 1: "dog", 2: "cow"})
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is FocalConfig
    assert loaded.to_json_string() == config.to_json_string()
    assert loaded.out_indices == [0, 2]
    assert loaded.num_labels == 3


def test_derived_values_follow_changed_fields(tmp_path):
    FocalConfig(**TINY).save_pretrained(tmp_path)
    config = FocalConfig.from_pretrained(tmp_path, embed_dim=16, image_size=(40, 64))
    assert config.hidden_size == 32
    assert config.stage_grids == [(10, 16), (5, 8)]
    three = {"depths": (1, 1, 1), "num_heads": (1, 2, 2), "focal_levels": (2, 2, 2), "focal_windows": (3, 1, 1)}
    config = FocalConfig.from_pretrained(tmp_path, **three, expand_sizes=(2, 2, 2))
    assert [config.block_geometry(stage, 0).pooled_levels for stage in range(3)] == [1, 1, 1]


def test_models_take_a_config_alone():
    with pytest.raises(TypeError, match="config in `FocalModel"):
        FocalModel(TINY)
