"""The network. Section numbers are those of Yang et al. 2021 (https://arxiv.org/abs/2107.00641)."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.backbone_utils import BackboneMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BackboneOutput
from transformers.modeling_utils import PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs, can_return_tuple, logging

from .attention_focal import choose_attention
from .compatibility_focal import (
    OutputRecorder,
    capture_outputs,
    filter_output_hidden_states,
    merge_with_config_defaults,
)
from .configuration_focal import FocalConfig
from .cpu_attention_focal import mlp_in_chunks
from .geometry_focal import BlockGeometry, level_grid
from .indexed_attention_focal import attend_by_index, attends_by_index, attention_tables
from .layout_focal import cat_unless_single, split_windows
from .neighborhood_focal import FocalNeighborhood, Neighborhood, TopkNeighborhood
from .run_state_focal import has_symbols, is_compiling, is_exporting, is_transforming, may_be_nonzero
from .weight_resizing_focal import neighbors_like_window, pooled_like_window

if TYPE_CHECKING:
    # Not needed here: see `configuration_focal`.
    from .triton_attention_focal import attend_by_triton  # noqa: F401

# A child of transformers' own logger, so that transformers' verbosity applies.
logger = logging.get_logger(f"transformers.{__name__}")


@dataclass
class FocalEncoderOutput(ModelOutput):
    """
    Output of the encoder.

    Args:
        last_hidden_state (`torch.Tensor` of shape `(batch, tokens, channels)`):
            The last stage's tokens, not normalised.
        hidden_states (`tuple(torch.Tensor)`, *optional*, with `output_hidden_states=True`):
            The tokens that enter the encoder and those that leave each stage, after its downsampling, each
            `(batch, tokens, channels)`.
        attentions (`tuple(torch.Tensor)`, *optional*, with `output_attentions=True` and eager attention):
            For the last block of each stage `(batch * windows, heads, queries, keys)`: see [`FocalAttention`].
        reshaped_hidden_states (`tuple(torch.Tensor)`, *optional*, with `output_hidden_states=True`):
            `hidden_states` as maps, each `(batch, channels, height, width)`. With
            `output_hidden_states_before_downsampling=True`, those of the stages before their downsampling.
    """

    last_hidden_state: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    reshaped_hidden_states: tuple[torch.Tensor, ...] | None = None


@dataclass
class FocalModelOutput(ModelOutput):
    """
    Output of [`FocalModel`].

    Args:
        last_hidden_state (`torch.Tensor` of shape `(batch, tokens, channels)`):
            The last stage's tokens, normalised.
        pooler_output (`torch.Tensor` of shape `(batch, channels)`, *optional*, unless `add_pooling_layer=False`):
            Their mean.
        hidden_states, attentions, reshaped_hidden_states:
            As in [`FocalEncoderOutput`].
    """

    last_hidden_state: torch.Tensor | None = None
    pooler_output: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    reshaped_hidden_states: tuple[torch.Tensor, ...] | None = None


@dataclass
class FocalImageClassifierOutput(ModelOutput):
    """
    Output of [`FocalForImageClassification`].

    Args:
        loss (`torch.Tensor` of shape `()`, *optional*, with `labels`):
            Classification loss, or regression loss if `config.num_labels == 1`.
        logits (`torch.Tensor` of shape `(batch, config.num_labels)`):
            Scores before the softmax.
        hidden_states, attentions, reshaped_hidden_states:
            As in [`FocalEncoderOutput`].
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    reshaped_hidden_states: tuple[torch.Tensor, ...] | None = None


@dataclass
class FocalMaskedImageModelingOutput(ModelOutput):
    """
    Output of [`FocalForMaskedImageModeling`].

    Args:
        loss (`torch.Tensor` of shape `()`, *optional*, with `bool_masked_pos`):
            Mean absolute error of the masked pixels.
        reconstruction (`torch.Tensor` of the shape of `pixel_values`):
            Reconstructed pixels. With `config.drop_remainder`, height and width are rounded down to multiples of
            `config.encoder_stride`.
        hidden_states, attentions, reshaped_hidden_states:
            As in [`FocalEncoderOutput`].
    """

    loss: torch.Tensor | None = None
    reconstruction: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    reshaped_hidden_states: tuple[torch.Tensor, ...] | None = None


class FocalDropPath(nn.Module):
    """Stochastic depth ([Huang et al. 2016](https://arxiv.org/abs/1603.09382)): drops whole samples in training."""

    def __init__(self, drop_prob: float = 0.0):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if not self.training or self.drop_prob == 0:
            return hidden_states
        keep_prob = 1 - self.drop_prob
        kept = hidden_states.new_empty(hidden_states.shape[:1] + (1,) * (hidden_states.ndim - 1)).bernoulli_(keep_prob)
        return hidden_states * kept / keep_prob

    def extra_repr(self) -> str:
        return f"p={self.drop_prob}"


