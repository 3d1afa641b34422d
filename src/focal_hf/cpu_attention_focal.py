"""Attention on a CPU, of some windows after others, so that what they gather stays in the processor's cache.

An operator of its own, so that compiled graphs call it too. Its backward pass gathers and attends again: what all
windows gather would be several times as large as all else that is kept for it.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import nn

from .neighborhood_focal import BiasPart, Neighborhood, at_least_float32, cut_windows, picked, rows_of_images

# Numbers in the keys that the windows of a piece gather: measured on a processor with 2 MB of second-level cache per
# core.
KEY_VALUES_PER_PIECE = 768 * 1024


def works_in_pieces(query: torch.Tensor) -> bool:
    """Whether `attention_in_pieces` is the way to attend. Exported graphs run where this operator is not known."""
    return query.device.type == "cpu" and not torch.compiler.is_exporting() and not torch.jit.is_tracing()


class Piece(NamedTuple):
    """Windows that are worked on together, `places` their rows and columns.

    `head_rows` (windows, heads, keys) is what they gather, `bias` is (windows, heads, queries, keys), and `images` are
    slices of the batch, to be taken one after the other.
    """

    places: tuple[slice, slice]
    head_rows: torch.Tensor
    bias: torch.Tensor
    images: list[slice]


def slices(length: int, step: int) -> list[slice]:
    """Slices of `step` that cover `length`."""
    return [slice(first, first + step) for first in range(0, length, step)]


def pieces(neighborhood: Neighborhood, batch: int, head_dim: int, dtype: torch.dtype) -> Iterator[Piece]:
    """All windows, piece by piece. The bias of one is written over that of the one before."""
    index, parts = neighborhood
    rows, cols, keys = index.shape
    heads = parts[0].source.shape[0]
    size = max(1, KEY_VALUES_PER_PIECE // (keys * heads * head_dim))  # windows in a piece
    # A bias of one window serves many images at once, others one image after the other.
    images = slices(batch, size if rows * cols == 1 else 1)
    bias, written = torch.empty(0), []
    # Down the columns, pieces differ least.
    for some_cols in slices(cols, size):
        for some_rows in slices(rows, max(1, size // cols)):
            places = some_rows, some_cols
            head_rows = neighborhood.head_rows(places, heads)
            patterns = [part.pattern[places] for part in parts]
            if len(bias) != len(head_rows):
                bias = neighborhood.bias(places).contiguous()
            else:
                # Away from the map's edges most windows have the patterns of those before, and their bias.
                columns = bias.split([part.columns for part in parts], dim=-1)
                for target, part, pattern, before in zip(columns, parts, patterns, written, strict=True):
                    if not torch.equal(pattern, before):
                        target.copy_(part.bias(places))
            written = patterns
            yield Piece(places, head_rows, bias.to(dtype), images)


def by_head(windows: torch.Tensor, head_dim: int) -> torch.Tensor:
    """(images, rows, cols, side, side, channels) to (images · windows, heads, queries, head_dim)."""
    return windows.flatten(3, 4).flatten(0, 2).unflatten(-1, (-1, head_dim)).transpose(1, 2)


def put(heads: torch.Tensor, windows: torch.Tensor):
    """Writes into windows what `by_head` makes of them."""
    windows.copy_(heads.transpose(1, 2).reshape(windows.shape))


def add_picked(target: torch.Tensor, head_rows: torch.Tensor, addend: torch.Tensor):
    """Adds to tokens (images, tokens, channels) what belongs to those that `picked` gives."""
    heads = target.view(-1, addend.shape[-1])
    rows = rows_of_images(head_rows, len(target), len(heads))
    heads.index_add_(0, rows.flatten(), addend.flatten(0, -2))


@torch.library.custom_op("focal_hf::attention_in_pieces", mutates_args=(), device_types="cpu")
def attention_in_pieces(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    index: torch.Tensor,
    sources: list[torch.Tensor],
    patterns: list[torch.Tensor],
    head_dim: int,
    scaling: float,
) -> torch.Tensor:
    """Args and output as `FocalAttention.attend` has them, the neighbourhood taken to pieces."""
    neighborhood = Neighborhood(index, list(map(BiasPart, sources, patterns)))
    side = query.shape[1] // index.shape[0]
    output = torch.empty_like(query, memory_format=torch.contiguous_format)
    queries, outputs = cut_windows(query, side), cut_windows(output, side)
    for places, head_rows, bias, images in pieces(neighborhood, len(query), head_dim, query.dtype):
        for some in images:
            attended = nn.functional.scaled_dot_product_attention(
                by_head(queries[some, *places], head_dim),
                picked(key[some], head_rows, head_dim),
                picked(value[some], head_rows, head_dim),
                attn_mask=bias,
                scale=scaling,
            )
            put(attended, outputs[some, *places])
    return output


@attention_in_pieces.register_fake
def _(query, key, value, index, sources, patterns, head_dim, scaling):
    return torch.empty_like(query, memory_format=torch.contiguous_format)


@torch.library.custom_op("focal_hf::attention_in_pieces_backward", mutates_args=(), device_types="cpu")
def attention_in_pieces_backward(
    grad_output: torch.Tensor,
    output: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    index: torch.Tensor,
    sources: list[torch.Tensor],
    patterns: list[torch.Tensor],
    head_dim: int,
    scaling: float,
) -> list[torch.Tensor]:
    """Gradients of query, key, value and the sources."""
    neighborhood = Neighborhood(index, list(map(BiasPart, sources, patterns)))
    side = query.shape[1] // index.shape[0]
    gradients = [torch.zeros(tensor.shape, dtype=tensor.dtype) for tensor in (query, key, value, *sources)]
    grad_query, grad_key, grad_value, *grad_sources = gradients
    cut = [cut_windows(maps, side) for maps in (query, output, grad_output)]
    grad_queries = cut_windows(grad_query, side)
    for places, head_rows, bias, images in pieces(neighborhood, len(query), head_dim, query.dtype):
        grad_bias = torch.zeros_like(bias, dtype=sources[0].dtype)
        for some in images:
            q, out, grad_out = (by_head(windows[some, *places], head_dim) for windows in cut)
            k, v = picked(key[some], head_rows, head_dim), picked(value[some], head_rows, head_dim)
            scores = torch.matmul(q, k.transpose(2, 3)).mul_(scaling).add_(bias)
            weights = at_least_float32(scores).softmax(dim=-1).to(q.dtype)
            grad_scores = torch.matmul(grad_out, v.transpose(2, 3))
            grad_scores.sub_((grad_out * out).sum(dim=-1, keepdim=True)).mul_(weights)
            grad_bias += grad_scores.sum_to_size(bias.shape)
            grad_scores.mul_(scaling)
            put(torch.matmul(grad_scores, k), grad_queries[some, *places])
            add_picked(grad_key[some], head_rows, torch.matmul(grad_scores.transpose(2, 3), q))
            add_picked(grad_value[some], head_rows, torch.matmul(weights.transpose(2, 3), grad_out))
        columns = grad_bias.split([part.columns for part in neighborhood.parts], dim=-1)
        for part, grad_source, grad in zip(neighborhood.parts, grad_sources, columns, strict=True):
            grad_source += part.gradient(grad, places)
    return gradients


@attention_in_pieces_backward.register_fake
def _(grad_output, output, query, key, value, index, sources, patterns, head_dim, scaling):
    return [
        torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device) for tensor in (query, key, value, *sources)
    ]


def _keep(ctx, inputs, output):
    query, key, value, index, sources, patterns, ctx.head_dim, ctx.scaling = inputs
    ctx.sources = len(sources)
    ctx.save_for_backward(output, query, key, value, index, *sources, *patterns)


def _backward(ctx, grad_output):
    output, query, key, value, index, *rest = ctx.saved_tensors
    sources, patterns = rest[: ctx.sources], rest[ctx.sources :]
    grad_query, grad_key, grad_value, *grad_sources = attention_in_pieces_backward(
        grad_output, output, query, key, value, index, sources, patterns, ctx.head_dim, ctx.scaling
    )
    return grad_query, grad_key, grad_value, None, grad_sources, [None] * len(patterns), None, None


attention_in_pieces.register_autograd(_backward, setup_context=_keep)
