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
from collections.abc import Collection
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from .layout_focal import split_windows
from .modeling_focal import FocalForImageClassification, FocalModel, pad_to_multiple
from .neighborhood_focal import Neighborhood

__all__ = [
    "AttentionRecord",
    "BlockAttention",
    "LevelAttention",
    "QueryAttention",
    "attention_rollout",
    "draw_query",
    "plot_grid",
    "plot_query",
    "plot_saliency",
    "query_attention",
    "record_attention",
    "shaded",
    "to_pixels",
]

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
        return tuple(self.neighborhood.index.shape[:2])

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
        return self.neighborhood.index.clamp(min=0).cpu()

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
    """Run a model on one image and keep the attention weights of every block: 30 MB for Focal-Tiny at 224 pixels.

    Not from two threads at once with the same model, whose hooks and attention it sets for as long as it runs.

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
        neighborhoods[module] = Neighborhood(output.index, output.parts)

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
        # Offloaded models have no device; their hooks bring the image to where it is needed.
        device = None if focal.device.type == "meta" else focal.device
        last_hidden_state = focal(pixel_values.to(device, focal.dtype)).last_hidden_state
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

    def plane(self, levels: Collection[int] | None = None) -> np.ndarray:
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
    seen = ~torch.isneginf(block.neighborhood.bias(*places)[0, 0, query]).cpu().numpy()

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
    but for what lies on padding, which is cut off. Pixels that the model drops (`drop_remainder`) have 0.
    """
    pixels = np.asarray(plane).repeat(stride, 0).repeat(stride, 1) / stride**2
    pixels = pixels[: image_size[0], : image_size[1]]
    return np.pad(pixels, [(0, length - tokens) for length, tokens in zip(image_size, pixels.shape, strict=True)])


def attended(block: BlockAttention, relevance: torch.Tensor) -> torch.Tensor:
    """Hands the relevance (rows, columns) of a block's queries on to the tokens that they attend to.

    Each by its weights, the mean of the heads; a pooled token hands its share on to the tokens of its cell, evenly.
    What falls on padding is gone.
    """
    shift, window = block.shift_size, block.window_size
    maps = pad_to_multiple(relevance[None], window)[..., None].roll((-shift, -shift), (1, 2))
    by_window = split_windows(maps, window).flatten(3).flatten(0, 2)  # (windows, queries)
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
    """How much each part of the image has to do with the answer: attention rollout over all blocks and stages.

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
            # Where a side was odd, the last tokens were merged from fewer than four, or from none of the last ones.
            merged_rows, merged_cols = (
                (length - 2 * torch.arange(tokens)).clamp(max=2)
                for length, tokens in zip((height, width), relevance.shape, strict=True)
            )
            relevance = relevance / (merged_rows[:, None] * merged_cols)
            relevance = relevance.repeat_interleave(2, 0).repeat_interleave(2, 1)[:height, :width]
            dropped_rows, dropped_cols = height - relevance.shape[0], width - relevance.shape[1]
            relevance = nn.functional.pad(relevance, (0, dropped_cols, 0, dropped_rows))
        for block in reversed(blocks):
            relevance = (relevance + attended(block, relevance)) / 2
    return relevance.numpy()


# -------------------------------------------------------------------------------------------------------------- figures

# Red, green and blue, of 255.
LEVEL_COLOURS = ((255, 176, 0), (77, 166, 255), (255, 95, 210), (61, 220, 132))  # from level 0; then anew
QUERY_COLOUR = (255, 42, 42)
WINDOW_COLOUR = (255, 255, 255)
PADDING_COLOUR = (32, 32, 32)
STRONGEST = 0.95  # of the highest weight's colour, the rest being the image
DASHED = (0, (2, 1.5))
HEADS_IN_A_LINE = 12


def level_colour(level: int) -> tuple[int, int, int]:
    return LEVEL_COLOURS[level % len(LEVEL_COLOURS)]


def of_one(colour: tuple[int, int, int]) -> tuple[float, ...]:
    """A colour as matplotlib takes it."""
    return tuple(part / 255 for part in colour)


def drawn(seen: QueryAttention, levels: Collection[int] | None) -> list[LevelAttention]:
    """The levels that are to be drawn, the finest first."""
    chosen = seen.levels if levels is None else [seen.levels[level] for level in set(levels)]
    return sorted(chosen, key=lambda level: level.cell)


def shown_size(seen: QueryAttention, levels: Collection[int] | None = None) -> tuple[int, int]:
    """Height and width in pixels of the image, with the padding where weight falls on it."""
    if not any(level.outside.any() for level in drawn(seen, levels)):
        return seen.image_size
    return tuple(np.maximum(seen.image_size, np.multiply(seen.levels[0].plane.shape, seen.stride)).tolist())


def covered(boxes: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Which tokens of a map lie in any of the boxes, a mask of shape `size`."""
    mask = np.zeros(size, dtype=bool)
    for top, left, bottom, right in boxes:
        mask[top:bottom, left:right] = True
    return mask


