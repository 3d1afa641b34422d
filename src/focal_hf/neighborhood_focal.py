"""Where a window looks: which tokens its queries attend to, and with which bias.

Both attention types are the same act. The keys and values of a block are the tokens of its map followed by its pooled
tokens, level by level. A neighbourhood picks, for each window, a fixed number of them by index, and has a bias for each
query and each picked token:

    index  (rows, cols, keys)                of windows; in [map tokens | pooled tokens of level 1 | of level 2 | ...]
    bias   (windows, heads, queries, keys)

Attention takes keys by head, from [head 0 of token 0 | head 1 of token 0 | ... | head 0 of token 1 | ...]. A
neighbourhood holds the index of those, `heads` times the index above plus the head. A kernel that reads tokens where
they lie has its own form of the same: see `Sight`.

Map tokens, windows, the tokens in them and pooled tokens are in row-major order. There is no attention here: only
geometry and tables.

Index tables depend on integers alone (map size, window size ...). They are made by functions rather than stored in
buffers, so that a model loaded through the meta device has nothing to refill.
"""

import functools
import math
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import torch
from torch import nn
from torch._guards import detect_fake_mode
from torch.autograd import forward_ad
from torch.fx.experimental import symbolic_shapes

# Numbers in the bias of a whole map, at most: what is remembered of it for every block.
WHOLE_BIAS = 1024 * 1024


def is_exporting() -> bool:
    """Whether the graph may run where our operators are not known."""
    # torch before 2.7 cannot tell exporting from compiling.
    exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)
    return exporting() or torch.jit.is_tracing()


def is_fixed(*sizes: int) -> bool:
    """Whether what runs now, or is compiled, runs for these sizes alone."""
    if is_exporting():
        return False
    # torch before 2.8 cannot tell.
    known = getattr(symbolic_shapes, "has_static_value", None)
    return not torch.compiler.is_compiling() or (known is not None and all(known(size) for size in sizes))


def in_cpu_inference(module: nn.Module, tensor: torch.Tensor) -> bool:
    """Whether this is inference on a CPU, where work in pieces and memory used again pay."""
    return tensor.device.type == "cpu" and not module.training and not torch.is_grad_enabled()


