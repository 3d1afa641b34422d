"""Attention on a CPU, of some windows after others, so that what they gather stays in the processor's cache.

An operator of its own, so that compiled graphs call it too. Its backward pass gathers and attends again: what all
windows gather would be several times as large as all else that is kept for it.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import register_flop_formula

from .neighborhood_focal import (
    BiasPart,
    Neighborhood,
    at_least_float32,
    is_exporting,
    is_transforming,
    keys_to_fill,
    picked,
)

# Numbers in the keys that the windows of a piece gather: measured on a processor with 2 MB of second-level cache per
# core.
KEY_VALUES_PER_PIECE = 768 * 1024


def works_in_pieces(query: torch.Tensor) -> bool:
    """Whether `attention_in_pieces` is the way to attend. It has no rules for `torch.func`."""
    return query.device.type == "cpu" and not is_exporting() and not is_transforming()


class Piece(NamedTuple):
    """Windows that are worked on together, of one image or of several whole ones.

    `here` are their rows and columns among the windows of all images, one below the other, and `places` those in the
    neighbourhood, of one image. They gather `head_index` (windows, heads, keys); `bias` is (windows, heads, queries,
    keys).
    """

    here: tuple[slice, slice]
    places: tuple[slice, slice]
    head_index: torch.Tensor
    bias: torch.Tensor


def slices(length: int, step: int) -> list[slice]:
    """Slices of `step`, or a little less to be even, that cover `length`."""
    step = -(-length // -(-length // step))
    return [slice(first, min(first + step, length)) for first in range(0, length, step)]


def pieces(neighborhood: Neighborhood, key: torch.Tensor) -> Iterator[Piece]:
    """All windows of all images, piece by piece. The bias of one is written over that of the one before."""
    index, parts = neighborhood.head_index, neighborhood.parts
    rows, cols, heads, keys = index.shape
    images, tokens, channels = key.shape
    # Pieces that are large beside the model's own tensors would be given back to the system, and asked for, every time.
    key_values = min(KEY_VALUES_PER_PIECE, max(key.numel(), KEY_VALUES_PER_PIECE * 5 // 12))
    size = max(1, key_values // (keys * channels))  # windows in a piece
    some_images = slices(images, max(1, size // (rows * cols)))
    filling = keys_to_fill(keys)
    if filling:
        index = torch.cat([index, index[..., :1].expand(-1, -1, -1, filling)], dim=-1)
    columns = [*(part.columns for part in parts), filling]
    windows, bias, targets, written = 0, torch.empty(0), [], []
    # Down the columns, and from image to image, pieces differ least.
    for some_cols in slices(cols, size):
        for some_rows in slices(rows, max(1, size // cols)):
            places = some_rows, some_cols
            of_image = index[places].flatten(0, 1)
            if windows != len(of_image):
                windows = len(of_image)
                bias = key.new_empty(some_images[0].stop, windows, heads, parts[0].queries, keys + filling)
                *targets, hidden = bias.split(columns, dim=-1)
                hidden.fill_(-torch.inf)
                written = [None] * len(parts)
            # Away from the map's edges most windows have the patterns of those before, and their bias.
            for number, (part, target) in enumerate(zip(parts, targets, strict=True)):
                pattern = part.pattern[places]
                if written[number] is None or not torch.equal(pattern, written[number]):
                    part.write_bias(target, places)
                written[number] = pattern
            for some in some_images:
                here = slice(some.start * rows + some_rows.start, (some.stop - 1) * rows + some_rows.stop), some_cols
                head_index = of_image
                if images > 1:
                    first = torch.arange(some.start, some.stop) * (tokens * heads)
                    head_index = (first[:, None, None, None] + of_image).flatten(0, 1)
                yield Piece(here, places, head_index, bias.flatten(0, 1)[: len(head_index)])


def all_windows(tokens: torch.Tensor, rows: int, cols: int) -> torch.Tensor:
    """(images, tokens, channels) to (images · rows, cols, side, side, channels), as a view if contiguous."""
    images, length, channels = tokens.shape
    side = math.isqrt(length // (rows * cols))
    return tokens.reshape(images * rows, side, cols, side, channels).transpose(1, 2)


def by_head(windows: torch.Tensor, head_dim: int) -> torch.Tensor:
    """(rows, cols, side, side, channels) to (windows, heads, queries, head_dim)."""
    rows, cols, side, _, channels = windows.shape
    return windows.reshape(rows * cols, side**2, channels // head_dim, head_dim).transpose(1, 2)


def put(heads: torch.Tensor, windows: torch.Tensor):
    """Writes into windows what `by_head` makes of them."""
    windows.copy_(heads.transpose(1, 2).reshape(windows.shape))


# Of this copy of the code: checkpoints may carry others into the same process, and the last operator of a name is what
# all who call that name get.
NAMESPACE = re.sub(r"[^0-9A-Za-z_]", "_", __name__.rpartition(".")[0])

# In so many words, as older torch does not read `list[...]`.
ARGUMENTS = (
    "Tensor query, Tensor key, Tensor value, Tensor index, Tensor[] sources, Tensor[] patterns, "
    "int head_dim, float scaling"
)


@torch.library.custom_op(
    f"{NAMESPACE}::attention_in_pieces", mutates_args=(), device_types="cpu", schema=f"({ARGUMENTS}) -> Tensor"
)
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
    output = torch.empty_like(query, memory_format=torch.contiguous_format)
    queries, outputs = (all_windows(tokens, *index.shape[:2]) for tokens in (query, output))
    for piece in pieces(neighborhood, key):
        attended = nn.functional.scaled_dot_product_attention(
            by_head(queries[piece.here], head_dim),
            picked(key, piece.head_index, head_dim),
            picked(value, piece.head_index, head_dim),
            attn_mask=piece.bias,
            scale=scaling,
        )
        put(attended, outputs[piece.here])
    return output


@attention_in_pieces.register_fake
def _(query, key, value, index, sources, patterns, head_dim, scaling):
    return torch.empty_like(query, memory_format=torch.contiguous_format)


@torch.library.custom_op(
    f"{NAMESPACE}::attention_in_pieces_backward",
    mutates_args=(),
    device_types="cpu",
    schema=f"(Tensor grad_output, Tensor output, {ARGUMENTS}) -> Tensor[]",
)
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
    grad_query = torch.empty_like(query, memory_format=torch.contiguous_format)
    sums = [torch.zeros(tensor.shape, dtype=tensor.dtype) for tensor in (key, value, *sources)]
    grad_key, grad_value, *grad_sources = sums
    windows = [all_windows(tokens, *index.shape[:2]) for tokens in (query, output, grad_output)]
    grad_queries = all_windows(grad_query, *index.shape[:2])
    for here, places, head_index, bias in pieces(neighborhood, key):
        q, out, grad_out = (by_head(maps[here], head_dim) for maps in windows)
        k, v = picked(key, head_index, head_dim), picked(value, head_index, head_dim)
        q = q * scaling  # with fewer numbers than its scores
        scores = torch.matmul(q, k.transpose(2, 3)).add_(bias)
        weights = at_least_float32(scores).softmax(dim=-1).to(q.dtype)
        grad_scores = torch.matmul(grad_out, v.transpose(2, 3))
        grad_scores.sub_((grad_out * out).sum(dim=-1, keepdim=True)).mul_(weights)
        first = 0
        for part, grad_source in zip(neighborhood.parts, grad_sources, strict=True):
            grad = grad_scores[..., first : first + part.columns].to(grad_source.dtype)
            grad_source += part.gradient(grad, places)
            first += part.columns
        put(torch.matmul(grad_scores, k).mul_(scaling), grad_queries[here])
        for grad, of_picked in (
            (grad_key, torch.matmul(grad_scores.transpose(2, 3), q)),
            (grad_value, torch.matmul(weights.transpose(2, 3), grad_out)),
        ):
            grad.view(-1, head_dim).index_add_(0, head_index.flatten(), of_picked.flatten(0, 2))
    return [grad_query, *sums]


@attention_in_pieces_backward.register_fake
def _(grad_output, output, query, key, value, index, sources, patterns, head_dim, scaling):
    return [
        torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device) for tensor in (query, key, value, *sources)
    ]


def written_out(query, key, value, index, sources, patterns, head_dim, scaling) -> torch.Tensor:
    """What `attention_in_pieces` computes, of all windows at once and as often differentiable as one likes."""
    neighborhood, sides = Neighborhood(index, list(map(BiasPart, sources, patterns))), index.shape[:2]
    head_index = index.flatten(0, 1) + torch.arange(len(key))[:, None, None, None] * (key[0].numel() // head_dim)
    queries = all_windows(query, *sides)
    scores = torch.matmul(
        by_head(queries, head_dim).unflatten(0, (len(query), -1)) * scaling,
        picked(key, head_index, head_dim).transpose(3, 4),
    )
    bias = neighborhood.bias((slice(None), slice(None)))
    weights = at_least_float32(scores + bias.to(scores.dtype)).softmax(dim=-1).to(query.dtype)
    attended = torch.matmul(weights, picked(value, head_index, head_dim)).flatten(0, 1)
    return attended.transpose(1, 2).reshape(queries.shape).transpose(1, 2).reshape(query.shape)


def _keep(ctx, inputs, output):
    query, key, value, index, sources, patterns, ctx.head_dim, ctx.scaling = inputs
    ctx.sources = len(sources)
    ctx.save_for_backward(output, query, key, value, index, *sources, *patterns)


def _backward(ctx, grad_output):
    output, query, key, value, index, *rest = ctx.saved_tensors
    sources, patterns = rest[: ctx.sources], rest[ctx.sources :]
    inputs = query, key, value, index, sources, patterns, ctx.head_dim, ctx.scaling
    if torch.is_grad_enabled():  # create_graph=True: these gradients will have gradients
        wanted = [tensor for tensor in (query, key, value, *sources) if tensor.requires_grad]
        found = iter(torch.autograd.grad(written_out(*inputs), wanted, grad_output, create_graph=True))
        grads = [next(found) if tensor.requires_grad else None for tensor in (query, key, value, *sources)]
    else:
        grads = attention_in_pieces_backward(grad_output, output, *inputs)
    return *grads[:3], None, list(grads[3:]), [None] * len(patterns), None, None


attention_in_pieces.register_autograd(_backward, setup_context=_keep)


@register_flop_formula(getattr(torch.ops, NAMESPACE).attention_in_pieces)
def _operations(query_shape, key_shape, value_shape, index_shape, *args, out_shape=None, **kwargs) -> int:
    """For `torch.utils.flop_counter`, which does not look into operators: two products of queries and picked keys."""
    return 4 * math.prod(query_shape) * index_shape[-1]
