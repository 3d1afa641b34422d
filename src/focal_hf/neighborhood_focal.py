"""Where a window looks: which tokens its queries attend to, and with which bias.

Both attention types are the same act. The keys and values of a block are the tokens of its map, window by window,
followed by its pooled tokens, level by level. A neighbourhood picks, for each window, a fixed number of them by index,
and has a bias for each query and each picked token:

    index  (windows, keys)                     rows of [map tokens | pooled tokens of level 1 | of level 2 | ...]
    bias   (windows or 1, heads, queries, keys)

Windows, the tokens in them and pooled tokens are in row-major order. There is no attention here: only geometry and
tables.

Index tables depend on integers alone (map size, window size ...). They are made by functions rather than stored in
buffers, so that a model loaded through the meta device has nothing to refill.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn


class Neighborhood(NamedTuple):
    """What the windows of a map attend to; see the module's docstring for the shapes.

    `bias` gives that of a slice of the windows: all at once would be most of a block's memory.
    """

    index: torch.Tensor
    bias: Callable[[slice], torch.Tensor]


def at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    """Biases are combined in float32 even where the weights are bfloat16."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def cached_table(function):
    """Remembers the tables that a function of integers and a device has made.

    Not while compiling, exporting or tracing, where the arithmetic belongs in the graph. Never as inference tensors,
    which autograd could not use later.
    """
    cached = functools.lru_cache(maxsize=64)(function)

    @functools.wraps(function)
    def wrapper(*args):
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return function(*args)
        with torch.inference_mode(False), torch.no_grad():
            return cached(*args)

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


@cached_table
def fine_columns(window_size: int, expand_size: int, device: torch.device) -> torch.Tensor:
    """Where the bias of each fine token stands, shape (2, (window_size + 2 · expand_size)²).

    The fine tokens are the square of the window and `expand_size` tokens around it, row by row. Their biases stand in
    `[the window's own tokens | the slots of the tokens around it]`. The slots are those of four windows, displaced by
    `expand_size` along both diagonals, without the tokens in the window itself. So a token has one column (then both
    rows here agree), two where displaced windows overlap, or none (-1) where they leave a gap.
    """
    square = torch.arange(-expand_size, window_size + expand_size, device=device)
    slots = slot_tokens(window_size, expand_size, device).flatten().cumsum(0) + window_size**2 - 1

    found = []
    for (down, right), slot in zip(displacements(expand_size), slots.view(4, -1), strict=True):
        row, col = square - down, square - right  # in the displaced window
        inside = row.clamp(0, window_size - 1)[:, None] * window_size + col.clamp(0, window_size - 1)[None, :]
        found.append(torch.where(in_window(row, col, window_size), slot[inside], -1))
    found = torch.stack(found).sort(dim=0, descending=True).values[:2]
    found[1] = torch.where(found[1] < 0, found[0], found[1])
    own_column = square[:, None] * window_size + square[None, :]
    return torch.where(in_window(square, square, window_size), own_column, found).flatten(1)


