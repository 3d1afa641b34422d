"""Attention on a GPU, as Triton kernels that read keys, values and biases in place.

The kernels read queries, keys and values as their projections return them, (images, tokens, channels); the index of
each window's keys; and the bias of each head, which all windows share. They write the output and, for the backward
pass, one number per query. Keys, values, biases and scores are never written per window.

A program of a kernel works on one window and head of one image, or on one block of tokens. The gradients of a block's
keys and values are sums over the windows that attend to them, which follow from the squares of the neighbourhood. Every
number is written by one program, which adds in a fixed order: equal input gives equal bits, in both passes.

This module needs the `triton` package and is imported only with `attn_implementation="triton"`. The kernels have not
run on a GPU yet. With TRITON_INTERPRET=1 in the environment before Triton is imported, they run on a CPU, for tests.
"""

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.utils.flop_counter import register_flop_formula

from .geometry_focal import Square
from .layout_focal import at_least_float32
from .neighborhood_focal import Neighborhood
from .run_state_focal import OPERATOR_NAMESPACE, allows_tf32, is_transforming

try:  # transformers requires every package that a checkpoint's code imports, unless the import is in a `try`.
    import triton
    import triton.language as tl
except ImportError:
    raise

if TYPE_CHECKING:
    from .modeling_focal import FocalAttention


# --- Kernels ----------------------------------------------------------------------------------------------------------

# Conventions of all kernels. Arguments are tensors, then numbers, then constants that are compiled in. `tokens` and
# `place_of` are (windows, keys), `place_of` only with LOOK_UP; `token_at` is (windows, places). Tokens of an image are
# rows of `channels` numbers, of which a head has HEAD_DIM, padded to BLOCK_D. The queries of a window are numbered row
# by row and padded to blocks of BLOCK_Q. `source` is (heads, places, FILLED queries), -inf for padding: its rows start
# at multiples of 16 bytes and are read four numbers at a time. Log-sum-exps and deltas are (images · windows, heads,
# queries) in float32. Offsets within an image fit into int32: see MOST_NUMBERS.

# Arguments that differ with the size of the images and must not trigger a compilation.
SIZES = ["rows", "cols", "images", "all_tokens", "keys", "places"]


