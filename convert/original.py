"""The names and shapes of the original's settings, weights and buffers. No other module knows them.

The original is the repository microsoft/Focal-Transformer. Its state dicts hold the same values as those of focal_hf
under other names, except that the query, key and value weights are one tensor, `qkv`.
"""

import re
from collections.abc import Iterable, Iterator, Mapping

import torch

from focal_hf import FocalConfig, FocalForImageClassification, FocalPreTrainedModel
from focal_hf.geometry_focal import focal_index, focal_squares, relative_position_index, slot_tokens
from messages import ConversionError, join_names, short_repr

# --- Settings ---------------------------------------------------------------------------------------------------------

# The key under MODEL.FOCAL, the field of FocalConfig, and the original's default.
_FOCAL_SETTINGS = (
    ("PATCH_SIZE", "patch_size", 4),
    ("IN_CHANS", "num_channels", 3),
    ("EMBED_DIM", "embed_dim", 96),
    ("DEPTHS", "depths", [2, 2, 6, 2]),
    ("NUM_HEADS", "num_heads", [3, 6, 12, 24]),
    ("WINDOW_SIZE", "window_size", 7),
    ("MLP_RATIO", "mlp_ratio", 4.0),
    ("QKV_BIAS", "qkv_bias", True),
    ("QK_SCALE", "qk_scale", False),
    ("APE", "use_absolute_embeddings", False),
    ("PATCH_NORM", "patch_norm", True),
    ("USE_SHIFT", "use_shift", False),
    ("FOCAL_POOL", "focal_pool", "none"),
    ("FOCAL_STAGES", "focal_stages", [0, 1, 2, 3]),
    ("FOCAL_LEVELS", "focal_levels", [1, 1, 1, 1]),
    ("FOCAL_WINDOWS", "focal_windows", [7, 5, 3, 1]),
    ("FOCAL_TOPK", "topk", 128),
    ("EXPAND_SIZES", "expand_sizes", [3, 3, 3, 3]),
    ("EXPAND_LAYER", "expand_layer", "all"),
    ("USE_CONV_EMBED", "use_conv_embed", False),
    ("USE_LAYERSCALE", "use_layerscale", False),
    ("USE_PRE_NORM", "use_pre_norm", False),
)
# The original reads EXPAND_STAGES and does not use it.
_FOCAL_DEFAULTS = {key: default for key, _, default in _FOCAL_SETTINGS} | {"EXPAND_STAGES": [0, 1, 2, 3]}
# Lists with one value per stage. The original ignores values beyond the last stage.
_PER_STAGE_KEYS = ("NUM_HEADS", "FOCAL_LEVELS", "FOCAL_WINDOWS", "EXPAND_SIZES")
_ATTENTION_TYPES = {"focal": "focal", "focalv2": "topk"}

# Bounds on memory and time that FocalConfig does not check. They are far above every known model.
_MAX_FACTOR = 10_000
_MAX_BLOCKS = 200
_MAX_TENSOR = 2**27  # elements


def _released_settings() -> dict[str, dict]:
    sizes = {
        "tiny": (96, [2, 2, 6, 2], [3, 6, 12, 24], 0.2),
        "small": (96, [2, 2, 18, 2], [3, 6, 12, 24], 0.3),
        "base": (128, [2, 2, 18, 2], [4, 8, 16, 32], 0.5),
    }
    settings = {}
    for kind, embedding in (("focal", ""), ("focal", "useconv_"), ("focalv2", "useconv_")):
        for size, (embed_dim, depths, num_heads, drop_path) in sizes.items():
            name = f"{kind}_{size}_{embedding}patch4_window7_224"
            settings[name] = {
                "MODEL": {
                    "TYPE": kind,
                    "NAME": name,
                    "DROP_PATH_RATE": drop_path,
                    "FOCAL": {
                        "EMBED_DIM": embed_dim,
                        "DEPTHS": depths,
                        "NUM_HEADS": num_heads,
                        "FOCAL_POOL": "fc",
                        "FOCAL_LEVELS": [2, 2, 2, 2],
                        "USE_CONV_EMBED": bool(embedding),
                    },
                }
            }
    return settings


RELEASED = _released_settings()


