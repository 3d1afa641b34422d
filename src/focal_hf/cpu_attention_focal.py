"""Attention on a CPU, in chunks that stay in the processor's cache, or on small maps as one dense product.

`attention_in_chunks` gathers keys and values for some windows at a time. It is a custom operator, so that compiled
graphs call it too. Its backward pass gathers and attends again: the gathered keys and values of all windows would take
several times the memory of all other activations.
"""

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import register_flop_formula

from .layout_focal import (
    at_least_float32,
    cat_unless_single,
    fold_windows,
    gather_heads,
    head_index,
    unfold_windows,
)
from .neighborhood_focal import BiasPart, Neighborhood
from .run_state_focal import (
    OPERATOR_NAMESPACE,
    is_compiling,
    is_cpu_inference,
    is_exporting,
    is_static,
    is_transforming,
)

if TYPE_CHECKING:
    from .modeling_focal import FocalAttention, FocalMLP

# Elements of the keys that a chunk of windows gathers, for a processor with 2 MB of second-level cache per core.
KEY_ELEMENTS_PER_CHUNK = 768 * 1024
# Tokens that an MLP processes at a time, for the same processor.
TOKENS_PER_CHUNK = 1600
# Largest number of chunks of an MLP in a compiled graph, which unrolls them.
CHUNKS_IN_GRAPH = 8
# Largest dense bias, in elements, that is cached for a block.
DENSE_BIAS_ELEMENTS = 1024 * 1024


def reason_against_cpu_attention(query: torch.Tensor) -> str | None:
    """Why the operator and the dense attention of this module cannot be used, or None if they can."""
    if query.device.type != "cpu":
        return f"it runs on CPUs (got {query.device.type})"
    if is_exporting():
        return "exported graphs cannot contain custom operators"
    if is_transforming():
        return "it has no rules for transforms of torch.func or forward-mode derivatives"
    return None


# --- Dense attention --------------------------------------------------------------------------------------------------


def padded_length(keys: int) -> int:
    """The number of keys, hidden ones included, with which attention is fastest.

    PyTorch's attention processes 16 keys at a time and the remaining ones singly. One single key costs almost half as
    much as 16 keys together.
    """
    return keys + (-keys % 16 if keys % 16 > 2 else 0)


def token_count(neighborhood: Neighborhood) -> int:
    """The number of tokens of the map and of all pooled levels."""
    rows, cols = neighborhood.index.shape[:2]
    return rows * cols * sum(square.step**2 for square in neighborhood.squares)


def dense_padding(neighborhood: Neighborhood) -> int:
    """The number of tokens of zeros that dense attention needs in addition."""
    tokens = token_count(neighborhood)
    return padded_length(tokens) - tokens


def reason_against_dense_attention(
    module: "FocalAttention", query: torch.Tensor, neighborhood: Neighborhood
) -> str | None:
    """The reason why dense attention cannot be used, or None if it can.

    In dense attention, every query attends to every token, and hidden tokens have a bias of -inf. This is faster than
    gathering where each window attends to most of the tokens.
    """
    rows, cols, keys = neighborhood.index.shape
    if not (is_cpu_inference(module, query) and is_static(rows, cols)):
        return "it is for inference on a CPU, for maps of a known size"
    if not neighborhood.squares or not all(part.is_mask for part in neighborhood.parts):
        return "the bias is not that of whole squares of tokens"
    if any(part.pattern.shape[2] > 1 for part in neighborhood.parts):
        return "a token is hidden from some queries of a window, as after a shift, which the index does not tell"
    if neighborhood.squares[0].side > neighborhood.window_size * min(rows, cols):
        return "a window has the same token in several columns"
    tokens = padded_length(token_count(neighborhood))
    if tokens > keys * 4 / 3 or module.num_heads * query.shape[1] * tokens > DENSE_BIAS_ELEMENTS:
        return "the windows attend to a small part of the tokens"
    return None


def dense_bias(neighborhood: Neighborhood) -> torch.Tensor:
    """The bias (1, heads, height · width, tokens and padding) of every query and token, -inf for hidden tokens."""
    tokens = padded_length(token_count(neighborhood))
    bias = torch.cat([part.source for part in neighborhood.parts], dim=-1)
    heads, queries, keys = bias.shape
    bias = nn.functional.pad(bias, (0, 1), value=-torch.inf)  # the last column is that of hidden tokens
    index = neighborhood.index
    place = index.masked_fill(index < 0, tokens).flatten(0, 1).long()
    column = place.new_full((place.shape[0], tokens + 1), keys)
    column.scatter_(1, place, torch.arange(keys, device=place.device).expand_as(place))
    shape = place.shape[0], heads, queries, -1
    everywhere = bias.expand(shape).gather(3, column[:, None, None, :tokens].expand(shape))
    side = neighborhood.window_size
    everywhere = everywhere.unflatten(2, (side, side)).unflatten(0, index.shape[:2])
    # Four dimensions, without which PyTorch takes a slow path.
    return everywhere.permute(2, 0, 3, 1, 4, 5).flatten(1, 4)[None]