@triton.jit
def _query_tokens(queries, window, cols, SIDE: tl.constexpr):
    """Numbers of the map's tokens that are a window's queries."""
    return (window // cols * SIDE + queries // SIDE) * (cols * SIDE) + window % cols * SIDE + queries % SIDE


@triton.jit
def _hidden(queries, places, window, rows, cols, SIDE: tl.constexpr, EXPAND: tl.constexpr, SHIFT: tl.constexpr):
    """Mask of the places that a shift hides from queries: tokens of the window that come from the opposite edge."""
    row = places // (SIDE + 2 * EXPAND) - EXPAND
    col = places % (SIDE + 2 * EXPAND) - EXPAND
    own = (row >= 0) & (row < SIDE) & (col >= 0) & (col < SIDE)
    across = ((queries // SIDE >= SIDE - SHIFT) != (row >= SIDE - SHIFT)) & (window // cols == rows - 1)
    aside = ((queries % SIDE >= SIDE - SHIFT) != (col >= SIDE - SHIFT)) & (window % cols == cols - 1)
    return own & (across | aside)


@triton.jit(do_not_specialize=SIZES)
def _forward_kernel(
    query, key, value, tokens, place_of, source, output, logsumexp,
    channels, rows, cols, all_tokens, keys, places, scaling,
    LOOK_UP: tl.constexpr, SIDE: tl.constexpr, EXPAND: tl.constexpr, SHIFT: tl.constexpr, HEAD_DIM: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Forward pass of a block of queries of one window and head."""
    window = tl.program_id(0) % (rows * cols)
    image = (tl.program_id(0) // (rows * cols)).to(tl.int64)
    head = tl.program_id(1)
    QUERIES: tl.constexpr = SIDE * SIDE
    FILLED: tl.constexpr = (QUERIES + BLOCK_Q - 1) // BLOCK_Q * BLOCK_Q
    queries = tl.program_id(2) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    real = queries < QUERIES
    dims = tl.arange(0, BLOCK_D)
    here = _query_tokens(queries, window, cols, SIDE)[:, None] * channels + head * HEAD_DIM + dims[None, :]
    here_real = real[:, None] & (dims < HEAD_DIM)[None, :]
    of_map = image * (rows * cols * QUERIES) * channels
    key += image * all_tokens * channels + head * HEAD_DIM
    value += image * all_tokens * channels + head * HEAD_DIM
    source += head * places * FILLED

    q = tl.load(query + of_map + here, mask=here_real, other=0.0)
    highest = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    mixed = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    for first in range(0, keys, BLOCK_K):
        columns = first + tl.arange(0, BLOCK_K)
        token = tl.load(tokens + window * keys + columns, mask=columns < keys, other=-1)
        seen = token >= 0
        place = tl.load(place_of + window * keys + columns, mask=seen, other=0) if LOOK_UP else columns
        there = token[:, None] * channels + dims[None, :]
        there_real = seen[:, None] & (dims < HEAD_DIM)[None, :]
        k = tl.load(key + there, mask=there_real, other=0.0)
        bias = tl.load(source + place[None, :] * FILLED + queries[:, None], mask=seen[None, :], other=float("-inf"))
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scaling + bias
        if SHIFT > 0:
            hidden = _hidden(queries[:, None], place[None, :], window, rows, cols, SIDE, EXPAND, SHIFT)
            scores = tl.where(hidden, float("-inf"), scores)
        higher = tl.maximum(highest, tl.max(scores, axis=1))
        base = tl.where(higher == float("-inf"), 0.0, higher)  # if all keys so far are hidden
        weights = tl.exp(scores - base[:, None])
        faded = tl.exp(highest - base)
        total = total * faded + tl.sum(weights, axis=1)
        v = tl.load(value + there, mask=there_real, other=0.0)
        mixed = tl.dot(weights.to(v.dtype), v, mixed * faded[:, None], input_precision=PRECISION)
        highest = higher
    total = tl.where(real, total, 1.0)
    tl.store(output + of_map + here, (mixed / total[:, None]).to(output.dtype.element_ty), mask=here_real)
    row = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + head
    tl.store(logsumexp + row * QUERIES + queries, highest + tl.log(total), mask=real)


@triton.jit(do_not_specialize=SIZES)
def _query_gradient_kernel(
    query, key, value, tokens, place_of, source, output, logsumexp, grad_output, grad_query, delta,
    channels, rows, cols, all_tokens, keys, places, scaling,
    LOOK_UP: tl.constexpr, SIDE: tl.constexpr, EXPAND: tl.constexpr, SHIFT: tl.constexpr, HEAD_DIM: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Gradient of a block of queries of one window and head. Writes delta, the sum of output · grad_output, as well."""
    window = tl.program_id(0) % (rows * cols)
    image = (tl.program_id(0) // (rows * cols)).to(tl.int64)
    head = tl.program_id(1)
    QUERIES: tl.constexpr = SIDE * SIDE
    FILLED: tl.constexpr = (QUERIES + BLOCK_Q - 1) // BLOCK_Q * BLOCK_Q
    queries = tl.program_id(2) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    real = queries < QUERIES
    dims = tl.arange(0, BLOCK_D)
    here = _query_tokens(queries, window, cols, SIDE)[:, None] * channels + head * HEAD_DIM + dims[None, :]
    here_real = real[:, None] & (dims < HEAD_DIM)[None, :]
    of_map = image * (rows * cols * QUERIES) * channels
    key += image * all_tokens * channels + head * HEAD_DIM
    value += image * all_tokens * channels + head * HEAD_DIM
    source += head * places * FILLED
    row = (tl.program_id(0).to(tl.int64) * tl.num_programs(1) + head) * QUERIES

    q = tl.load(query + of_map + here, mask=here_real, other=0.0)
    grad_out = tl.load(grad_output + of_map + here, mask=here_real, other=0.0)
    out = tl.load(output + of_map + here, mask=here_real, other=0.0)
    d = tl.sum(out.to(tl.float32) * grad_out.to(tl.float32), axis=1)
    tl.store(delta + row + queries, d, mask=real)
    lse = tl.load(logsumexp + row + queries, mask=real, other=0.0)
    grad = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    for first in range(0, keys, BLOCK_K):
        columns = first + tl.arange(0, BLOCK_K)
        token = tl.load(tokens + window * keys + columns, mask=columns < keys, other=-1)
        seen = token >= 0
        place = tl.load(place_of + window * keys + columns, mask=seen, other=0) if LOOK_UP else columns
        there = token[:, None] * channels + dims[None, :]
        there_real = seen[:, None] & (dims < HEAD_DIM)[None, :]
        k = tl.load(key + there, mask=there_real, other=0.0)
        v = tl.load(value + there, mask=there_real, other=0.0)
        bias = tl.load(source + place[None, :] * FILLED + queries[:, None], mask=seen[None, :], other=float("-inf"))
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scaling + bias
        if SHIFT > 0:
            hidden = _hidden(queries[:, None], place[None, :], window, rows, cols, SIDE, EXPAND, SHIFT)
            scores = tl.where(hidden, float("-inf"), scores)
        weights = tl.exp(scores - lse[:, None])
        grad_scores = weights * (tl.dot(grad_out, tl.trans(v), input_precision=PRECISION) - d[:, None])
        grad = tl.dot(grad_scores.to(k.dtype), k, grad, input_precision=PRECISION)
    tl.store(grad_query + of_map + here, (grad * scaling).to(grad_query.dtype.element_ty), mask=here_real)


@triton.jit(do_not_specialize=[*SIZES, "per_program"])
def _bias_gradient_kernel(
    query, key, value, token_at, source, logsumexp, delta, grad_output, grad_source,
    channels, rows, cols, all_tokens, places, images, per_program, scaling,
    LOOK_UP: tl.constexpr, SIDE: tl.constexpr, EXPAND: tl.constexpr, SHIFT: tl.constexpr, HEAD_DIM: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Gradient of the bias of a block of places and of queries of one head, summed over some windows of all images."""
    head = tl.program_id(1)
    QUERIES: tl.constexpr = SIDE * SIDE
    FILLED: tl.constexpr = (QUERIES + BLOCK_Q - 1) // BLOCK_Q * BLOCK_Q
    part = tl.program_id(2) // (FILLED // BLOCK_Q)
    queries = tl.program_id(2) % (FILLED // BLOCK_Q) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    place = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    real = queries < QUERIES
    dims = tl.arange(0, BLOCK_D)
    here_real = real[:, None] & (dims < HEAD_DIM)[None, :]
    in_table = (place < places)[:, None]
    in_head = place[:, None] * FILLED + queries[None, :]
    bias = tl.load(source + head * places * FILLED + in_head, mask=in_table, other=float("-inf"))

    grad = tl.zeros([BLOCK_K, BLOCK_Q], tl.float32)
    for unit in range(part * per_program, min((part + 1) * per_program, rows * cols * images)):
        window = unit // images
        image = (unit % images).to(tl.int64)
        token = tl.load(token_at + window * places + place, mask=place < places, other=-1)
        seen = token >= 0
        any_seen = True
        if LOOK_UP:
            any_seen = tl.max(token, axis=0) >= 0  # a window has keys in few of all places
        if any_seen:
            of_map = image * (rows * cols * QUERIES) * channels + head * HEAD_DIM
            here = _query_tokens(queries, window, cols, SIDE)[:, None] * channels + dims[None, :]
            row = ((image * (rows * cols) + window) * tl.num_programs(1) + head) * QUERIES
            q = tl.load(query + of_map + here, mask=here_real, other=0.0)
            grad_out = tl.load(grad_output + of_map + here, mask=here_real, other=0.0)
            lse = tl.load(logsumexp + row + queries, mask=real, other=0.0)
            d = tl.load(delta + row + queries, mask=real, other=0.0)
            of_image = image * all_tokens * channels + head * HEAD_DIM
            there = token[:, None] * channels + dims[None, :]
            there_real = seen[:, None] & (dims < HEAD_DIM)[None, :]
            k = tl.load(key + of_image + there, mask=there_real, other=0.0)
            v = tl.load(value + of_image + there, mask=there_real, other=0.0)
            scores = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scaling + bias
            scores = tl.where(seen[:, None], scores, float("-inf"))
            if SHIFT > 0:
                hidden = _hidden(queries[None, :], place[:, None], window, rows, cols, SIDE, EXPAND, SHIFT)
                scores = tl.where(hidden, float("-inf"), scores)
            weights = tl.exp(scores - lse[None, :])
            grad += weights * (tl.dot(v, tl.trans(grad_out), input_precision=PRECISION) - d[None, :])
    of_part = (part * tl.num_programs(1) + head).to(tl.int64) * places * FILLED
    tl.store(grad_source + of_part + in_head, grad, mask=in_table)


@triton.jit(do_not_specialize=[*SIZES, "height", "width", "first_token", "first_place", "block_rows", "block_cols"])
def _key_gradient_kernel(
    query, key, value, token_at, source, logsumexp, delta, grad_output, grad_key, grad_value,
    channels, rows, cols, all_tokens, places, height, width, first_token, first_place, block_rows, block_cols,
    scaling,
    SQUARE_SIDE: tl.constexpr, STEP: tl.constexpr, FIRST: tl.constexpr, WRAPS: tl.constexpr, LOOK_UP: tl.constexpr,
    SIDE: tl.constexpr, EXPAND: tl.constexpr, SHIFT: tl.constexpr, HEAD_DIM: tl.constexpr, PRECISION: tl.constexpr,
    ORIGIN: tl.constexpr, BLOCK_SIDE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Gradients of a square block of a level's tokens of one head, summed over the windows that attend to them."""
    block = tl.program_id(0) % (block_rows * block_cols)
    image = (tl.program_id(0) // (block_rows * block_cols)).to(tl.int64)
    head = tl.program_id(1)
    QUERIES: tl.constexpr = SIDE * SIDE
    FILLED: tl.constexpr = (QUERIES + BLOCK_Q - 1) // BLOCK_Q * BLOCK_Q
    slots = tl.arange(0, BLOCK_N)
    dims = tl.arange(0, BLOCK_D)
    top = block // block_cols * BLOCK_SIDE + ORIGIN
    left = block % block_cols * BLOCK_SIDE + ORIGIN
    row = top + slots // BLOCK_SIDE
    col = left + slots % BLOCK_SIDE
    in_map = slots < BLOCK_SIDE * BLOCK_SIDE
    if WRAPS:  # blocks start at row and column ORIGIN, so the last ones go on with the map's first rows and columns
        in_map &= (row < ORIGIN + height) & (col < ORIGIN + width)
        token = row % height * width + col % width
    else:
        in_map &= (row >= 0) & (row < height) & (col >= 0) & (col < width)
        token = row * width + col
    there = (first_token + token)[:, None] * channels + head * HEAD_DIM + dims[None, :]
    there_real = in_map[:, None] & (dims < HEAD_DIM)[None, :]
    of_image = image * all_tokens * channels
    k = tl.load(key + of_image + there, mask=there_real, other=0.0)
    v = tl.load(value + of_image + there, mask=there_real, other=0.0)
    source += head * places * FILLED

    # The windows whose squares overlap the block, within the map or, if it wraps, across its edges. AWAY keeps the
    # numerators positive, because divisions round towards zero.
    AWAY: tl.constexpr = SQUARE_SIDE + BLOCK_SIDE + SIDE
    first_row = (top + FIRST - SQUARE_SIDE + STEP + STEP * AWAY) // STEP - AWAY
    first_col = (left + FIRST - SQUARE_SIDE + STEP + STEP * AWAY) // STEP - AWAY
    last_row = (top + BLOCK_SIDE - 1 + FIRST + STEP * AWAY) // STEP - AWAY
    last_col = (left + BLOCK_SIDE - 1 + FIRST + STEP * AWAY) // STEP - AWAY
    if not WRAPS:
        first_row, last_row = tl.maximum(first_row, 0), tl.minimum(last_row, rows - 1)
        first_col, last_col = tl.maximum(first_col, 0), tl.minimum(last_col, cols - 1)
    across = tl.maximum(last_col - first_col + 1, 0)

    grad_k = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    grad_v = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for number in range(0, tl.maximum(last_row - first_row + 1, 0) * across):
        window_row = first_row + number // across
        window_col = first_col + number % across
        square_row = row - window_row * STEP + FIRST
        square_col = col - window_col * STEP + FIRST
        seen = in_map & (square_row >= 0) & (square_row < SQUARE_SIDE) & (square_col >= 0) & (square_col < SQUARE_SIDE)
        place = first_place + square_row * SQUARE_SIDE + square_col
        if WRAPS:
            window = (window_row + rows * AWAY) % rows * cols + (window_col + cols * AWAY) % cols
        else:
            window = window_row * cols + window_col
        any_seen = True
        if LOOK_UP:
            seen = tl.load(token_at + window * places + place, mask=seen, other=-1) >= 0
            any_seen = tl.max(seen.to(tl.int32), axis=0) > 0
        if any_seen:
            of_map = image * (rows * cols * QUERIES) * channels + head * HEAD_DIM
            of_window = ((image * (rows * cols) + window) * tl.num_programs(1) + head) * QUERIES
            for first in range(0, QUERIES, BLOCK_Q):
                queries = first + tl.arange(0, BLOCK_Q)
                real = queries < QUERIES
                here = _query_tokens(queries, window, cols, SIDE)[:, None] * channels + dims[None, :]
                here_real = real[:, None] & (dims < HEAD_DIM)[None, :]
                q = tl.load(query + of_map + here, mask=here_real, other=0.0)
                grad_out = tl.load(grad_output + of_map + here, mask=here_real, other=0.0)
                lse = tl.load(logsumexp + of_window + queries, mask=real, other=0.0)
                d = tl.load(delta + of_window + queries, mask=real, other=0.0)
                of_place = source + place[:, None] * FILLED + queries[None, :]
                bias = tl.load(of_place, mask=seen[:, None], other=float("-inf"))
                scores = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scaling + bias
                if SHIFT > 0:
                    hidden = _hidden(queries[None, :], place[:, None], window, rows, cols, SIDE, EXPAND, SHIFT)
                    scores = tl.where(hidden, float("-inf"), scores)
                weights = tl.exp(scores - lse[None, :])
                grad_v = tl.dot(weights.to(v.dtype), grad_out, grad_v, input_precision=PRECISION)
                grad_scores = weights * (tl.dot(v, tl.trans(grad_out), input_precision=PRECISION) - d[None, :])
                grad_k = tl.dot(grad_scores.to(k.dtype), q, grad_k, input_precision=PRECISION)
    tl.store(grad_key + of_image + there, (grad_k * scaling).to(grad_key.dtype.element_ty), mask=there_real)
    tl.store(grad_value + of_image + there, grad_v.to(grad_value.dtype.element_ty), mask=there_real)


INTERPRETED = not isinstance(_forward_kernel, triton.JITFunction)


# --- How they are launched --------------------------------------------------------------------------------------------


class LaunchSizes(NamedTuple):
    """How a kernel's work is divided. Only the speed depends on it."""

    queries: int  # in a block
    keys: int  # in a block
    side: int  # of a square block of tokens whose gradients are summed, at most
    warps: int


# By bytes of a number, then by channels of a head, at most. Chosen from the compiler's reports for compute capability
# 9.0 (Triton 3.6 and 3.9), not measured yet: benchmarks/README.md lists the registers. Half precision spills none.
# In float32, some kernels spill up to 15 numbers, most of them outside their loops. Biases are read four at a time.
# With num_stages above 1, they are read singly, and fewer programs fit on a multiprocessor.
LAUNCH_SIZES = {
    2: {64: LaunchSizes(64, 32, 8, 4), 128: LaunchSizes(64, 32, 4, 8), 256: LaunchSizes(16, 16, 4, 8)},
    4: {32: LaunchSizes(32, 32, 8, 8), 128: LaunchSizes(32, 16, 4, 8), 256: LaunchSizes(16, 16, 4, 8)},
}
LARGEST_HEAD = 256
MOST_NUMBERS = 2**31  # of an image's keys, because the kernels compute with offsets in int32
# Programs that sum the gradient of the bias: enough for present GPUs, few enough that their sums take little memory.
BIAS_GRADIENT_PROGRAMS = 1024


def reason_against(
    device: torch.device, dtype: torch.dtype, head_dim: int, dropout: float, neighborhood: Neighborhood
) -> str | None:
    """Why the kernels cannot run, or None if they can."""
    if is_transforming():
        return "it has no rules for the transforms of torch.func, nor for forward-mode derivatives"
    if dropout:
        return f"it has no dropout of attention weights (got attention_probs_dropout_prob={dropout} in training)"
    if device.type != "cuda" and not INTERPRETED:
        return f"it runs on CUDA devices (got {device.type}), or with TRITON_INTERPRET=1 on a CPU"
    if torch.version.hip:
        return "it is for NVIDIA's GPUs (this is PyTorch for AMD's)"
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        if properties.major < 8:
            return f"it needs a GPU of compute capability 8.0 or higher (got {properties.major}.{properties.minor})"
    # Interpreted products of bfloat16 are wrong.
    dtypes = [torch.float32, torch.float16] + [torch.bfloat16] * (not INTERPRETED)
    if dtype not in dtypes:
        return f"it takes {', '.join(map(str, dtypes))}{' when interpreted' * INTERPRETED} (got {dtype})"
    if head_dim > LARGEST_HEAD:
        return f"it takes heads of at most {LARGEST_HEAD} channels (got {head_dim})"
    if not neighborhood.squares:
        return "the neighbourhood does not give the squares of tokens that windows attend to (Neighborhood.squares)"
    return None


def power_of_two(number: int) -> int:
    """The smallest power of two that is at least `number` and that `tl.dot` accepts."""
    return max(16, triton.next_power_of_2(number))


class LaunchPlan:
    """Sizes that the launches of a pass share, and settings that are compiled into the kernels."""

    def __init__(self, query, key, tokens, places, source, squares, shift_size, head_dim):
        self.rows, self.cols, self.keys = tokens.shape
        self.images, self.all_tokens, self.channels = key.shape
        if (numbers := self.all_tokens * self.channels) > MOST_NUMBERS:
            raise ValueError(
                f"attn_implementation='triton' takes at most {MOST_NUMBERS} numbers in the keys of an image; got "
                f"{numbers} ({self.all_tokens} tokens of {self.channels} channels). Use smaller images, or call "
                "model.set_attn_implementation('sdpa')."
            )
        self.heads, self.places, self.queries = source.shape[0], source.shape[1], source.shape[2]
        self.side = math.isqrt(self.queries)
        self.squares = [Square(*squares[at : at + 3]) for at in range(0, len(squares), 3)]
        of_size = LAUNCH_SIZES[query.element_size()].items()
        self.launch = next(launch for channels, launch in of_size if head_dim <= channels)
        self.settings = {
            "LOOK_UP": places is not None,
            "SIDE": self.side,
            # Not with topk, where this is the radius, and the kernels would be compiled again for each radius.
            "EXPAND": self.squares[0].first if shift_size else 0,
            "SHIFT": shift_size,
            "HEAD_DIM": head_dim,
            "PRECISION": "tf32" if allows_tf32() else "ieee",  # of float32
            "BLOCK_Q": min(self.launch.queries, power_of_two(self.queries)),
            "BLOCK_D": power_of_two(head_dim),
            "num_warps": self.launch.warps,
            "num_stages": 1,
        }

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """The numbers that all kernels take after their tensors."""
        return self.channels, self.rows, self.cols, self.all_tokens

    @property
    def query_blocks(self) -> int:
        return triton.cdiv(self.queries, self.settings["BLOCK_Q"])

    @property
    def windows_grid(self) -> tuple[int, int, int]:
        """One program per window of all images, head and block of queries."""
        return self.images * self.rows * self.cols, self.heads, self.query_blocks

    def filled(self, source: torch.Tensor) -> torch.Tensor:
        """(heads, places, queries) to (heads, places, FILLED queries)."""
        fill = self.query_blocks * self.settings["BLOCK_Q"] - self.queries
        return torch.nn.functional.pad(source, (0, fill), value=-math.inf)

    @property
    def numbers_of_queries(self) -> tuple[int, int, int]:
        """Shape of tensors with one number per query and head."""
        return self.images * self.rows * self.cols, self.heads, self.queries


# Schemas are spelled out, because older torch cannot infer them from `list[int]`.
ARGUMENTS = (
    "Tensor query, Tensor key, Tensor value, Tensor tokens, Tensor? places, Tensor source, SymInt[] squares, "
    "int shift_size, int head_dim, float scaling"
)


@torch.library.custom_op(
    f"{OPERATOR_NAMESPACE}::triton_attention", mutates_args=(), schema=f"({ARGUMENTS}) -> (Tensor, Tensor)"
)
def triton_attention(query, key, value, tokens, places, source, squares, shift_size, head_dim, scaling):
    """The output and, for the backward pass, the scores' log-sum-exps (images · windows, heads, queries).

    Args:
        query (`torch.Tensor` of shape `(images, height · width, channels)`)
        key, value (`torch.Tensor` of shape `(images, tokens, channels)`)
        tokens (`torch.Tensor` of shape `(rows, cols, keys)`):
            The index of a [`Neighborhood`].
        places (`torch.Tensor` of shape `(rows, cols, keys)`, *optional*):
            The place of each key in `source`, in int32; by default the keys have all places in order.
        source (`torch.Tensor` of shape `(heads, places, queries)`):
            The bias, in float32.
        squares (`list[int]`), shift_size (`int`):
            Those of a [`Neighborhood`], with the numbers of all squares in one list.
    """
    query, key, value, tokens, source = (tensor.contiguous() for tensor in (query, key, value, tokens, source))
    plan = LaunchPlan(query, key, tokens, places, source, squares, shift_size, head_dim)
    output = torch.empty_like(query)
    logsumexp = source.new_empty(plan.numbers_of_queries)
    with torch.cuda.device_of(query):
        inputs = query, key, value, tokens, tokens if places is None else places, plan.filled(source)
        numbers = *plan.sizes, plan.keys, plan.places, scaling
        _forward_kernel[plan.windows_grid](
            *inputs, output, logsumexp, *numbers, BLOCK_K=plan.launch.keys, **plan.settings
        )
    return output, logsumexp


@triton_attention.register_fake
def _(query, key, value, tokens, places, source, squares, shift_size, head_dim, scaling):
    windows = query.shape[0] * tokens.shape[0] * tokens.shape[1]
    output = torch.empty_like(query, memory_format=torch.contiguous_format)
    return output, source.new_empty(windows, source.shape[0], source.shape[2])


@torch.library.custom_op(
    f"{OPERATOR_NAMESPACE}::triton_attention_backward",
    mutates_args=(),
    schema=f"(Tensor grad_output, Tensor output, Tensor logsumexp, {ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor)",
)
def triton_attention_backward(
    grad_output, output, logsumexp, query, key, value, tokens, places, source, squares, shift_size, head_dim, scaling
):
    """Gradients of query, key, value and source."""
    grad_output, query, key, value, tokens, source = (
        tensor.contiguous() for tensor in (grad_output, query, key, value, tokens, source)
    )
    plan = LaunchPlan(query, key, tokens, places, source, squares, shift_size, head_dim)
    grad_query, grad_key, grad_value = map(torch.empty_like, (query, key, value))
    delta = torch.empty_like(logsumexp)
    source = plan.filled(source)
    with torch.cuda.device_of(query):
        inputs = query, key, value, tokens, tokens if places is None else places, source
        numbers = *plan.sizes, plan.keys, plan.places, scaling
        _query_gradient_kernel[plan.windows_grid](
            *(*inputs, output, logsumexp, grad_output, grad_query, delta, *numbers),
            BLOCK_K=plan.launch.keys,
            **plan.settings,
        )
        token_at = tokens
        if places is not None:
            token_at = tokens.new_full((plan.rows, plan.cols, plan.places), -1).scatter_(2, places.long(), tokens)
        tensors = query, key, value, token_at, source, logsumexp, delta, grad_output
        grad_source = _bias_gradient(plan, tensors, scaling)
        _write_key_gradients_(plan, tensors, grad_key, grad_value, scaling)
    return grad_query, grad_key, grad_value, grad_source


def _bias_gradient(plan: LaunchPlan, inputs: tuple[torch.Tensor, ...], scaling: float) -> torch.Tensor:
    """The gradient of the bias: each program sums over some windows, and the sums are added in order."""
    units, blocks = plan.images * plan.rows * plan.cols, triton.cdiv(plan.places, plan.launch.keys)
    # Blocks of the places in which a window has keys: in the others, programs have next to nothing to do.
    busy = plan.heads * triton.cdiv(plan.keys, plan.launch.keys) * plan.query_blocks
    parts = min(units, max(1, BIAS_GRADIENT_PROGRAMS // busy))
    per_program = triton.cdiv(units, parts)
    parts = triton.cdiv(units, per_program)
    source = inputs[4]
    grad_source = source.new_empty(parts, *source.shape)
    numbers = *plan.sizes, plan.places, plan.images, per_program, scaling
    _bias_gradient_kernel[(blocks, plan.heads, parts * plan.query_blocks)](
        *inputs, grad_source, *numbers, BLOCK_K=plan.launch.keys, **plan.settings
    )
    return grad_source[..., : plan.queries].sum(0)


def _write_key_gradients_(
    plan: LaunchPlan,
    inputs: tuple[torch.Tensor, ...],
    grad_key: torch.Tensor,
    grad_value: torch.Tensor,
    scaling: float,
):
    """Writes the gradients of keys and values, level by level."""
    first_token, first_place = 0, 0
    for square in plan.squares:
        height, width = plan.rows * square.step, plan.cols * square.step
        of_map = first_token == 0
        wraps = of_map and not plan.settings["LOOK_UP"]
        block, origin = min(4, plan.launch.side), 0
        if of_map:
            # Blocks of whole windows, if these are small enough, centred on the windows' corners, where the fewest
            # windows attend to them.
            block = plan.launch.side // plan.side * plan.side or plan.launch.side
            origin = plan.side // 2 - (0 if wraps else block)
        blocks = [triton.cdiv(length - min(origin, 0), block) for length in (height, width)]
        numbers = *plan.sizes, plan.places, height, width, first_token, first_place, *blocks, scaling
        settings = plan.settings | ({} if of_map else {"SHIFT": 0})
        _key_gradient_kernel[(plan.images * blocks[0] * blocks[1], plan.heads)](
            *(*inputs, grad_key, grad_value, *numbers),
            SQUARE_SIDE=square.side,
            STEP=square.step,
            FIRST=square.first,
            WRAPS=wraps,
            ORIGIN=origin,
            BLOCK_SIDE=block,
            BLOCK_N=power_of_two(block**2),
            **settings,
        )
        first_token += height * width
        first_place += square.side**2


@triton_attention_backward.register_fake
def _(
    grad_output, output, logsumexp, query, key, value, tokens, places, source, squares, shift_size, head_dim, scaling
):
    inputs = query, key, value, source
    return tuple(torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in inputs)


def _setup_context(ctx, inputs, output):
    query, key, value, tokens, places, source, *ctx.numbers = inputs
    ctx.save_for_backward(*output, query, key, value, tokens, places, source)


def _backward(ctx, grad_output, grad_logsumexp):
    """The log-sum-exps are returned for this function alone and have no gradient."""
    output, logsumexp, *rest = ctx.saved_tensors
    grad_query, grad_key, grad_value, grad_source = triton_attention_backward(
        grad_output, output, logsumexp, *rest, *ctx.numbers
    )
    return grad_query, grad_key, grad_value, None, None, grad_source, None, None, None, None


triton_attention.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(getattr(torch.ops, OPERATOR_NAMESPACE).triton_attention)
def _count_flops(query_shape, key_shape, value_shape, tokens_shape, *args, out_shape=None, **kwargs) -> int:
    """For `torch.utils.flop_counter`, which does not see into operators: two products of queries and their keys."""
    return 4 * math.prod(query_shape) * tokens_shape[-1]


def kernel_layout(
    neighborhood: Neighborhood,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, list[int], int]:
    """A neighbourhood as `triton_attention` takes it: tokens, places, source, squares and shift_size."""
    sources = [at_least_float32(part.source) for part in neighborhood.parts]
    places = None
    # The biases of a place are contiguous, so that a program reads only those of its window's keys.
    if neighborhood.parts[0].is_mask:
        sources = [source.transpose(1, 2) for source in sources]
    else:
        of_parts, first = [], 0
        for part in neighborhood.parts:
            of_parts.append(part.pattern + first if first else part.pattern)
            first += len(part.source)
        places = torch.cat(of_parts, dim=2).int()
        sources = [source.transpose(0, 1) for source in sources]
    squares = [number for square in neighborhood.squares for number in square]
    return neighborhood.index, places, torch.cat(sources, dim=1), squares, neighborhood.shift_size


def attend_by_triton(
    module: "FocalAttention",
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    neighborhood: Neighborhood,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of every window's queries to the keys of its neighbourhood, by `triton_attention`."""
    numbers = module.head_dim, module.scaling
    return triton_attention(query, key, value, *kernel_layout(neighborhood), *numbers)[0], None