def config_from_settings(settings: Mapping, image_size: int | list[int] | None = None) -> FocalConfig:
    """Returns the FocalConfig of the model that the original builds from `settings`.

    `image_size` replaces `DATA.IMG_SIZE`.

    Raises:
        ConversionError: if a setting is unknown, has a wrong type, is out of bounds or contradicts another setting.
    """
    model, data = _section(settings, "MODEL"), _section(settings, "DATA")
    focal = _section(model, "FOCAL")
    if unknown := sorted(map(str, set(focal) - set(_FOCAL_DEFAULTS))):
        raise ConversionError(f"MODEL.FOCAL has no {join_names(unknown)}; it has {', '.join(_FOCAL_DEFAULTS)}.")
    focal = _FOCAL_DEFAULTS | focal
    for key, default in _FOCAL_DEFAULTS.items():
        has_scale = key == "QK_SCALE" and focal[key] is not False
        _check_type(f"MODEL.FOCAL.{key}", focal[key], 0.125 if has_scale else default)
    model_type, num_classes = model.get("TYPE", "focal"), model.get("NUM_CLASSES", 1000)
    if not isinstance(model_type, str) or model_type not in _ATTENTION_TYPES:
        raise ConversionError(f"MODEL.TYPE must be focal or focalv2; got {short_repr(model_type)}.")
    if type(num_classes) is not int or num_classes < 1:
        raise ConversionError(f"MODEL.NUM_CLASSES must be an integer of at least 1; got {short_repr(num_classes)}.")
    dropout, drop_path = model.get("DROP_RATE", 0.0), model.get("DROP_PATH_RATE", 0.1)
    _check_type("MODEL.DROP_RATE", dropout, 0.0)
    _check_type("MODEL.DROP_PATH_RATE", drop_path, 0.1)
    image_size = image_size or data.get("IMG_SIZE", 224)
    _check_type("DATA.IMG_SIZE", image_size, [224, 224] if isinstance(image_size, list | tuple) else 224)

    num_stages = len(focal["DEPTHS"])
    for key in _PER_STAGE_KEYS:
        focal[key] = focal[key][:num_stages]
    focal["FOCAL_STAGES"] = sorted(set(range(num_stages)) & set(focal["FOCAL_STAGES"]))
    focal["QK_SCALE"] = focal["QK_SCALE"] or None
    try:
        config = FocalConfig(
            **{field: focal[key] for key, field, _ in _FOCAL_SETTINGS},
            attention_type=_ATTENTION_TYPES[model_type],
            image_size=image_size,
            hidden_dropout_prob=dropout,
            drop_path_rate=drop_path,
            num_labels=num_classes,
            drop_remainder=True,
        )
    except Exception as error:  # huggingface_hub wraps the ValueError of FocalConfig
        raise ConversionError(f"The settings do not describe a model: {error.__cause__ or error}") from error
    config.drop_remainder = has_remainder(config)
    config.encoder_stride = _total_stride(config)
    check_bounds(config)
    return config


def _section(settings: Mapping, name: str) -> Mapping:
    section = settings.get(name) or {}
    if not isinstance(section, Mapping):
        raise ConversionError(f"{name} in the settings must hold further settings; it holds {short_repr(section)}.")
    return section


def _check_type(name: str, value, example) -> None:
    """Raises ConversionError unless `value` has the type of `example`. FocalConfig checks the values later.

    Floats are bounded here, since FocalConfig accepts any `qk_scale`.
    """
    if isinstance(example, bool):
        fits, expected = isinstance(value, bool), "True or False"
    elif isinstance(example, int):
        fits, expected = type(value) is int, "an integer"
    elif isinstance(example, float):
        fits, expected = type(value) in (int, float) and 0 <= value <= _MAX_FACTOR, f"a number from 0 to {_MAX_FACTOR}"
    elif isinstance(example, str):
        fits, expected = isinstance(value, str), "a string"
    else:
        fits = isinstance(value, list | tuple) and all(type(item) is int for item in value)
        expected = "a list of integers"
    if not fits:
        raise ConversionError(f"{name} must be {expected}, such as {example}; got {short_repr(value)}.")


def check_bounds(config: FocalConfig) -> None:
    """Checks bounds on memory and time, so that a config from a hostile file can exhaust neither.

    Raises:
        ConversionError: if the model has too many blocks, or needs too large tensors for one image.
    """
    if sum(config.depths) > _MAX_BLOCKS:
        raise ConversionError(
            f"A model may have at most {_MAX_BLOCKS} blocks in total; these settings have depths = "
            f"{short_repr(config.depths)}."
        )
    if (numel := _largest_tensor(config)) > _MAX_TENSOR:
        raise ConversionError(
            f"A model of these settings needs tensors of {numel:,} elements for one image; at most {_MAX_TENSOR:,} are "
            f"allowed. Set a smaller image size than {config.image_size}: the converted model takes images of any size."
        )