def attend_densely(
    module: "FocalAttention",
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    neighborhood: Neighborhood,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of all queries of the map to all tokens. `key` and `value` include `dense_padding` tokens."""
    queries, keys, values = (
        tensor.unflatten(2, (module.num_heads, -1)).transpose(1, 2) for tensor in (query, key, value)
    )
    output = nn.functional.scaled_dot_product_attention(
        queries,
        keys,
        values,
        attn_mask=neighborhood.derived(dense_bias).to(query.dtype),
        scale=module.scaling,
    )
    return output.transpose(1, 2).reshape(query.shape), None


# --- Attention in chunks ----------------------------------------------------------------------------------------------


class Chunk(NamedTuple):
    """Windows that are processed together: some of one image, or all of several images.

    Args:
        rows, cols (`slice`):
            The windows within an image.
        all_rows (`slice`):
            Rows of windows when the images are stacked vertically.
        head_index (`torch.Tensor` of shape `(windows, heads, keys)`):
            The keys to gather.
        bias (`torch.Tensor` of shape `(windows, heads, queries, keys)`):
            Their bias.
    """

    rows: slice
    cols: slice
    all_rows: slice
    head_index: torch.Tensor
    bias: torch.Tensor


def slices(length: int, step: int) -> list[slice]:
    """Slices of equal length, at most `step`, that cover `length`. The last one may be shorter."""
    step = -(-length // -(-length // step))
    return [slice(first, min(first + step, length)) for first in range(0, length, step)]


def chunks(neighborhood: Neighborhood, key: torch.Tensor, head_dim: int) -> Iterator[Chunk]:
    """All windows of all images, chunk by chunk. Each chunk's bias overwrites the one before."""
    index, parts = neighborhood.index, neighborhood.parts
    rows, cols, keys = index.shape
    images, tokens, channels = key.shape
    heads = channels // head_dim
    # If a chunk is large compared with the model's own tensors, the allocator returns its memory to the system after
    # every use.
    key_elements = min(KEY_ELEMENTS_PER_CHUNK, max(key.numel(), KEY_ELEMENTS_PER_CHUNK * 5 // 12))
    size = max(1, key_elements // (keys * channels))  # windows in a chunk
    image_slices = slices(images, max(1, size // (rows * cols)))
    padding = padded_length(keys) - keys
    if padding:
        index = torch.cat([index, index[..., :1].expand(-1, -1, padding)], dim=-1)
    index = head_index(index, heads)
    columns = [*(part.columns for part in parts), padding]
    windows, bias = 0, torch.empty(0)
    targets: list[torch.Tensor] = []
    written: list[torch.Tensor | None] = []
    # Consecutive chunks differ least when they go down the columns, and then from image to image.
    for some_cols in slices(cols, size):
        for some_rows in slices(rows, max(1, size // cols)):
            of_image = index[some_rows, some_cols].flatten(0, 1)
            if windows != len(of_image):
                windows = len(of_image)
                bias = key.new_empty(image_slices[0].stop, windows, heads, parts[0].queries, keys + padding)
                *targets, hidden = bias.split(columns, dim=-1)
                hidden.fill_(-torch.inf)
                written = [None] * len(parts)
            # Away from the map's edges, most windows have the pattern, and so the bias, of the chunk before.
            for number, (part, target) in enumerate(zip(parts, targets, strict=True)):
                pattern = part.pattern[some_rows, some_cols]
                before = written[number]
                if before is None or not torch.equal(pattern, before):
                    part.write_bias_(target, some_rows, some_cols)
                written[number] = pattern
            for some_images in image_slices:
                all_rows = slice(
                    some_images.start * rows + some_rows.start, (some_images.stop - 1) * rows + some_rows.stop
                )
                of_images = of_image
                if images > 1:
                    first = torch.arange(some_images.start, some_images.stop) * (tokens * heads)
                    of_images = (first[:, None, None, None] + of_image).flatten(0, 1)
                yield Chunk(some_rows, some_cols, all_rows, of_images, bias.flatten(0, 1)[: len(of_images)])


def stacked_windows(tokens: torch.Tensor, rows: int, cols: int) -> torch.Tensor:
    """(images, tokens, channels) to (images · rows, cols, side, side, channels), as a view if contiguous."""
    images, length, channels = tokens.shape
    side = math.isqrt(length // (rows * cols))
    return tokens.reshape(images * rows, side, cols, side, channels).transpose(1, 2)


def split_heads(windows: torch.Tensor, head_dim: int) -> torch.Tensor:
    """(rows, cols, side, side, channels) to (windows, heads, queries, head_dim)."""
    rows, cols, side, _, channels = windows.shape
    return windows.reshape(rows * cols, side**2, channels // head_dim, head_dim).transpose(1, 2)


def write_heads_(windows: torch.Tensor, heads: torch.Tensor) -> None:
    """Writes (windows, heads, queries, head_dim) into the windows that `split_heads` takes."""
    windows.copy_(heads.transpose(1, 2).reshape(windows.shape))


# Schemas are spelled out, because older torch cannot infer them from `list[torch.Tensor]`.
ARGUMENTS = (
    "Tensor query, Tensor key, Tensor value, Tensor index, Tensor[] sources, Tensor[] patterns, "
    "int head_dim, float scaling"
)


@torch.library.custom_op(
    f"{OPERATOR_NAMESPACE}::attention_in_chunks", mutates_args=(), device_types="cpu", schema=f"({ARGUMENTS}) -> Tensor"
)
def attention_in_chunks(query, key, value, index, sources, patterns, head_dim, scaling):
    """Attention of every window's queries to the keys of its neighbourhood.

    Args:
        query: (batch, height · width, channels).
        key, value: (batch, tokens, channels), of the map's and the pooled tokens.
        index, sources, patterns: the index of a [`Neighborhood`], and the fields of its [`BiasPart`]s.

    Returns:
        (batch, height · width, channels).
    """
    neighborhood = Neighborhood(index, list(map(BiasPart, sources, patterns)))
    output = torch.empty_like(query, memory_format=torch.contiguous_format)
    queries, outputs = (stacked_windows(tokens, *index.shape[:2]) for tokens in (query, output))
    for chunk in chunks(neighborhood, key, head_dim):
        attended = nn.functional.scaled_dot_product_attention(
            split_heads(queries[chunk.all_rows, chunk.cols], head_dim),
            gather_heads(key, chunk.head_index, head_dim),
            gather_heads(value, chunk.head_index, head_dim),
            attn_mask=chunk.bias,
            scale=scaling,
        )
        write_heads_(outputs[chunk.all_rows, chunk.cols], attended)
    return output


@attention_in_chunks.register_fake
def _(query, key, value, index, sources, patterns, head_dim, scaling):
    return torch.empty_like(query, memory_format=torch.contiguous_format)


@torch.library.custom_op(
    f"{OPERATOR_NAMESPACE}::attention_in_chunks_backward",
    mutates_args=(),
    device_types="cpu",
    schema=f"(Tensor grad_output, Tensor output, {ARGUMENTS}) -> Tensor[]",
)
def attention_in_chunks_backward(grad_output, output, query, key, value, index, sources, patterns, head_dim, scaling):
    """Gradients of query, key, value and the sources."""
    neighborhood = Neighborhood(index, list(map(BiasPart, sources, patterns)))
    grad_query = torch.empty_like(query, memory_format=torch.contiguous_format)
    sums = [torch.zeros(tensor.shape, dtype=tensor.dtype) for tensor in (key, value, *sources)]
    grad_key, grad_value, *grad_sources = sums
    windows = [stacked_windows(tokens, *index.shape[:2]) for tokens in (query, output, grad_output)]
    grad_queries = stacked_windows(grad_query, *index.shape[:2])
    for rows, cols, all_rows, gathered, bias in chunks(neighborhood, key, head_dim):
        q, out, grad_out = (split_heads(maps[all_rows, cols], head_dim) for maps in windows)
        k, v = gather_heads(key, gathered, head_dim), gather_heads(value, gathered, head_dim)
        q = q * scaling  # queries have fewer elements than scores
        scores = torch.matmul(q, k.transpose(2, 3)).add_(bias)
        weights = at_least_float32(scores).softmax(dim=-1).to(q.dtype)
        grad_scores = torch.matmul(grad_out, v.transpose(2, 3))
        grad_scores.sub_((grad_out * out).sum(dim=-1, keepdim=True)).mul_(weights)
        first = 0
        for part, grad_source in zip(neighborhood.parts, grad_sources, strict=True):
            grad = grad_scores[..., first : first + part.columns].to(grad_source.dtype)
            grad_source += part.source_gradient(grad, rows, cols)
            first += part.columns
        write_heads_(grad_queries[all_rows, cols], torch.matmul(grad_scores, k).mul_(scaling))
        for grad, of_gathered in (
            (grad_key, torch.matmul(grad_scores.transpose(2, 3), q)),
            (grad_value, torch.matmul(weights.transpose(2, 3), grad_out)),
        ):
            grad.view(-1, head_dim).index_add_(0, gathered.flatten(), of_gathered.flatten(0, 2))
    return [grad_query, *sums]


@attention_in_chunks_backward.register_fake
def _(grad_output, output, query, key, value, index, sources, patterns, head_dim, scaling):
    return [
        torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device) for tensor in (query, key, value, *sources)
    ]


def differentiable_attention(query, key, value, index, sources, patterns, head_dim, scaling) -> torch.Tensor:
    """`attention_in_chunks` of all windows at once, in operations that can be differentiated any number of times."""
    neighborhood = Neighborhood(index, list(map(BiasPart, sources, patterns)))
    window_size = neighborhood.window_size
    queries, keys, values = fold_windows(query, key, value, index, window_size, head_dim)
    scores = torch.matmul(queries * scaling, keys.transpose(2, 3)) + neighborhood.bias().to(query.dtype).flatten(0, 1)
    weights = at_least_float32(scores).softmax(dim=-1).to(query.dtype)
    return unfold_windows(torch.matmul(weights, values), query, index, window_size)


def _setup_context(ctx, inputs, output):
    query, key, value, index, sources, patterns, ctx.head_dim, ctx.scaling = inputs
    ctx.sources = len(sources)
    ctx.save_for_backward(output, query, key, value, index, *sources, *patterns)


def _backward(ctx, grad_output):
    output, query, key, value, index, *rest = ctx.saved_tensors
    sources, patterns = rest[: ctx.sources], rest[ctx.sources :]
    inputs = query, key, value, index, sources, patterns, ctx.head_dim, ctx.scaling
    if torch.is_grad_enabled():  # create_graph=True: these gradients will have gradients
        wanted = [tensor for tensor in (query, key, value, *sources) if tensor.requires_grad]
        found = iter(torch.autograd.grad(differentiable_attention(*inputs), wanted, grad_output, create_graph=True))
        grads = [next(found) if tensor.requires_grad else None for tensor in (query, key, value, *sources)]
    else:
        grads = attention_in_chunks_backward(grad_output, output, *inputs)
    return *grads[:3], None, list(grads[3:]), [None] * len(patterns), None, None


attention_in_chunks.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(getattr(torch.ops, OPERATOR_NAMESPACE).attention_in_chunks)
def _count_flops(query_shape, key_shape, value_shape, index_shape, *args, out_shape=None, **kwargs) -> int:
    """For `torch.utils.flop_counter`, which does not see into operators: two products of queries and gathered keys."""
    return 4 * math.prod(query_shape) * index_shape[-1]


def attend_in_chunks(
    module: "FocalAttention",
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    neighborhood: Neighborhood,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of every window's queries to the keys of its neighbourhood, by `attention_in_chunks`."""
    sources = [part.source for part in neighborhood.parts]
    patterns = [part.pattern for part in neighborhood.parts]
    numbers = module.head_dim, module.scaling
    return attention_in_chunks(query, key, value, neighborhood.index, sources, patterns, *numbers), None


# --- MLPs -------------------------------------------------------------------------------------------------------------


def mlp_in_chunks(mlp: "FocalMLP", hidden_states: torch.Tensor) -> torch.Tensor:
    """`mlp.transform(hidden_states)`, in inference on a CPU for some tokens at a time."""
    # A layer in the place of a linear one may need to know a token's image, as PEFT's with one adapter per image do.
    plain = type(mlp.fc1) is type(mlp.fc2) is nn.Linear
    if not (plain and is_cpu_inference(mlp, hidden_states) and is_static(*hidden_states.shape[:-1])):
        return mlp.transform(hidden_states)
    tokens = hidden_states.flatten(0, -2)
    count = -(-tokens.shape[0] // TOKENS_PER_CHUNK)
    if is_compiling():
        count = min(count, CHUNKS_IN_GRAPH)
    return cat_unless_single([mlp.transform(chunk) for chunk in tokens.chunk(count)]).view(hidden_states.shape)