def token_places(rows: torch.Tensor, cols: torch.Tensor, width: int, window_size: int) -> tuple[torch.Tensor, ...]:
    """Where tokens stand among a map's, window by window: the sum of a term of the row and one of the column."""
    row_term = (rows // window_size * width + rows % window_size) * window_size
    return row_term, cols // window_size * window_size**2 + cols % window_size


@cached_table
def focal_index(
    height: int,
    width: int,
    window_size: int,
    expand_size: int,
    shift_size: int,
    focal_window: int,
    pooled_levels: int,
    device: torch.device,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The tokens that each window of a map attends to with `attention_type="focal"` (section 3.2 of the paper).

    Args:
        height, width: sides of the map, multiples of `window_size`.

    Returns:
        The index (windows, keys), and a mask to add to the scores, (windows, queries or 1, keys), or None where nothing
        is hidden. Fine tokens wrap around the map's edges; pooled tokens beyond them are hidden, and so are tokens that
        a shift has brought to the window from the opposite edge.
    """
    rows, cols = height // window_size, width // window_size

    def grid_index(row_term: torch.Tensor, col_term: torch.Tensor) -> torch.Tensor:
        """Terms (rows, a) and (cols, b) of places to (rows · cols, a · b) places."""
        return (row_term[:, None, :, None] + col_term[None, :, None, :]).reshape(rows * cols, -1)

    def spans(count: int, step: int, first: int, length: int) -> torch.Tensor:
        """(count, length): the coordinates from `first` before each of `count` places that are `step` apart."""
        return torch.arange(count, device=device)[:, None] * step - first + torch.arange(length, device=device)

    side = window_size + 2 * expand_size
    fine_rows = spans(rows, window_size, expand_size, side) % height
    fine_cols = spans(cols, window_size, expand_size, side) % width
    index = [grid_index(*token_places(fine_rows, fine_cols, width, window_size))]
    hidden = [torch.zeros(1, 1, 1, dtype=torch.bool, device=device).expand(rows * cols, 1, side**2)]

    if shift_size:

        def regions(length: int) -> torch.Tensor:
            position = torch.arange(length, device=device)
            return (position >= length - window_size).long() + (position >= length - shift_size).long()

        row_region, col_region = regions(height)[fine_rows] * 3, regions(width)[fine_cols]
        own = slice(expand_size, expand_size + window_size)
        of_query, of_key = grid_index(row_region[:, own], col_region[:, own]), grid_index(row_region, col_region)
        square = torch.arange(-expand_size, window_size + expand_size, device=device)
        own_key = in_window(square, square, window_size).flatten()
        hidden = [own_key & (of_query[:, :, None] != of_key[:, None, :])]

    first_pooled = height * width
    for level in range(pooled_levels):
        stride = 2**level  # pooled tokens in a window, per axis
        pooled_rows, pooled_cols = rows * stride, cols * stride
        length = focal_window + stride - 1
        row = spans(rows, stride, (focal_window - 1) // 2, length)
        col = spans(cols, stride, (focal_window - 1) // 2, length)
        row_term = row.clamp(0, pooled_rows - 1) * pooled_cols + first_pooled
        index.append(grid_index(row_term, col.clamp(0, pooled_cols - 1)))
        row_outside, col_outside = (row < 0) | (row >= pooled_rows), (col < 0) | (col >= pooled_cols)
        outside = row_outside[:, None, :, None] | col_outside[None, :, None, :]
        hidden.append(outside.reshape(rows * cols, 1, -1))
        first_pooled += pooled_rows * pooled_cols

    index = torch.cat(index, dim=1)
    if shift_size == 0 and (pooled_levels == 0 or focal_window == 1):
        return index, None
    queries = max(part.shape[1] for part in hidden)
    hidden = torch.cat([part.expand(-1, queries, -1) for part in hidden], dim=2)
    return index, torch.zeros(hidden.shape, device=device).masked_fill(hidden, -torch.inf)


def nearest_radius(height: int, width: int, count: int) -> int:
    """The least radius in tokens of a disc that holds `count` of a map's tokens wherever in the map it is centred."""
    # Fewest lie in a disc at a corner.
    for radius in range(height + width):
        inside = sum(min(math.isqrt(radius**2 - row**2) + 1, width) for row in range(min(radius + 1, height)))
        if inside >= count:
            return radius
    raise ValueError(f"A map of {height} by {width} tokens has fewer than {count}.")


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
    topk = min(topk, height * width)
    radius = nearest_radius(height, width, topk)

    # A square around each centre, pushed back into the map, holds them all: no need to search the whole map.
    def spans(centers: torch.Tensor, length: int) -> torch.Tensor:
        side = min(2 * radius + 1, length)
        return (centers - radius).clamp(0, length - side)[:, None] + torch.arange(side, device=device)

    center_row = window_centers(rows, window_size, level, device)
    center_col = window_centers(cols, window_size, level, device)
    row, col = spans(center_row, height), spans(center_col, width)
    distance = ((row - center_row[:, None]) ** 2)[:, None, :, None] + ((col - center_col[:, None]) ** 2)[
        None, :, None, :
    ]
    token = (row * width)[:, None, :, None] + col[None, :, None, :]
    order = distance.reshape(rows * cols, -1).argsort(dim=1, stable=True)[:, :topk]
    return token.reshape(rows * cols, -1).gather(1, order)


class FocalNeighborhood(nn.Module):
    """Neighbourhoods of `attention_type="focal"`: the window and its surroundings, and squares of pooled tokens.

    A token that the original lists twice, with biases a and b, is one column here with bias log(eᵃ + eᵇ): the same
    attention with fewer columns, and gradients reach both. The columns are the fine square of side
    window_size + 2 · expand_size, then for each pooled level k a square of side focal_window + 2ᵏ - 1, all row-major.
    """

    def __init__(
        self, num_heads: int, window_size: int, expand_size: int, shift_size: int, focal_window: int, pooled_levels: int
    ):
        super().__init__()
        self.window_size = window_size
        self.expand_size = expand_size
        self.shift_size = shift_size
        self.focal_window = focal_window
        self.pooled_levels = pooled_levels

        window = window_size**2
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window_size - 1) ** 2, num_heads))
        slots = 4 * window - 4 * (window_size - expand_size) ** 2
        self.relative_position_bias_table_to_neighbors = (
            nn.Parameter(torch.zeros(1, num_heads, window, slots)) if expand_size else None
        )
        # Not a ParameterList, which is never called: offloading brings weights in when their module is called.
        for level in range(pooled_levels):
            table = nn.Parameter(torch.zeros(num_heads, (window_size + focal_window + 2**level - 2) ** 2))
            self.register_parameter(f"relative_position_bias_table_to_windows_{level}", table)

    def pooled_tables(self) -> list[nn.Parameter]:
        """The table of each pooled level, each (heads, relative positions)."""
        return [getattr(self, f"relative_position_bias_table_to_windows_{k}") for k in range(self.pooled_levels)]

    def fine_bias(self) -> torch.Tensor:
        """Bias of every query of a window to its fine tokens, shape (heads, queries, fine tokens)."""
        table = self.relative_position_bias_table
        index = relative_position_index(self.window_size, self.window_size, table.device)
        own = at_least_float32(table)[index].permute(2, 0, 1)
        if self.relative_position_bias_table_to_neighbors is None:
            return own
        listed = torch.cat([own, at_least_float32(self.relative_position_bias_table_to_neighbors[0])], dim=-1)
        first, second = fine_columns(self.window_size, self.expand_size, table.device)
        once, again = listed[..., first], listed[..., second]
        bias = torch.where(first == second, once, torch.logaddexp(once, again))
        return bias.masked_fill(first < 0, -torch.inf) if 2 * self.expand_size > self.window_size else bias

    def pooled_bias(self, level: int) -> torch.Tensor:
        """Bias of every query of a window to its pooled tokens of a level, shape (heads, queries, pooled tokens)."""
        table = self.pooled_tables()[level]
        index = relative_position_index(self.window_size, self.focal_window + 2**level - 1, table.device)
        return at_least_float32(table)[:, index]

    def forward(self, maps: torch.Tensor) -> Neighborhood:
        """Of (batch, height, width, channels) maps, their sides multiples of the window's."""
        bias = torch.cat([self.fine_bias(), *(self.pooled_bias(level) for level in range(self.pooled_levels))], dim=-1)
        index, mask = focal_index(
            *maps.shape[1:3],
            self.window_size,
            self.expand_size,
            self.shift_size,
            self.focal_window,
            self.pooled_levels,
            maps.device,
        )
        if mask is None:
            return Neighborhood(index, lambda windows: bias[None])
        return Neighborhood(index, lambda windows: bias + mask[windows, None])


