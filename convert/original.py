"""What the original calls its settings, weights and buffers, and what focal_hf calls them; nothing else here knows.

The original is the repository microsoft/Focal-Transformer. Both state dicts hold the same numbers under other names;
only `qkv`, one matrix there, is three here. One table of names serves both directions.
"""

import re
from collections.abc import Iterable, Iterator, Mapping

import torch

from focal_hf import FocalConfig, FocalForImageClassification, FocalPreTrainedModel
from focal_hf.geometry_focal import focal_index, relative_position_index, slot_tokens
from messages import ConversionError, shown

# --- Settings ---------------------------------------------------------------------------------------------------------

# MODEL.FOCAL.*, what focal_hf calls it, and the original's default.
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
# EXPAND_STAGES is read and ignored by the original, too.
_FOCAL_DEFAULTS = {theirs: default for theirs, _, default in _FOCAL_SETTINGS} | {"EXPAND_STAGES": [0, 1, 2, 3]}
# Lists with a value per stage, which the original reads up to the last stage: they may be longer.
_READ_BY_STAGE = ("NUM_HEADS", "FOCAL_LEVELS", "FOCAL_WINDOWS", "EXPAND_SIZES")
_ATTENTION_TYPES = {"focal": "focal", "focalv2": "topk"}

# Upper bounds, well above all models that are known, so that no file of settings asks for any amount of memory or time.
_MOST = 10_000  # of every whole number
_MOST_CLASSES = 100_000
_MOST_STAGES, _MOST_BLOCKS = 16, 200
_LARGEST_TENSOR = 2**27  # elements


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
    """The FocalConfig of a model that the original builds from `settings`, for `DATA.IMG_SIZE` or `image_size`.

    Raises:
        ConversionError: names the setting that is unknown, of another type, out of bounds or contradicts another one.
    """
    model, data = _section(settings, "MODEL"), _section(settings, "DATA")
    focal = _section(model, "FOCAL")
    if unknown := sorted(map(str, set(focal) - set(_FOCAL_DEFAULTS))):
        raise ConversionError(f"MODEL.FOCAL has no {_listed(unknown)}; it has {', '.join(_FOCAL_DEFAULTS)}.")
    focal = _FOCAL_DEFAULTS | focal
    for key, default in _FOCAL_DEFAULTS.items():
        scale = key == "QK_SCALE" and focal[key] is not False
        _check_setting(f"MODEL.FOCAL.{key}", focal[key], 0.125 if scale else default)
    kind, labels = model.get("TYPE", "focal"), model.get("NUM_CLASSES", 1000)
    if not isinstance(kind, str) or kind not in _ATTENTION_TYPES:
        raise ConversionError(f"MODEL.TYPE must be focal or focalv2; it is {shown(kind)}.")
    if type(labels) is not int or not 1 <= labels <= _MOST_CLASSES:
        raise ConversionError(f"MODEL.NUM_CLASSES must be a number from 1 to {_MOST_CLASSES}; it is {shown(labels)}.")
    dropout, drop_path = model.get("DROP_RATE", 0.0), model.get("DROP_PATH_RATE", 0.1)
    _check_setting("MODEL.DROP_RATE", dropout, 0.0)
    _check_setting("MODEL.DROP_PATH_RATE", drop_path, 0.1)
    image_size = image_size or data.get("IMG_SIZE", 224)
    _check_setting("DATA.IMG_SIZE", image_size, [224, 224] if isinstance(image_size, list | tuple) else 224)

    depths = focal["DEPTHS"]
    if not 1 <= len(depths) <= _MOST_STAGES or sum(depths) > _MOST_BLOCKS:
        raise ConversionError(
            f"MODEL.FOCAL.DEPTHS must list from 1 to {_MOST_STAGES} stages, with {_MOST_BLOCKS} blocks in all at most; "
            f"it is {shown(depths)}."
        )
    for key in _READ_BY_STAGE:
        focal[key] = focal[key][: len(depths)]
    focal["FOCAL_STAGES"] = [stage for stage in range(len(depths)) if stage in focal["FOCAL_STAGES"]]
    focal["QK_SCALE"] = focal["QK_SCALE"] or None
    try:
        config = FocalConfig(
            **{ours: focal[theirs] for theirs, ours, _ in _FOCAL_SETTINGS},
            attention_type=_ATTENTION_TYPES[kind],
            image_size=image_size,
            hidden_dropout_prob=dropout,
            drop_path_rate=drop_path,
            encoder_stride=focal["PATCH_SIZE"] * 2 ** (len(depths) - 1),
            num_labels=labels,
            drop_remainder=True,
        )
    except Exception as error:  # whatever a strict config raises, its message says which setting is wrong
        raise ConversionError(f"The settings do not describe a model. {error}") from error
    config.drop_remainder = leaves_remainder(config)
    if (elements := _largest_tensor(config)) > _LARGEST_TENSOR:
        raise ConversionError(
            f"A model of these settings makes tensors of {elements:,} elements from one image; at most "
            f"{_LARGEST_TENSOR:,} are allowed. Give a smaller image size: a converted model takes images of any size."
        )
    return config


