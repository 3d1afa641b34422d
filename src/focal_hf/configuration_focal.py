"""The settings of a Focal Transformer, and the geometry of stages and blocks that follows from them."""

import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.backbone_utils import BackboneConfigMixin

from .geometry_focal import BlockGeometry

if TYPE_CHECKING:
    # Not needed here. transformers reads these lines to find the modules that it copies beside a config. Up to 5.12, it
    # does not read the lines of those modules when it loads from a folder, so every module of a model is named here and
    # in `modeling_focal`.
    from .attention_focal import choose_attention  # noqa: F401
    from .compatibility_focal import has_static_value  # noqa: F401
    from .cpu_attention_focal import attend_in_chunks  # noqa: F401
    from .indexed_attention_focal import attend_by_index  # noqa: F401
    from .layout_focal import fold_windows  # noqa: F401
    from .modeling_focal import FocalPreTrainedModel  # noqa: F401
    from .neighborhood_focal import Neighborhood  # noqa: F401
    from .run_state_focal import can_cache  # noqa: F401
    from .triton_attention_focal import attend_by_triton  # noqa: F401
    from .weight_resizing_focal import resized_maps  # noqa: F401

# transformers' Auto classes, and the classes of `modeling_focal` that they build from a FocalConfig.
AUTO_CLASSES = {
    "AutoModel": "FocalModel",
    "AutoModelForImageClassification": "FocalForImageClassification",
    "AutoModelForMaskedImageModeling": "FocalForMaskedImageModeling",
    "AutoBackbone": "FocalBackbone",
}

ATTENTION_TYPES = ("focal", "topk")
POOLS = ("fc", "conv", "mean", "max", "none")
EXPAND_LAYERS = ("all", "even", "odd")
DOWNSAMPLE_TYPES = ("conv", "patch_merging")

# Settings beyond these bounds, far above those of any model, would only exhaust time or memory.
MOST_STAGES = 16
MOST_CHANNELS = 2**16
LONGEST_SIDE = 2**16  # in pixels, of `image_size`
LARGEST_INDEX = 2**26  # elements, of one block with `attention_type="topk"`
MOST_LABELS = 2**20  # transformers gives each a name


