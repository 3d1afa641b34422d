"""Weights for another window size, expand size or image size: `from_pretrained(..., window_size=12)`.

Position tables are interpolated bicubically, as Swin's are for fine-tuning at a larger size. Importing this module adds
the interpolation to transformers' mapping of checkpoints. Weights that fit already are loaded unchanged.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .compatibility_focal import (
    ConversionOps,
    WeightConverter,
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from .geometry_focal import displacements, slot_tokens
from .layout_focal import at_least_float32


def resized_maps(maps: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """(..., height, width) maps to (..., *size)."""
    flat = at_least_float32(maps).reshape(1, -1, *maps.shape[-2:])
    flat = nn.functional.interpolate(flat, size=size, mode="bicubic", align_corners=False)
    return flat.view(*maps.shape[:-2], *size).to(maps.dtype)


def sampled_maps(maps: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """(..., side, side) maps at fractional places (count, 2), rows and columns, to (..., count)."""
    side = maps.shape[-1]
    grid = places.flip(1) * (2 / max(side - 1, 1)) - 1  # grid_sample takes columns first, from -1 to 1
    flat = maps.reshape(1, -1, side, side)
    flat = nn.functional.grid_sample(flat, grid[None, None], mode="bicubic", padding_mode="border", align_corners=True)
    return flat.view(*maps.shape[:-2], len(places))


def resized_square(values: torch.Tensor, count: int) -> torch.Tensor:
    """(..., side²) values of a square, row by row, to (..., count) of another."""
    side, new_side = math.isqrt(values.shape[-1]), math.isqrt(count)
    if side**2 != values.shape[-1]:
        return values  # of another model: transformers reports the shapes
    return resized_maps(values.unflatten(-1, (side, side)), (new_side, new_side)).flatten(-2)


def square_places(side: int, device: torch.device) -> torch.Tensor:
    """Rows and columns (side², 2) of the tokens of a square, row by row."""
    axis = torch.arange(side, device=device)
    return torch.cartesian_prod(axis, axis)


def neighbor_slots(window_size: int, expand_size: int, device: torch.device) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """For each of the four displaced windows: its displacement (2,) and the places of its slots in it (slots, 2)."""
    places = square_places(window_size, device)
    masks = slot_tokens(window_size, expand_size, device)
    displacement = torch.tensor(displacements(expand_size), device=device)
    return list(zip(displacement, [places[mask] for mask in masks], strict=True))


def neighbors_geometry(shape: torch.Size) -> tuple[int, int]:
    """Window and expand size of a table of neighbours (1, heads, window_size², slots)."""
    window_size = math.isqrt(shape[2])
    hidden = window_size**2 - shape[3] // 4
    if window_size**2 != shape[2] or hidden < 0 or math.isqrt(hidden) ** 2 != hidden:
        raise ValueError(
            f"A table of neighbours has shape (1, heads, w², 4w² - 4(w - e)²) for windows of w and expand size e; got "
            f"{tuple(shape)}."
        )
    return window_size, window_size - math.isqrt(hidden)


def resized_neighbors(table: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Resizes a table of neighbours (1, heads, queries, slots), each displaced window by itself."""
    window_size, expand_size = neighbors_geometry(table.shape)
    new_window_size, new_expand_size = neighbors_geometry(shape)
    old_slots = neighbor_slots(window_size, expand_size, table.device)
    new_slots = neighbor_slots(new_window_size, new_expand_size, table.device)
    directions = at_least_float32(table[0]).split([len(places) for _, places in old_slots], dim=-1)

    resized = []
    for bias, (displacement, places), (new_displacement, new_places) in zip(
        directions, old_slots, new_slots, strict=True
    ):
        # Places of the displaced window inside the window itself have no slot: they take the nearest slot's bias.
        whole = square_places(window_size, table.device)
        nearest = torch.cdist(whole.to(bias), places.to(bias)).argmin(dim=1)
        keys = bias[..., nearest].unflatten(-1, (window_size, window_size))
        # The places of the new slots in the old window, whose tokens are larger or smaller than the new ones.
        over = (new_places + new_displacement + 0.5) * (window_size / new_window_size) - 0.5
        keys = sampled_maps(keys, (over - displacement).to(keys))
        resized.append(resized_square(keys.transpose(1, 2), new_window_size**2).transpose(1, 2))
    return torch.cat(resized, dim=-1)[None].to(table.dtype)