def _section(settings: Mapping, name: str) -> Mapping:
    section = settings.get(name) or {}
    if not isinstance(section, Mapping):
        raise ConversionError(f"{name} in the settings must hold further settings; it holds {shown(section)}.")
    return section


def _check_setting(name: str, value, example) -> None:
    """Raises ConversionError unless `value` is of the type of `example`, its numbers within bounds."""

    def whole(number) -> bool:
        return type(number) is int and 0 <= number <= _MOST

    if isinstance(example, bool):
        fits, kind = isinstance(value, bool), "True or False"
    elif isinstance(example, int):
        fits, kind = whole(value), f"a whole number of at most {_MOST}"
    elif isinstance(example, float):
        fits, kind = type(value) in (int, float) and 0 <= value <= _MOST, f"a number of at most {_MOST}"
    elif isinstance(example, str):
        fits, kind = isinstance(value, str), "a word"
    else:
        fits = isinstance(value, list | tuple) and all(map(whole, value))
        kind = f"a list of whole numbers of at most {_MOST}"
    if not fits:
        raise ConversionError(f"{name} must be {kind}, such as {example}; it is {shown(value)}.")


def _largest_tensor(config: FocalConfig) -> int:
    """Elements of the largest tensor that the model, or the original's fixed tensors, have for one image."""
    height, width = config.image_sides
    sizes = [config.num_channels * height * width]
    for stage, (rows, cols) in enumerate(config.stage_grids):
        geometry = config.block_geometry(stage, 0)
        window = geometry.window_size**2
        pooled = (geometry.focal_window + 2**geometry.pooled_levels) ** 2 if geometry.pooled_levels else 0
        keys = max(window, config.topk if config.attention_type == "topk" else 0)
        sizes += [rows * cols * max(config.embed_dim * 2**stage, keys), window * pooled]
    return max(sizes)


def leaves_remainder(config: FocalConfig) -> bool:
    """Whether patches do not fill an image of `image_size`, or a map between stages is odd then."""
    stride = config.patch_size * 2 ** (len(config.depths) - 1)
    return any(side % stride for side in config.image_sides)


def reason_against_original(config: FocalConfig) -> str | None:
    """Why the original cannot run a classifier of `config` at its `image_size`, or None if it can."""
    if config.use_conv_embed and (
        any(side % 4 == 3 for side in config.image_sides)
        or any(side % 2 for grid in config.stage_grids[:-1] for side in grid)
    ):
        return (
            f"with use_conv_embed, it halves only even maps, and takes no image with a side of 4n + 3 pixels; here, "
            f"image_size is {config.image_size}, and the maps are "
            + ", ".join(f"{height} x {width}" for height, width in config.stage_grids)
        )
    for stage, grid in enumerate(config.stage_grids):
        shifts = any(config.block_geometry(stage, block).shift_size for block in range(config.depths[stage]))
        window = config.block_geometry(stage, 0).window_size
        if (shifts or config.attention_type == "topk") and any(side % window for side in grid):
            return (
                f"with {'use_shift' if shifts else 'focalv2'}, it does not pad maps, and at {config.image_size} pixels "
                f"that of stage {stage + 1}, {grid[0]} by {grid[1]} tokens, does not divide into windows of {window}"
            )
    return None