class TopkNeighborhood(nn.Module):
    """Neighbourhoods of `attention_type="topk"` (the original's focalv2): the nearest tokens of each level.

    The bias is a small MLP of the offset between query and key, in tokens of the map. The indices for a map of
    `grid` are a buffer that is saved, since the original's break ties in distance as its `torch.topk` once did; for
    maps of other sizes they are computed. So weights belong to their `image_size`: another one whose indices happen to
    have the same shape (height and width swapped, say) cannot be told from it.
    """

    def __init__(self, num_heads: int, head_dim: int, window_size: int, levels: int, topk: int, grid: tuple[int, int]):
        super().__init__()
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

    def level_bias(self, maps: torch.Tensor, level: int, index: torch.Tensor) -> Callable[[slice], torch.Tensor]:
        """Bias of every query to the tokens of a level in `index`: of windows, (windows, heads, queries, tokens)."""
        height, width = maps.shape[1:3]
        window, device = self.window_size, index.device
        rows, cols = height // window, width // window
        step = window if level else 1  # of the level's tokens, in tokens of the map
        level_height, level_width = (rows, cols) if level else (height, width)
        radius = nearest_radius(level_height, level_width, index.shape[1])

        # Offsets repeat across windows and queries: the MLP sees each once, on a square grid of all that occur.
        reach = step * radius
        axis = torch.arange(-reach - window // 2, reach + window - window // 2, device=device)
        offsets = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), dim=-1)
        table = self.coordinate_mlps[level](offsets.to(maps.dtype)).flatten(0, 1)  # (offsets, heads)

        center_row = window_centers(rows, window, level, device).repeat_interleave(cols)[:, None]
        center_col = window_centers(cols, window, level, device).repeat(rows)[:, None]
        first_row = (center_row - index // level_width) * step + reach  # on the axis, of a window's first query
        first_col = (center_col - index % level_width) * step + reach
        query = torch.arange(window, device=device)[:, None]

        def bias_of(windows: slice) -> torch.Tensor:
            row, col = first_row[windows, None] + query, first_col[windows, None] + query
            place = row[:, :, None] * len(axis) + col[:, None]  # (windows, query rows, query columns, keys)
            return table[place.flatten(1, 2)].permute(0, 3, 1, 2)

        return bias_of

    def forward(self, maps: torch.Tensor) -> Neighborhood:
        """Of (batch, height, width, channels) maps, their sides multiples of the window's."""
        height, width = maps.shape[1:3]
        index, biases = [], []
        for level in range(self.levels):
            saved = getattr(self, f"nearest_index_{level}")
            at_home = (height, width) == self.grid
            of_level = saved if at_home else self.computed_index(height, width, level, saved.device)
            biases.append(self.level_bias(maps, level, of_level))
            if level == 0:
                row_term, col_term = token_places(of_level // width, of_level % width, width, self.window_size)
                index.append(row_term + col_term)
            else:
                index.append(of_level + height * width)
        return Neighborhood(
            torch.cat(index, dim=1), lambda windows: torch.cat([bias_of(windows) for bias_of in biases], dim=-1)
        )