class FocalLayerScale(nn.Module):
    """Learnt factor per channel of a residual branch ([Touvron et al. 2021](https://arxiv.org/abs/2103.17239))."""

    def __init__(self, channels: int, value: float):
        super().__init__()
        self.value = value
        self.lambda1 = nn.Parameter(torch.full((channels,), float(value)))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states * self.lambda1


def pad_to_multiple(maps: torch.Tensor, multiple: int) -> torch.Tensor:
    """Pads (..., height, width) maps with zeros at the bottom and right to multiples of `multiple`."""
    # Not -(-side // multiple): ONNX divides integers towards zero.
    height, width = ((side + multiple - 1) // multiple * multiple for side in maps.shape[-2:])
    bottom, right = height - maps.shape[-2], width - maps.shape[-1]
    if may_be_nonzero(bottom, right):
        maps = nn.functional.pad(maps, (0, right, 0, bottom))
    return maps


def crop(maps: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Removes the padding of `pad_to_multiple` from (batch, height, width, channels) maps."""
    maps = maps[:, :height, :width]
    # With a copy, one graph serves maps with and without padding. The compiler fuses it with the next operation.
    return maps.clone(memory_format=torch.contiguous_format) if is_compiling() else maps


def to_map(hidden_states: torch.Tensor, dimensions: tuple[int, int]) -> torch.Tensor:
    """(batch, tokens, channels) to (batch, channels, height, width)."""
    return hidden_states.unflatten(1, dimensions).permute(0, 3, 1, 2).contiguous()


class FocalPatchEmbeddings(nn.Module):
    """Pixels (batch, channels, height, width) to tokens (batch, height / patch · width / patch, embed_dim)."""

    def __init__(self, config: FocalConfig):
        super().__init__()
        self.config = config
        self.num_channels = config.num_channels
        self.patch_size = config.patch_size
        kernel_size, padding = (7, 2) if config.use_conv_embed else (config.patch_size, 0)
        self.projection = nn.Conv2d(
            config.num_channels, config.embed_dim, kernel_size=kernel_size, stride=config.patch_size, padding=padding
        )

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int]]:
        """Returns the tokens and the height and width of their map.

        The input is padded to whole patches. With `config.drop_remainder`, an incomplete patch is dropped instead.
        """
        if not isinstance(pixel_values, torch.Tensor):
            raise ValueError(
                f"pixel_values must be a torch.Tensor of shape (batch, {self.num_channels}, height, width), as image "
                f"processors return with return_tensors='pt'; got {type(pixel_values).__name__}."
            )
        if pixel_values.ndim != 4 or pixel_values.shape[1] != self.num_channels:
            raise ValueError(
                f"pixel_values must have shape (batch, {self.num_channels}, height, width), with the model's "
                f"config.num_channels = {self.num_channels} channels; got {tuple(pixel_values.shape)}."
            )
        if 0 in pixel_values.shape:
            raise ValueError(
                f"pixel_values must hold at least one image of at least one pixel; got {tuple(pixel_values.shape)}."
            )
        if not pixel_values.is_floating_point():
            raise ValueError(
                f"pixel_values must be floating point, normalised by the image processor; got {pixel_values.dtype}."
            )
        if self.config.drop_remainder:
            least_side = self.config.least_side
            if min(pixel_values.shape[2:]) < least_side:
                raise ValueError(
                    f"pixel_values must be at least {least_side} pixels high and wide with the model's "
                    f"config.drop_remainder=True, or the last stage has no token; got {tuple(pixel_values.shape)}."
                )
        else:
            pixel_values = pad_to_multiple(pixel_values, self.patch_size)
        # In channels-last layout, the output of the projection needs no transposition to become tokens.
        # `torch.func.vmap` does not support this layout.
        if not (is_transforming() or is_exporting()):
            pixel_values = pixel_values.contiguous(memory_format=torch.channels_last)
        height, width = self.config.reduced_size(pixel_values.shape[2:], self.patch_size)
        embeddings = self.projection(pixel_values)
        if self.config.drop_remainder:
            embeddings = embeddings[:, :, :height, :width]  # An overlapping patch may have begun in the remainder.
        return embeddings.flatten(2).transpose(1, 2), tuple(embeddings.shape[2:])


class FocalEmbeddings(nn.Module):
    """Patch embeddings, with mask tokens and absolute positions if the model has them."""

    def __init__(self, config: FocalConfig, use_mask_token: bool = False):
        super().__init__()
        self.patch_embeddings = FocalPatchEmbeddings(config)
        self.patch_grid = config.stage_grids[0]
        self.norm = nn.LayerNorm(config.embed_dim, eps=config.map_norm_eps) if config.patch_norm else nn.Identity()
        self.mask_token = nn.Parameter(torch.zeros(1, 1, config.embed_dim)) if use_mask_token else None
        num_patches = self.patch_grid[0] * self.patch_grid[1]
        self.position_embeddings = (
            nn.Parameter(torch.zeros(1, num_patches, config.embed_dim)) if config.use_absolute_embeddings else None
        )
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def interpolated_positions(self, height: int, width: int) -> torch.Tensor:
        """Absolute positions (1, height · width, embed_dim) for a map of any size."""
        positions = self.position_embeddings
        assert positions is not None  # Only models with use_absolute_embeddings call this.
        if not has_symbols(height, width) and (height, width) == self.patch_grid:
            return positions
        maps = positions.unflatten(1, self.patch_grid).permute(0, 3, 1, 2)
        maps = nn.functional.interpolate(maps, size=(height, width), mode="bicubic", align_corners=False)
        return maps.flatten(2).transpose(1, 2)

    def forward(
        self, pixel_values: torch.Tensor, bool_masked_pos: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, tuple[int, int]]:
        embeddings, (height, width) = self.patch_embeddings(pixel_values)
        embeddings = self.norm(embeddings)
        if bool_masked_pos is not None:
            if self.mask_token is None:
                raise ValueError("bool_masked_pos needs a model with a mask token: build it with use_mask_token=True.")
            if bool_masked_pos.shape != embeddings.shape[:2]:
                raise ValueError(
                    f"bool_masked_pos must have shape (batch, patches) = {tuple(embeddings.shape[:2])} for this input "
                    f"of {height} by {width} patches; got {tuple(bool_masked_pos.shape)}."
                )
            embeddings = torch.where(
                bool_masked_pos.bool()[..., None], self.mask_token.to(embeddings.dtype), embeddings
            )
        if self.position_embeddings is not None:
            embeddings = embeddings + self.interpolated_positions(height, width)
        return self.dropout(embeddings), (height, width)


class FocalDownsample(nn.Module):
    """Halves the map and doubles the channels.

    Odd sides are padded to even ones. With `config.drop_remainder`, their last row or column is dropped.
    """

    def __init__(self, config: FocalConfig, dim: int):
        super().__init__()
        self.config = config
        kernel_size, padding = (3, 1) if config.use_conv_embed else (2, 0)
        self.pre_norm = nn.GroupNorm(1, dim) if config.use_pre_norm else nn.Identity()
        self.projection = nn.Conv2d(dim, 2 * dim, kernel_size=kernel_size, stride=2, padding=padding)
        self.norm = nn.LayerNorm(2 * dim, eps=config.layer_norm_eps)

    def forward(self, hidden_states: torch.Tensor, input_dimensions: tuple[int, int]) -> torch.Tensor:
        # Tokens are a map in channels-last layout.
        maps = hidden_states.unflatten(1, input_dimensions).permute(0, 3, 1, 2)
        # `torch.func` has no group norm of maps with their channels last.
        if is_transforming():
            maps = maps.contiguous()
        maps = self.pre_norm(maps)
        if not self.config.drop_remainder:
            maps = pad_to_multiple(maps, 2)
        height, width = self.config.reduced_size(maps.shape[2:], 2)
        # A channels-last convolution reorders its weights at every call. Where the weights are larger than the map,
        # reordering the map is cheaper. (Not while compiling, where this would need two graphs.)
        if not is_compiling() and self.projection.weight.numel() > maps.numel():
            maps = maps.contiguous()
        maps = self.projection(maps)
        if self.config.drop_remainder:
            maps = maps[:, :, :height, :width]  # An overlapping kernel may have begun in the remainder.
        return self.norm(maps.flatten(2).transpose(1, 2))


class FocalPatchMerging(nn.Module):
    """Swin's downsampling: concatenates the channels of 2 x 2 tokens, normalises them and projects them to half.

    Odd sides are padded to even ones. With `config.drop_remainder`, their last row or column is dropped.
    """

    def __init__(self, config: FocalConfig, dim: int):
        super().__init__()
        self.config = config
        self.norm = nn.LayerNorm(4 * dim, eps=config.map_norm_eps)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, hidden_states: torch.Tensor, input_dimensions: tuple[int, int]) -> torch.Tensor:
        maps = hidden_states.unflatten(1, input_dimensions)
        if self.config.drop_remainder:
            height, width = self.config.reduced_size(input_dimensions, 2)
            maps = maps[:, : 2 * height, : 2 * width]
        else:
            maps = pad_to_multiple(maps.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)
        # Swin's order: the two tokens of the left column, then those of the right one.
        cells = split_windows(maps, 2).transpose(3, 4).flatten(3).flatten(1, 2)
        return self.reduction(self.norm(cells))


class FocalPooling(nn.Module):
    """Sub-window pooling (section 3.2.1): each cell of tokens becomes one pooled token.

    Level k, counted from 1, has 2ᵏ⁻¹ cells of side floor(window_size / 2ᵏ⁻¹) per window and axis. If they do not fill
    the map, its border is trimmed, half of the surplus at the top and left.
    """

    def __init__(self, config: FocalConfig, dim: int, geometry: BlockGeometry):
        super().__init__()
        self.pool = config.focal_pool
        self.window_size = geometry.window_size
        self.cells = [self.window_size // 2**number for number in range(geometry.pooled_levels)]
        self.layers = nn.ModuleList()
        if self.pool == "fc":
            self.layers.extend(nn.Linear(cell**2, 1) for cell in self.cells)
        elif self.pool == "conv":
            self.layers.extend(nn.Conv2d(dim, dim, kernel_size=cell, stride=cell, groups=dim) for cell in self.cells)

    def cells_of(self, windows: torch.Tensor, level: int) -> torch.Tensor:
        """(batch, rows, cols, side, side, channels) windows to the cells of a level, in the same layout."""
        if level == 1:
            return windows
        maps = windows.transpose(2, 3).flatten(3, 4).flatten(1, 2)
        height, width = maps.shape[1:3]
        rows, cols, cell, top, left = level_grid(height, width, self.window_size, level)
        maps = maps[:, top : top + rows * cell, left : left + cols * cell]
        return maps.unflatten(2, (cols, cell)).unflatten(1, (rows, cell)).transpose(2, 3)

    def pool_level(self, windows: torch.Tensor, level: int) -> torch.Tensor:
        """(batch, rows, cols, side, side, channels) windows to (batch, pooled tokens, channels)."""
        cells = self.cells_of(windows, level).flatten(0, 1)
        side, channels = cells.shape[-2:]
        if self.pool == "mean":
            pooled = cells.mean(dim=(2, 3))
        elif self.pool == "max":
            pooled = cells.amax(dim=(2, 3))
        elif self.pool == "fc":
            # The dimensions of the places in a cell go first, so that `reshape` copies whole runs of channels. The
            # linear layer gets a transposed view of this copy.
            pooled = self.layers[level - 1](cells.permute(2, 3, 0, 1, 4).reshape(side**2, -1).t())
        else:
            pooled = self.layers[level - 1](cells.permute(0, 1, 4, 2, 3).flatten(0, 1))
        return pooled.view(windows.shape[0], -1, channels)

    def forward(self, windows: torch.Tensor) -> torch.Tensor:
        """(batch, rows, cols, side, side, channels) windows to (batch, pooled tokens of all levels, channels)."""
        levels = range(1, len(self.cells) + 1)
        return cat_unless_single([self.pool_level(windows, level) for level in levels], dim=1)


class FocalAttention(nn.Module):
    """Every window's queries attend to the tokens of its neighbourhood (section 3.2.1, "Attention computation").

    `forward` returns the new map and, with eager attention, the weights (batch · windows, heads, queries, keys):
    windows row by row, queries row by row in their window, keys in the order of the neighbourhood's index
    ([`FocalNeighborhood`], [`TopkNeighborhood`]). `output_attentions=True` returns the weights of the last block of
    each stage; a forward hook on this module sees the weights of every block.
    """

    def __init__(self, config: FocalConfig, stage: int, geometry: BlockGeometry):
        super().__init__()
        dim = config.embed_dim * 2**stage
        self.num_heads = config.num_heads[stage]
        self.config = config
        self.window_size = geometry.window_size
        self.shift_size = geometry.shift_size
        # transformers' Swin does not shift a map of a single window, unless in a backbone.
        self.shifts_single_windows = not config.swin_compatible
        self.head_dim = dim // self.num_heads
        self.scaling = config.qk_scale or self.head_dim**-0.5
        self.attention_dropout = config.attention_probs_dropout_prob
        self.is_causal = False

        self.q_proj = nn.Linear(dim, dim, bias=config.qkv_bias)
        self.k_proj = nn.Linear(dim, dim, bias=config.qkv_bias)
        self.v_proj = nn.Linear(dim, dim, bias=config.qkv_bias)
        self.o_proj = nn.Linear(dim, dim)

        self.pooling = FocalPooling(config, dim, geometry) if geometry.pooled_levels else None
        self.neighborhood = (
            FocalNeighborhood(self.num_heads, geometry)
            if config.attention_type == "focal"
            else TopkNeighborhood(
                self.num_heads,
                self.head_dim,
                geometry.window_size,
                config.focal_levels[stage],
                config.topk,
                config.stage_grids[stage],
            )
        )

    @property
    def active_dropout(self) -> float:
        """Probability with which attention weights are dropped: zero in inference."""
        return self.attention_dropout if self.training else 0.0

    def shift_of(self, height: int, width: int) -> int:
        """Size in tokens by which the block shifts a map of that size."""
        if self.shift_size and not self.shifts_single_windows and min(height, width) <= self.window_size:
            return 0
        return self.shift_size

    def neighborhood_of(self, maps: torch.Tensor, shift_size: int) -> Neighborhood:
        """The neighbourhood of (batch, height, width, channels) maps that were padded, and shifted by `shift_size`."""
        # Only those of this package know of another shift than the block's own.
        shift = {} if shift_size == self.shift_size else {"shift_size": shift_size}
        return self.neighborhood(maps, **shift)

    def attended_tokens(self, tokens: torch.Tensor, size: torch.Size, padding: int) -> torch.Tensor:
        """Tokens (batch, height · width, channels) of a map, its pooled tokens, and `padding` tokens of zeros."""
        parts = [tokens]
        if self.pooling is not None:
            # From tokens back to maps, because compiled code would give the map itself an unsuitable memory layout.
            parts.append(self.pooling(split_windows(tokens.unflatten(1, size), self.window_size)))
        if padding:
            parts.append(tokens.new_zeros(tokens.shape[0], padding, tokens.shape[2]))
        return cat_unless_single(parts, dim=1)

    def forward(
        self, maps: torch.Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Takes (batch, height, width, channels) maps of any size. Returns maps of that size and attention weights."""
        input_height, input_width = maps.shape[1:3]
        shift_size = self.shift_of(input_height, input_width)
        maps = pad_to_multiple(maps.permute(0, 3, 1, 2), self.window_size).permute(0, 2, 3, 1)
        if shift_size:
            maps = torch.roll(maps, (-shift_size, -shift_size), dims=(1, 2))
        neighborhood = self.neighborhood_of(maps, shift_size)

        tokens = maps.flatten(1, 2)
        if attends_by_index(self, neighborhood):
            tables = neighborhood.tables or attention_tables(self, neighborhood, input_height, input_width, shift_size)
            return attend_by_index(self, tokens, tables).unflatten(1, (input_height, input_width)), None
        query = self.q_proj(tokens)
        attention = choose_attention(self, query, neighborhood)
        tokens = self.attended_tokens(tokens, maps.shape[1:3], attention.padding)
        key, value = self.k_proj(tokens), self.v_proj(tokens)
        del tokens  # so that attention can reuse the memory
        output, weights = attention.attend(self, query, key, value, neighborhood, **kwargs)
        output = self.o_proj(output).unflatten(1, maps.shape[1:3])

        if shift_size:
            output = torch.roll(output, (shift_size, shift_size), dims=(1, 2))
        return crop(output, input_height, input_width), weights


class FocalMLP(nn.Module):
    """Two linear layers with an activation between them."""

    def __init__(self, config: FocalConfig, dim: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, int(config.mlp_ratio * dim))
        self.activation_fn = ACT2FN[config.hidden_act]
        self.fc2 = nn.Linear(int(config.mlp_ratio * dim), dim)
        self.activation_dropout = nn.Dropout(0.0 if config.swin_compatible else config.hidden_dropout_prob)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return mlp_in_chunks(self, hidden_states)

    def transform(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = self.activation_dropout(self.activation_fn(self.fc1(hidden_states)))
        return self.dropout(self.fc2(hidden_states))


class FocalLayer(GradientCheckpointingLayer):
    """One block: focal attention and an MLP, each with a norm before it and a residual connection."""

    def __init__(self, config: FocalConfig, stage: int, block: int, drop_path_rate: float):
        super().__init__()
        dim = config.embed_dim * 2**stage

        def layer_scale() -> nn.Module:
            return FocalLayerScale(dim, config.layerscale_value) if config.use_layerscale else nn.Identity()

        self.layernorm_before = nn.LayerNorm(dim, eps=config.layer_norm_eps)
        self.attention = FocalAttention(config, stage, config.block_geometry(stage, block))
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.layer_scale1 = layer_scale()
        self.layernorm_after = nn.LayerNorm(dim, eps=config.layer_norm_eps)
        self.mlp = FocalMLP(config, dim)
        self.layer_scale2 = layer_scale()
        self.drop_path = FocalDropPath(drop_path_rate)
        self.mlp_drop_path = FocalDropPath(0.0 if config.swin_compatible else drop_path_rate)

    def forward(
        self, hidden_states: torch.Tensor, input_dimensions: tuple[int, int], **kwargs: Unpack[TransformersKwargs]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Takes tokens (batch, tokens, channels). Returns new ones and the attention weights."""
        maps = self.layernorm_before(hidden_states).unflatten(1, input_dimensions)
        attention, weights = self.attention(maps, **kwargs)
        hidden_states = hidden_states + self.drop_path(self.layer_scale1(self.dropout(attention.flatten(1, 2))))
        update = self.layer_scale2(self.mlp(self.layernorm_after(hidden_states)))
        return hidden_states + self.mlp_drop_path(update), weights


class FocalStage(nn.Module):
    """Blocks on a map of one size, and the downsampling to the next stage."""

    def __init__(self, config: FocalConfig, stage: int, drop_path_rates: list[float]):
        super().__init__()
        self.blocks = nn.ModuleList(
            FocalLayer(config, stage, block, rate) for block, rate in enumerate(drop_path_rates)
        )
        last = stage == len(config.depths) - 1
        downsample = FocalPatchMerging if config.downsample_type == "patch_merging" else FocalDownsample
        self.downsample = None if last else downsample(config, config.embed_dim * 2**stage)

    def forward(
        self,
        hidden_states: torch.Tensor,
        input_dimensions: tuple[int, int],
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Returns tokens (batch, tokens, channels), the tokens before downsampling, and the last attention weights."""
        for block in self.blocks:
            hidden_states, weights = block(hidden_states, input_dimensions, **kwargs)
        before = hidden_states
        if self.downsample is not None:
            hidden_states = self.downsample(hidden_states, input_dimensions)
        return hidden_states, before, weights


def is_loaded(parameter: nn.Parameter) -> bool:
    """Whether transformers has loaded the parameter from a checkpoint, so that it will not initialise it."""
    return getattr(parameter, "_is_hf_initialized", False)


class FocalPreTrainedModel(PreTrainedModel):
    """Weight initialisation, and the interface for loading and saving that all models share."""

    config: FocalConfig
    base_model_prefix = "focal"
    main_input_name = "pixel_values"
    input_modalities = ("image",)  # type: ignore[assignment]  # a tuple in all models, a list in the base class
    supports_gradient_checkpointing = True
    _no_split_modules = ["FocalEmbeddings", "FocalLayer"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flex_attn = False
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _input_embed_layer = "patch_embeddings"
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": OutputRecorder(FocalStage, index=0),
        "attentions": OutputRecorder(FocalStage, index=2),
    }

    def __init__(self, config: FocalConfig, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        # `from_pretrained(..., key=value)` sets fields after the config has checked itself.
        config.validate()

    def get_input_embeddings(self) -> nn.Module:
        """The convolution of the patches."""
        # Not the module around it: the hook of `enable_input_require_grads` needs a tensor, and that returns a tuple.
        embeddings = super().get_input_embeddings()
        return getattr(embeddings, "projection", embeddings)  # without one if it was set by `set_input_embeddings`

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        # transformers searches this file for its attention interface, which is in `attention_focal`.
        return True

    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False) -> str:
        # Not registered with transformers' interface, where any other model could choose it.
        if requested_attention == "triton":
            return requested_attention
        return super().get_correct_attn_implementation(requested_attention, is_init_check)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """The original's initialisation: truncated normals for linear layers and tables, zeros for the window's own
        table, PyTorch's default for convolutions."""
        std = self.config.initializer_range
        if isinstance(module, nn.Linear):
            init.trunc_normal_(module.weight, std=std)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Conv2d):
            init.kaiming_uniform_(module.weight, a=5**0.5)
            if module.bias is not None:
                bound = (module.weight.shape[1] * module.weight.shape[2] * module.weight.shape[3]) ** -0.5
                init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, nn.LayerNorm | nn.GroupNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, FocalEmbeddings):
            if module.mask_token is not None:
                init.zeros_(module.mask_token)
            if module.position_embeddings is not None:
                init.trunc_normal_(module.position_embeddings, std=std)
        elif isinstance(module, FocalLayerScale):
            init.constant_(module.lambda1, module.value)
        elif isinstance(module, FocalNeighborhood):
            own = module.relative_position_bias_table
            init.zeros_(own)
            for name, table in module.named_parameters():
                if table is own:
                    continue
                if not is_loaded(own):
                    init.trunc_normal_(table, std=std)
                elif not is_loaded(table):
                    like_window = neighbors_like_window if name.endswith("_to_neighbors") else pooled_like_window
                    init.copy_(table, like_window(own, table.shape))
                    path = next(path for path, other in self.named_modules() if other is module)
                    logger.warning(
                        f"{path}.{name} is not in the checkpoint. It starts from the window's own table, each position "
                        "from the nearest there: fine-tune the model."
                    )
        elif isinstance(module, TopkNeighborhood):
            for level in range(module.levels):
                saved = getattr(module, f"nearest_index_{level}")
                init.copy_(saved, module.computed_index(*module.grid, level, saved.device))


class FocalEncoder(FocalPreTrainedModel):
    """All stages."""

    def __init__(self, config: FocalConfig):
        super().__init__(config)
        total = sum(config.depths)
        rates = iter([config.drop_path_rate * block / max(total - 1, 1) for block in range(total)])
        self.layers = nn.ModuleList(
            FocalStage(config, stage, [next(rates) for _ in range(depth)]) for stage, depth in enumerate(config.depths)
        )
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(  # type: ignore[misc]  # TransformersKwargs has output_hidden_states, too
        self,
        hidden_states: torch.Tensor,
        input_dimensions: tuple[int, int],
        output_hidden_states: bool = False,
        output_hidden_states_before_downsampling: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> FocalEncoderOutput:
        r"""
        Args:
            hidden_states (`torch.Tensor` of shape `(batch, tokens, channels)`):
                Embedded patches.
            input_dimensions (`tuple[int, int]`):
                Height and width of their map.
            output_hidden_states_before_downsampling (`bool`, *optional*, defaults to `False`):
                Whether `reshaped_hidden_states` are the stages' maps before their downsampling.
        """
        maps = [to_map(hidden_states, input_dimensions)] if output_hidden_states else []
        for stage in self.layers:
            hidden_states, before, _ = stage(hidden_states, input_dimensions, **kwargs)
            if output_hidden_states and output_hidden_states_before_downsampling:
                maps.append(to_map(before, input_dimensions))
            if stage.downsample is not None:
                input_dimensions = self.config.reduced_size(input_dimensions, 2)
            if output_hidden_states and not output_hidden_states_before_downsampling:
                maps.append(to_map(hidden_states, input_dimensions))
        return FocalEncoderOutput(last_hidden_state=hidden_states, reshaped_hidden_states=tuple(maps) or None)


class FocalModel(FocalPreTrainedModel):
    """The Focal Transformer without a head.

    Args:
        config ([`FocalConfig`]):
            The settings of the model.
        add_pooling_layer (`bool`, *optional*, defaults to `True`):
            Whether to return the mean of the last tokens.
        use_mask_token (`bool`, *optional*, defaults to `False`):
            Whether to have a mask token for masked image modelling.
    """

    def __init__(self, config: FocalConfig, add_pooling_layer: bool = True, use_mask_token: bool = False):
        super().__init__(config)
        self.num_layers = config.num_layers
        self.num_features = config.hidden_size
        self.embeddings = FocalEmbeddings(config, use_mask_token=use_mask_token)
        self.encoder = FocalEncoder(config)
        self.layernorm: nn.Module = nn.LayerNorm(self.num_features, eps=config.layer_norm_eps)
        self.add_pooling_layer = add_pooling_layer
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        bool_masked_pos: torch.BoolTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> FocalModelOutput:
        r"""
        Args:
            pixel_values (`torch.Tensor` of shape `(batch, channels, height, width)`):
                Images of any height and width.
            bool_masked_pos (`torch.BoolTensor` of shape `(batch, patches)`, *optional*):
                Which patches to hide, row by row, where the model has a mask token.

        Raises:
            ValueError: for input of another shape or dtype, or without any pixel; the message says what was expected.
                Pixels that are not finite, and labels out of range, are left to PyTorch: to look would stall a GPU.
        """
        # Passed explicitly: `forward` of the encoder has this argument, and its decorator would not pass it the default
        # from the config.
        output_hidden_states = kwargs.pop("output_hidden_states", self.config.output_hidden_states)
        embeddings, input_dimensions = self.embeddings(pixel_values, bool_masked_pos)
        encoder_outputs = self.encoder(
            embeddings, input_dimensions, output_hidden_states=output_hidden_states, **kwargs
        )
        last_hidden_state = self.layernorm(encoder_outputs.last_hidden_state)
        return FocalModelOutput(
            last_hidden_state=last_hidden_state,
            pooler_output=last_hidden_state.mean(dim=1) if self.add_pooling_layer else None,
            hidden_states=encoder_outputs.hidden_states,
            attentions=encoder_outputs.attentions,
            reshaped_hidden_states=encoder_outputs.reshaped_hidden_states,
        )


class FocalForImageClassification(FocalPreTrainedModel):
    """A Focal Transformer that classifies images: a linear layer on the mean of the last tokens."""

    def __init__(self, config: FocalConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.focal = FocalModel(config)
        self.classifier = nn.Linear(self.focal.num_features, config.num_labels) if config.num_labels else nn.Identity()
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> FocalImageClassifierOutput:
        r"""
        Args:
            pixel_values (`torch.Tensor` of shape `(batch, channels, height, width)`):
                Images of any height and width.
            labels (`torch.LongTensor` of shape `(batch,)`, *optional*):
                Classes in `[0, config.num_labels)`, or values to regress if `config.num_labels == 1`.
        """
        outputs = self.focal(pixel_values, **kwargs)
        logits = self.classifier(outputs.pooler_output)
        loss = None if labels is None else self.loss_function(labels, logits, self.config, **kwargs)
        return FocalImageClassifierOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            reshaped_hidden_states=outputs.reshaped_hidden_states,
        )


class FocalForMaskedImageModeling(FocalPreTrainedModel):
    """A Focal Transformer that reconstructs hidden patches ([SimMIM](https://arxiv.org/abs/2111.09886))."""

    def __init__(self, config: FocalConfig):
        super().__init__(config)
        stride = config.patch_size * 2 ** (len(config.depths) - 1)
        if config.encoder_stride != stride:
            raise ValueError(
                f"encoder_stride must be patch_size * 2**(stages - 1) = {stride}, the pixels per token of the last "
                f"map; got {config.encoder_stride}."
            )
        self.focal = FocalModel(config, add_pooling_layer=False, use_mask_token=True)
        self.decoder = nn.Sequential(
            nn.Conv2d(config.hidden_size, config.encoder_stride**2 * config.num_channels, kernel_size=1),
            nn.PixelShuffle(config.encoder_stride),
        )
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        bool_masked_pos: torch.BoolTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> FocalMaskedImageModelingOutput:
        r"""
        Args:
            pixel_values (`torch.Tensor` of shape `(batch, channels, height, width)`):
                Images of any height and width.
            bool_masked_pos (`torch.BoolTensor` of shape `(batch, patches)`, *optional*):
                Which patches to hide, row by row; `patches` is ceil(height / patch_size) · ceil(width / patch_size), or
                the floors' product with `config.drop_remainder`.

        Example:

        ```python
        >>> import torch
        >>> from focal_hf import FocalConfig, FocalForMaskedImageModeling

        >>> model = FocalForMaskedImageModeling(FocalConfig())
        >>> pixel_values = torch.rand(1, 3, 160, 224)
        >>> bool_masked_pos = torch.rand(1, 40 * 56) < 0.6
        >>> outputs = model(pixel_values, bool_masked_pos=bool_masked_pos)
        >>> list(outputs.reconstruction.shape)
        [1, 3, 160, 224]
        ```"""
        outputs = self.focal(pixel_values, bool_masked_pos=bool_masked_pos, **kwargs)
        assert pixel_values is not None  # FocalModel has raised an error.
        size = pixel_values.shape[2:]
        patch, stride = self.config.patch_size, self.config.encoder_stride
        last_map = outputs.last_hidden_state.transpose(1, 2).unflatten(2, self.config.reduced_size(size, stride))
        # Padding is cropped. Dropped pixels are not reconstructed.
        reconstruction = self.decoder(last_map)[:, :, : size[0], : size[1]]

        loss = None
        if bool_masked_pos is not None:
            height, width = reconstruction.shape[2:]
            pixel_values = pixel_values[:, :, :height, :width]
            mask = bool_masked_pos.unflatten(1, self.config.reduced_size(size, patch))[:, None].float()
            mask = mask.repeat_interleave(patch, 2).repeat_interleave(patch, 3)[:, :, :height, :width]
            # In float32, whose range the sums over all pixels need.
            error = nn.functional.l1_loss(reconstruction.float(), pixel_values.float(), reduction="none")
            loss = (error * mask).sum() / (mask.sum() + 1e-5) / self.config.num_channels
        return FocalMaskedImageModelingOutput(
            loss=loss,
            reconstruction=reconstruction,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            reshaped_hidden_states=outputs.reshaped_hidden_states,
        )


class FocalBackbone(BackboneMixin, FocalPreTrainedModel):
    """Feature maps of the stages that `config.out_features` names, for detection and segmentation heads."""

    def __init__(self, config: FocalConfig):
        super().__init__(config)
        self.num_features = [config.embed_dim] + [config.embed_dim * 2**stage for stage in range(config.num_layers)]
        self.focal = FocalModel(config, add_pooling_layer=False)
        # Feature maps are taken before it, and a parameter without a gradient stops distributed training.
        self.focal.layernorm = nn.Identity()
        for module in self.focal.modules():
            if isinstance(module, FocalAttention):
                module.shifts_single_windows = True  # as in transformers' Swin backbone
        self.hidden_states_norms = nn.ModuleDict(
            {
                name: nn.LayerNorm(channels, eps=config.map_norm_eps)
                for name, channels in zip(self.out_features, self.channels, strict=True)
            }
        )
        self.post_init()

    @can_return_tuple
    @filter_output_hidden_states
    def forward(self, pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> BackboneOutput:
        r"""
        Args:
            pixel_values (`torch.Tensor` of shape `(batch, channels, height, width)`):
                Images of any height and width.

        Returns:
            `feature_maps`: normalised maps. With `output_hidden_states=True`, also `hidden_states`: the map of the
            stem, and the map of every stage before its downsampling. All have the shape
            `(batch, channels, height / stride, width / stride)`.

        Example:

        ```python
        >>> import torch
        >>> from focal_hf import FocalBackbone, FocalConfig

        >>> model = FocalBackbone(FocalConfig(out_features=["stage1", "stage2", "stage3", "stage4"]))
        >>> outputs = model(torch.rand(1, 3, 224, 224))
        >>> list(outputs.feature_maps[-1].shape)
        [1, 768, 7, 7]
        ```"""
        kwargs["output_hidden_states"] = True  # transformers 5.12 and newer does this in `filter_output_hidden_states`
        outputs = self.focal(pixel_values, output_hidden_states_before_downsampling=True, **kwargs)
        feature_maps = tuple(
            self.hidden_states_norms[name](maps.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).contiguous()
            for name, maps in zip(self.stage_names, outputs.reshaped_hidden_states, strict=True)
            if name in self.out_features
        )
        return BackboneOutput(
            feature_maps=feature_maps,
            hidden_states=outputs.reshaped_hidden_states,
            attentions=outputs.attentions,
        )


__all__ = [
    "FocalBackbone",
    "FocalForImageClassification",
    "FocalForMaskedImageModeling",
    "FocalModel",
    "FocalPreTrainedModel",
]