def settings_from_config(config: FocalConfig, name: str) -> dict:
    """The settings from which the original builds the model of `config`.

    Raises:
        ConversionError: where the original has no such setting.
    """
    for setting, fixed in (("hidden_act", "gelu"), ("layer_norm_eps", 1e-5), ("attention_probs_dropout_prob", 0)):
        if (value := getattr(config, setting)) != fixed:
            raise ConversionError(f"The original always has {setting} = {fixed}; this model has {value}.")
    kinds = {ours: theirs for theirs, ours in _ATTENTION_TYPES.items()}
    focal = {theirs: getattr(config, ours) for theirs, ours, _ in _FOCAL_SETTINGS}
    focal["QK_SCALE"] = focal["QK_SCALE"] or False
    if focal["FOCAL_STAGES"] is None:
        focal["FOCAL_STAGES"] = range(config.num_layers)
    focal = {key: list(value) if isinstance(value, list | tuple | range) else value for key, value in focal.items()}
    size = config.image_size
    return {
        "DATA": {"IMG_SIZE": size if isinstance(size, int) else list(size)},
        "MODEL": {
            "TYPE": kinds[config.attention_type],
            "NAME": name,
            "NUM_CLASSES": config.num_labels,
            "DROP_RATE": config.hidden_dropout_prob,
            "DROP_PATH_RATE": config.drop_path_rate,
            "FOCAL": focal,
        },
    }


# --- Weights ----------------------------------------------------------------------------------------------------------

