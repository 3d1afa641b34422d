"""Pre-trained weights for the Focal backbone inside a head of transformers, which builds it with random ones."""

import dataclasses
import os
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig

from .configuration_focal import FocalConfig
from .modeling_focal import FocalBackbone

# Settings to which `from_pretrained` fits the weights.
FITTED = {"image_size", "drop_remainder", "window_size", "expand_sizes", "expand_layer", "focal_windows", "topk"}
# Settings that trained weights do not depend on.
FREE = {"hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate", "initializer_range"}
FREE |= {"layerscale_value", "encoder_stride", "_out_features", "_out_indices"}

NORMS = "hidden_states_norms."
# Weights of the other classes that a backbone does not have.
OF_HEADS = ("classifier.", "decoder.", "layernorm.", "embeddings.mask_token")


def differences(config: FocalConfig, other: FocalConfig) -> dict[str, tuple]:
    """The settings of Focal in which two configs differ, with both values."""
    names = {field.name for field in dataclasses.fields(FocalConfig)}
    names -= {field.name for field in dataclasses.fields(PreTrainedConfig)}
    values = {}
    for name in sorted(names):
        pair = getattr(config, name), getattr(other, name)
        # A tuple becomes a list in a file.
        values[name] = tuple(tuple(value) if isinstance(value, list) else value for value in pair)
    return {name: pair for name, pair in values.items() if pair[0] != pair[1]}


def load_backbone_weights(
    model: torch.nn.Module, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any
) -> torch.nn.Module:
    r"""
    Loads pre-trained weights into the one Focal backbone in a model, such as a head that was built with a
    [`FocalConfig`] as its `backbone_config`. Everything else in the model stays as it is, as do its device and dtype.

    The checkpoint may be of any Focal model: its classifier or decoder, mask token and final norm are not used. The
    norms of the feature maps, which only a backbone has, are taken where the checkpoint has them; else they stay.
    Weights are fitted to another image, window or expand size as by [`FocalBackbone.from_pretrained`].

    Args:
        model (`torch.nn.Module`):
            The model with a [`FocalBackbone`] in it. It is changed in place.
        pretrained_model_name_or_path (`str` or `os.PathLike`):
            A folder as `save_pretrained` writes it, or the name of a model on the Hub.
        kwargs:
            Arguments of `from_pretrained` that find files: `revision`, `token`, `cache_dir`, `subfolder`, `variant` …

    Returns:
        `model`.

    Raises:
        ValueError: where the model has no Focal backbone or several, or the checkpoint is of another architecture, or
            lacks weights or has ones that have no place. Nothing in the model has changed then.

    Example:

    ```python
    >>> from focal_hf import FocalConfig, load_backbone_weights
    >>> from transformers import UperNetConfig, UperNetForSemanticSegmentation

    >>> stages = ["stage1", "stage2", "stage3", "stage4"]
    >>> backbone_config = FocalConfig.from_pretrained("focal-tiny", out_features=stages)
    >>> model = UperNetForSemanticSegmentation(UperNetConfig(backbone_config=backbone_config))
    >>> model = load_backbone_weights(model, "focal-tiny")
    ```"""
    name = str(pretrained_model_name_or_path)
    backbones = {path: module for path, module in model.named_modules() if isinstance(module, FocalBackbone)}
    if len(backbones) != 1:
        raise ValueError(
            f"load_backbone_weights needs a model with one FocalBackbone in it; {type(model).__name__} has "
            f"{len(backbones)}{': ' * bool(backbones)}{', '.join(backbones)}. Build it with a FocalConfig as its "
            "backbone_config; of several backbones, give one at a time."
        )
    (backbone,) = backbones.values()
    if any(parameter.is_meta for parameter in backbone.parameters()):
        raise ValueError(
            f"the backbone of {type(model).__name__} is on the meta device and cannot hold weights: load them before "
            "offloading, or build the model on another device."
        )

    config = AutoConfig.from_pretrained(name, **kwargs)
    if not isinstance(config, FocalConfig):
        raise ValueError(
            f"{name} is a model of type {config.model_type}, not focal. Give a checkpoint of a Focal model."
        )
    differing = differences(config, backbone.config)
    unfit = [
        f"{key} is {given!r} there and {own!r} here"
        for key, (given, own) in differing.items()
        if key not in FITTED | FREE
    ]
    if unfit:
        raise ValueError(
            f"{name} does not fit the backbone of {type(model).__name__}: {'; '.join(unfit)}. Build the model with "
            "backbone_config=FocalConfig.from_pretrained(checkpoint, out_features=…)."
        )

    # Loaded in float32, so that each tensor is rounded only once, to its dtype in the model.
    with_info: Any = FocalBackbone.from_pretrained(  # annotated as if it always returned the model alone
        name, config=backbone.config, dtype=torch.float32, output_loading_info=True, **kwargs
    )
    loaded, info = with_info
    # At another size, blocks may gain or lose the surroundings of their windows.
    around = ("relative_position_bias_table_to_neighbors",) if differing.keys() & FITTED else ()
    missing = sorted(key for key in info["missing_keys"] if not (key.startswith(NORMS) or key.endswith(around)))
    unexpected = (key.removeprefix("focal.") for key in info["unexpected_keys"])
    unused = sorted(key for key in unexpected if not (key.startswith((NORMS, *OF_HEADS)) or key.endswith(around)))
    if missing or unused:
        raise ValueError(
            f"{name} is not a whole checkpoint of a Focal model like the backbone of {type(model).__name__}: it lacks "
            f"{len(missing)} weights{': ' * bool(missing)}{', '.join(missing[:3])}, and {len(unused)} have no place"
            f"{': ' * bool(unused)}{', '.join(unused[:3])}. Convert or save it again."
        )
    kept = {key for key in info["missing_keys"] if key.startswith(NORMS)}
    weights = {key: value for key, value in loaded.state_dict().items() if key not in kept}
    if changed := sorted(weights.keys() - backbone.state_dict().keys()):
        raise ValueError(
            f"the backbone of {type(model).__name__} has no longer the layers of a Focal model: {len(changed)} weights "
            f"have no place: {', '.join(changed[:3])}. Load them before adapters or the like are put in."
        )
    backbone.load_state_dict(weights, strict=False)
    return model


__all__ = ["load_backbone_weights"]
