"""Where a Focal Transformer looks: attention weights put back on the image.

One forward pass is recorded; all else is read from the record, in milliseconds:

    record = record_attention(model, pixel_values)                     # one image, any Focal model
    seen = query_attention(record, at=(0.4, 0.6), stage=0)             # what one point looks at
    seen.levels[0].plane                                               # (rows, columns), weights of the fine tokens
    saliency = attention_rollout(record, label)                        # (rows, columns), for a class
    plot_query(image, seen).savefig("attention.png")                   # needs matplotlib

Level 0 are the tokens of the map, the window's own and those around it; level k from 1 up are pooled tokens, each of
which stands for a square cell of tokens, from the coarsest (a whole window) to finer ones. Positions are told in tokens
of a stage's map, row by row from the top left; `to_pixels` makes pixels of them. A map is padded below and on the right
to whole windows: planes have those rows and columns, too, since weight falls on them.
"""

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from .modeling_focal import FocalForImageClassification, FocalModel, pad_to_multiple
from .neighborhood_focal import Neighborhood, cut_windows

# ------------------------------------------------------------------------------------------------------------ recording


@dataclass(frozen=True)
class BlockAttention:
    """The attention weights of one block on one image, and the geometry that tells their places.

    A block with a shift works on a map that is rolled: row r of that is row (r + shift_size) % padded rows of the map.
    """

    weights: torch.Tensor  # (windows, heads, queries, keys), on the CPU in float32; each query's sum to 1
    neighborhood: Neighborhood  # which tokens of the rolled map, and which pooled tokens, the keys are
    map_size: tuple[int, int]  # rows and columns of tokens
    window_size: int
    shift_size: int
    expand_size: int | None  # None where the fine tokens are not a square around the window (`attention_type="topk"`)
    cells: list[int]  # side in tokens of the cells of each level: 1, then those of the pooled tokens

    @property
    def windows(self) -> tuple[int, int]:
        """Rows and columns of windows."""
        return tuple(self.neighborhood.head_index.shape[:2])

    @property
    def padded_size(self) -> tuple[int, int]:
        """Rows and columns of the map in whole windows."""
        rows, cols = self.windows
        return rows * self.window_size, cols * self.window_size

    @property
    def index(self) -> torch.Tensor:
        """Each key's place in [tokens of the rolled map | pooled tokens of level 1 | of level 2 | ...].

        Of shape (rows, cols, keys) of windows.
        """
        head_index = self.neighborhood.head_index
        return head_index[:, :, 0].cpu() // head_index.shape[2]

    def grid(self, level: int) -> tuple[int, int]:
        """Rows and columns of the tokens of a level."""
        if level == 0:
            return self.padded_size
        rows, cols = self.windows
        return rows * 2 ** (level - 1), cols * 2 ** (level - 1)

    def corner(self, level: int) -> tuple[int, int]:
        """Row and column in the rolled map at which the cells of a level begin: they are centred in it."""
        return tuple(
            (length - count * self.cells[level]) // 2
            for length, count in zip(self.padded_size, self.grid(level), strict=True)
        )


@dataclass(frozen=True)
class AttentionRecord:
    """What [`record_attention`] keeps of one forward pass.

    Args:
        stages (`list[list[BlockAttention]]`):
            The blocks of each stage.
        image_size (`tuple[int, int]`):
            Height and width of the image in pixels.
        patch_size (`int`):
            Side of a token of the first stage in pixels; it doubles with each stage.
        token_logits (`np.ndarray` of shape `(rows, columns, labels)`, *optional*):
            What the classifier makes of each token of the last map by itself. Their mean over the tokens is `logits`.
    """

    stages: list[list[BlockAttention]]
    image_size: tuple[int, int]
    patch_size: int
    token_logits: np.ndarray | None

    @property
    def logits(self) -> np.ndarray | None:
        """(labels,), the model's own; `None` where there is no classifier."""
        return None if self.token_logits is None else self.token_logits.mean((0, 1))