def shaded(image: np.ndarray, seen: QueryAttention, levels: Collection[int] | None = None) -> np.ndarray:
    """The image, grey and dimmed, with what a query looks at in colour. Needs no matplotlib, and a few milliseconds.

    Each level has its colour, the stronger the higher the weight, by the square root of its share of the level's
    highest, so that small weights stay visible. Finer levels cover coarser ones.

    Args:
        image (`np.ndarray` of shape `(height, width, 3)`):
            What the model was shown, of type uint8 and of `seen.image_size`.
        seen ([`QueryAttention`]):
            From [`query_attention`].
        levels (`Collection[int]`, *optional*):
            The levels to draw; all by default.

    Returns:
        `np.ndarray` of shape `(rows, columns, 3)` of type uint8: the pixels of the image and of the padded map. What it
        has beyond the image's height and width is padding.
    """
    image, (height, width) = np.asarray(image), seen.image_size
    if image.shape != (height, width, 3):
        raise ValueError(
            f"image must be what the model was shown, of shape {(height, width, 3)}; got {image.shape}. Resize it to "
            "the pixel_values first."
        )
    size = seen.levels[0].plane.shape
    rows, cols = size[0] * seen.stride, size[1] * seen.stride
    pixels = np.empty((max(rows, height), max(cols, width), 3), dtype=np.float32)
    pixels[:] = PADDING_COLOUR
    pixels[:height, :width] = 0.55 * image.mean(2, keepdims=True)
    finer = np.zeros(size, dtype=bool)
    for level in drawn(seen, levels):
        mask = covered(level.boxes, size)
        strength = STRONGEST * np.sqrt(level.plane / (level.plane.max() or 1)) * (mask & ~finer)
        strength = strength.astype(np.float32).repeat(seen.stride, 0).repeat(seen.stride, 1)[..., None]
        colour = np.array(level_colour(level.level), dtype=np.float32)
        pixels[:rows, :cols] += strength * (colour - pixels[:rows, :cols])
        finer |= mask
    return pixels.round().astype(np.uint8)


def outline(mask: np.ndarray, stride: int) -> list[list[tuple[int, int]]]:
    """The borders of a mask (rows, columns) of tokens, as lines from (x, y) to (x, y) in pixels."""
    framed = np.pad(mask, 1).astype(np.int8)
    below, right = np.argwhere(np.diff(framed, axis=0)[:, 1:-1]), np.argwhere(np.diff(framed, axis=1)[1:-1])
    lines = [((col, row), (col + 1, row)) for row, col in below] + [((col, row), (col, row + 1)) for row, col in right]
    return [[(int(x) * stride, int(y) * stride) for x, y in line] for line in lines]