def neighbors_like_window(table: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """A table of neighbours (1, heads, queries, slots) from the window's own table (relative positions, heads).

    Each slot has the bias of the nearest offset in the window's own table.
    """
    window_size, expand_size = neighbors_geometry(shape)
    queries = square_places(window_size, table.device)[:, None]
    columns = []
    for displacement, places in neighbor_slots(window_size, expand_size, table.device):
        offsets = (queries - places - displacement).clamp(1 - window_size, window_size - 1) + window_size - 1
        row, col = offsets.unbind(-1)
        columns.append(table[row * (2 * window_size - 1) + col])  # (queries, slots, heads)
    return torch.cat(columns, dim=1).permute(2, 0, 1)[None]


def pooled_like_window(table: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """A table of pooled tokens (heads, relative positions) from the window's own table (relative positions, heads).

    Each position has the bias of the nearest position in the window's own table. The two tables are centred.
    """
    side, new_side = math.isqrt(table.shape[0]), math.isqrt(shape[1])
    along = (torch.arange(new_side, device=table.device) - (new_side - side) // 2).clamp(0, side - 1)
    return table.T.unflatten(1, (side, side))[:, along][:, :, along].flatten(1)


# Modules are not checked by their classes: the code of a checkpoint may have brought classes of the same names.


def fitted_neighborhood(tensor: torch.Tensor, module: Any, name: str) -> torch.Tensor:
    """Fits a table or an index of a neighbourhood."""
    shape = getattr(module, name).shape
    if name.startswith("nearest_index_"):
        return module.nearest_or_computed(tensor, level=int(name.rpartition("_")[2]))
    if name.endswith("_to_neighbors"):
        return resized_neighbors(tensor, shape)
    if name == "relative_position_bias_table":
        return resized_square(tensor.T, shape[0]).T
    return resized_square(tensor, shape[1])  # of pooled tokens


def fitted_pooling(weight: torch.Tensor, module: Any, name: str) -> torch.Tensor:
    """Fits the pooling weights of a cell, (1, tokens) or (channels, 1, height, width), to a cell of another size."""
    expected = getattr(module, name)
    flat = weight.flatten(1)
    count = expected[0].numel()
    # The sum of the weights stays the same.
    return (resized_square(flat, count) * (flat.shape[1] / count)).view(-1, *expected.shape[1:])


def fitted_positions(positions: torch.Tensor, module: Any, name: str) -> torch.Tensor:
    """Fits the absolute positions (1, patches, channels) of a square image to `module.patch_grid`."""
    side = math.isqrt(positions.shape[1])
    if side**2 != positions.shape[1]:
        return positions
    maps = positions.transpose(1, 2).unflatten(2, (side, side))
    return resized_maps(maps, module.patch_grid).flatten(2).transpose(1, 2)


class FitFocalWeight(ConversionOps):
    """Changes a tensor of a checkpoint to the shape that the model has, by a function of tensor, module and name."""

    def __init__(self, fitted: Callable[[torch.Tensor, Any, str], torch.Tensor]):
        self.fitted = fitted

    # transformers passes all arguments but the first by name.
    def convert(self, input_dict, full_layer_name, model, **kwargs):  # type: ignore[override]
        (tensors,) = input_dict.values()
        tensor = tensors[0] if isinstance(tensors, list) else tensors
        path, _, name = full_layer_name.rpartition(".")
        module = model.get_submodule(path)
        expected = getattr(module, name).shape
        # The index of another map may have the same shape.
        if tensor.ndim == len(expected) and (tensor.shape != expected or not tensor.is_floating_point()):
            tensor = self.fitted(tensor, module, name).contiguous()
        return {full_layer_name: tensor}

    @property
    def reverse_op(self) -> ConversionOps:
        return SaveAsItIs()


class SaveAsItIs(ConversionOps):
    """The reverse of `FitFocalWeight`: tensors are saved unchanged."""

    def convert(self, input_dict, full_layer_name, **kwargs):  # type: ignore[override]  # see above
        (tensors,) = input_dict.values()
        return {full_layer_name: tensors}


# Each pattern matches tensors of models of both attention types, as transformers expects. No pattern matches the parts
# of a quantised linear layer: a tensor has one conversion, and those parts need the quantiser's.
CONVERSIONS = [
    WeightConverter(name, name, operations=[FitFocalWeight(fitted)])
    for name, fitted in (
        (r"attention\.neighborhood\.(relative_position_bias_table|nearest_index_)", fitted_neighborhood),
        (r"attention\.pooling\.layers\.(\d+\.weight$)", fitted_pooling),
        ("embeddings.position_embeddings", fitted_positions),
    )
]
# Conversions of other models of this type stay. Those of other copies of this code are replaced.
patterns = [conversion.source_patterns for conversion in CONVERSIONS]
others = get_checkpoint_conversion_mapping("focal") or []
others = [conversion for conversion in others if conversion.source_patterns not in patterns]
register_checkpoint_conversion_mapping("focal", others + CONVERSIONS, overwrite=True)
