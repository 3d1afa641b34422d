"""Which tokens a window attends to, in integers alone.

The keys of a block are the tokens of its map followed by its pooled tokens, level by level:

    [map tokens | pooled tokens of level 1 | of level 2 | …]

An index (rows, cols, keys) lists, for each window, the numbers of its keys in that order, with -1 for keys that are
hidden from all queries of the window. Map tokens, windows, the tokens in a window and pooled tokens are in row-major
order.

The tables depend on integers alone (map size, window size, …). Functions make them and `cached_table` caches them. They
are not buffers, so a model that is loaded through the meta device has nothing to refill.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from .run_state_focal import cached_table, has_symbols


class BlockGeometry(NamedTuple):
    """How one block divides its map. Lengths are in tokens of the map, `focal_window` in pooled tokens."""

    window_size: int
    expand_size: int
    shift_size: int
    focal_window: int
    pooled_levels: int


class Square(NamedTuple):
    """The square of tokens of one level that a window attends to.

    The square of window (i, j) has `side` tokens a side and starts at (i · step - first, j · step - first). A level has
    `step` tokens per window and axis.
    """

    side: int
    step: int
    first: int


class LevelGrid(NamedTuple):
    """The tokens of a level: `rows` by `cols` cells of side `cell`, from row `top` and column `left` on."""

    rows: int
    cols: int
    cell: int
    top: int
    left: int


def level_grid(height: int, width: int, window_size: int, level: int) -> LevelGrid:
    """The cells of map tokens that the tokens of a level stand for.

    Level 0 is the map itself. Level k above 0 is pooled, with 2ᵏ⁻¹ cells per window and axis. Where these do not fill
    the map, they are centred in it.
    """
    if level == 0:
        return LevelGrid(height, width, 1, 0, 0)
    cell = window_size // 2 ** (level - 1)
    rows, cols = (length // window_size * 2 ** (level - 1) for length in (height, width))
    return LevelGrid(rows, cols, cell, (height - rows * cell) // 2, (width - cols * cell) // 2)


def cell_tokens(grid: LevelGrid, width: int, device: torch.device) -> torch.Tensor:
    """Numbers of the map's tokens in each cell of a level, shape (cells, tokens in a cell), on a map of that width."""
    place = torch.arange(grid.cell, device=device)
    row = torch.arange(grid.rows, device=device)[:, None] * grid.cell + grid.top + place
    col = torch.arange(grid.cols, device=device)[:, None] * grid.cell + grid.left + place
    tokens = row[:, None, :, None] * width + col[None, :, None, :]
    return tokens.view(grid.rows * grid.cols, grid.cell**2)


@cached_table
def relative_position_index(query_side: int, key_side: int, device: torch.device) -> torch.Tensor:
    """Relative position of every query and key of two squares, shape (query_side², key_side²).

    The numbers are rows of a bias table of (query_side + key_side - 1)² relative positions.
    """
    query = torch.arange(query_side, device=device)
    key = torch.arange(key_side, device=device)
    offset = query[:, None] - key[None, :] + key_side - 1  # (query_side, key_side), for rows and columns alike
    index = offset[:, None, :, None] * (query_side + key_side - 1) + offset[None, :, None, :]
    return index.reshape(query_side**2, key_side**2)


def displacements(expand_size: int) -> list[tuple[int, int]]:
    """Rows and columns by which the four displaced windows around a window are displaced, in the original's order."""
    return [(down, right) for down in (expand_size, -expand_size) for right in (expand_size, -expand_size)]


def in_window(rows: torch.Tensor, cols: torch.Tensor, window_size: int) -> torch.Tensor:
    """Mask of the places of a grid that are in a window.

    `rows` and `cols` are the coordinates of the grid, counted from the window's first token.
    """
    return ((rows >= 0) & (rows < window_size))[:, None] & ((cols >= 0) & (cols < window_size))[None, :]


def slot_tokens(window_size: int, expand_size: int, device: torch.device) -> torch.Tensor:
    """Mask (4, window_size²) of the tokens of the four displaced windows that are outside of the window itself.

    Each of these tokens has a slot, a column of its own, in the table of biases to the surroundings.
    """
    place = torch.arange(window_size, device=device)
    return torch.stack(
        [~in_window(place + down, place + right, window_size).flatten() for down, right in displacements(expand_size)]
    )


def slot_count(window_size: int, expand_size: int) -> int:
    """Number of slots of the four displaced windows."""
    return 4 * (window_size**2 - (window_size - expand_size) ** 2)


