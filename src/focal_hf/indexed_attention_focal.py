"""Attention in which every movement of tokens is a gather by an index, for exported graphs.

A gather needs to know no more about a map than its index does, so that one graph serves maps of all sizes. In a graph
for maps of one size, indices and biases are constants.
"""

from typing import TYPE_CHECKING

import torch
from torch import nn

from .geometry_focal import cell_tokens, level_grid
from .layout_focal import at_least_float32, cat_unless_single, head_index
from .neighborhood_focal import HIDDEN, AttentionTables, Neighborhood
from .run_state_focal import is_exporting

if TYPE_CHECKING:
    from .modeling_focal import FocalAttention, FocalPooling

# Largest ratio of all tokens to the keys of a window with which a frozen model attends densely.
DENSE_RATIO = 1.6


def attends_by_index(module: "FocalAttention", neighborhood: Neighborhood) -> bool:
    """Whether a [`FocalAttention`] is exported with its default attention, or has dense tables."""
    by_index = is_exporting() or neighborhood.tables is not None
    return by_index and module.config._attn_implementation == "sdpa" and not module.active_dropout


def cell_sides(module: "FocalAttention") -> list[int]:
    """The sides in tokens of the cells of each pooled level of a [`FocalAttention`]."""
    return module.pooling.cells if module.pooling is not None else []