@torch.no_grad()
def record_attention(model: PreTrainedModel, pixel_values: torch.Tensor) -> AttentionRecord:
    """Run a model on one image and keep the attention weights of every block.

    Args:
        model ([`PreTrainedModel`]):
            A Focal model, or any that has one inside, in evaluation mode. Its attention is computed by
            `attn_implementation="eager"`, which gives the weights, and set back to what it was.
        pixel_values (`torch.Tensor` of shape `(1, channels, height, width)`):
            The image, as the image processor returns it; of any size.

    Raises:
        ValueError: for a model that is not Focal or is training, and for more than one image.
    """
    modules = list(model.modules())
    focal = next((module for module in modules if isinstance(module, FocalModel)), None)
    if focal is None:
        raise ValueError(
            f"record_attention takes a Focal model, or one with a Focal backbone; got {type(model).__name__}. (One "
            "loaded with trust_remote_code=True has classes of its own: import focal_hf first, and load it without.)"
        )
    if focal.training:
        raise ValueError("The model is in training mode, where attention weights are dropped: call model.eval() first.")
    if not isinstance(pixel_values, torch.Tensor) or pixel_values.ndim != 4 or len(pixel_values) != 1:
        raise ValueError(
            "record_attention takes one image at a time, a tensor of shape (1, channels, height, width); got "
            f"{tuple(getattr(pixel_values, 'shape', ())) or type(pixel_values).__name__}."
        )

    stages = [[block.attention for block in stage.blocks] for stage in focal.encoder.layers]
    neighborhoods, recorded = {}, {}

    def keep_neighborhood(module: nn.Module, args: tuple, output: Neighborhood):
        neighborhoods[module] = output

    def keep_weights(module: nn.Module, args: tuple, output: tuple):
        pooled = [] if module.pooling is None else module.pooling.cells
        recorded[module] = BlockAttention(
            weights=output[1].float().cpu(),
            neighborhood=neighborhoods[module.neighborhood],
            map_size=tuple(args[0].shape[1:3]),
            window_size=module.window_size,
            shift_size=module.shift_size,
            expand_size=getattr(module.neighborhood, "expand_size", None),
            cells=[1, *pooled],
        )

    hooks = []
    for attention in (attention for stage in stages for attention in stage):
        hooks.append(attention.neighborhood.register_forward_hook(keep_neighborhood))
        hooks.append(attention.register_forward_hook(keep_weights))
    implementation = focal.config._attn_implementation
    focal.set_attn_implementation("eager")
    try:
        last_hidden_state = focal(pixel_values.to(focal.device)).last_hidden_state
    finally:
        focal.set_attn_implementation(implementation)
        for hook in hooks:
            hook.remove()

    stages = [[recorded[attention] for attention in stage] for stage in stages]
    classified = next((module for module in modules if isinstance(module, FocalForImageClassification)), None)
    token_logits = None
    if classified is not None:
        # The classifier is linear and works on the tokens' mean: its answer is the mean of its answers to each.
        token_logits = (
            classified.classifier(last_hidden_state)[0].unflatten(0, stages[-1][-1].map_size).float().cpu().numpy()
        )
    return AttentionRecord(stages, tuple(pixel_values.shape[2:]), focal.config.patch_size, token_logits)


# ------------------------------------------------------------------------------------------------------------ one query


@dataclass(frozen=True)
class LevelAttention:
    """What a query sees of one level: boxes on the map, and the weight of each.

    A box is what one key, a token or the cell of a pooled token, covers of the map. Where a shift puts a cell's parts
    at opposite edges, or part of it lies on padding, the parts are boxes of their own and share its weight by area.

    Args:
        level (`int`):
            0 for the map's own tokens, k for pooled tokens of level k.
        cell (`int`):
            Side in tokens of its cells; 1 at level 0.
        boxes (`np.ndarray` of shape `(boxes, 4)`):
            Top, left, bottom and right in tokens of the map, the latter two exclusive.
        weights (`np.ndarray` of shape `(boxes,)`):
            Those of all levels together sum to 1. Keys that are hidden from the query are not listed: pooled tokens
            beyond the map's edge, of which there are none, and those that a shift has brought from the opposite edge.
        wrapped (`np.ndarray` of shape `(boxes,)`):
            Which lie across the map's edge: the query takes them for neighbours, on the image they are at the opposite
            edge, where `boxes` says.
        outside (`np.ndarray` of shape `(boxes,)`):
            Which are padding, below or on the right of the image's own tokens.
        plane (`np.ndarray` of shape `(rows, columns)` of the padded map):
            The weight on each token, cells sharing theirs out evenly. It has the same sum as `weights`.
    """

    level: int
    cell: int
    boxes: np.ndarray
    weights: np.ndarray
    wrapped: np.ndarray
    outside: np.ndarray
    plane: np.ndarray


