"""Models for images of one size, whose indices and biases are constants: for inference, compiled or exported."""

import copy

import torch
from torch import nn

from .indexed_attention_focal import AttentionTables, attention_tables, dense_tables
from .modeling_focal import FocalAttention, FocalEncoder, pad_to_multiple
from .neighborhood_focal import BiasPart, Neighborhood
from .run_state_focal import is_exporting


class FrozenNeighborhood(nn.Module):
    """The neighbourhoods of a [`FocalAttention`] for maps of one size, in buffers that are not saved."""

    index: torch.Tensor
    table_queries: torch.Tensor | None
    table_keys: torch.Tensor | None
    table_outputs: torch.Tensor | None
    table_bias: torch.Tensor | None

    def __init__(self, attention: FocalAttention, height: int, width: int):
        super().__init__()
        maps = attention.o_proj.weight.new_empty(1, attention.o_proj.in_features, height, width)
        maps = pad_to_multiple(maps, attention.window_size).permute(0, 2, 3, 1)
        shift_size = attention.shift_of(height, width)
        shift = {} if shift_size == attention.shift_size else {"shift_size": shift_size}
        neighborhood = attention.neighborhood(maps, **shift)
        tables = attention_tables(attention, neighborhood, height, width, shift_size)
        dense = dense_tables(attention, neighborhood, tables)
        self.map_size = tuple(maps.shape[1:3])
        self.squares, self.shift_size = neighborhood.squares, neighborhood.shift_size
        tensors: dict[str, torch.Tensor | None] = {"index": neighborhood.index}
        for number, part in enumerate(neighborhood.parts):
            tensors |= {f"source_{number}": part.source, f"pattern_{number}": part.pattern}
        tables = dense or tables
        tensors |= {"table_queries": tables.queries, "table_keys": tables.keys, "table_outputs": tables.outputs}
        # Elsewhere the bias follows from the parts, and a constant of all windows would be large.
        tensors["table_bias"] = tables.bias if dense else None
        tensors |= {f"cells_{level}": cells for level, cells in enumerate(tables.cells)}
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor, persistent=False)
        self.parts, self.levels = len(neighborhood.parts), len(tables.cells)

    def forward(self, maps: torch.Tensor, shift_size: int | None = None) -> Neighborhood:
        """The neighbourhood of (batch, height, width, channels) maps of the frozen size, which determines the shift."""
        if tuple(maps.shape[1:3]) != self.map_size:
            raise ValueError(
                f"This model was frozen for images of another size: a block expects {self.map_size} tokens, and got "
                f"{tuple(maps.shape[1:3])}. Freeze the model for this size, or use the model that is not frozen."
            )
        parts = [BiasPart(getattr(self, f"source_{n}"), getattr(self, f"pattern_{n}")) for n in range(self.parts)]
        neighborhood = Neighborhood(self.index, parts, self.squares, self.shift_size)
        bias = self.table_bias
        if bias is None and is_exporting():
            bias = neighborhood.exported_bias()
        if bias is not None:
            cells = [getattr(self, f"cells_{level}") for level in range(self.levels)]
            neighborhood.tables = AttentionTables(self.table_queries, self.table_keys, self.table_outputs, cells, bias)
        return neighborhood


@torch.no_grad()
def freeze(model: nn.Module, image_size: tuple[int, int]) -> nn.Module:
    """A copy of a model, for inference with images of one size.

    The indices and biases of all blocks are constants in it, which a compiled or exported graph does not compute. Where
    windows attend to most of a map, all queries attend to all tokens.

    Args:
        model (`nn.Module`):
            A Focal Transformer, or a head of transformers with a [`FocalBackbone`] in it.
        image_size (`tuple[int, int]`):
            Height and width in pixels. Other images raise a ValueError.
    """
    frozen = copy.deepcopy(model).eval().requires_grad_(False)
    encoders = [module for module in frozen.modules() if isinstance(module, FocalEncoder)]
    if not encoders:
        raise ValueError(f"model must contain a Focal Transformer; got {type(model).__name__}.")
    for encoder in encoders:
        config = encoder.config
        for number, stage in enumerate(encoder.layers):
            size = config.reduced_size(image_size, config.patch_size * 2**number)
            for attention in [module for module in stage.modules() if isinstance(module, FocalAttention)]:
                attention.add_module("neighborhood", FrozenNeighborhood(attention, *size))
    return frozen


__all__ = ["freeze"]