def draw_query(axes, image: np.ndarray, seen: QueryAttention, levels: Collection[int] | None = None, line: float = 1.0):
    """Draws into a matplotlib `Axes` what [`shaded`] makes, with lines.

    They are around the query's token (red), its window (white), the region of the fine tokens and the cells of the
    pooled ones. Dashed is what the query sees across the map's edge. Padding is shown where weight falls on it.

    Args:
        image, seen, levels:
            As in [`shaded`].
        line (`float`, *optional*):
            The width of lines in points.
    """
    from matplotlib.collections import LineCollection

    pixels, size, stride = shaded(image, seen, levels), seen.levels[0].plane.shape, seen.stride
    axes.imshow(pixels, extent=(0, pixels.shape[1], pixels.shape[0], 0), interpolation="nearest")

    def add_lines(lines: list, colour: tuple[int, int, int], width: float, style="-"):
        # Butted, or dashes would grow together.
        axes.add_collection(
            LineCollection(lines, colors=[of_one(colour)], linewidths=width, linestyles=[style], capstyle="butt")
        )

    for level in reversed(drawn(seen, levels)):
        for side, style in ((False, "-"), (True, DASHED)):
            boxes, colour = level.boxes[level.wrapped == side], level_colour(level.level)
            if level.level == 0:
                add_lines(outline(covered(boxes, size), stride), colour, line, style)
            else:
                cells = [
                    [(left, top), (right, top), (right, bottom), (left, bottom)] for top, left, bottom, right in boxes
                ]
                cells = [[(x * stride, y * stride) for x, y in [*cell, cell[0]]] for cell in cells]
                add_lines(cells, colour, line / 2, style)
    add_lines(outline(covered(seen.window, size), stride), WINDOW_COLOUR, line)
    (row, col) = seen.query
    add_lines(outline(covered(np.array([(row, col, row + 1, col + 1)]), size), stride), QUERY_COLOUR, 1.5 * line)

    bottom, right = shown_size(seen, levels)
    margin = 0.004 * max(bottom, right)  # for the outer half of lines along the edge
    axes.set(xlim=(-margin, right + margin), ylim=(bottom + margin, -margin), xticks=[], yticks=[], anchor="NW")
    axes.spines[:].set_visible(False)


