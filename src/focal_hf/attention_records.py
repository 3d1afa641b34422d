"""Attention weights of one forward pass, and the arithmetic that puts them back on the image."""

import functools
import itertools
from collections.abc import Collection
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from .geometry_focal import LevelGrid, level_grid
from .layout_focal import split_windows
from .modeling_focal import FocalAttention, FocalForImageClassification, FocalModel, pad_to_multiple
from .neighborhood_focal import BiasPart, Neighborhood

# --- Recording --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BlockAttention:
    """The attention weights of one block for one image, and where the keys are. All tensors are on the CPU.

    A block with a shift works on a rolled map: row r of the rolled map is row (r + shift_size) % padded rows of the
    map.
    """

    weights: torch.Tensor  # (windows, heads, queries, keys) in float32; they sum to 1 over the keys
    neighborhood: Neighborhood  # of the rolled map
    map_size: tuple[int, int]  # rows and columns of tokens
    window_size: int
    shift_size: int
    cells: list[int]  # side of the cells of each level, in tokens of the map; 1 at level 0

    @property
    def windows(self) -> tuple[int, int]:
        """Rows and columns of windows."""
        rows, cols = self.neighborhood.index.shape[:2]
        return rows, cols

    @property
    def padded_size(self) -> tuple[int, int]:
        """Rows and columns of the map, padded to whole windows."""
        rows, cols = self.windows
        return rows * self.window_size, cols * self.window_size

    @property
    def grids(self) -> list[LevelGrid]:
        """The cells of each level in the rolled map."""
        return [level_grid(*self.padded_size, self.window_size, level) for level in range(len(self.cells))]


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
            The classifier's answer to each token of the last map alone. Their mean over the tokens is `logits`.
    """

    stages: list[list[BlockAttention]]
    image_size: tuple[int, int]
    patch_size: int
    token_logits: np.ndarray | None

    @property
    def logits(self) -> np.ndarray | None:
        """The model's logits (labels,), or `None` without a classifier."""
        return None if self.token_logits is None else self.token_logits.mean((0, 1))