def is_transforming() -> bool:
    """Whether this runs under a transform of `torch.func`, or with forward-mode derivatives.

    Our operators have rules for neither, and would leave out the latter without a word.
    """
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def may_remember() -> bool:
    """Whether what is computed now is good for later.

    Not while compiling, exporting or tracing, where the arithmetic belongs in the graph, nor under a fake mode or a
    transform of `torch.func`, whose tensors hold nothing afterwards, nor in a CUDA graph, whose tensors do not yet.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        return False
    return detect_fake_mode() is None and not is_transforming()


class BiasPart(NamedTuple):
    """The bias of some consecutive columns of the index.

    `source` follows from the weights; `pattern` (rows, cols, ...) is what is particular to a window, and windows of one
    pattern have one bias. A pattern of floating point (rows, cols, queries or 1, columns or 1) is added to `source`
    (heads, queries, columns); one of integers (rows, cols, columns) says which row of `source` (places, heads, queries)
    each column has.
    """

    source: torch.Tensor
    pattern: torch.Tensor

    @property
    def queries(self) -> int:
        return self.source.shape[1 if self.pattern.is_floating_point() else 2]

    @property
    def columns(self) -> int:
        return (self.source if self.pattern.is_floating_point() else self.pattern).shape[-1]

    def bias(self, places: tuple[slice, slice]) -> torch.Tensor:
        """Of the windows in some rows and columns, (windows, heads, queries, columns)."""
        pattern = self.pattern[places].flatten(0, 1)
        if pattern.is_floating_point():
            return self.source + pattern[:, None]
        return self.source.index_select(0, pattern.flatten()).unflatten(0, pattern.shape).permute(0, 2, 3, 1)

    def write_bias(self, target: torch.Tensor, places: tuple[slice, slice]):
        """Writes it into (images, windows, heads, queries, columns)."""
        pattern = self.pattern[places].flatten(0, 1)
        if pattern.is_floating_point():
            torch.add(self.source, pattern[:, None].expand(len(target), -1, -1, -1, -1), out=target)
        else:
            target.copy_(self.bias(places))

    def gradient(self, gradient: torch.Tensor, places: tuple[slice, slice]) -> torch.Tensor:
        """That of `source`, from that of the bias of all these windows, of one image or more."""
        if self.pattern.is_floating_point():
            return gradient.sum(0)
        pattern = self.pattern[places].flatten()
        of_columns = gradient.unflatten(0, (-1, len(pattern) // self.columns)).sum(0).permute(0, 3, 1, 2).flatten(0, 1)
        return gradient.new_zeros(self.source.shape).index_add_(0, pattern, of_columns)


class Square(NamedTuple):
    """Where a window sees tokens of one level: window (i, j) those from (i · step - first, j · step - first) on.

    A square of `side` tokens a side. A level has `step` tokens per window and axis.
    """

    side: int
    step: int
    first: int


class Sight(NamedTuple):
    """What a window sees, for a kernel that reads tokens where they lie.

    `tokens` is the index in int32, with -1 for what is hidden from all queries of a window. `squares` tell of which
    places around a window the columns are, level by level: all of them, in order, or those that the patterns name.
    Tokens of the first level wrap around the map's edges if the columns are all places. With a shift, the window's own
    tokens that come from across the map's edge are hidden from its others.
    """

    tokens: torch.Tensor  # (rows, cols, keys)
    squares: list[Square]
    shift_size: int


class Neighborhood(NamedTuple):
    """What the windows of a map attend to; see the module's docstring for the shapes.

    The bias is given for some windows at a time: all at once it would be most of a block's memory.
    """

    head_index: torch.Tensor  # (rows, cols, heads, keys)
    parts: list[BiasPart]
    sight: Sight | None = None
    # Of a map that is small enough, of all its queries to all tokens, and to some more to fill up: (heads, height ·
    # width, tokens), -inf where hidden. To attend to all at once is faster there than to gather most for each window.
    whole_bias: torch.Tensor | None = None

    def bias(self, places: tuple[slice, slice]) -> torch.Tensor:
        """Of the windows in some rows and columns, (windows, heads, queries, keys)."""
        return torch.cat([part.bias(places) for part in self.parts], dim=-1)


def head_index(index: torch.Tensor, heads: int) -> torch.Tensor:
    """The index (rows, cols, keys) of tokens to that of their heads, (rows, cols, heads, keys)."""
    return index[:, :, None] * heads + torch.arange(heads, device=index.device)[:, None]


def cut_windows(maps: torch.Tensor, side: int) -> torch.Tensor:
    """(batch, height, width, channels) maps as a view (batch, rows, cols, side, side, channels) of windows."""
    return maps.unflatten(2, (-1, side)).unflatten(1, (-1, side)).transpose(2, 3)


def picked(tokens: torch.Tensor, head_index: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Heads of tokens (..., channels), by their places among all, to (*head_index.shape, head_dim)."""
    picked = tokens.reshape(-1, head_dim).index_select(0, head_index.reshape(-1))
    return picked.view(*head_index.shape, head_dim)


def joined(parts: list[torch.Tensor], dim: int = 0) -> torch.Tensor:
    """Them side by side, or a single one as it is."""
    return torch.cat(parts, dim=dim) if len(parts) > 1 else parts[0]


def keys_to_fill(keys: int) -> int:
    """How many hidden keys to add to some, so that attention takes less time.

    PyTorch's attention takes keys 16 at a time and those that remain one by one, at almost half the cost of 16 each.
    """
    return -keys % 16 if keys % 16 > 2 else 0


def at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    """Biases are combined in float32 even where the weights are bfloat16."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors hold the same numbers in the same type."""
    return one.dtype == other.dtype and one.device == other.device and torch.equal(one, other)


def cached_table(function):
    """Remembers the tables that a function of integers and a device has made.

    Never as inference tensors, which autograd could not use later.
    """

    @functools.lru_cache(maxsize=64)
    def cached(*args):
        with torch.inference_mode(False), torch.no_grad():
            return function(*args)

    @functools.wraps(function)
    def wrapper(*args):
        return (cached if may_remember() else function)(*args)

    return wrapper