@strict
class FocalConfig(BackboneConfigMixin, PreTrainedConfig):
    r"""
    Settings of a Focal Transformer ([Yang et al. 2021](https://arxiv.org/abs/2107.00641)). The defaults are Focal-Tiny.

    Every tuple holds one value per stage, so all of them have the length of `depths`.

    Args:
        image_size (`int` or `(height, width)`, *optional*, defaults to 224):
            Image size in pixels that determines the sizes of the position bias tables. Inputs of any other size run
            too. If the shorter side of a stage's map at this size is at most `window_size`, the stage uses that side as
            its window size, and neither expands nor shifts its windows.
        patch_size (`int`, *optional*, defaults to 4):
            Side in pixels of the patch that becomes one token; 4 with `use_conv_embed`.
        num_channels (`int`, *optional*, defaults to 3):
            Channels of the input.
        embed_dim (`int`, *optional*, defaults to 96):
            Channels of the first stage; each later stage has twice those of the one before.
        depths (`tuple[int]`, *optional*, defaults to `(2, 2, 6, 2)`):
            Blocks per stage.
        num_heads (`tuple[int]`, *optional*, defaults to `(3, 6, 12, 24)`):
            Attention heads per stage.
        window_size (`int`, *optional*, defaults to 7):
            Side in tokens of a window of queries.
        attention_type (`str`, *optional*, defaults to `"focal"`):
            `"focal"` (section 3.2 of the paper): a window attends to itself, to the tokens around it and to pooled
            tokens in a square around it. `"topk"` (the original's `focalv2`): to the nearest tokens of each level.
        focal_levels (`tuple[int]`, *optional*, defaults to `(2, 2, 2, 2)`):
            Levels of granularity: 0 is the window alone, 1 adds the tokens around it, and each further level adds
            pooled tokens. At most 2 with `"topk"`.
        focal_windows (`tuple[int]`, *optional*, defaults to `(7, 5, 3, 1)`):
            `"focal"` only: side in pooled tokens, odd, of the square that a window sees.
        focal_stages (`tuple[int]`, *optional*):
            Indices, from 0, of the stages that pool; all of them if `None`.
        focal_pool (`str`, *optional*, defaults to `"fc"`):
            How a cell of tokens becomes one: `"fc"`, `"conv"`, `"mean"`, `"max"`; `"none"` for no pooled tokens.
        expand_sizes (`tuple[int]`, *optional*, defaults to `(3, 3, 3, 3)`):
            `"focal"` only: how many tokens beyond its border a window sees at full resolution.
        expand_layer (`str`, *optional*, defaults to `"all"`):
            Which blocks of a stage expand: with `"even"` the even ones do not, with `"odd"` the odd ones do not.
        topk (`int`, *optional*, defaults to 128):
            `"topk"` only: the number of tokens that a window sees at each level.
        use_shift (`bool`, *optional*, defaults to `False`):
            Whether odd blocks shift the map by half a window, as Swin does.
        use_conv_embed (`bool`, *optional*, defaults to `False`):
            Whether patches and downsampling convolutions overlap (kernels 7 and 3 instead of 4 and 2).
        downsample_type (`str`, *optional*, defaults to `"conv"`):
            The layer that halves a map between two stages. `"conv"`: a convolution and a layer norm. `"patch_merging"`,
            as in Swin: the channels of 2 x 2 tokens are concatenated, normalised and projected.
        drop_remainder (`bool`, *optional*, defaults to `False`):
            What happens to pixels that do not fill a patch, and to the last row or column of a map with an odd side
            before a downsampling. If true, they are dropped, as in the original. If false, zeros are added.
        use_pre_norm (`bool`, *optional*, defaults to `False`):
            Whether maps are normalised before downsampling, too. `"conv"` only.
        use_layerscale (`bool`, *optional*, defaults to `False`):
            Whether residual branches are scaled by learnt factors.
        layerscale_value (`float`, *optional*, defaults to 1e-4):
            Initial value of those factors.
        use_absolute_embeddings (`bool`, *optional*, defaults to `False`):
            Whether learnt absolute positions are added to the patches.
        patch_norm (`bool`, *optional*, defaults to `True`):
            Whether the patches are normalised.
        qkv_bias (`bool`, *optional*, defaults to `True`):
            Whether the query, key and value projections have a bias.
        qk_scale (`float`, *optional*):
            Factor of the attention scores; `head_dim ** -0.5` if `None`.
        mlp_ratio (`float`, *optional*, defaults to 4.0):
            Hidden size of the MLPs relative to their input.
        hidden_act (`str`, *optional*, defaults to `"gelu"`):
            Activation of the MLPs.
        hidden_dropout_prob (`float`, *optional*, defaults to 0.0):
            Dropout after the patches, the attention and in the MLPs.
        attention_probs_dropout_prob (`float`, *optional*, defaults to 0.0):
            Dropout of attention weights. A token that the original lists twice is dropped as one here.
        drop_path_rate (`float`, *optional*, defaults to 0.1):
            Stochastic depth of the last block; it grows linearly from 0 at the first.
        layer_norm_eps (`float`, *optional*, defaults to 1e-5):
            Epsilon of the layer norms.
        initializer_range (`float`, *optional*, defaults to 0.02):
            Standard deviation of the truncated normal for linear layers, absolute positions and position bias tables.
            The table for the tokens of the window itself starts at 0 instead.
        swin_compatible (`bool`, *optional*, defaults to `False`):
            `"focal"` only: whether the details in which transformers' Swin differs from the authors' code are Swin's.
            Windows have `window_size` in every stage, and smaller maps are padded. With `use_shift`, blocks shift every
            map that is larger than a window, and in a backbone every map. `layer_norm_eps` does not apply to the norms
            of patches, patch merging and feature maps, which have 1e-5. MLPs have no dropout after the activation, and
            stochastic depth drops attention only.
        encoder_stride (`int`, *optional*, defaults to 32):
            Side in pixels of the square that one token of the last map covers. Masked image modelling reconstructs the
            square from this token.
        out_features (`list[str]`, *optional*):
            Backbone only: names of the maps to return, of `stem`, `stage1`, `stage2` …; the last stage by default.
        out_indices (`list[int]`, *optional*):
            Backbone only: the same by index.

    Raises:
        StrictDataclassClassValidationError: where settings contradict each other; the message names them.

    Example:

    ```python
    >>> from focal_hf import FocalConfig, FocalModel

    >>> config = FocalConfig()  # Focal-Tiny
    >>> model = FocalModel(config)  # with random weights
    ```"""

    model_type = "focal"
    attribute_map = {"num_attention_heads": "num_heads", "num_hidden_layers": "num_layers"}  # noqa: RUF012

    image_size: int | list[int] | tuple[int, int] = 224
    patch_size: int = 4
    num_channels: int = 3
    embed_dim: int = 96
    depths: list[int] | tuple[int, ...] = (2, 2, 6, 2)
    num_heads: list[int] | tuple[int, ...] = (3, 6, 12, 24)
    window_size: int = 7
    attention_type: str = "focal"
    focal_levels: list[int] | tuple[int, ...] = (2, 2, 2, 2)
    focal_windows: list[int] | tuple[int, ...] = (7, 5, 3, 1)
    focal_stages: list[int] | tuple[int, ...] | None = None
    focal_pool: str = "fc"
    expand_sizes: list[int] | tuple[int, ...] = (3, 3, 3, 3)
    expand_layer: str = "all"
    topk: int = 128
    use_shift: bool = False
    use_conv_embed: bool = False
    downsample_type: str = "conv"
    drop_remainder: bool = False
    use_pre_norm: bool = False
    use_layerscale: bool = False
    layerscale_value: float | int = 1e-4
    use_absolute_embeddings: bool = False
    patch_norm: bool = True
    qkv_bias: bool = True
    qk_scale: float | int | None = None
    mlp_ratio: float | int = 4.0
    hidden_act: str = "gelu"
    hidden_dropout_prob: float | int = 0.0
    attention_probs_dropout_prob: float | int = 0.0
    drop_path_rate: float | int = 0.1
    layer_norm_eps: float | int = 1e-5
    initializer_range: float | int = 0.02
    swin_compatible: bool = False
    encoder_stride: int = 32
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self.set_output_features_output_indices(
            out_indices=kwargs.pop("out_indices", None), out_features=kwargs.pop("out_features", None)
        )
        # Swin's config files hold these; here they are derived, and may be given where they agree.
        for name in ("hidden_size", "num_layers", "num_hidden_layers", "stage_names"):
            if name in kwargs and (value := kwargs.pop(name)) != getattr(self, name):
                raise ValueError(
                    f"{name} follows from embed_dim and depths, and is {getattr(self, name)}; got {value}. Leave it "
                    "out."
                )
        if isinstance(labels := kwargs.get("num_labels"), int) and labels > MOST_LABELS:
            raise ValueError(f"num_labels must be at most {MOST_LABELS}; got {labels}.")
        # PreTrainedConfig makes attributes of all other names.
        for name in kwargs:
            attribute = getattr(type(self), name, None)
            if callable(attribute) or (isinstance(attribute, property) and attribute.fset is None):
                raise ValueError(f"{name} is not a setting: FocalConfig derives it from others. Leave it out.")
        super().__post_init__(**kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> None:
        """As for every config. The `save_pretrained` of models calls it, too.

        The modules of this package are saved too in two cases: after a call of `register_for_auto_class()` on
        `FocalConfig` or a model class, and if the config was loaded from a folder that contains these modules. The
        model can then be loaded with `trust_remote_code=True` where the package is not installed.
        """
        carried = getattr(self, "auto_map", None) or {}
        # A class derived from this one has models of its own.
        if type(self) is FocalConfig and (carried or self._auto_class):
            self.auto_map = carried | {auto: f"modeling_focal.{name}" for auto, name in AUTO_CLASSES.items()}
            # For "AutoConfig", transformers copies the modules. The class attribute is the default.
            self._auto_class = "AutoConfig"  # type: ignore[misc]
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    # Properties, not attributes: `from_pretrained(..., depths=...)` sets a field after construction, and the values
    # that are computed from this field must change with it.

    @property
    def num_layers(self) -> int:
        """Number of stages. Swin's config has the same name for it."""
        return len(self.depths)

    @property
    def hidden_size(self) -> int:
        """Channels of the last stage."""
        return self.embed_dim * 2 ** (len(self.depths) - 1)

    @property
    def stage_names(self) -> list[str]:
        return ["stem"] + [f"stage{stage}" for stage in range(1, len(self.depths) + 1)]

    @property
    def image_sides(self) -> tuple[int, int]:
        """Height and width in pixels of an image of `image_size`."""
        height, width = (self.image_size,) * 2 if isinstance(self.image_size, int) else self.image_size
        return height, width

    @property
    def stage_grids(self) -> list[tuple[int, int]]:
        """Height and width in tokens of every stage's map for an image of `image_size`."""
        return [self.reduced_size(self.image_sides, self.patch_size * 2**stage) for stage in range(len(self.depths))]

    def reduced_size(self, size: Sequence[int], stride: int) -> tuple[int, int]:
        """Height and width of an image or a map after convolutions with that stride in all.

        They are rounded up, as a remainder is padded, or down with `drop_remainder`.
        """
        height, width = size
        if self.drop_remainder:
            return height // stride, width // stride
        # Not -(-height // stride): ONNX divides integers towards zero.
        return (height + stride - 1) // stride, (width + stride - 1) // stride

    @property
    def least_side(self) -> int:
        """Shortest side in pixels of an image for which every stage has a token."""
        return self.patch_size * 2 ** (len(self.depths) - 1) if self.drop_remainder else 1

    @property
    def map_norm_eps(self) -> float:
        """Epsilon of the layer norms of patches, patch merging and feature maps."""
        return 1e-5 if self.swin_compatible else self.layer_norm_eps

    def block_geometry(self, stage: int, block: int) -> BlockGeometry:
        """Geometry of block `block` of stage `stage`, both counted from 0."""
        shortest = min(self.stage_grids[stage])
        divided = shortest > self.window_size
        still = {"all": None, "even": 0, "odd": 1}[self.expand_layer]
        expands = divided and self.focal_levels[stage] > 0 and block % 2 != still and self.attention_type == "focal"
        shifts = self.use_shift and block % 2 == 1 and (divided or self.swin_compatible)
        pools = self.focal_pool != "none" and (self.focal_stages is None or stage in self.focal_stages)
        return BlockGeometry(
            window_size=self.window_size if self.swin_compatible else min(self.window_size, shortest),
            expand_size=self.expand_sizes[stage] if expands else 0,
            shift_size=self.window_size // 2 if shifts else 0,
            focal_window=self.focal_windows[stage],
            pooled_levels=max(self.focal_levels[stage] - 1, 0) if pools else 0,
        )

    def validate_architecture(self) -> None:
        """Called when the config is made, and again by every model built from it."""
        self._check_values()
        self._check_combinations()

    def _check_values(self) -> None:
        """Every setting by itself."""
        for name, choices in (
            ("attention_type", ATTENTION_TYPES),
            ("focal_pool", POOLS),
            ("expand_layer", EXPAND_LAYERS),
            ("downsample_type", DOWNSAMPLE_TYPES),
            ("hidden_act", tuple(ACT2FN)),
        ):
            if (value := getattr(self, name)) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}; got {value!r}.")

        for name, most in (
            ("patch_size", 1024),
            ("num_channels", 1024),
            ("embed_dim", MOST_CHANNELS),
            ("window_size", 256),
            ("topk", 2**16),
            ("encoder_stride", 2**16),
        ):
            if not 1 <= (value := getattr(self, name)) <= most:
                raise ValueError(f"{name} must be at least 1 and at most {most}; got {value}.")
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate"):
            if not 0 <= (value := getattr(self, name)) < 1:
                raise ValueError(f"{name} must be at least 0 and below 1; got {value}.")
        for name in ("mlp_ratio", "qk_scale", "layer_norm_eps"):
            if (value := getattr(self, name)) is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} must be positive and finite; got {value}.")
        if self.mlp_ratio > 1024:
            raise ValueError(f"mlp_ratio must be at most 1024; got {self.mlp_ratio}.")
        if not 0 <= self.initializer_range < math.inf:
            raise ValueError(f"initializer_range must be at least 0 and finite; got {self.initializer_range}.")
        if not -math.inf < self.layerscale_value < math.inf:
            raise ValueError(f"layerscale_value must be finite; got {self.layerscale_value}.")

        if len(self.depths) == 0:
            raise ValueError("depths must name at least one stage; got none.")
        if len(self.depths) > MOST_STAGES:
            raise ValueError(f"depths must name at most {MOST_STAGES} stages; got {len(self.depths)}.")
        if self.hidden_size > MOST_CHANNELS:
            raise ValueError(
                f"the last stage must have at most {MOST_CHANNELS} channels; embed_dim * 2**{len(self.depths) - 1} is "
                f"{self.hidden_size}."
            )
        for name, least, most in (
            ("depths", 1, 1024),
            ("num_heads", 1, MOST_CHANNELS),
            ("focal_levels", 0, 16),
            ("focal_windows", 1, 1024),
            ("expand_sizes", 0, 256),
        ):
            values = getattr(self, name)
            if len(values) != len(self.depths):
                raise ValueError(
                    f"{name} must hold one value for each of the {len(self.depths)} stages in depths="
                    f"{tuple(self.depths)}; got {len(values)}: {tuple(values)}."
                )
            if min(values) < least or max(values) > most:
                raise ValueError(
                    f"every value of {name} must be at least {least} and at most {most}; got {tuple(values)}."
                )
        stages = [] if self.focal_stages is None else list(self.focal_stages)
        if not set(stages) <= set(range(len(self.depths))) or len(set(stages)) != len(stages):
            raise ValueError(
                f"focal_stages must be distinct indices of the {len(self.depths)} stages, counted from 0; got {stages}."
            )

        if not isinstance(self.image_size, int) and len(self.image_size) != 2:
            raise ValueError(f"image_size must be one side or (height, width); got {tuple(self.image_size)}.")
        if min(self.image_sides) < 1:
            raise ValueError(f"image_size must be at least 1 pixel a side; got {self.image_size}.")
        if max(self.image_sides) > LONGEST_SIDE:
            raise ValueError(f"image_size must be at most {LONGEST_SIDE} pixels a side; got {self.image_size}.")
        if min(self.image_sides) < self.least_side:
            raise ValueError(
                f"image_size must be at least {self.least_side} pixels a side with drop_remainder=True, or the last "
                f"stage has no token; got {self.image_size}."
            )

    def _check_combinations(self) -> None:
        """Combinations of settings."""
        if self.use_conv_embed and self.patch_size != 4:
            raise ValueError(
                f"use_conv_embed has patches of kernel 7 and stride 4, so patch_size must be 4; got {self.patch_size}."
            )
        if self.use_pre_norm and self.downsample_type == "patch_merging":
            raise ValueError(
                "downsample_type='patch_merging' has a norm of its own before the projection: use_pre_norm must be "
                "False; got True."
            )
        if self.swin_compatible and self.attention_type != "focal":
            raise ValueError(
                f"swin_compatible=True needs attention_type='focal'; got attention_type={self.attention_type!r}."
            )
        for stage, heads in enumerate(self.num_heads):
            if (channels := self.embed_dim * 2**stage) % heads:
                raise ValueError(
                    f"the channels of a stage must divide among its heads; stage {stage} has embed_dim * 2**{stage} = "
                    f"{channels} channels and num_heads[{stage}] = {heads}."
                )
        for stage, level in enumerate(self.focal_levels):
            geometry = self.block_geometry(stage, 0)
            if self.attention_type == "topk":
                if level not in (1, 2):
                    raise ValueError(
                        f"attention_type='topk' has one level (fine) or two (fine and pooled); focal_levels[{stage}] "
                        f"is {level}."
                    )
                windows = math.prod(-(-side // geometry.window_size) for side in self.stage_grids[stage])
                if windows * self.topk > LARGEST_INDEX:
                    raise ValueError(
                        f"attention_type='topk' lists topk = {self.topk} tokens for each of {windows} windows of stage "
                        f"{stage} at image_size={self.image_size}; at most {LARGEST_INDEX} tokens can be listed. Use a "
                        "smaller image_size: inputs of any other size run too."
                    )
                if level - 1 != geometry.pooled_levels:
                    raise ValueError(
                        f"focal_levels[{stage}] = {level} asks attention_type='topk' for pooled tokens, but stage "
                        f"{stage} does not pool: focal_pool={self.focal_pool!r}, focal_stages="
                        f"{self.focal_stages}. Let it pool, or set that level to 1."
                    )
            elif geometry.pooled_levels and geometry.focal_window % 2 == 0:
                raise ValueError(
                    f"focal_windows must be odd, so that a window stands at the middle of the pooled tokens that it "
                    f"sees; focal_windows[{stage}] is {geometry.focal_window}."
                )
            if geometry.pooled_levels and geometry.window_size < 2 ** (geometry.pooled_levels - 1):
                raise ValueError(
                    f"focal_levels[{stage}] = {level} pools down to 1/{2 ** (geometry.pooled_levels - 1)} of a "
                    f"window's side, but a window of stage {stage} is {geometry.window_size} tokens wide at image_size="
                    f"{self.image_size}. Use fewer levels, a larger window_size or a larger image_size."
                )
            expand_size = max(self.block_geometry(stage, block).expand_size for block in range(self.depths[stage]))
            if expand_size > self.window_size:
                raise ValueError(
                    f"expand_sizes must be at most window_size = {self.window_size}; expand_sizes[{stage}] is "
                    f"{expand_size}."
                )


__all__ = ["FocalConfig"]