def _largest_tensor(config: FocalConfig) -> int:
    """Returns the number of elements of the largest tensor: an activation for one image, or an original buffer."""
    height, width = config.image_sides
    sizes = [config.num_channels * height * width]
    for stage, (rows, cols) in enumerate(config.stage_grids):
        geometry = config.block_geometry(stage, 0)
        window = geometry.window_size**2
        pooled = max((square.side**2 for square in focal_squares(geometry)[1:]), default=0)
        keys = max(window, config.topk if config.attention_type == "topk" else 0)
        sizes += [rows * cols * max(config.embed_dim * 2**stage, keys), window * max(window, pooled)]
    return max(sizes)


def _total_stride(config: FocalConfig) -> int:
    return config.patch_size * 2 ** (config.num_layers - 1)


def has_remainder(config: FocalConfig) -> bool:
    """Whether at `image_size` the patches do not fill the image, or downsampling meets an odd map."""
    return any(side % _total_stride(config) for side in config.image_sides)


def why_original_cannot_run(config: FocalConfig) -> str | None:
    """Returns why the original cannot run a classifier of `config` at `image_size`, or None if it can."""
    if config.use_conv_embed and (
        any(side % 4 == 3 for side in config.image_sides)
        or any(side % 2 for grid in config.stage_grids[:-1] for side in grid)
    ):
        return (
            "with use_conv_embed, all maps that are downsampled must have even sides, and no side of the image may be "
            f"4n + 3 pixels; image_size is {config.image_size}, and the maps are "
            + ", ".join(f"{height} x {width}" for height, width in config.stage_grids)
        )
    for stage, grid in enumerate(config.stage_grids):
        shifts = any(config.block_geometry(stage, block).shift_size for block in range(config.depths[stage]))
        window = config.block_geometry(stage, 0).window_size
        if (shifts or config.attention_type == "topk") and any(side % window for side in grid):
            return (
                f"with {'use_shift' if shifts else 'focalv2'}, maps must divide into windows; "
                f"image_size is {config.image_size}, and the map of stage {stage + 1} has {grid[0]} x {grid[1]} tokens "
                f"for windows of {window} x {window}"
            )
    return None


def settings_from_config(config: FocalConfig, name: str) -> dict:
    """Returns the settings from which the original builds the model of `config`.

    Raises:
        ConversionError: if the original has no setting for a value of `config`.
    """
    for field, only_value in (
        ("hidden_act", "gelu"),
        ("layer_norm_eps", 1e-5),
        ("attention_probs_dropout_prob", 0),
        ("downsample_type", "conv"),
        ("swin_compatible", False),
    ):
        if (value := getattr(config, field)) != only_value:
            raise ConversionError(
                f"The original supports only {field} = {only_value}; this model has {field} = {value}, and cannot be "
                "converted."
            )
    model_types = {attention_type: model_type for model_type, attention_type in _ATTENTION_TYPES.items()}
    focal = {key: getattr(config, field) for key, field, _ in _FOCAL_SETTINGS}
    focal["QK_SCALE"] = focal["QK_SCALE"] or False
    if focal["FOCAL_STAGES"] is None:
        focal["FOCAL_STAGES"] = range(config.num_layers)
    focal = {key: list(value) if isinstance(value, list | tuple | range) else value for key, value in focal.items()}
    image_size = config.image_size
    return {
        "DATA": {"IMG_SIZE": image_size if isinstance(image_size, int) else list(image_size)},
        "MODEL": {
            "TYPE": model_types[config.attention_type],
            "NAME": name,
            "NUM_CLASSES": config.num_labels,
            "DROP_RATE": config.hidden_dropout_prob,
            "DROP_PATH_RATE": config.drop_path_rate,
            "FOCAL": focal,
        },
    }


# --- Weights ----------------------------------------------------------------------------------------------------------