@cached_table
def relative_position_index(query_side: int, key_side: int, device: torch.device) -> torch.Tensor:
    """Rows of a table of (query_side + key_side - 1)² relative positions, shape (query_side², key_side²)."""
    query = torch.arange(query_side, device=device)
    key = torch.arange(key_side, device=device)
    offset = query[:, None] - key[None, :] + key_side - 1  # (query_side, key_side), for rows and columns alike
    index = offset[:, None, :, None] * (query_side + key_side - 1) + offset[None, :, None, :]
    return index.reshape(query_side**2, key_side**2)


def displacements(expand_size: int) -> list[tuple[int, int]]:
    """Rows and columns by which the four windows around a window are displaced, in the original's order."""
    return [(down, right) for down in (expand_size, -expand_size) for right in (expand_size, -expand_size)]


def in_window(rows: torch.Tensor, cols: torch.Tensor, window_size: int) -> torch.Tensor:
    """Which places of a grid of `rows` by `cols`, counted from a window's first token, lie in it."""
    return ((rows >= 0) & (rows < window_size))[:, None] & ((cols >= 0) & (cols < window_size))[None, :]


def slot_tokens(window_size: int, expand_size: int, device: torch.device) -> torch.Tensor:
    """Which tokens of the four displaced windows have a slot: those outside of the window, (4, window_size²)."""
    place = torch.arange(window_size, device=device)
    return torch.stack(
        [~in_window(place + down, place + right, window_size).flatten() for down, right in displacements(expand_size)]
    )


def slot_count(window_size: int, expand_size: int) -> int:
    """How many tokens have a slot."""
    return 4 * (window_size**2 - (window_size - expand_size) ** 2)