_NAMES = (  # focal_hf's, then the original's, applied in this order
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
    """The original's name for a tensor of a classifier or a backbone; `qkv` for each of its three parts."""
    for pattern, replacement in _NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def _qkv_part(name: str) -> int | None:
    match = re.search(r"\.([qkv])_proj\.", name)
    return "qkv".index(match[1]) if match else None


def dense_backbone(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor] | None:
    """The backbone in the state dict of a detector or segmenter, or a backbone's own; `None` for a classifier's."""
    prefix = "backbone."
    inside = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    return inside or (dict(state) if any(re.match(r"norm\d", name) for name in state) else None)


def output_indices(state: Mapping[str, torch.Tensor], config: FocalConfig) -> list[int]:
    """The `out_indices` of a backbone: the stages whose maps it normalises, `norm0` being that of the first."""
    stages = [stage for stage in range(config.num_layers) if any(name.startswith(f"norm{stage}.") for name in state)]
    if not stages:
        raise ConversionError(
            f"The checkpoint's backbone has no output norms, such as norm{config.num_layers - 1}.weight, one for every "
            f"stage whose map it returns; its names begin with {prefixes(state)}. Is it a Focal Transformer?"
        )
    return [stage + 1 for stage in stages]


def build_empty(
    config: FocalConfig, model_class: type[FocalPreTrainedModel] = FocalForImageClassification
) -> FocalPreTrainedModel:
    """The model without memory for its weights, to read names and shapes from."""
    with torch.device("meta"):
        return model_class(config)


def original_buffers(config: FocalConfig, nearest: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """The fixed tensors in the original's state dict that follow from the settings, and, for focalv2, from the indices.

    `nearest` holds the indices, by their names in the original. Yields names and tensors one by one: all together can
    need more memory than the model.
    """
    cpu = torch.device("cpu")
    for stage, depth in enumerate(config.depths):
        height, width = config.stage_grids[stage]
        for block in range(depth):
            prefix = f"layers.{stage}.blocks.{block}"
            geometry = config.block_geometry(stage, block)
            window, expand = geometry.window_size, geometry.expand_size
            if geometry.shift_size:
                _, (hidden,) = focal_index(height, width, window, 0, geometry.shift_size, 1, 0, cpu)
                yield f"{prefix}.attn_mask", torch.zeros(hidden.shape).masked_fill(hidden, -100.0).flatten(0, 1)
            if config.attention_type == "topk":
                side = torch.arange(window) - window // 2
                coords = torch.stack(torch.meshgrid(side, side, indexing="ij"), dim=-1)
                yield f"{prefix}.attn.window_coords", coords
                for level in range(config.focal_levels[stage]):
                    index = nearest[f"{prefix}.attn.topk_cloest_indice_{level}"]
                    offsets = _nearest_offsets(index, height, width, window, level).unsqueeze(1)
                    yield f"{prefix}.attn.topk_cloest_coords_{level}", offsets + coords.view(-1, 2)[None, :, None, :]
                continue
            yield f"{prefix}.attn.relative_position_index", relative_position_index(window, window, cpu)
            if expand:
                kept = slot_tokens(window, expand, cpu)
                yield f"{prefix}.attn.valid_ind_rolled", kept.flatten().nonzero().flatten()
            for level in range(geometry.pooled_levels):
                key_side = geometry.focal_window + 2**level - 1
                index = relative_position_index(window, key_side, cpu)
                yield f"{prefix}.attn.relative_position_index_{level}", index
                if level:
                    dropped = 2**level - 1
                    kept = torch.arange(key_side) + dropped
                    kept = (kept[:, None] * (key_side + dropped) + kept).flatten()
                    yield f"{prefix}.attn.valid_ind_unfold_{level}", kept


def _nearest_offsets(index: torch.Tensor, height: int, width: int, window: int, level: int) -> torch.Tensor:
    """(window centre - key) in tokens of the map, (windows, keys, 2), as the original keeps it."""
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
    """The state dict of `model_class(config)` from one of the original's, every tensor accounted for.

    Raises:
        ConversionError: names the tensors that are missing, left over, of another shape or not finite.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in build_empty(config, model_class).state_dict().items()}
    advice = " Is --config (and --image-size) what the checkpoint was trained with?"

    if missing := sorted({original_name(name) for name in expected} - set(state)):
        if swin := [name for name in state if name.endswith(".downsample.reduction.weight")]:
            raise ConversionError(f"The checkpoint holds a Swin Transformer: {swin[0]} is Swin's, not Focal's.")
        if len(missing) == len({original_name(name) for name in expected}):
            raise ConversionError(
                f"The checkpoint holds nothing of a Focal Transformer: its names begin with {prefixes(state)}. "
                "Expected the original's, such as patch_embed.proj.weight, or those of a detector or segmenter, such "
                "as backbone.patch_embed.proj.weight."
            )
        raise ConversionError(f"The checkpoint lacks {_listed(missing)} of a model of these settings.{advice}")

    converted = {}
    for name, shape in expected.items():
        tensor, part = state[original_name(name)], _qkv_part(name)
        given = tuple(tensor.shape)
        wanted = shape if part is None else (3 * shape[0], *shape[1:])
        if given != wanted:
            raise ConversionError(
                f"{original_name(name)} has shape {given} in the checkpoint and {wanted} in a model of these settings."
                + advice
            )
        if tensor.is_floating_point() != ("nearest_index" not in name):
            raise ConversionError(f"{original_name(name)} is of type {tensor.dtype} in the checkpoint.")
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ConversionError(f"{original_name(name)} holds values that are not finite: the checkpoint is damaged.")
        converted[name] = (tensor if part is None else tensor.chunk(3)[part]).contiguous()

    for name, tensor in converted.items():
        if "nearest_index" in name:
            stage, block = (int(number) for number in re.findall(r"\.(\d+)\.", name)[:2])
            height, width = config.stage_grids[stage]
            window = config.block_geometry(stage, block).window_size
            tokens = height * width // (window**2 if name.endswith("_1") else 1)
            if tensor.min() < 0 or tensor.max() >= tokens:
                raise ConversionError(
                    f"{original_name(name)} points at tokens {tensor.min()} to {tensor.max()}; its level has {tokens}."
                )

    surplus = set(state) - {original_name(name) for name in expected}
    for name, derived in original_buffers(config, state):
        if name not in surplus:
            continue
        surplus.remove(name)
        if state[name].shape != derived.shape or not torch.equal(state[name].to(derived.dtype), derived):
            raise ConversionError(f"{name} in the checkpoint is not what these settings give.{advice}")
    if surplus:
        raise ConversionError(
            f"The checkpoint holds {_listed(sorted(surplus))}, for which a model of these settings has no use.{advice}"
        )
    return converted


def to_original(state: Mapping[str, torch.Tensor], config: FocalConfig) -> dict[str, torch.Tensor]:
    """The original's state dict, its fixed tensors included, from that of a classifier or backbone of `config`."""
    original, parts = {}, {}
    for name, tensor in state.items():
        if (part := _qkv_part(name)) is None:
            original[original_name(name)] = tensor
        else:
            parts.setdefault(original_name(name), {})[part] = tensor
    for name, qkv in parts.items():
        original[name] = torch.cat([qkv[part] for part in range(3)])
    return original | dict(original_buffers(config, original))


def prefixes(names: Iterable[str]) -> str:
    """What the names begin with, to tell."""
    return _listed(sorted({name.partition(".")[0] for name in names}))


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return ", ".join(names[:8]) + more