def attention_tables(
    module: "FocalAttention", neighborhood: Neighborhood, height: int, width: int, shift_size: int
) -> AttentionTables:
    """The tables of a [`FocalAttention`] for maps of `height` by `width`.

    The neighbourhood is that of the maps after padding and after a shift by `shift_size`.
    """
    index, heads, window = neighborhood.index, module.num_heads, module.window_size
    rows, cols = index.shape[:2]

    def places(length: int, windows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Window and place in it of the coordinates of the original map, along one axis."""
        shifted = torch.arange(length, device=index.device) - shift_size
        shifted = torch.where(shifted < 0, shifted + windows * window, shifted)
        return shifted // window, shifted % window

    (row, down), (col, right) = places(height, rows), places(width, cols)
    of_window = row[:, None] * cols + col
    head = torch.arange(heads, device=index.device)
    query = (of_window[..., None] * heads + head) * window**2 + (down[:, None] * window + right)[..., None]

    cells = []
    for level in range(1, len(cell_sides(module)) + 1):
        grid = level_grid(rows * window, cols * window, window, level)
        cells.append(cell_tokens(grid, cols * window, index.device).flatten())
    windows = level_grid(rows * window, cols * window, window, 1)
    return AttentionTables(
        queries=head_index(cell_tokens(windows, cols * window, index.device), heads).flatten(),
        keys=head_index(index.long(), heads).flatten(),
        outputs=query.flatten(),
        cells=cells,
        bias=neighborhood.exported_bias(),
    )


def dense_tables(
    module: "FocalAttention", neighborhood: Neighborhood, tables: AttentionTables
) -> AttentionTables | None:
    """Tables with which all queries attend to all tokens, or None where windows attend to a small part of them.

    A token that a window lists several times, with biases a and b, has the bias log(eᵃ + eᵇ).
    """
    rows, cols, keys = neighborhood.index.shape
    window, heads = module.window_size, module.num_heads
    map_tokens = rows * cols * window**2
    pooled = sum(cells.shape[0] // side**2 for cells, side in zip(tables.cells, cell_sides(module), strict=True))
    if map_tokens + pooled > keys * DENSE_RATIO:
        return None
    listed = neighborhood.bias()  # (windows, heads, queries, keys)
    index = neighborhood.index.clamp(min=0).view(-1, 1, 1, keys).expand(listed.shape).long()
    largest = listed.new_full((*listed.shape[:3], map_tokens + pooled), HIDDEN).scatter_reduce(3, index, listed, "amax")
    total = torch.zeros_like(largest).scatter_add(3, index, (listed - largest.gather(3, index)).exp())
    bias = largest + total.clamp(min=1).log()
    # From the order of windows to that of the map.
    grid = level_grid(rows * window, cols * window, window, 1)
    tokens = cell_tokens(grid, cols * window, index.device).flatten()
    bias = bias.transpose(0, 1).flatten(1, 2)[:, tokens.argsort()]
    assert tables.outputs is not None
    of_window = tables.outputs.view(-1, heads)[:, 0]
    outputs = tokens[of_window // (heads * window**2) * window**2 + of_window % window**2]
    in_order = torch.equal(outputs, torch.arange(map_tokens, device=outputs.device))
    return AttentionTables(None, None, None if in_order else outputs, tables.cells, bias[None])


def pool_by_index(pooling: "FocalPooling", tokens: torch.Tensor, cells: list[torch.Tensor]) -> torch.Tensor:
    """`pooling` of the tokens (batch, height · width, channels) of a map: (batch, pooled tokens, channels)."""
    pooled = []
    for number, (side, index) in enumerate(zip(pooling.cells, cells, strict=True)):
        gathered = tokens.index_select(1, index).unflatten(1, (-1, side**2))
        if pooling.pool == "mean":
            pooled.append(gathered.mean(dim=2))
        elif pooling.pool == "max":
            pooled.append(gathered.amax(dim=2))
        elif pooling.pool == "fc":
            # Not as `pooling` does it: with its transposes, a whole model takes 11 % more time in OpenVINO.
            layer = pooling.layers[number]
            if type(layer) is nn.Linear:  # Weights on the left stay in float32 where an export has eight bits.
                pooled.append(torch.matmul(layer.weight, gathered).squeeze(2) + layer.bias)
            else:  # that of an adapter, for instance
                pooled.append(layer(gathered.transpose(2, 3)).squeeze(3))
        else:
            maps = gathered.flatten(0, 1).transpose(1, 2).unflatten(2, (side, side))
            pooled.append(pooling.layers[number](maps).view(*gathered.shape[:2], -1))
    return cat_unless_single(pooled, dim=1)


def project_and_gather(
    layer: nn.Module, tokens: torch.Tensor, head_dim: int, index: torch.Tensor | None, length: int
) -> torch.Tensor:
    """Heads (batch, windows · heads, length, head_dim) of the tokens that `index` lists, or of all without an index."""
    projected = layer(tokens).unflatten(2, (-1, head_dim))
    if index is None:
        return projected.transpose(1, 2)
    return projected.flatten(1, 2).index_select(1, index).unflatten(1, (-1, length))


def attend_by_index(module: "FocalAttention", tokens: torch.Tensor, tables: AttentionTables) -> torch.Tensor:
    """The output (batch, height · width, channels) of a [`FocalAttention`] for a map's tokens, padded and shifted."""
    batch, channels = tokens.shape[0], tokens.shape[2]
    queries, keys = tables.bias.shape[2:]
    query = project_and_gather(module.q_proj, tokens, module.head_dim, tables.queries, queries)
    if module.pooling is not None:
        tokens = torch.cat([tokens, pool_by_index(module.pooling, tokens, tables.cells)], dim=1)
    key = project_and_gather(module.k_proj, tokens, module.head_dim, tables.keys, keys)
    value = project_and_gather(module.v_proj, tokens, module.head_dim, tables.keys, keys)
    if is_exporting():
        # Exporters decompose PyTorch's own attention into more operations, or fail.
        scores = torch.matmul(query * module.scaling, key.transpose(2, 3)) + tables.bias.to(query.dtype)
        output = torch.matmul(at_least_float32(scores).softmax(dim=-1).to(value.dtype), value)
    else:
        output = nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=tables.bias.to(query.dtype), scale=module.scaling
        )
    if tables.queries is None:
        output = output.transpose(1, 2).reshape(batch, -1, channels)
    else:
        output = output.view(batch, -1, module.head_dim)
    if tables.outputs is not None:
        output = output.index_select(1, tables.outputs)
    return module.o_proj(output.view(batch, -1, channels))