_NAME_SUBSTITUTIONS = (  # from focal_hf's names to the original's, applied in this order
    (r"^hidden_states_norms\.stage(\d+)\.", lambda match: f"norm{int(match[1]) - 1}."),
    (r"^classifier\.", "head."),
    (r"^focal\.", ""),
    (r"^layernorm\.", "norm."),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.norm\.", "patch_embed.norm."),
    (r"^embeddings\.position_embeddings$", "absolute_pos_embed"),
    (r"^encoder\.", ""),
    (r"\.downsample\.projection\.", ".downsample.proj."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.layer_scale(\d)\.lambda1$", r".gamma_\1"),
    (r"\.attention\.pooling\.layers\.", ".pool_layers."),
    (r"\.attention\.o_proj\.", ".attn.proj."),
    (r"\.attention\.[qkv]_proj\.", ".attn.qkv."),
    (r"\.attention\.neighborhood\.coordinate_mlps\.", ".attn.coord2rpb_all."),
    (r"\.attention\.neighborhood\.nearest_index_", ".attn.topk_cloest_indice_"),
    (r"\.attention\.neighborhood\.(relative_position_bias_table_to_windows)_(\d+)$", r".attn.\1.\2"),
    (r"\.attention\.neighborhood\.", ".attn."),
)


def original_name(name: str) -> str:
    """Returns the original's name of a tensor. The query, key and value projections share one name, with `qkv`."""
    for pattern, replacement in _NAME_SUBSTITUTIONS:
        name = re.sub(pattern, replacement, name)
    return name


def _qkv_part(name: str) -> int | None:
    """Returns the position of a tensor in `qkv`, or None for other tensors."""
    match = re.search(r"\.([qkv])_proj\.", name)
    return "qkv".index(match[1]) if match else None


def backbone_state_dict(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor] | None:
    """Returns the backbone's state dict from that of a detector, segmenter or backbone; None for a classifier."""
    prefix = "backbone."
    backbone = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    return backbone or (dict(state) if any(re.match(r"norm\d", name) for name in state) else None)


def backbone_out_indices(state: Mapping[str, torch.Tensor], config: FocalConfig) -> list[int]:
    """Returns the `out_indices` of a backbone: the stages with an output norm, which is `norm0` for the first stage."""
    stages = [stage for stage in range(config.num_layers) if any(name.startswith(f"norm{stage}.") for name in state)]
    if not stages:
        raise ConversionError(
            "The backbone in the checkpoint must have an output norm for each map that it returns, such as "
            f"norm{config.num_layers - 1}.weight; its tensor names begin with {list_prefixes(state)}. Check that it is "
            "a Focal Transformer."
        )
    return [stage + 1 for stage in stages]


def build_on_meta(
    config: FocalConfig, model_class: type[FocalPreTrainedModel] = FocalForImageClassification
) -> FocalPreTrainedModel:
    """Builds the model on the meta device, where its tensors have shapes and no memory."""
    with torch.device("meta"):
        return model_class(config)


def original_buffers(config: FocalConfig, state: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields the names and values of the buffers that the original's state dict holds beside the weights.

    The settings determine them, together with the indices of the nearest tokens for focalv2, which `state` holds under
    their names in the original. They are yielded one by one, as they can need more memory than the model.
    """
    cpu = torch.device("cpu")
    for stage, depth in enumerate(config.depths):
        height, width = config.stage_grids[stage]
        for block in range(depth):
            prefix = f"layers.{stage}.blocks.{block}"
            geometry = config.block_geometry(stage, block)
            window, expand = geometry.window_size, geometry.expand_size
            if geometry.shift_size:
                windows_alone = geometry._replace(expand_size=0, pooled_levels=0)
                _, (hidden,) = focal_index(height, width, windows_alone, cpu)
                yield f"{prefix}.attn_mask", torch.zeros(hidden.shape).masked_fill(hidden, -100.0).flatten(0, 1)
            if config.attention_type == "topk":
                side = torch.arange(window) - window // 2
                coords = torch.stack(torch.meshgrid(side, side, indexing="ij"), dim=-1)
                yield f"{prefix}.attn.window_coords", coords
                for level in range(config.focal_levels[stage]):
                    index = state[f"{prefix}.attn.topk_cloest_indice_{level}"]
                    offsets = _nearest_offsets(index, height, width, window, level).unsqueeze(1)
                    yield f"{prefix}.attn.topk_cloest_coords_{level}", offsets + coords.view(-1, 2)[None, :, None, :]
                continue
            yield f"{prefix}.attn.relative_position_index", relative_position_index(window, window, cpu)
            if expand:
                kept = slot_tokens(window, expand, cpu)
                yield f"{prefix}.attn.valid_ind_rolled", kept.flatten().nonzero().flatten()
            for number, square in enumerate(focal_squares(geometry)[1:]):
                index = relative_position_index(window, square.side, cpu)
                yield f"{prefix}.attn.relative_position_index_{number}", index
                if number:
                    dropped = square.step - 1
                    kept = torch.arange(square.side) + dropped
                    kept = (kept[:, None] * (square.side + dropped) + kept).flatten()
                    yield f"{prefix}.attn.valid_ind_unfold_{number}", kept


def _nearest_offsets(index: torch.Tensor, height: int, width: int, window: int, level: int) -> torch.Tensor:
    """Returns the offsets from each key to the centre of its window, in tokens of the map: (windows, keys, 2)."""
    rows, cols = height // window, width // window
    center = torch.cartesian_prod(torch.arange(rows), torch.arange(cols))
    if level:
        key = torch.stack([index // cols, index % cols], dim=-1)
        return (center[:, None] - key).float() * window
    center = center * window + window // 2
    return (center[:, None] - torch.stack([index // width, index % width], dim=-1)).float()


def from_original(
    state: Mapping[str, torch.Tensor],
    config: FocalConfig,
    model_class: type[FocalPreTrainedModel] = FocalForImageClassification,
) -> dict[str, torch.Tensor]:
    """Converts the original's state dict to that of `model_class(config)`. Every tensor of `state` must be used.

    Raises:
        ConversionError: if a tensor is missing, is not part of the model, has a wrong shape or dtype, is not finite, or
            is a buffer with other values than the settings determine.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in build_on_meta(config, model_class).state_dict().items()}
    advice = " Check that --config and --image-size are those that the checkpoint was trained with."

    if missing := sorted({original_name(name) for name in expected} - set(state)):
        if swin := [name for name in state if name.endswith(".downsample.reduction.weight")]:
            raise ConversionError(
                f"The checkpoint holds a Swin Transformer: only Swin has {swin[0]}. Give the checkpoint of a Focal "
                "Transformer."
            )
        if len(missing) == len({original_name(name) for name in expected}):
            raise ConversionError(
                f"The checkpoint holds no tensor of a Focal Transformer: its tensor names begin with "
                f"{list_prefixes(state)}. Expected names such as patch_embed.proj.weight or, for a detector or "
                "segmenter, backbone.patch_embed.proj.weight."
            )
        raise ConversionError(
            f"The checkpoint lacks {join_names(missing)}, which a model of these settings needs.{advice}"
        )

    converted = {}
    for name, shape in expected.items():
        tensor, part = state[original_name(name)], _qkv_part(name)
        original_shape = shape if part is None else (3 * shape[0], *shape[1:])
        if tensor.shape != original_shape:
            raise ConversionError(
                f"{original_name(name)} has shape {tuple(tensor.shape)} in the checkpoint and shape {original_shape} "
                f"in a model of these settings.{advice}"
            )
        is_index = "nearest_index" in name
        if tensor.is_floating_point() == is_index:
            raise ConversionError(
                f"{original_name(name)} has dtype {tensor.dtype} in the checkpoint; expected "
                f"{'integers' if is_index else 'floating-point numbers'}. The checkpoint is damaged."
            )
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ConversionError(f"{original_name(name)} holds values that are not finite. The checkpoint is damaged.")
        converted[name] = (tensor if part is None else tensor.chunk(3)[part]).contiguous()

    for name, tensor in converted.items():
        if "nearest_index" in name:
            stage, block = (int(number) for number in re.findall(r"\.(\d+)\.", name)[:2])
            height, width = config.stage_grids[stage]
            window = config.block_geometry(stage, block).window_size
            tokens = height * width // (window**2 if name.endswith("_1") else 1)
            if tensor.min() < 0 or tensor.max() >= tokens:
                raise ConversionError(
                    f"{original_name(name)} holds indices from {tensor.min()} to {tensor.max()}; expected indices from "
                    f"0 to {tokens - 1}.{advice}"
                )

    unused = set(state) - {original_name(name) for name in expected}
    for name, buffer in original_buffers(config, state):
        if name not in unused:
            continue
        unused.remove(name)
        if state[name].shape != buffer.shape or not torch.equal(state[name].to(buffer.dtype), buffer):
            raise ConversionError(f"The buffer {name} has other values than these settings determine.{advice}")
    if unused:
        raise ConversionError(
            f"The checkpoint holds {join_names(sorted(unused))}, which a model of these settings does not have."
            + advice
        )
    return converted


def to_original(state: Mapping[str, torch.Tensor], config: FocalConfig) -> dict[str, torch.Tensor]:
    """Converts the state dict of a classifier or backbone to the original's, with the original's buffers."""
    original, qkv_parts = {}, {}
    for name, tensor in state.items():
        if (part := _qkv_part(name)) is None:
            original[original_name(name)] = tensor
        else:
            qkv_parts.setdefault(original_name(name), {})[part] = tensor
    for name, parts in qkv_parts.items():
        original[name] = torch.cat([parts[part] for part in range(3)])
    # Copies, because blocks share the tables of a cache, and in a file each tensor has values of its own.
    return original | {name: buffer.clone() for name, buffer in original_buffers(config, original)}


def list_prefixes(names: Iterable[str]) -> str:
    """Returns the part before the first dot of all names, for a message."""
    return join_names(sorted({name.partition(".")[0] for name in names}))