def new_figure(width: float, height: float):
    """An empty `matplotlib.figure.Figure`, in inches: of no window, and known to no global state."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Figures need matplotlib: pip install 'focal-hf[visualization]'.") from error
    return Figure(figsize=(width, height))


def level_name(level: LevelAttention) -> str:
    return "tokens" if level.level == 0 else f"cells of {level.cell} x {level.cell} tokens"


def plot_query(image: np.ndarray, seen: QueryAttention):
    """The paper's Figure 1 for any image, as a `matplotlib.figure.Figure`: all levels in one, then each by itself.

    Args:
        image, seen:
            As in [`shaded`].
    """
    panels, side = 1 + len(seen.levels), 4.0
    shown = shown_size(seen)
    ratio = shown[0] / shown[1]
    top, below, gap = 0.8, 1.0, 0.15  # inches
    width, height = panels * (side + gap) + gap, side * ratio + top + below
    figure = new_figure(width, height)
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, PowerNorm
    from matplotlib.lines import Line2D

    def add_axes(panel: int, from_bottom: float, high: float):
        return figure.add_axes(
            ((gap + panel * (side + gap)) / width, from_bottom / height, side / width, high / height)
        )

    heads = "mean of its heads" if seen.head is None else f"head {seen.head}"
    figure.text(
        *(gap / width, 1 - 0.32 / height),
        f"Where a token looks: row {seen.query[0]}, column {seen.query[1]} of the map of stage {seen.stage}, "
        f"layer {seen.layer}, {heads}",
        weight="bold",
        size=12,
    )
    axes = add_axes(0, below, side * ratio)
    draw_query(axes, image, seen)
    axes.set_title("near finely, far coarsely", loc="left", size=11)
    for panel, level in enumerate(seen.levels, 1):
        axes = add_axes(panel, below, side * ratio)
        draw_query(axes, image, seen, [level.level])
        axes.set_title(f"level {level.level}: {level_name(level)}", loc="left", size=11)
        colour = np.array(of_one(level_colour(level.level)))
        dark = np.full(3, 0.2)
        colours = LinearSegmentedColormap.from_list("level", [dark, dark + STRONGEST * (colour - dark)])
        highest = level.plane.max() * level.cell**2
        bar = figure.colorbar(
            ScalarMappable(PowerNorm(0.5, vmin=0, vmax=highest or 1), colours),
            cax=add_axes(panel, below - 0.25, 0.15),
            orientation="horizontal",
            ticks=[highest * part for part in (0, 1 / 16, 1 / 4, 1)],
        )
        labels = bar.ax.set_xticklabels([f"{100 * highest * part:.2g} %" for part in (0, 1 / 16, 1 / 4, 1)], size=9)
        labels[0].set_horizontalalignment("left")
        labels[-1].set_horizontalalignment("right")
        bar.ax.minorticks_off()
        each = "token" if level.level == 0 else "cell"
        bar.set_label(f"weight of a {each}; together {100 * level.weights.sum():.1f} %")

    def entry(colour: tuple[int, int, int], label: str, filled: bool):
        return Line2D(
            *([], []),
            label=label,
            linestyle="none",
            marker="s",
            markersize=9,
            markeredgewidth=2,
            markeredgecolor=of_one(colour),
            markerfacecolor=of_one(colour) if filled else "none",
        )

    entries = [entry(QUERY_COLOUR, "query", False), entry(WINDOW_COLOUR, "its window", False)]
    entries += [entry(level_colour(level.level), level_name(level), True) for level in seen.levels]
    if any(level.wrapped.any() for level in seen.levels):
        entries.append(Line2D([], [], color="white", label="across the edge", linestyle=DASHED))
    if any(level.outside.any() for level in seen.levels):
        entries.append(entry(PADDING_COLOUR, "padding", True))
    figure.legend(
        handles=entries,
        loc="upper left",
        bbox_to_anchor=(gap / width, (below - 0.08) / height),
        borderaxespad=0,
        ncols=2,
        facecolor="#505050",
        labelcolor="white",
        fontsize=9,
        columnspacing=1.2,
        handletextpad=0.4,
    )
    return figure


def plot_grid(image: np.ndarray, record: AttentionRecord, at: tuple[float, float], layer: int = -1):
    """Where a point looks in every head of every stage, in one of its layers, as a `matplotlib.figure.Figure`.

    Args:
        image:
            As in [`shaded`].
        record, at, layer:
            As in [`query_attention`].
    """
    lines = []
    for stage, blocks in enumerate(record.stages):
        views = [
            query_attention(record, at, stage, layer, head)
            for head in range(blocks[chosen(f"layer of stage {stage}", layer, len(blocks))].weights.shape[1])
        ]
        lines += [views[first : first + HEADS_IN_A_LINE] for first in range(0, len(views), HEADS_IN_A_LINE)]
    columns, ratio = max(map(len, lines)), record.image_size[0] / record.image_size[1]
    side = max(1.3, 8 / columns)
    title, label, gap = 0.45, 0.25, 0.08  # inches
    width, height = columns * (side + gap) + gap, title + len(lines) * (side * ratio + label) + gap
    figure = new_figure(width, height)
    figure.text(gap / width, 1 - 0.28 / height, "Where it looks, by stage and head", weight="bold", size=12)
    for line, views in enumerate(lines):
        bottom = height - title - (line + 1) * (side * ratio + label)
        for column, seen in enumerate(views):
            left = gap + column * (side + gap)
            axes = figure.add_axes((left / width, bottom / height, side / width, side * ratio / height))
            draw_query(axes, image, seen, line=0.5)
            name = f"stage {seen.stage}, head 0" if seen.head == 0 else f"{seen.head}"
            axes.set_title(name, size=8, loc="left", pad=3)
    return figure


def plot_saliency(image: np.ndarray, saliency: np.ndarray, patch_size: int, title: str):
    """The image, and beside it what [`attention_rollout`] tells, as a `matplotlib.figure.Figure`.

    Args:
        image (`np.ndarray` of shape `(height, width, 3)`):
            What the model was shown, of type uint8.
        saliency (`np.ndarray` of shape `(rows, columns)`), patch_size (`int`):
            From [`attention_rollout`], and the record's.
        title (`str`):
            What stands above, such as the class.
    """
    height, width = image.shape[:2]
    side, ratio, top, gap = 4.0, height / width, 0.45, 0.15
    wide, high = 2 * (side + gap) + gap + 0.9, side * ratio + top + gap
    figure = new_figure(wide, high)
    figure.text(gap / wide, 1 - 0.3 / high, title, weight="bold", size=12)

    def add_axes(left: float, across: float):
        return figure.add_axes((left / wide, gap / high, across / wide, side * ratio / high))

    plain, heated = add_axes(gap, side), add_axes(2 * gap + side, side)
    plain.imshow(image, extent=(0, width, height, 0))
    heated.imshow(image.mean(2), cmap="gray", vmin=0, vmax=255, extent=(0, width, height, 0))
    extent = (0, saliency.shape[1] * patch_size, saliency.shape[0] * patch_size, 0)
    heat = heated.imshow(saliency, cmap="inferno", alpha=0.7, vmin=0, extent=extent, interpolation="nearest")
    for axes in (plain, heated):
        axes.set(xlim=(0, width), ylim=(height, 0), xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    bar = figure.colorbar(heat, cax=add_axes(2 * (gap + side) + 0.1, 0.15), label="share of a patch")
    bar.ax.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.2g} %")
    return figure