@dataclass(frozen=True)
class QueryAttention:
    """What one query looks at, as [`query_attention`] returns it.

    Args:
        stage, layer (`int`), head (`int`, *optional*):
            What was asked for; `None` for the mean of the heads.
        query (`tuple[int, int]`):
            Row and column of the query's token.
        window (`np.ndarray` of shape `(boxes, 4)`):
            The query's window, as boxes of [`LevelAttention`]: one, or up to four where a shift takes it across edges.
        levels (`list[LevelAttention]`):
            The levels, finest (0) first, then from the coarsest (1) on.
        map_size (`tuple[int, int]`):
            Rows and columns of tokens that the image has; what planes have beyond is padding.
        stride (`int`):
            Side of a token in pixels.
        image_size (`tuple[int, int]`):
            Height and width of the image in pixels.
    """

    stage: int
    layer: int
    head: int | None
    query: tuple[int, int]
    window: np.ndarray
    levels: list[LevelAttention]
    map_size: tuple[int, int]
    stride: int
    image_size: tuple[int, int]

    def plane(self, levels: Iterable[int] | None = None) -> np.ndarray:
        """(rows, columns) of the padded map: the weight on each token, of some levels or (then its sum is 1) of all."""
        chosen = range(len(self.levels)) if levels is None else levels
        return sum((self.levels[level].plane for level in chosen), np.zeros_like(self.levels[0].plane))


class Run(NamedTuple):
    """Consecutive tokens of one axis of the map."""

    start: int
    stop: int
    wrapped: bool
    outside: bool


@functools.lru_cache(maxsize=4096)
def runs(first: int, length: int, query: int, shift: int, padded: int, image: int) -> tuple[Run, ...]:
    """Where `length` tokens of a rolled axis are on the map, seen from the token `query` of the rolled axis.

    `first` may be below 0, and first + length beyond `padded`: the axis is cyclic. `image` is the length without
    padding.
    """
    rolled = np.arange(first, first + length)
    place = (rolled + shift) % padded
    wrapped = place - rolled != (query + shift) % padded - query
    outside = place >= image
    new = np.flatnonzero((np.diff(place) != 1) | (np.diff(outside) != 0)) + 1
    return tuple(
        Run(int(place[part[0]]), int(place[part[-1]]) + 1, bool(wrapped[part[0]]), bool(outside[part[0]]))
        for part in np.split(np.arange(length), new)
    )


def chosen(what: str, number: int, count: int) -> int:
    if not -count <= number < count:
        raise ValueError(f"There is no {what} {number}: they are counted from 0, and there are {count}.")
    return number % count