@torch.no_grad()
def record_attention(model: PreTrainedModel, pixel_values: torch.Tensor) -> AttentionRecord:
    """Runs a model on one image and keeps the attention weights of every block: 30 MB for Focal-Tiny at 224 pixels.

    It must not run in two threads at once with the same model, because it sets the model's hooks and attention.

    Args:
        model ([`PreTrainedModel`]):
            A Focal model, or a model that contains one, in evaluation mode. It runs with
            `attn_implementation="eager"`, which returns the weights; afterwards its own implementation is restored.
        pixel_values (`torch.Tensor` of shape `(1, channels, height, width)`):
            The image, of any size, as the image processor returns it.

    Raises:
        ValueError: for a model that is not Focal or is training, for more than one image, and for pixels that are not
            floating point.
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
            f"{type(pixel_values).__name__} of shape {tuple(getattr(pixel_values, 'shape', ()))}."
        )

    attentions = [
        [module for module in stage.modules() if isinstance(module, FocalAttention)] for stage in focal.encoder.layers
    ]
    neighborhoods: dict[nn.Module, Neighborhood] = {}
    recorded: dict[nn.Module, BlockAttention] = {}

    def keep_neighborhood(module: nn.Module, args: tuple, output: Neighborhood) -> None:
        # Without the forms that attention implementations have derived.
        parts = [BiasPart(part.source.cpu(), part.pattern.cpu()) for part in output.parts]
        neighborhoods[module] = Neighborhood(output.index.cpu(), parts, output.squares)

    def keep_weights(module: FocalAttention, args: tuple, output: tuple) -> None:
        height, width = args[0].shape[1:3]
        recorded[module] = BlockAttention(
            weights=output[1].float().cpu(),
            neighborhood=neighborhoods[module.neighborhood],
            map_size=(height, width),
            window_size=module.window_size,
            shift_size=module.shift_of(height, width),
            cells=[1] if module.pooling is None else [1, *module.pooling.cells],
        )

    hooks = []
    for attention in itertools.chain(*attentions):
        hooks.append(attention.neighborhood.register_forward_hook(keep_neighborhood))
        hooks.append(attention.register_forward_hook(keep_weights))
    implementation = focal.config._attn_implementation
    focal.set_attn_implementation("eager")
    try:
        # Offloaded models have no device. Their hooks move the image.
        device = None if focal.device.type == "meta" else focal.device
        # Integers stay, so that the model refuses them: they are not normalised.
        dtype = focal.dtype if pixel_values.is_floating_point() else None
        last_hidden_state = focal(pixel_values.to(device=device, dtype=dtype)).last_hidden_state
    finally:
        focal.set_attn_implementation(implementation)
        for hook in hooks:
            hook.remove()

    stages = [[recorded[attention] for attention in stage] for stage in attentions]
    classifier = next(
        (module.classifier for module in modules if isinstance(module, FocalForImageClassification)), None
    )
    token_logits = None
    if classifier is not None:
        # The classifier is linear, so its answer to the mean of the tokens is the mean of its answers to each token.
        token_logits = classifier(last_hidden_state)[0].unflatten(0, stages[-1][-1].map_size).float().cpu().numpy()
    height, width = pixel_values.shape[2:]
    return AttentionRecord(stages, (height, width), focal.config.patch_size, token_logits)


# --- One query --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LevelAttention:
    """What a query attends to at one level: boxes on the map, with weights.

    A box is the part of the map that one key covers: a token, or the cell of a pooled token. Where a shift puts parts
    of a cell at opposite edges, or part of a cell is padding, each part is a box and has a share of the weight by area.

    Args:
        level (`int`):
            0 for the map's own tokens, k for pooled tokens of level k.
        cell (`int`):
            Side of the level's cells in tokens; 1 at level 0.
        boxes (`np.ndarray` of shape `(boxes, 4)`):
            Top, left, bottom and right in tokens of the map, the last two exclusive.
        weights (`np.ndarray` of shape `(boxes,)`):
            The weight of each box. The weights of all levels sum to 1. Keys that are hidden from the query have no box:
            pooled tokens beyond the map's edge, and tokens that a shift has brought from the opposite edge.
        wrapped (`np.ndarray` of shape `(boxes,)`):
            Whether a box lies across the map's edge. The query attends to such a box as if it were next to the query's
            window. On the image, the box is at the opposite edge, at the place in `boxes`.
        outside (`np.ndarray` of shape `(boxes,)`):
            Whether a box is padding, below or to the right of the image's tokens.
        plane (`np.ndarray` of shape `(rows, columns)` of the padded map):
            The weight on each token, with a cell's weight spread evenly over its tokens. It has the same sum as
            `weights`.
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
    """What one query attends to, as [`query_attention`] returns it.

    Args:
        stage, layer (`int`), head (`int`, *optional*):
            The arguments of [`query_attention`]; `None` for the mean of the heads.
        query (`tuple[int, int]`):
            Row and column of the query's token.
        window (`np.ndarray` of shape `(boxes, 4)`):
            The query's window, as boxes of [`LevelAttention`]: one, or up to four where a shift moves it across edges.
        levels (`list[LevelAttention]`):
            Level 0 has single tokens. Level 1 has the coarsest pooled tokens, and each level after it finer ones.
        map_size (`tuple[int, int]`):
            Rows and columns of the image's tokens. Planes may be larger, by the padding.
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

    def plane(self, levels: Collection[int] | None = None) -> np.ndarray:
        """The weight on each token of the padded map (rows, columns), of some levels or, with a sum of 1, of all."""
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
    """Where `length` tokens of a rolled axis lie on the map.

    The axis is cyclic: the tokens may start below 0 and end beyond `padded`. `image` is the length without padding.
    `query` is a token of the rolled axis. A run is `wrapped` if the map's edge lies between it and this token.
    """
    rolled = np.arange(first, first + length)
    place = (rolled + shift) % padded
    wrapped = place - rolled != (query + shift) % padded - query
    outside = place >= image
    starts = np.flatnonzero((np.diff(place) != 1) | (np.diff(outside) != 0)) + 1
    return tuple(
        Run(int(place[part[0]]), int(place[part[-1]]) + 1, bool(wrapped[part[0]]), bool(outside[part[0]]))
        for part in np.split(np.arange(length), starts)
    )


def checked_number(what: str, number: int, count: int) -> int:
    """Converts an index, which may be negative as in Python, to one that counts from 0.

    Raises:
        ValueError: for a number out of range.
    """
    if not -count <= number < count:
        raise ValueError(f"There is no {what} {number}: they are counted from 0, and there are {count}.")
    return number % count


def query_attention(
    record: AttentionRecord, at: tuple[float, float], stage: int = 0, layer: int = -1, head: int | None = None
) -> QueryAttention:
    """What one point of the image attends to.

    Args:
        record ([`AttentionRecord`]):
            From [`record_attention`].
        at (`tuple[float, float]`):
            The point, as fractions from 0 to 1 of the image's width (from the left) and height (from the top).
        stage, layer (`int`, *optional*):
            The stage and its block, counted from 0, or from the last (-1) down.
        head (`int`, *optional*):
            The head; the mean of all heads by default.

    Raises:
        ValueError: for a point outside of the image, and for a stage, layer or head that the model does not have.
    """
    if len(at) != 2 or not all(0 <= value <= 1 for value in at):
        raise ValueError(
            f"A point is two fractions of the image's width and height, each from 0 to 1; got {tuple(at)}."
        )
    stage = checked_number("stage", stage, len(record.stages))
    layer = checked_number(f"stage {stage}, layer", layer, len(record.stages[stage]))
    block = record.stages[stage][layer]
    if head is not None:
        head = checked_number(f"stage {stage}, head", head, block.weights.shape[1])

    stride = record.patch_size * 2**stage
    row, col = (
        min(int(fraction * pixels / stride), tokens - 1)
        for fraction, pixels, tokens in zip(reversed(at), record.image_size, block.map_size, strict=True)
    )
    window, shift, padded, neighborhood = block.window_size, block.shift_size, block.padded_size, block.neighborhood
    rolled = [(place - shift) % length for place, length in zip((row, col), padded, strict=True)]
    (window_row, row_in_window), (window_col, col_in_window) = (divmod(place, window) for place in rolled)
    number, query = window_row * block.windows[1] + window_col, row_in_window * window + col_in_window

    of_heads = block.weights[number, :, query]
    weights = (of_heads.mean(0) if head is None else of_heads[head]).double().numpy()
    index = neighborhood.index[window_row, window_col].numpy()
    bias = neighborhood.bias(slice(window_row, window_row + 1), slice(window_col, window_col + 1))
    visible = ~torch.isneginf(bias[0, 0, query]).numpy()

    def map_runs(first_row: int, first_col: int, side: int) -> itertools.product:
        """Rows and columns of the map that a square of the rolled map covers."""
        axes = zip((first_row, first_col), rolled, padded, block.map_size, strict=True)
        return itertools.product(*(runs(first, side, own, shift, length, image) for first, own, length, image in axes))

    levels, first = [], 0
    for level, grid in enumerate(block.grids):
        keys = np.flatnonzero(visible & (index >= first) & (index < first + grid.rows * grid.cols))
        if level == 0 and neighborhood.squares and neighborhood.parts[0].is_mask:
            # In the index, a token across the edge has the number of its place at the opposite edge. Its position in
            # the square shows on which side of the window it is.
            square = neighborhood.squares[0]
            key_row = window_row * square.step - square.first + keys // square.side
            key_col = window_col * square.step - square.first + keys % square.side
        else:
            key_row, key_col = np.divmod(index[keys] - first, grid.cols)
        first += grid.rows * grid.cols

        parts, plane = [], np.zeros(padded)
        corners = zip(
            (grid.top + key_row * grid.cell).tolist(), (grid.left + key_col * grid.cell).tolist(), strict=True
        )
        for weight, corner in zip(weights[keys] / grid.cell**2, corners, strict=True):
            for rows, cols in map_runs(*corner, grid.cell):
                plane[rows.start : rows.stop, cols.start : cols.stop] += weight
                area = (rows.stop - rows.start) * (cols.stop - cols.start)
                flags = rows.wrapped or cols.wrapped, rows.outside or cols.outside
                parts.append((rows.start, cols.start, rows.stop, cols.stop, *flags, weight * area))
        columns = np.array(parts).reshape(-1, 7)
        boxes, (wrapped, outside) = columns[:, :4].astype(int), columns[:, 4:6].T.astype(bool)
        levels.append(LevelAttention(level, grid.cell, boxes, columns[:, 6], wrapped, outside, plane))

    own_runs = map_runs(window_row * window, window_col * window, window)
    own = np.array([(rows.start, cols.start, rows.stop, cols.stop) for rows, cols in own_runs])
    return QueryAttention(stage, layer, head, (row, col), own, levels, block.map_size, stride, record.image_size)


# --- The whole image --------------------------------------------------------------------------------------------------


def to_pixels(plane: np.ndarray, stride: int, image_size: tuple[int, int]) -> np.ndarray:
    """A plane (rows, columns) of tokens as one of pixels, (height, width) = `image_size`.

    Each token's number is spread evenly over its `stride` by `stride` pixels. The sum stays the same, except for what
    is on padding, which is cut off. Pixels that the model drops (`drop_remainder`) have 0.
    """
    pixels = np.asarray(plane).repeat(stride, 0).repeat(stride, 1) / stride**2
    pixels = pixels[: image_size[0], : image_size[1]]
    return np.pad(pixels, [(0, length - tokens) for length, tokens in zip(image_size, pixels.shape, strict=True)])


def attended(block: BlockAttention, relevance: torch.Tensor) -> torch.Tensor:
    """Distributes the relevance (rows, columns) of a block's queries over the tokens that they attend to.

    The shares are the attention weights, the mean of the heads. A pooled token spreads its share evenly over the tokens
    of its cell. The share of padding is lost.
    """
    shift = block.shift_size
    maps = pad_to_multiple(relevance[None], block.window_size)[..., None].roll((-shift, -shift), (1, 2))
    by_window = split_windows(maps, block.window_size).flatten(3).flatten(0, 2)  # (windows, queries)
    by_key = torch.einsum("wq,whqk->wk", by_window, block.weights.to(relevance.dtype)) / block.weights.shape[1]

    counts = [grid.rows * grid.cols for grid in block.grids]
    tokens = relevance.new_zeros(sum(counts))
    tokens.index_add_(0, block.neighborhood.index.clamp(min=0).flatten(), by_key.flatten())  # hidden keys add 0
    result = relevance.new_zeros(block.padded_size)
    for grid, of_level in zip(block.grids, tokens.split(counts), strict=True):
        cells = of_level.view(grid.rows, grid.cols) / grid.cell**2
        spread = cells.repeat_interleave(grid.cell, 0).repeat_interleave(grid.cell, 1)
        result[grid.top : grid.top + spread.shape[0], grid.left : grid.left + spread.shape[1]] += spread
    height, width = block.map_size
    return result.roll((shift, shift), (0, 1))[:height, :width]


def attention_rollout(record: AttentionRecord, label: int | None = None) -> np.ndarray:
    """How much each part of the image contributes to the answer: attention rollout over all blocks and stages.

    [Abnar and Zuidema 2020](https://arxiv.org/abs/2005.00928): a block passes on half of a token's relevance through
    its residual connection and half through its attention, the mean of the heads. The relevance is one number per
    token, computed from the last map back to the first; no matrix of all pairs of tokens is made. A pooled token passes
    its relevance evenly to the tokens of its cell, whatever the weights of the pooling are; a token of a later stage,
    to the four tokens that it was merged from.

    The relevance of the last map's tokens is their contribution to the logit of the class, as far as it exceeds their
    mean contribution to all classes, and 0 for tokens below that mean. It is exact and needs no gradient: a logit is
    the mean of the classifier's answers to each token.

    Args:
        record ([`AttentionRecord`]):
            From [`record_attention`].
        label (`int`, *optional*):
            The class. By default all tokens of the last map have the same relevance.

    Returns:
        `np.ndarray` of shape `(rows, columns)` of the first stage's map, `record.patch_size` pixels each. Its sum is 1
        minus the share of the padding of maps that are not whole windows, or 0 where no token contributes to the class.

    Raises:
        ValueError: for a class that the model does not have, and for any class without a classifier.
    """
    rows, cols = record.stages[-1][-1].map_size
    if label is None:
        relevance = torch.full((rows, cols), 1 / (rows * cols), dtype=torch.float64)
    else:
        if record.token_logits is None:
            raise ValueError("The saliency of a class needs a classifier: record a FocalForImageClassification.")
        labels = record.token_logits.shape[2]
        label = checked_number("class", label, labels)
        logits = record.token_logits.astype(np.float64)
        votes = (logits[..., label] - (logits.mean(2) if labels > 1 else 0)).clip(0)
        relevance = torch.from_numpy(votes / max(votes.sum(), np.finfo(votes.dtype).tiny))

    for blocks in reversed(record.stages):
        height, width = blocks[-1].map_size
        if (height, width) != tuple(relevance.shape):
            # At the end of an odd side, one token was merged alone or, with drop_remainder, not at all.
            row, col = torch.arange(height) // 2, torch.arange(width) // 2
            merged = torch.outer(row.bincount(), col.bincount())
            bottom, right = merged.shape[0] - relevance.shape[0], merged.shape[1] - relevance.shape[1]
            relevance = (nn.functional.pad(relevance, (0, right, 0, bottom)) / merged)[row][:, col]
        for block in reversed(blocks):
            relevance = (relevance + attended(block, relevance)) / 2
    return relevance.numpy()
