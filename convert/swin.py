"""Transformers' Swin as a Focal Transformer: the settings, and the names of the tensors.

A Focal Transformer with `focal_levels` of 0, `use_shift`, `downsample_type="patch_merging"` and `swin_compatible`
computes what Swin computes. All tensors keep their values and shapes.
"""

import re
from collections.abc import Mapping

import torch
from transformers import PreTrainedModel, SwinConfig

from focal_hf import (
    FocalBackbone,
    FocalConfig,
    FocalForImageClassification,
    FocalForMaskedImageModeling,
    FocalModel,
    FocalPreTrainedModel,
)
from messages import ConversionError, join_names, short_repr
from original import build_on_meta, check_bounds

MODEL_CLASSES = {
    "SwinForImageClassification": FocalForImageClassification,
    "SwinForMaskedImageModeling": FocalForMaskedImageModeling,
    "SwinBackbone": FocalBackbone,
    "SwinModel": FocalModel,
}

_SHARED_SETTINGS = (
    *("num_channels", "embed_dim", "window_size", "mlp_ratio", "qkv_bias", "hidden_act", "use_absolute_embeddings"),
    *("hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate", "initializer_range", "layer_norm_eps"),
    *("encoder_stride", "id2label", "label2id", "problem_type"),
)
_NAME_SUBSTITUTIONS = (
    (r"^swin\.", "focal."),
    (r"\.attention\.relative_position_bias\.", ".attention.neighborhood."),
    # Names of transformers before 5.9.
    (r"\.attention\.self\.(query|key|value)\.", lambda match: f".attention.{match[1][0]}_proj."),
    (r"\.attention\.self\.relative_position_bias_table$", ".attention.neighborhood.relative_position_bias_table"),
    (r"\.attention\.output\.dense\.", ".attention.o_proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
)
# Released Focal models have these at four stages and windows of 7.
_EXPAND_SIZE = 3


def focal_from_swin(swin: PreTrainedModel) -> FocalPreTrainedModel:
    """Returns a model that computes what `swin` computes, with copies of its weights, on the CPU.

    Raises:
        ConversionError: if Focal cannot compute this.
    """
    model_class = MODEL_CLASSES[type(swin).__name__]
    config = config_from_swin(swin.config, model_class)
    model = build_on_meta(config, model_class).to(swin.dtype).to_empty(device="cpu").train(swin.training)
    model.load_state_dict(from_swin(swin.state_dict(), config, model_class))
    return model


def config_from_swin(swin: SwinConfig, model_class: type[FocalPreTrainedModel]) -> FocalConfig:
    """Returns the FocalConfig of the model that computes what a Swin of that config computes.

    Raises:
        ConversionError: if Focal has no setting for a value of `swin`, or the model is too large.
    """
    patch_size, image_size, stages = swin.patch_size, swin.image_size, len(swin.depths)
    if not isinstance(patch_size, int):
        if len(set(patch_size)) != 1:
            raise ConversionError(f"Focal has square patches; this model has patch_size = {short_repr(patch_size)}.")
        patch_size = patch_size[0]
    if model_class is FocalForMaskedImageModeling and swin.encoder_stride != patch_size * 2 ** (stages - 1):
        raise ConversionError(
            f"Focal reconstructs as many pixels as the image has, with an encoder_stride of "
            f"{patch_size * 2 ** (stages - 1)} for this model; it has encoder_stride = {swin.encoder_stride}."
        )
    try:
        config = FocalConfig(
            **{name: getattr(swin, name) for name in _SHARED_SETTINGS},
            image_size=image_size,
            patch_size=patch_size,
            depths=list(swin.depths),
            num_heads=list(swin.num_heads)[:stages],
            focal_levels=[0] * stages,
            focal_windows=[2 * (stages - stage) - 1 for stage in range(stages)],
            expand_sizes=[min(_EXPAND_SIZE, swin.window_size // 2)] * stages,
            use_shift=True,
            downsample_type="patch_merging",
            swin_compatible=True,
            out_features=list(swin.out_features),
        )
        if swin.use_absolute_embeddings:
            # Swin has no positions for patches that the image does not fill.
            height, width = (side // patch_size * patch_size for side in config.image_sides)
            config.image_size = height if isinstance(image_size, int) else [height, width]
            config.validate()
    except Exception as error:  # huggingface_hub wraps the ValueError of FocalConfig
        raise ConversionError(f"Focal does not have these settings: {error.__cause__ or error}") from error
    check_bounds(config)
    return config


def from_swin(
    state: Mapping[str, torch.Tensor], config: FocalConfig, model_class: type[FocalPreTrainedModel]
) -> dict[str, torch.Tensor]:
    """Converts the state dict of a Swin to that of `model_class(config)`. Every tensor of `state` must be used.

    The only exception is the last norm in a SwinBackbone, which the backbone does not apply.

    Raises:
        ConversionError: if a tensor is missing, is not part of the model, has a wrong shape or is not finite.
    """
    expected = build_on_meta(config, model_class).state_dict()
    # An index that is determined by the window size.
    state = {name: tensor for name, tensor in state.items() if not name.endswith(".relative_position_index")}
    converted = {_focal_name(name): tensor for name, tensor in state.items()}
    if model_class is FocalBackbone:
        # Before transformers 5.9, the parts of a SwinBackbone have no prefix.
        converted = {re.sub(r"^(embeddings|encoder)\.", r"focal.\1.", name): value for name, value in converted.items()}
        converted = {name: tensor for name, tensor in converted.items() if not name.startswith("focal.layernorm.")}
    if missing := sorted(expected.keys() - converted.keys()):
        raise ConversionError(f"The model lacks {join_names(missing)}, which a Swin of these settings has.")
    if unused := sorted(converted.keys() - expected.keys()):
        raise ConversionError(f"The model holds {join_names(unused)}, which a Swin of these settings does not have.")
    for name, tensor in converted.items():
        if tensor.shape != expected[name].shape:
            raise ConversionError(
                f"{name} has shape {tuple(tensor.shape)} in the model and shape {tuple(expected[name].shape)} in a "
                "Swin of these settings."
            )
        if not tensor.isfinite().all():
            raise ConversionError(f"{name} holds values that are not finite. The model is damaged.")
    return converted


def _focal_name(name: str) -> str:
    for pattern, replacement in _NAME_SUBSTITUTIONS:
        name = re.sub(pattern, replacement, name)
    return name
