"""Which tokens the queries of a window attend to, and with which bias: the modules that hold the learnt biases.

A neighbourhood module takes a map and returns a `Neighborhood`: an index of each window's keys (see `geometry_focal`)
and the parts of the bias. It does not know how attention is computed.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn

from .geometry_focal import (
    BlockGeometry,
    Square,
    computed_topk_index,
    fine_columns,
    focal_index,
    focal_squares,
    nearest_index,
    nearest_radius,
    relative_position_index,
    slot_count,
    topk_index,
    topk_offsets,
    window_centers,
)
from .layout_focal import at_least_float32, cat_unless_single
from .run_state_focal import cached_by_value, has_symbols

T = TypeVar("T")

# Bias of hidden keys in exported graphs. Their weights vanish beside others, as with -inf. But they are not denormal
# numbers, with which runtimes are many times slower.
HIDDEN = -70.0


# A tuple with properties could not be compiled by torch before 2.11.
@dataclass(frozen=True)
class BiasPart:
    """The bias of consecutive columns of the index.

    `source` follows from the weights and is the same for all windows. `pattern` (rows, cols, …) is what differs from
    window to window. Windows with equal patterns have equal biases. There are two kinds:

    - A boolean pattern (rows, cols, queries or 1, columns or 1) masks `source` (heads, queries, columns) with -inf.
    - An integer pattern (rows, cols, columns) looks up, for each column, a row of `source` (places, heads, queries).
    """

    source: torch.Tensor
    pattern: torch.Tensor

    @property
    def is_mask(self) -> bool:
        """Whether the pattern is a mask, not a lookup."""
        return self.pattern.dtype == torch.bool

    @property
    def queries(self) -> int:
        return self.source.shape[1 if self.is_mask else 2]

    @property
    def columns(self) -> int:
        return (self.source if self.is_mask else self.pattern).shape[-1]

    def bias(self, rows: slice | None = None, cols: slice | None = None) -> torch.Tensor:
        """The bias (windows, heads, queries, columns) of the windows in some rows and columns, by default of all."""
        pattern = self.pattern if rows is None else self.pattern[rows, cols]
        pattern = pattern.flatten(0, 1)
        if self.is_mask:
            return torch.where(pattern[:, None], -torch.inf, self.source)
        return self.source.index_select(0, pattern.flatten()).unflatten(0, pattern.shape).permute(0, 2, 3, 1)

    def write_bias_(self, target: torch.Tensor, rows: slice, cols: slice) -> None:
        """Writes `bias` into `target` (images, windows, heads, queries, columns)."""
        if not self.is_mask:
            target.copy_(self.bias(rows, cols))
            return
        pattern = self.pattern[rows, cols].flatten(0, 1)
        # An addition is the only pass over the bias. A copy and a mask would be two.
        mask = self.source.new_zeros(pattern.shape).masked_fill_(pattern, -torch.inf)
        torch.add(self.source, mask[:, None].expand(len(target), -1, -1, -1, -1), out=target)

    def source_gradient(self, gradient: torch.Tensor, rows: slice, cols: slice) -> torch.Tensor:
        """Gradient of `source`, from that of the bias of these windows, in one image or several."""
        if self.is_mask:
            return gradient.sum(0)
        pattern = self.pattern[rows, cols].flatten()
        of_columns = gradient.unflatten(0, (-1, len(pattern) // self.columns)).sum(0).permute(0, 3, 1, 2).flatten(0, 1)
        return gradient.new_zeros(self.source.shape).index_add_(0, pattern, of_columns)


class AttentionTables(NamedTuple):
    """What a block gathers on maps of one size, and its bias.

    Indices count heads of tokens: head h of token t is number t · heads + h. In dense tables, all queries attend to all
    tokens, in order: there is no index of queries and keys, and `outputs` counts tokens, or is None for all in order.

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
            The bias. In dense tables, `(1, heads, tokens of the map, all tokens)`.
    """

    queries: torch.Tensor | None
    keys: torch.Tensor | None
    outputs: torch.Tensor | None
    cells: list[torch.Tensor]
    bias: torch.Tensor


class Neighborhood:
    """The tokens that the windows of a map attend to, and the bias of each query and key.

    Args:
        index (`torch.Tensor` of shape `(rows, cols, keys)`):
            Numbers of the keys of each window in [map tokens | pooled tokens of level 1 | …]; -1 where a key is hidden
            from all queries of the window, which the parts mask as well.
        parts (`list[BiasPart]`):
            The bias of the index's columns, in order. The full bias would be most of a block's memory.
        squares (`list[Square]`, *optional*):
            For each level, a square around a window. Every column of the index is a place in one of these squares. If
            the patterns of the parts are masks, the columns are all places in order. If the patterns are integers, they
            give the place of each column. The Triton kernels require the squares.
        shift_size (`int`, *optional*, defaults to 0):
            Size in tokens of the shift of the map, whose masks are in the parts.
        forms (`dict`, *optional*):
            What `derived` has computed. A module that caches its biases passes the same dict as long as they are the
            same.
    """

    def __init__(
        self,
        index: torch.Tensor,
        parts: list[BiasPart],
        squares: list[Square] | None = None,
        shift_size: int = 0,
        forms: dict[Callable, Any] | None = None,
    ):
        self.index = index
        self.parts = parts
        self.squares = squares or []
        self.shift_size = shift_size
        self.forms = {} if forms is None else forms
        self.tables: AttentionTables | None = None  # of a frozen model

    @property
    def window_size(self) -> int:
        return math.isqrt(self.parts[0].queries)

    def bias(self, rows: slice | None = None, cols: slice | None = None) -> torch.Tensor:
        """The bias (windows, heads, queries, keys) of the windows in some rows and columns, by default of all."""
        return cat_unless_single([part.bias(rows, cols) for part in self.parts], dim=-1)

    def exported_bias(self) -> torch.Tensor:
        """`bias` of all windows for exported graphs, (1, windows · heads, queries, keys), with `HIDDEN` for -inf."""
        return self.bias().clamp(min=HIDDEN).flatten(0, 1)[None]

    def derived(self, make: Callable[["Neighborhood"], T]) -> T:
        """`make(self)`, kept for the last size of the map: the form that an attention implementation needs."""
        size = tuple(self.index.shape)
        # Read and written once each: another thread may run the module on maps of another size.
        form = self.forms.get(make)
        if form is None or form[0] != size:
            form = self.forms[make] = size, make(self)
        return form[1]


class FocalNeighborhood(nn.Module):
    """Neighbourhoods with `attention_type="focal"`: a window, its surroundings, and squares of pooled tokens.

    The columns of the index are the tokens of the `focal_squares`, all row-major. A token that the original lists
    twice, with biases a and b, has one column with bias log(eᵃ + eᵇ): the same attention with fewer columns, and
    gradients reach both biases.
    """

    def __init__(self, num_heads: int, geometry: BlockGeometry):
        super().__init__()
        self.geometry = geometry
        window_size, expand_size = geometry.window_size, geometry.expand_size
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window_size - 1) ** 2, num_heads))
        self.relative_position_bias_table_to_neighbors = (
            nn.Parameter(torch.zeros(1, num_heads, window_size**2, slot_count(window_size, expand_size)))
            if expand_size
            else None
        )
        # Not a ParameterList: offloading loads the weights of a module when it is called, and a list is never called.
        for number, square in enumerate(self.pooled_squares()):
            table = nn.Parameter(torch.zeros(num_heads, (window_size + square.side - 1) ** 2))
            self.register_parameter(f"relative_position_bias_table_to_windows_{number}", table)

    def pooled_squares(self) -> list[Square]:
        """The square of each pooled level."""
        return focal_squares(self.geometry)[1:]

    def pooled_tables(self) -> list[nn.Parameter]:
        """The table of each pooled level, each (heads, relative positions)."""
        numbers = range(self.geometry.pooled_levels)
        return [getattr(self, f"relative_position_bias_table_to_windows_{number}") for number in numbers]

    def bias_tables(self) -> list[torch.Tensor]:
        """All bias tables. `parameters()` is empty in replicas of DataParallel and in modules of FSDP."""
        tables = [self.relative_position_bias_table, self.relative_position_bias_table_to_neighbors]
        return [table for table in (*tables, *self.pooled_tables()) if table is not None]

    def fine_bias(self) -> torch.Tensor:
        """Bias between the queries of a window and its fine tokens, shape (heads, queries, fine tokens)."""
        table = self.relative_position_bias_table
        window_size, expand_size = self.geometry.window_size, self.geometry.expand_size
        index = relative_position_index(window_size, window_size, table.device)
        own = at_least_float32(table)[index].permute(2, 0, 1)
        if self.relative_position_bias_table_to_neighbors is None:
            return own
        listed = torch.cat([own, at_least_float32(self.relative_position_bias_table_to_neighbors[0])], dim=-1)
        pairs, columns, gaps = fine_columns(window_size, expand_size, table.device)
        # `gather` takes a third of the time of indexing.
        first, second = (listed.gather(-1, of_pair.expand(*listed.shape[:2], -1)) for of_pair in pairs)
        listed = torch.cat([listed, torch.logaddexp(first, second)], dim=-1)
        bias = listed.gather(-1, columns.expand(*listed.shape[:2], -1))
        return bias.masked_fill(gaps, -torch.inf) if 2 * expand_size > window_size else bias

    def pooled_biases(self) -> list[torch.Tensor]:
        """For each pooled level, the bias between the queries of a window and its tokens, (heads, queries, tokens)."""
        biases = []
        for table, square in zip(self.pooled_tables(), self.pooled_squares(), strict=True):
            index = relative_position_index(self.geometry.window_size, square.side, table.device)
            biases.append(at_least_float32(table)[:, index])
        return biases

    def biases(self) -> list[torch.Tensor]:
        """`fine_bias` and, if there are pooled tokens, those of all levels in one tensor."""
        pooled = self.pooled_biases()
        return [self.fine_bias(), cat_unless_single(pooled, dim=-1)] if pooled else [self.fine_bias()]

    def forward(self, maps: torch.Tensor, shift_size: int | None = None) -> Neighborhood:
        """The neighbourhood of (batch, height, width, channels) maps whose sides are multiples of the window's.

        `shift_size` is the shift of the maps, if it is not the block's.
        """
        height, width = maps.shape[1:3]
        geometry = self.geometry if shift_size is None else self.geometry._replace(shift_size=shift_size)
        forms: dict[Callable, Any]
        biases, forms = cached_by_value(self, lambda *tables: (self.biases(), {}), *self.bias_tables())
        index, hidden = focal_index(height, width, geometry, maps.device)
        parts = [BiasPart(*part) for part in zip(biases, hidden, strict=True)]
        return Neighborhood(index, parts, focal_squares(geometry), geometry.shift_size, forms)


class TopkNeighborhood(nn.Module):
    """Neighbourhoods with `attention_type="topk"` (the original's focalv2): the nearest tokens of each level.

    The bias is a small MLP of the offset between query and key, in tokens of the map. The indices for a map of size
    `grid` are buffers that are saved: ties in distance are broken as `torch.topk` did when the checkpoint was made. For
    maps of other sizes the indices are computed.
    """

    def __init__(self, num_heads: int, head_dim: int, window_size: int, levels: int, topk: int, grid: tuple[int, int]):
        super().__init__()
        self.window_size = window_size
        self.levels = levels
        self.topk = topk
        rows, cols = (-(-side // window_size) for side in grid)
        self.grid = (rows * window_size, cols * window_size)
        self.coordinate_mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(2, head_dim), nn.ReLU(), nn.Linear(head_dim, num_heads)) for _ in range(levels)
        )
        for level in range(levels):
            # A copy, because the computed table is cached and shared with other blocks.
            self.register_buffer(f"nearest_index_{level}", self.computed_index(*self.grid, level).clone())

    def computed_index(self, height: int, width: int, level: int, device: torch.device | None = None) -> torch.Tensor:
        """Indices (windows, min(topk, tokens of the level)) for a map of any size."""
        device = device or torch.get_default_device()
        return nearest_index(height, width, self.window_size, level, self.topk, device)

    def nearest_or_computed(self, index: torch.Tensor, level: int) -> torch.Tensor:
        """A checkpoint's index if it lists nearest tokens of a map of `grid`, in any order of ties; else our own."""
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

    def saved_or_computed(self, saved: torch.Tensor, height: int, width: int, level: int) -> torch.Tensor:
        """The saved index for maps of size `grid`, the computed one for others, without a branch."""
        computed = self.computed_index(height, width, level, saved.device)
        is_grid = torch.stack(
            [
                torch.full((), side, device=saved.device) == of_grid
                for side, of_grid in zip((height, width), self.grid, strict=True)
            ]
        ).all()
        place = torch.arange(computed.shape[0] * computed.shape[1], device=saved.device).clamp(max=saved.numel() - 1)
        return torch.where(is_grid, saved.flatten().index_select(0, place).view(computed.shape), computed)

    def biases(self, radii: list[int], maps: torch.Tensor) -> list[torch.Tensor]:
        """Per level, the bias between a window's queries and the tokens in the square around its centre.

        Each has shape ((2 · radius + 1)², heads, queries), by the token's place in that square.
        """
        biases = []
        window = self.window_size
        for level, (mlp, radius) in enumerate(zip(self.coordinate_mlps, radii, strict=True)):
            step = window if level else 1  # between the level's tokens, in tokens of the map
            # Offsets repeat across tokens and queries: the MLP sees each distinct offset once.
            offsets = topk_offsets(radius, step, window, maps.dtype, maps.device)
            table = mlp(offsets).unfold(0, window, step).unfold(1, window, step)
            # An offset is query minus token: it falls as the token's coordinate grows.
            biases.append(table.flip(0, 1).flatten(3).flatten(0, 1))
        return biases

    def forward(self, maps: torch.Tensor) -> Neighborhood:
        """The neighbourhood of (batch, height, width, channels) maps whose sides are multiples of the window's."""
        height, width = maps.shape[1:3]
        window = self.window_size
        saved = [getattr(self, f"nearest_index_{level}") for level in range(self.levels)]
        if has_symbols(height, width):
            nearest = [self.saved_or_computed(index, height, width, level) for level, index in enumerate(saved)]
            index, places = topk_index(nearest, height, width, window, self.topk)
        elif (height, width) == self.grid:
            index, places = cached_by_value(
                self, lambda *nearest: topk_index(nearest, height, width, window, self.topk), *saved
            )
        else:
            index, places = computed_topk_index(height, width, window, self.levels, self.topk, maps.device)
        grids = [(height, width), (height // window, width // window)][: self.levels]
        radii = [nearest_radius(*grid, self.topk) for grid in grids]
        parts = [BiasPart(*part) for part in zip(self.biases(radii, maps), places, strict=True)]
        squares = [
            Square(2 * radius + 1, step, radius - step // 2) for radius, step in zip(radii, (window, 1), strict=False)
        ]
        return Neighborhood(index, parts, squares)