def query_attention(
    record: AttentionRecord, at: tuple[float, float], stage: int = 0, layer: int = -1, head: int | None = None
) -> QueryAttention:
    """What one point of the image looks at.

    Args:
        record ([`AttentionRecord`]):
            From [`record_attention`].
        at (`tuple[float, float]`):
            The point as fractions of the image's width (from the left) and height (from the top), from 0 to 1.
        stage, layer (`int`, *optional*):
            Which stage, and which of its blocks; from 0 up, or from -1, the last, down.
        head (`int`, *optional*):
            Which head; the mean of all by default.

    Raises:
        ValueError: for a point outside of the image, or a stage, layer or head that there is not.
    """
    if len(at) != 2 or not all(0 <= value <= 1 for value in at):
        raise ValueError(
            f"A point is two fractions of the image's width and height, each from 0 to 1; got {tuple(at)}."
        )
    stage = chosen("stage", stage, len(record.stages))
    layer = chosen(f"layer of stage {stage}", layer, len(record.stages[stage]))
    block = record.stages[stage][layer]
    if head is not None:
        head = chosen(f"head in stage {stage}", head, block.weights.shape[1])

    stride = record.patch_size * 2**stage
    row, col = (
        min(int(fraction * pixels / stride), tokens - 1)
        for fraction, pixels, tokens in zip(reversed(at), record.image_size, block.map_size, strict=True)
    )
    window, shift, padded = block.window_size, block.shift_size, block.padded_size
    rolled = [(place - shift) % length for place, length in zip((row, col), padded, strict=True)]
    (window_row, row_in_window), (window_col, col_in_window) = (divmod(place, window) for place in rolled)
    number, query = window_row * block.windows[1] + window_col, row_in_window * window + col_in_window

    weights = block.weights[number, :, query]
    weights = (weights.mean(0) if head is None else weights[head]).double().numpy()
    index = block.index[window_row, window_col].numpy()
    places = slice(window_row, window_row + 1), slice(window_col, window_col + 1)
    seen = ~torch.isneginf(block.neighborhood.bias(places)[0, 0, query]).cpu().numpy()

    def boxes(first_row: int, first_col: int, side: int) -> list[tuple[Run, Run]]:
        across = [
            runs(first, side, own, shift, length, image)
            for first, own, length, image in zip((first_row, first_col), rolled, padded, block.map_size, strict=True)
        ]
        return [(rows, cols) for rows in across[0] for cols in across[1]]

    levels, begin = [], 0
    for level, cell in enumerate(block.cells):
        height, width = block.grid(level)
        of_level = (index >= begin) & (index < begin + height * width)
        keys = np.flatnonzero(of_level & seen)
        if level == 0 and block.expand_size is not None:
            # The index has them rolled round the edges; where they lie from the window tells the place among the keys.
            side = window + 2 * block.expand_size
            key_row = window_row * window - block.expand_size + keys // side
            key_col = window_col * window - block.expand_size + keys % side
        else:
            top, left = block.corner(level)
            key_row, key_col = np.divmod(index[keys] - begin, width)
            key_row, key_col = top + key_row * cell, left + key_col * cell
        begin += height * width

        parts = [
            (weights[key] * (rows.stop - rows.start) * (cols.stop - cols.start) / cell**2, rows, cols)
            for key, first_row, first_col in zip(keys, key_row.tolist(), key_col.tolist(), strict=True)
            for rows, cols in boxes(first_row, first_col, cell)
        ]
        plane = np.zeros(padded)
        for weight, rows, cols in parts:
            area = (rows.stop - rows.start) * (cols.stop - cols.start)
            plane[rows.start : rows.stop, cols.start : cols.stop] += weight / area
        levels.append(
            LevelAttention(
                level,
                cell,
                np.array([(rows.start, cols.start, rows.stop, cols.stop) for _, rows, cols in parts]).reshape(-1, 4),
                np.array([weight for weight, _, _ in parts]),
                np.array([rows.wrapped or cols.wrapped for _, rows, cols in parts], dtype=bool),
                np.array([rows.outside or cols.outside for _, rows, cols in parts], dtype=bool),
                plane,
            )
        )

    own = boxes(window_row * window, window_col * window, window)
    own = np.array([(rows.start, cols.start, rows.stop, cols.stop) for rows, cols in own])
    return QueryAttention(stage, layer, head, (row, col), own, levels, block.map_size, stride, record.image_size)


# ---------------------------------------------------------------------------------------------------------- whole image


def to_pixels(plane: np.ndarray, stride: int, image_size: tuple[int, int]) -> np.ndarray:
    """A plane (rows, columns) of tokens as one of pixels, (height, width) = `image_size`.

    Each token's number is shared out evenly among its `stride` by `stride` pixels, so that the sum stays what it was
    but for what lies on padding, which is cut off.
    """
    pixels = np.asarray(plane).repeat(stride, 0).repeat(stride, 1) / stride**2
    return pixels[: image_size[0], : image_size[1]]