@cached_table
def fine_columns(window_size: int, expand_size: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    """Where the bias of each fine token stands.

    The fine tokens are the square of the window and `expand_size` tokens around it, row by row. Their biases stand in
    `[the window's own tokens | the slots of the tokens around it]`. The slots are those of four windows, displaced by
    `expand_size` along both diagonals, without the tokens in the window itself. So a token has one place there, two
    where displaced windows overlap, or none where they leave a gap.

    Returns:
        The pairs of places of the tokens that have two, (2, pairs); for each fine token its place, or its pair's
        place behind them all; and which have none, where any place is given.
    """
    side = window_size + 2 * expand_size
    square = torch.arange(-expand_size, window_size + expand_size, device=device)
    slots = slot_tokens(window_size, expand_size, device).flatten().cumsum(0) + window_size**2 - 1

    found = []
    for (down, right), slot in zip(displacements(expand_size), slots.view(4, -1), strict=True):
        row, col = square - down, square - right  # in the displaced window
        inside = row.clamp(0, window_size - 1)[:, None] * window_size + col.clamp(0, window_size - 1)[None, :]
        found.append(torch.where(in_window(row, col, window_size), slot[inside], -1))
    found = torch.stack(found).sort(dim=0, descending=True).values.flatten(1)
    own_column = square[:, None] * window_size + square[None, :]
    columns = torch.where(in_window(square, square, window_size).flatten(), own_column.flatten(), found[0])

    # In the rows, or columns, that windows displaced either way reach, beside the window itself.
    both = torch.arange(2 * expand_size, max(window_size, 2 * expand_size), device=device)
    reached = torch.arange(expand_size, device=device)
    beside = torch.cat([reached, side - expand_size + reached])
    twice = torch.cat([both[:, None] * side + beside, beside * side + both[:, None]]).flatten()
    behind = window_size**2 + slot_count(window_size, expand_size)
    columns[twice] = behind + torch.arange(twice.shape[0], device=device)
    return found[:2, twice], columns.clamp(min=0), columns < 0


@cached_table
def focal_index(
    height: int,
    width: int,
    heads: int,
    window_size: int,
    expand_size: int,
    shift_size: int,
    focal_window: int,
    pooled_levels: int,
    device: torch.device,
) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
    """The tokens that each window of a map attends to with `attention_type="focal"` (section 3.2 of the paper).

    Args:
        height, width: sides of the map, multiples of `window_size`.

    Returns:
        The index (rows, cols, heads, keys); what to add to the scores of the fine tokens, (rows, cols, queries or 1,
        keys or 1), and, where there are any, of the pooled tokens, (rows, cols, 1, keys); and the tokens of a `Sight`.
        Fine tokens wrap around the map's edges; pooled tokens beyond them are hidden, and so are tokens that a shift
        has brought to the window from the opposite edge.
    """
    rows, cols = height // window_size, width // window_size

    def grid_index(row_term: torch.Tensor, col_term: torch.Tensor) -> torch.Tensor:
        """Terms (rows, a) and (cols, b) of places to (rows, cols, a · b) places."""
        return (row_term[:, None, :, None] + col_term[None, :, None, :]).flatten(2)

    def spans(count: int, step: int, first: int, length: int) -> torch.Tensor:
        """(count, length): the coordinates from `first` before each of `count` places that are `step` apart."""
        return torch.arange(count, device=device)[:, None] * step - first + torch.arange(length, device=device)

    side = window_size + 2 * expand_size
    fine_rows = spans(rows, window_size, expand_size, side) % height
    fine_cols = spans(cols, window_size, expand_size, side) % width
    index = [grid_index(fine_rows * width, fine_cols)]

    fine_hidden = torch.zeros(rows, cols, 1, 1, dtype=torch.bool, device=device)
    if shift_size:

        def regions(length: int) -> torch.Tensor:
            position = torch.arange(length, device=device)
            return (position >= length - window_size).long() + (position >= length - shift_size).long()

        row_region, col_region = regions(height)[fine_rows] * 3, regions(width)[fine_cols]
        own = slice(expand_size, expand_size + window_size)
        of_query, of_key = grid_index(row_region[:, own], col_region[:, own]), grid_index(row_region, col_region)
        square = torch.arange(-expand_size, window_size + expand_size, device=device)
        own_key = in_window(square, square, window_size).flatten()
        fine_hidden = own_key & (of_query[..., :, None] != of_key[..., None, :])

    first_pooled, hidden, seen = height * width, [], [index[0]]
    for level in range(pooled_levels):
        stride = 2**level  # pooled tokens in a window, per axis
        pooled_rows, pooled_cols = rows * stride, cols * stride
        length = focal_window + stride - 1
        row = spans(rows, stride, (focal_window - 1) // 2, length)
        col = spans(cols, stride, (focal_window - 1) // 2, length)
        row_term = row.clamp(0, pooled_rows - 1) * pooled_cols + first_pooled
        index.append(grid_index(row_term, col.clamp(0, pooled_cols - 1)))
        row_outside, col_outside = (row < 0) | (row >= pooled_rows), (col < 0) | (col >= pooled_cols)
        hidden.append((row_outside[:, None, :, None] | col_outside[None, :, None, :]).flatten(2))
        seen.append(index[-1].masked_fill(hidden[-1], -1))
        first_pooled += pooled_rows * pooled_cols

    masks = [fine_hidden, *([torch.cat(hidden, dim=2)[:, :, None]] if hidden else [])]
    patterns = [torch.zeros(mask.shape, device=device).masked_fill(mask, -torch.inf) for mask in masks]
    return head_index(torch.cat(index, dim=2), heads), patterns, torch.cat(seen, dim=2).int()


def whole_bias(bias: torch.Tensor, seen: torch.Tensor, tokens: int) -> torch.Tensor:
    """The bias of all queries of a map to all of its tokens, from that of a window.

    Args:
        bias: what all windows share, (heads, queries, keys).
        seen: the index of a `Sight`, no token twice.
        tokens: how many there are, pooled ones included, or more.

    Returns:
        The bias (heads, height · width, tokens), -inf where a query does not see a token.
    """
    heads, queries, keys = bias.shape
    bias = nn.functional.pad(bias, (0, 1), value=-torch.inf)  # a last column, of what is hidden
    place = seen.masked_fill(seen < 0, tokens).flatten(0, 1).long()
    column = place.new_full((place.shape[0], tokens + 1), keys)
    column.scatter_(1, place, torch.arange(keys, device=place.device).expand_as(place))
    shape = place.shape[0], heads, queries, -1
    everywhere = bias.expand(shape).gather(3, column[:, None, None, :tokens].expand(shape))
    side = math.isqrt(queries)
    everywhere = everywhere.unflatten(2, (side, side)).unflatten(0, seen.shape[:2])
    return everywhere.permute(2, 0, 3, 1, 4, 5).flatten(1, 4)


def nearest_radius(height: int, width: int, topk: int) -> int:
    """A radius in tokens of a disc that holds `topk` of a map's tokens, or all, wherever in the map it is centred.

    Not by searching the least one: compiled code knows a map's size only as a symbol.
    """
    # Fewest lie in a disc at a corner: of that quarter of a disc at least as many as its area.
    radius = math.ceil(math.sqrt(4 * topk / math.pi))
    shorter, longer = min(height, width), max(height, width)
    if shorter > radius:
        return radius
    # Where it would leave the map, a rectangle across the map holds them.
    return min(longer, shorter + -(-topk // shorter) - 1) - 1


def window_centers(windows: int, window_size: int, level: int, device: torch.device) -> torch.Tensor:
    """Coordinates along one axis, in the tokens of `level`, at which windows stand with `attention_type="topk"`."""
    centers = torch.arange(windows, device=device)
    return centers if level else centers * window_size + window_size // 2


@cached_table
def nearest_index(
    height: int, width: int, window_size: int, level: int, topk: int, device: torch.device
) -> torch.Tensor:
    """The `topk` tokens of a level that are nearest to each window's centre, shape (windows, min(topk, tokens)).

    Nearest first, ties in row-major order. `height` and `width` are the map's, multiples of `window_size`; the indices
    count within the level: map tokens at level 0, pooled tokens at level 1.
    """
    rows, cols = height // window_size, width // window_size
    if level:
        height, width = rows, cols
    radius = nearest_radius(height, width, topk)
    topk = min(topk, height * width)

    # A square around each centre, pushed back into the map, holds them all: no need to search the whole map.
    def spans(centers: torch.Tensor, length: int) -> torch.Tensor:
        side = min(2 * radius + 1, length)
        return (centers - radius).clamp(0, length - side)[:, None] + torch.arange(side, device=device)

    center_row = window_centers(rows, window_size, level, device)
    center_col = window_centers(cols, window_size, level, device)
    row, col = spans(center_row, height), spans(center_col, width)
    row_distance, col_distance = (row - center_row[:, None]) ** 2, (col - center_col[:, None]) ** 2
    distance = (row_distance[:, None, :, None] + col_distance[None, :, None, :]).flatten(2)
    # No two alike, the earlier place in the square first: ONNX has no stable sort.
    places = distance.shape[2]
    rank = distance * places + torch.arange(places, device=device)
    place = rank.topk(topk, largest=False).indices
    side = col.shape[1]
    token = (row[:, :1, None] + place // side) * width + col[:, :1] + place % side
    return token.flatten(0, 1)


@cached_table
def first_places(rows: int, cols: int, window_size: int, level: int, radius: int, device: torch.device) -> torch.Tensor:
    """Where a level's first token would stand in the square around each window's centre, shape (rows, cols, 1).

    The square is of side 2 · `radius` + 1, and counted row by row, on beyond it.
    """
    row = radius - window_centers(rows, window_size, level, device)
    col = radius - window_centers(cols, window_size, level, device)
    return row[:, None, None] * (2 * radius + 1) + col[:, None]


def topk_index(
    nearest: Sequence[torch.Tensor], height: int, width: int, heads: int, window_size: int, topk: int
) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
    """The tokens that each window of a map attends to with `attention_type="topk"`.

    Args:
        nearest: the nearest tokens of each level, as `nearest_index` gives them.

    Returns:
        The index (rows, cols, heads, keys); for each level where its tokens stand in the square around the window's
        centre of side 2 · `nearest_radius` + 1, row by row, (rows, cols, keys); and the tokens of a `Sight`.
    """
    rows, cols = height // window_size, width // window_size
    index, places = [], []
    for level, of_level in enumerate(nearest):
        of_level = of_level.unflatten(0, (rows, cols))
        level_height, level_width = (rows, cols) if level else (height, width)
        radius = nearest_radius(level_height, level_width, topk)
        # Of row · width + col, row · side + col from where the first token would stand.
        further = of_level // level_width * (2 * radius + 1 - level_width)
        places.append(of_level + further + first_places(rows, cols, window_size, level, radius, of_level.device))
        index.append(of_level + height * width if level else of_level)
    index = torch.cat(index, dim=2)
    return head_index(index, heads), places, index.int()


@cached_table
def computed_topk_index(
    height: int, width: int, heads: int, window_size: int, levels: int, topk: int, device: torch.device
) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
    """`topk_index` of the nearest tokens as they are computed."""
    nearest = [nearest_index(height, width, window_size, level, topk, device) for level in range(levels)]
    return topk_index(nearest, height, width, heads, window_size, topk)


@cached_table
def topk_offsets(radius: int, step: int, window_size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """All that a window's queries can have from tokens within a radius of its centre, (offsets, offsets, 2).

    In tokens of the map, of which those of the radius are `step` apart.
    """
    reach = step * radius + window_size // 2
    axis = torch.arange(-reach, reach + window_size % 2, device=device)
    return torch.stack(torch.meshgrid(axis, axis, indexing="ij"), dim=-1).to(dtype)


class RememberingModule(nn.Module):
    """A module that keeps what it has made of its weights."""

    def __init__(self):
        super().__init__()
        self._remembered = None

    def __getstate__(self):
        return self.__dict__ | {"_remembered": None}  # copies and pickles carry the weights alone

    def remembered(self, make: Callable, *tensors: torch.Tensor, key: Hashable = None):
        """`make(*tensors)`, in inference on a CPU made once for as long as the tensors hold the same numbers.

        What was made for another `key` is forgotten.

        The numbers themselves are compared: neither versions nor addresses tell of every change by fused optimizers,
        `.data`, loading or swapping.
        """
        if not (may_remember() and in_cpu_inference(self, tensors[0])):
            return make(*tensors)
        remembered = self._remembered
        if remembered is None or remembered[0] != key or not all(map(same, remembered[1], tensors)):
            with torch.inference_mode(False), torch.no_grad():
                remembered = self._remembered = key, [tensor.clone() for tensor in tensors], make(*tensors)
        return remembered[2]


class FocalNeighborhood(RememberingModule):
    """Neighbourhoods of `attention_type="focal"`: the window and its surroundings, and squares of pooled tokens.

    A token that the original lists twice, with biases a and b, is one column here with bias log(eᵃ + eᵇ): the same
    attention with fewer columns, and gradients reach both. The columns are the fine square of side
    window_size + 2 · expand_size, then for each pooled level k a square of side focal_window + 2ᵏ - 1, all row-major.
    """

    def __init__(
        self, num_heads: int, window_size: int, expand_size: int, shift_size: int, focal_window: int, pooled_levels: int
    ):
        super().__init__()
        self.num_heads = num_heads
        self.window_size = window_size
        self.expand_size = expand_size
        self.shift_size = shift_size
        self.focal_window = focal_window
        self.pooled_levels = pooled_levels

        window = window_size**2
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window_size - 1) ** 2, num_heads))
        self.relative_position_bias_table_to_neighbors = (
            nn.Parameter(torch.zeros(1, num_heads, window, slot_count(window_size, expand_size)))
            if expand_size
            else None
        )
        # Not a ParameterList, which is never called: offloading brings weights in when their module is called.
        for level in range(pooled_levels):
            table = nn.Parameter(torch.zeros(num_heads, (window_size + focal_window + 2**level - 2) ** 2))
            self.register_parameter(f"relative_position_bias_table_to_windows_{level}", table)

    def pooled_tables(self) -> list[nn.Parameter]:
        """The table of each pooled level, each (heads, relative positions)."""
        return [getattr(self, f"relative_position_bias_table_to_windows_{k}") for k in range(self.pooled_levels)]

    def tables(self) -> list[torch.Tensor]:
        """All there are. `parameters` has none in replicas of DataParallel, nor in FSDP's modules."""
        tables = [self.relative_position_bias_table, self.relative_position_bias_table_to_neighbors]
        return [table for table in (*tables, *self.pooled_tables()) if table is not None]

    def fine_bias(self) -> torch.Tensor:
        """Bias of every query of a window to its fine tokens, shape (heads, queries, fine tokens)."""
        table = self.relative_position_bias_table
        index = relative_position_index(self.window_size, self.window_size, table.device)
        own = at_least_float32(table)[index].permute(2, 0, 1)
        if self.relative_position_bias_table_to_neighbors is None:
            return own
        listed = torch.cat([own, at_least_float32(self.relative_position_bias_table_to_neighbors[0])], dim=-1)
        pairs, columns, gaps = fine_columns(self.window_size, self.expand_size, table.device)
        # Gathered, which takes a third of the time of indexing.
        first, second = (listed.gather(-1, of_pair.expand(*listed.shape[:2], -1)) for of_pair in pairs)
        listed = torch.cat([listed, torch.logaddexp(first, second)], dim=-1)
        bias = listed.gather(-1, columns.expand(*listed.shape[:2], -1))
        return bias.masked_fill(gaps, -torch.inf) if 2 * self.expand_size > self.window_size else bias

    def pooled_bias(self, level: int) -> torch.Tensor:
        """Bias of every query of a window to its pooled tokens of a level, shape (heads, queries, pooled tokens)."""
        table = self.pooled_tables()[level]
        index = relative_position_index(self.window_size, self.focal_window + 2**level - 1, table.device)
        return at_least_float32(table)[:, index]

    def forward(self, maps: torch.Tensor) -> Neighborhood:
        """Of (batch, height, width, channels) maps, their sides multiples of the window's."""
        height, width = maps.shape[1:3]
        index, masks, tokens = focal_index(
            height,
            width,
            self.num_heads,
            self.window_size,
            self.expand_size,
            self.shift_size,
            self.focal_window,
            self.pooled_levels,
            maps.device,
        )

        # Of the map's and pooled tokens, if windows see so many of them that all may attend to all of them at once.
        at_once = in_cpu_inference(self, maps) and is_fixed(height, width)
        whole = self.tokens_at_once(height, width) if at_once else None

        def made(*tables: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor | None]:
            biases = self.biases()
            return biases, whole and whole_bias(torch.cat(biases, dim=-1), tokens, whole)

        biases, bias_at_once = self.remembered(made, *self.tables(), key=whole and (height, width))
        parts = [BiasPart(*part) for part in zip(biases, masks, strict=True)]
        squares = [Square(self.window_size + 2 * self.expand_size, self.window_size, self.expand_size)]
        for level in range(self.pooled_levels):
            squares.append(Square(self.focal_window + 2**level - 1, 2**level, (self.focal_window - 1) // 2))
        return Neighborhood(index, parts, Sight(tokens, squares, self.shift_size), bias_at_once)

    def tokens_at_once(self, height: int, width: int) -> int | None:
        """How many tokens a map has, pooled ones included and filled up, if each window sees most, and none twice."""
        side = self.window_size + 2 * self.expand_size
        keys = side**2 + sum((self.focal_window + 2**level - 1) ** 2 for level in range(self.pooled_levels))
        windows = height * width // self.window_size**2
        tokens = height * width + windows * sum(4**level for level in range(self.pooled_levels))
        tokens += keys_to_fill(tokens)
        small = tokens <= keys * 4 / 3 and self.num_heads * height * width * tokens <= WHOLE_BIAS
        # A shift hides more than the index tells.
        return tokens if small and side <= min(height, width) and not self.shift_size else None

    def biases(self) -> list[torch.Tensor]:
        """Bias of every query of a window to its fine, and to its pooled tokens, each (heads, queries, tokens)."""
        pooled = [self.pooled_bias(level) for level in range(self.pooled_levels)]
        return [self.fine_bias(), joined(pooled, dim=-1)] if pooled else [self.fine_bias()]


class TopkNeighborhood(RememberingModule):
    """Neighbourhoods of `attention_type="topk"` (the original's focalv2): the nearest tokens of each level.

    The bias is a small MLP of the offset between query and key, in tokens of the map. The indices for a map of
    `grid` are a buffer that is saved, since the original's break ties in distance as its `torch.topk` once did; for
    maps of other sizes they are computed.
    """

    def __init__(self, num_heads: int, head_dim: int, window_size: int, levels: int, topk: int, grid: tuple[int, int]):
        super().__init__()
        self.num_heads = num_heads
        self.window_size = window_size
        self.levels = levels
        self.topk = topk
        self.grid = tuple(-(-side // window_size) * window_size for side in grid)
        self.coordinate_mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(2, head_dim), nn.ReLU(), nn.Linear(head_dim, num_heads)) for _ in range(levels)
        )
        for level in range(levels):
            # A copy: what is computed is remembered, and serves other blocks.
            self.register_buffer(f"nearest_index_{level}", self.computed_index(*self.grid, level).clone())

    def computed_index(self, height: int, width: int, level: int, device: torch.device | None = None) -> torch.Tensor:
        """Indices for a map of any size, (windows, min(topk, tokens of the level))."""
        device = device or torch.empty(0).device
        return nearest_index(height, width, self.window_size, level, self.topk, device)

    def nearest_or_computed(self, index: torch.Tensor, level: int) -> torch.Tensor:
        """An index from a checkpoint if it lists nearest tokens of a map of `grid`, whatever breaks ties; else ours."""
        computed = self.computed_index(*self.grid, level, index.device)
        rows, cols = (side // self.window_size for side in self.grid)
        height, width = (rows, cols) if level else self.grid
        center_row = window_centers(rows, self.window_size, level, index.device).repeat_interleave(cols)[:, None]
        center_col = window_centers(cols, self.window_size, level, index.device).repeat(rows)[:, None]

        def distances(nearest: torch.Tensor) -> torch.Tensor:
            row, col = nearest // width - center_row, nearest % width - center_col
            return (row**2 + col**2).sort(dim=1).values

        in_map = index.shape == computed.shape and bool(((index >= 0) & (index < height * width)).all())
        return index if in_map and torch.equal(distances(index), distances(computed)) else computed.clone()

    def biases(self, radii: list[int], maps: torch.Tensor) -> list[torch.Tensor]:
        """Per level, the bias of every query of a window to every token of that level within a radius of its centre.

        Each ((2 · radius + 1)², heads, queries), by the token's place in that square.
        """
        biases = []
        window = self.window_size
        for level, (mlp, radius) in enumerate(zip(self.coordinate_mlps, radii, strict=True)):
            step = window if level else 1  # of the level's tokens, in tokens of the map
            # Offsets repeat across tokens and queries: the MLP sees each once.
            offsets = topk_offsets(radius, step, window, maps.dtype, maps.device)
            table = mlp(offsets).unfold(0, window, step).unfold(1, window, step)
            # Offsets are of the query from the token, so that they fall where the token's coordinates grow.
            biases.append(table.flip(0, 1).flatten(3).flatten(0, 1))
        return biases

    def forward(self, maps: torch.Tensor) -> Neighborhood:
        """Of (batch, height, width, channels) maps, their sides multiples of the window's."""
        height, width = maps.shape[1:3]
        if (height, width) == self.grid:
            saved = [getattr(self, f"nearest_index_{level}") for level in range(self.levels)]
            index, places, tokens = self.remembered(
                lambda *nearest: topk_index(nearest, height, width, self.num_heads, self.window_size, self.topk),
                *saved,
            )
        else:
            index, places, tokens = computed_topk_index(
                height, width, self.num_heads, self.window_size, self.levels, self.topk, maps.device
            )
        grids = [(height, width), (height // self.window_size, width // self.window_size)]
        radii = [nearest_radius(*grid, self.topk) for grid in grids[: self.levels]]
        parts = [BiasPart(*part) for part in zip(self.biases(radii, maps), places, strict=True)]
        squares = [
            Square(2 * radius + 1, step, radius - step // 2)
            for radius, step in zip(radii, (self.window_size, 1), strict=False)
        ]
        return Neighborhood(index, parts, Sight(tokens, squares, shift_size=0))
