"""Attention in which every movement of tokens is a gather by an index, for exported graphs.

A gather needs to know no more about a map than its index does, so that one graph serves maps of all sizes. In a graph
for maps of one size, indices and biases are constants.
"""

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from .geometry_focal import level_grid, window_tokens
from .layout_focal import at_least_float32, cat_unless_single
from .neighborhood_focal import Neighborhood
from .run_state_focal import is_exporting

if TYPE_CHECKING:
    from .modeling_focal import FocalAttention, FocalPooling


class AttentionTables(NamedTuple):
    """What a block gathers on maps of one size, and its bias.

    Indices count heads of tokens: head h of token t is number t · heads + h.

    Args:
        queries (`torch.Tensor` of shape `(windows · heads · queries,)`):
            Of the tokens of the map.
        keys (`torch.Tensor` of shape `(windows · heads · keys,)`):
            Of the tokens of the map and the pooled tokens.
        outputs (`torch.Tensor` of shape `(height · width · heads,)`):
            Of the queries, for every token of the map before it was padded and shifted.
        cells (`list[torch.Tensor]`):
            For each pooled level, the numbers of the tokens in its cells, `(cells · tokens in a cell,)`.
        bias (`torch.Tensor` of shape `(1, windows · heads, queries, keys)`):
            The bias, -inf for hidden keys.
    """

    queries: torch.Tensor
    keys: torch.Tensor
    outputs: torch.Tensor
    cells: list[torch.Tensor]
    bias: torch.Tensor


def attends_by_index(module: "FocalAttention") -> bool:
    """Whether a [`FocalAttention`] is being exported with its default attention."""
    drops = module.training and module.attention_dropout > 0
    return is_exporting() and module.config._attn_implementation == "sdpa" and not drops


def attention_tables(
    module: "FocalAttention", neighborhood: Neighborhood, height: int, width: int, shift_size: int
) -> AttentionTables:
    """The tables of a [`FocalAttention`] for maps of `height` by `width`.

    The neighbourhood is that of the maps after padding and after a shift by `shift_size`.
    """
    index, heads, window = neighborhood.index, module.num_heads, module.window_size
    rows, cols, keys = index.shape
    head = torch.arange(heads, device=index.device)

    def of_heads(tokens: torch.Tensor) -> torch.Tensor:
        return (tokens[:, None, :] * heads + head[:, None]).flatten()

    def place(length: int, windows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Window and place in it of the coordinates of the original map, along one axis."""
        place = torch.arange(length, device=index.device) - shift_size
        place = torch.where(place < 0, place + windows * window, place)
        return place // window, place % window

    (row, down), (col, right) = place(height, rows), place(width, cols)
    of_window = row[:, None] * cols + col
    query = (of_window[..., None] * heads + head) * window**2 + (down[:, None] * window + right)[..., None]

    cells = []
    for level in range(1, len(module.pooling.cells) + 1 if module.pooling else 1):
        grid = level_grid(rows * window, cols * window, window, level)
        cells.append(window_tokens(grid, cols * window, index.device).flatten())
    windows = level_grid(rows * window, cols * window, window, 1)
    return AttentionTables(
        queries=of_heads(window_tokens(windows, cols * window, index.device)),
        keys=of_heads(index.clamp(min=0).view(rows * cols, keys).long()),
        outputs=query.flatten(),
        cells=cells,
        bias=neighborhood.bias().flatten(0, 1)[None],
    )


def pool_by_index(pooling: "FocalPooling", tokens: torch.Tensor, cells: list[torch.Tensor]) -> torch.Tensor:
    """`pooling` of the tokens (batch, height · width, channels) of a map: (batch, pooled tokens, channels)."""
    pooled = []
    for level, (side, index) in enumerate(zip(pooling.cells, cells, strict=True)):
        gathered = tokens.index_select(1, index).unflatten(1, (-1, side**2))
        if pooling.pool == "mean":
            pooled.append(gathered.mean(dim=2))
        elif pooling.pool == "max":
            pooled.append(gathered.amax(dim=2))
        elif pooling.pool == "fc":
            layer: Any = pooling.layers[level]  # nn.Linear, nn.Conv2d, or a layer in the place of one
            pooled.append(torch.matmul(layer.weight, gathered).squeeze(2) + layer.bias)
        else:
            layer = pooling.layers[level]
            weight = layer.weight.flatten(1).t()  # (tokens in a cell, channels)
            pooled.append((weight * gathered).sum(dim=2) + layer.bias)
    return cat_unless_single(pooled, dim=1)


def attend_by_index(module: "FocalAttention", tokens: torch.Tensor, tables: AttentionTables) -> torch.Tensor:
    """The output (batch, height · width, channels) of a [`FocalAttention`] for a map's tokens, padded and shifted."""
    batch, channels = tokens.shape[0], tokens.shape[2]
    head_dim, queries, keys = module.head_dim, *tables.bias.shape[2:]

    def gather(layer: nn.Module, tokens: torch.Tensor, index: torch.Tensor, length: int) -> torch.Tensor:
        heads = layer(tokens).reshape(batch, -1, head_dim).index_select(1, index)
        return heads.view(batch, -1, length, head_dim)

    query = gather(module.q_proj, tokens, tables.queries, queries)
    if module.pooling is not None:
        tokens = torch.cat([tokens, pool_by_index(module.pooling, tokens, tables.cells)], dim=1)
    key, value = (gather(layer, tokens, tables.keys, keys) for layer in (module.k_proj, module.v_proj))
    scores = torch.matmul(query * module.scaling, key.transpose(2, 3)) + tables.bias.to(query.dtype)
    output = torch.matmul(at_least_float32(scores).softmax(dim=-1).to(value.dtype), value)
    output = output.view(batch, -1, head_dim).index_select(1, tables.outputs)
    return module.o_proj(output.view(batch, -1, channels))