@cached_table
def fine_columns(window_size: int, expand_size: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    """Columns of the learnt biases for each fine token of a window.

    The fine tokens are the square of the window and `expand_size` tokens around it, row by row. The learnt biases are
    `[the window's own tokens | slots of the four displaced windows]`. So a fine token has one column there, two columns
    where displaced windows overlap, or no column where they leave a gap.

    Returns:
        The two columns of each token that has two, (2, pairs). The column of every fine token, (fine tokens,); for
        the token of pair n, the number of learnt columns plus n. A mask (fine tokens,) of the gaps, whose column is
        arbitrary.
    """
    side = window_size + 2 * expand_size
    square = torch.arange(-expand_size, window_size + expand_size, device=device)
    slots = slot_tokens(window_size, expand_size, device).flatten().cumsum(0) + window_size**2 - 1

    found = []
    for (down, right), slot in zip(displacements(expand_size), slots.view(4, -1), strict=True):
        row, col = square - down, square - right  # in the displaced window
        inside = row.clamp(0, window_size - 1)[:, None] * window_size + col.clamp(0, window_size - 1)[None, :]
        found.append(torch.where(in_window(row, col, window_size), slot[inside], -1))
    of_windows = torch.stack(found).flatten(1)  # -1 for each displaced window that a token is not in
    # No token outside of the window is in more than two. Not `sort`, which ExecuTorch does not have.
    first = of_windows.amax(dim=0)
    second = of_windows.sum(dim=0) - first + 2
    own_column = square[:, None] * window_size + square[None, :]
    columns = torch.where(in_window(square, square, window_size).flatten(), own_column.flatten(), first)

    # Displaced windows overlap beside the window itself, in its middle rows and in its middle columns.
    both = torch.arange(2 * expand_size, max(window_size, 2 * expand_size), device=device)
    reached = torch.arange(expand_size, device=device)
    beside = torch.cat([reached, side - expand_size + reached])
    twice = torch.cat([both[:, None] * side + beside, beside * side + both[:, None]]).flatten()
    behind = window_size**2 + slot_count(window_size, expand_size)
    columns[twice] = behind + torch.arange(twice.shape[0], device=device)
    return torch.stack([first[twice], second[twice]]), columns.clamp(min=0), columns < 0


@cached_table
def focal_index(
    height: int, width: int, geometry: BlockGeometry, device: torch.device
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The tokens that each window attends to with `attention_type="focal"` (section 3.2 of the paper).

    Fine tokens wrap around the edges of the map. Pooled tokens beyond the edges are hidden.

    Args:
        height, width: sides of the map, multiples of the window's.

    Returns:
        The index (rows, cols, keys) in int32. Masks of hidden keys: of the fine tokens (rows, cols, queries or 1, keys
        or 1), true for tokens that a shift has brought to the window from the opposite edge; and, if there are any, of
        the pooled tokens (rows, cols, 1, keys).
    """
    window_size, expand_size, shift_size = geometry.window_size, geometry.expand_size, geometry.shift_size
    rows, cols = height // window_size, width // window_size

    def grid_index(row_term: torch.Tensor, col_term: torch.Tensor) -> torch.Tensor:
        """Terms (rows, a) and (cols, b) of token numbers to (rows, cols, a · b) token numbers."""
        return (row_term[:, None, :, None] + col_term[None, :, None, :]).flatten(2)

    def spans(count: int, square: Square) -> torch.Tensor:
        """(count, side) coordinates, along one axis, of the squares of `count` windows."""
        first = torch.arange(count, device=device)[:, None] * square.step - square.first
        return first + torch.arange(square.side, device=device)

    def wrapped(coordinates: torch.Tensor, length: int) -> torch.Tensor:
        # Not `%`: see `nearest_index`.
        coordinates = torch.where(coordinates < 0, coordinates + length, coordinates)
        return torch.where(coordinates >= length, coordinates - length, coordinates)

    fine_square, *pooled_squares = focal_squares(geometry)
    fine_rows, fine_cols = wrapped(spans(rows, fine_square), height), wrapped(spans(cols, fine_square), width)
    of_levels = [grid_index(fine_rows * width, fine_cols)]

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

    first_pooled = height * width
    for pooled in pooled_squares:
        pooled_rows, pooled_cols = rows * pooled.step, cols * pooled.step
        row, col = spans(rows, pooled), spans(cols, pooled)
        row_outside, col_outside = (row < 0) | (row >= pooled_rows), (col < 0) | (col >= pooled_cols)
        outside = (row_outside[:, None, :, None] | col_outside[None, :, None, :]).flatten(2)
        of_levels.append(grid_index(row * pooled_cols + first_pooled, col).masked_fill(outside, -1))
        first_pooled += pooled_rows * pooled_cols

    index = torch.cat(of_levels, dim=2).int()
    pooled_hidden = index[:, :, None, fine_square.side**2 :] < 0
    return index, [fine_hidden, pooled_hidden] if pooled_squares else [fine_hidden]


def focal_squares(geometry: BlockGeometry) -> list[Square]:
    """The squares of tokens that a window attends to with `attention_type="focal"`, level by level."""
    window_size, expand_size, focal_window = geometry.window_size, geometry.expand_size, geometry.focal_window
    squares = [Square(window_size + 2 * expand_size, window_size, expand_size)]
    for level in range(1, geometry.pooled_levels + 1):
        per_window = 2 ** (level - 1)
        squares.append(Square(focal_window + per_window - 1, per_window, (focal_window - 1) // 2))
    return squares


def nearest_radius(height: int, width: int, topk: int) -> int:
    """A radius in tokens of a disc that holds at least `topk` of a map's tokens, or all, for any centre in the map.

    It is not the smallest such radius: compiled code knows the size of a map only as a symbol and cannot search.
    """
    # A disc at a corner holds the fewest tokens. A quarter of the disc is in the map, and the number of tokens in this
    # quarter is at least its area.
    radius = math.ceil(math.sqrt(4 * topk / math.pi))
    shorter, longer = min(height, width), max(height, width)
    if has_symbols(height, width):
        # An exported graph cannot branch. The rectangle below, which is up to `radius` high, holds as many tokens.
        shorter = min(shorter, radius)
    elif shorter > radius:
        return radius
    # The disc is larger than the map's shorter side: a rectangle across the map holds them.
    return min(longer, shorter + (topk + shorter - 1) // shorter - 1) - 1


def window_centers(windows: int, window_size: int, level: int, device: torch.device) -> torch.Tensor:
    """Coordinates of the windows' centres along one axis, in tokens of `level`, with `attention_type="topk"`."""
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
    if device.type == "meta":  # where loading builds the model, and only the shape counts
        return torch.empty(rows * cols, topk, dtype=torch.long, device=device)

    # A square around each centre, moved into the map, holds them all, so the rest of the map is not searched.
    def spans(centers: torch.Tensor, length: int) -> torch.Tensor:
        side = min(2 * radius + 1, length)
        return (centers - radius).clamp(0, length - side)[:, None] + torch.arange(side, device=device)

    center_row = window_centers(rows, window_size, level, device)
    center_col = window_centers(cols, window_size, level, device)
    row, col = spans(center_row, height), spans(center_col, width)
    row_distance, col_distance = (row - center_row[:, None]) ** 2, (col - center_col[:, None]) ** 2
    distance = (row_distance[:, None, :, None] + col_distance[None, :, None, :]).flatten(2)
    # Ranks are unique, with ties broken by the place in the square, because ONNX has no stable sort.
    places = distance.shape[2]
    rank = distance * places + torch.arange(places, device=device)
    place = rank.topk(topk, largest=False).indices
    side = col.shape[1]
    down = place // side
    right = place - down * side  # not `%`, which ONNX's exporter has for numbers alone, not for symbols
    token = (row[:, 0][:, None, None] + down) * width + col[:, 0][:, None] + right
    return token.flatten(0, 1)


@cached_table
def first_places(rows: int, cols: int, window_size: int, level: int, radius: int, device: torch.device) -> torch.Tensor:
    """Place of a level's first token in the square around each window's centre, shape (rows, cols, 1).

    The square has side 2 · `radius` + 1. Its places are numbered row by row. The same formula also numbers
    places outside the square.
    """
    row = radius - window_centers(rows, window_size, level, device)
    col = radius - window_centers(cols, window_size, level, device)
    return row[:, None, None] * (2 * radius + 1) + col[:, None]


def topk_index(
    nearest: Sequence[torch.Tensor], height: int, width: int, window_size: int, topk: int
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The tokens that each window attends to with `attention_type="topk"`.

    Args:
        nearest: the nearest tokens of each level, as `nearest_index` returns them.

    Returns:
        The index (rows, cols, keys) in int32. For each level, the places (rows, cols, keys) of its keys in the square
        of side 2 · `nearest_radius` + 1 around the window's centre, row by row.
    """
    rows, cols = height // window_size, width // window_size
    index, places = [], []
    for level, of_level in enumerate(nearest):
        of_level = of_level.unflatten(0, (rows, cols))
        level_height, level_width = (rows, cols) if level else (height, width)
        radius = nearest_radius(level_height, level_width, topk)
        # From row · width + col to row · side + col, both counted from the level's first token.
        further = of_level // level_width * (2 * radius + 1 - level_width)
        places.append(of_level + further + first_places(rows, cols, window_size, level, radius, of_level.device))
        index.append(of_level + height * width if level else of_level)
    return torch.cat(index, dim=2).int(), places


@cached_table
def computed_topk_index(
    height: int, width: int, window_size: int, levels: int, topk: int, device: torch.device
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """`topk_index` of the tokens that `nearest_index` computes."""
    nearest = [nearest_index(height, width, window_size, level, topk, device) for level in range(levels)]
    return topk_index(nearest, height, width, window_size, topk)


@cached_table
def topk_offsets(radius: int, step: int, window_size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """All offsets (offsets, offsets, 2) between a window's queries and the tokens within a radius of its centre.

    Offsets are in tokens of the map. `radius` is in tokens of the level. Neighbouring tokens of the level are `step`
    tokens of the map apart.
    """
    reach = step * radius + window_size // 2
    axis = torch.arange(-reach, reach + window_size % 2, device=device)
    return torch.stack(torch.meshgrid(axis, axis, indexing="ij"), dim=-1).to(dtype)