def attended(block: BlockAttention, relevance: torch.Tensor) -> torch.Tensor:
    """Hands the relevance (rows, columns) of a block's queries on to the tokens that they attend to.

    Each by its weights, the mean of the heads; a pooled token hands its share on to the tokens of its cell, evenly.
    What falls on padding is gone.
    """
    shift, window = block.shift_size, block.window_size
    maps = pad_to_multiple(relevance[None], window)[..., None].roll((-shift, -shift), (1, 2))
    by_window = cut_windows(maps, window).flatten(3).flatten(0, 2)  # (windows, queries)
    by_key = torch.einsum("wq,whqk->wk", by_window, block.weights.to(relevance.dtype)) / block.weights.shape[1]

    grids = [block.grid(level) for level in range(len(block.cells))]
    tokens = relevance.new_zeros(sum(rows * cols for rows, cols in grids))
    tokens.index_add_(0, block.index.flatten(), by_key.flatten())
    by_level = tokens.split([rows * cols for rows, cols in grids])
    result = by_level[0].view(grids[0]).clone()
    for level, cell in list(enumerate(block.cells))[1:]:
        spread = by_level[level].view(grids[level]).repeat_interleave(cell, 0).repeat_interleave(cell, 1) / cell**2
        top, left = block.corner(level)
        result[top : top + spread.shape[0], left : left + spread.shape[1]] += spread
    height, width = block.map_size
    return result.roll((shift, shift), (0, 1))[:height, :width]


def attention_rollout(record: AttentionRecord, label: int | None = None) -> np.ndarray:
    """How much each part of the image can have told the answer: attention rollout over all blocks and stages.

    [Abnar and Zuidema 2020](https://arxiv.org/abs/2005.00928): a block hands on half of what a token counts by its
    residual connection and half by its attention, the mean of the heads. What is handed on is a number for each token,
    from the last map back to the first; no matrix of all pairs of tokens is made. A pooled token stands for its cell's
    tokens evenly, whatever the weights of the pooling are, and a token of a later stage for the four that it was merged
    from.

    The class comes in with the last map. Its logit is the mean of what the classifier makes of each of these tokens, so
    each token's share in it is exact, without a gradient: what speaks for the class more than for the mean of all
    classes. Tokens that speak against it count nothing.

    Args:
        record ([`AttentionRecord`]):
            From [`record_attention`].
        label (`int`, *optional*):
            The class; without one, all tokens of the last map count alike.

    Returns:
        `np.ndarray` of shape `(rows, columns)` of the first stage's map, `record.patch_size` pixels each. It sums to 1
        less what fell on the padding of maps that are not whole windows; it is all 0 where no token speaks for the
        class.

    Raises:
        ValueError: for a class that there is not, or any class where there is no classifier.
    """
    rows, cols = record.stages[-1][-1].map_size
    if label is None:
        relevance = torch.full((rows, cols), 1 / (rows * cols), dtype=torch.float64)
    else:
        if record.token_logits is None:
            raise ValueError("The saliency of a class needs a classifier: record a FocalForImageClassification.")
        labels = record.token_logits.shape[2]
        label = chosen("class", label, labels)
        logits = record.token_logits.astype(np.float64)
        votes = logits[..., label] - (logits.mean(2) if labels > 1 else 0)
        relevance = torch.from_numpy(votes.clip(0) / max(votes.clip(0).sum(), np.finfo(votes.dtype).tiny))

    for blocks in reversed(record.stages):
        height, width = blocks[-1].map_size
        if (height, width) != tuple(relevance.shape):
            # Where a side was odd, the last tokens were merged from fewer than four.
            merged_rows = torch.full((relevance.shape[0],), 2)
            merged_rows[-1] -= height % 2
            merged_cols = torch.full((relevance.shape[1],), 2)
            merged_cols[-1] -= width % 2
            relevance = relevance / (merged_rows[:, None] * merged_cols)
            relevance = relevance.repeat_interleave(2, 0).repeat_interleave(2, 1)[:height, :width]
        for block in reversed(blocks):
            relevance = (relevance + attended(block, relevance)) / 2
    return relevance.numpy()
