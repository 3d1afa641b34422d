"""Figures of attention. Only functions that return or take a matplotlib object need matplotlib."""

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import numpy as np

from .attention_records import AttentionRecord, LevelAttention, QueryAttention, checked_number, query_attention

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

# Red, green and blue, from 0 to 255.
LEVEL_COLOURS = ((255, 176, 0), (77, 166, 255), (255, 95, 210), (61, 220, 132))  # of level 0, 1, …, then from the first
QUERY_COLOUR = (255, 42, 42)
WINDOW_COLOUR = (255, 255, 255)
PADDING_COLOUR = (32, 32, 32)
STRONGEST = 0.95  # opacity of the colour at a level's highest weight
DASHED = (0, (2, 1.5))
HEADS_PER_LINE = 12
SIDE = 4.0  # width of a panel in inches


def level_colour(level: int) -> tuple[int, int, int]:
    return LEVEL_COLOURS[level % len(LEVEL_COLOURS)]


def matplotlib_colour(colour: tuple[int, int, int]) -> tuple[float, float, float]:
    red, green, blue = colour
    return red / 255, green / 255, blue / 255


def finest_first(seen: QueryAttention, levels: Collection[int] | None) -> list[LevelAttention]:
    """Some levels, by default all, the finest first."""
    selected = seen.levels if levels is None else [seen.levels[level] for level in set(levels)]
    return sorted(selected, key=lambda level: level.cell)


def visible_size(seen: QueryAttention, levels: Collection[int] | None = None) -> tuple[int, int]:
    """Height and width in pixels of the image, including the padding if it has weight."""
    if not any(level.outside.any() for level in finest_first(seen, levels)):
        return seen.image_size
    height, width = np.maximum(seen.image_size, np.multiply(seen.levels[0].plane.shape, seen.stride)).tolist()
    return height, width


def box_mask(boxes: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """Mask of shape `size` of the tokens that are in any of the boxes."""
    mask = np.zeros(size, dtype=bool)
    for top, left, bottom, right in boxes:
        mask[top:bottom, left:right] = True
    return mask


def shaded(image: np.ndarray, seen: QueryAttention, levels: Collection[int] | None = None) -> np.ndarray:
    """The image in dimmed grey, with what a query attends to in colour. Takes a few milliseconds, without matplotlib.

    Each level has a colour. Its opacity is the square root of the weight relative to the level's highest weight, so
    that small weights are visible. Finer levels cover coarser ones.

    Args:
        image (`np.ndarray` of shape `(height, width, 3)`):
            The model's input as pixels of type uint8, of `seen.image_size`.
        seen ([`QueryAttention`]):
            From [`query_attention`].
        levels (`Collection[int]`, *optional*):
            The levels to draw; all by default.

    Returns:
        `np.ndarray` of shape `(rows, columns, 3)` of type uint8: the pixels of the image and of the padded map. Pixels
        beyond the image's height and width are padding.

    Raises:
        ValueError: for an image of another shape or type.
    """
    image, (height, width) = np.asarray(image), seen.image_size
    if image.shape != (height, width, 3) or image.dtype != np.uint8:
        raise ValueError(
            f"image must be what the model was shown, of shape {(height, width, 3)} and type uint8; got {image.shape} "
            f"and {image.dtype}. Resize it to the pixel_values first."
        )
    size = seen.levels[0].plane.shape
    rows, cols = size[0] * seen.stride, size[1] * seen.stride
    pixels = np.empty((max(rows, height), max(cols, width), 3), dtype=np.float32)
    pixels[:] = PADDING_COLOUR
    pixels[:height, :width] = 0.55 * image.mean(2, keepdims=True)
    finer = np.zeros(size, dtype=bool)
    for level in finest_first(seen, levels):
        mask = box_mask(level.boxes, size)
        strength = STRONGEST * np.sqrt(level.plane / (level.plane.max() or 1)) * (mask & ~finer)
        strength = strength.astype(np.float32).repeat(seen.stride, 0).repeat(seen.stride, 1)[..., None]
        colour = np.array(level_colour(level.level), dtype=np.float32)
        pixels[:rows, :cols] += strength * (colour - pixels[:rows, :cols])
        finer |= mask
    return pixels.round().astype(np.uint8)


def outline(mask: np.ndarray) -> np.ndarray:
    """The borders of a mask (rows, columns) as lines (lines, 2, 2) from (x, y) to (x, y)."""
    framed = np.pad(mask, 1).astype(np.int8)
    below, right = np.argwhere(np.diff(framed, axis=0)[:, 1:-1]), np.argwhere(np.diff(framed, axis=1)[1:-1])
    return np.concatenate([below[:, None, ::-1] + [[0, 0], [1, 0]], right[:, None, ::-1] + [[0, 0], [0, 1]]])


def draw_query(
    axes: "Axes", image: np.ndarray, seen: QueryAttention, levels: Collection[int] | None = None, line: float = 1.0
) -> None:
    """Draws the image of [`shaded`] into a matplotlib `Axes`, with outlines.

    The outlines are those of the query's token (red), its window (white), the region of the fine tokens and the cells
    of the pooled tokens. They are dashed for keys across the map's edge. Padding is visible if it has weight.

    Args:
        image, seen, levels:
            As in [`shaded`].
        line (`float`, *optional*):
            The width of lines in points.
    """
    from matplotlib.collections import LineCollection

    pixels, size, stride = shaded(image, seen, levels), seen.levels[0].plane.shape, seen.stride
    axes.imshow(pixels, extent=(0, pixels.shape[1], pixels.shape[0], 0), interpolation="nearest")

    def add_lines(lines: np.ndarray, colour: tuple[int, int, int], width: float, style: Any = "-") -> None:
        # Butt caps keep dashes apart.
        drawn = LineCollection(list(lines * stride), linewidths=width, linestyles=[style], capstyle="butt")
        drawn.set_color(matplotlib_colour(colour))
        axes.add_collection(drawn)

    for level in reversed(finest_first(seen, levels)):
        for wrapped, style in ((False, "-"), (True, DASHED)):
            boxes, colour = level.boxes[level.wrapped == wrapped], level_colour(level.level)
            if level.level == 0:
                add_lines(outline(box_mask(boxes, size)), colour, line, style)
            else:
                add_lines(boxes[:, [[1, 0], [3, 0], [3, 2], [1, 2], [1, 0]]], colour, line / 2, style)
    add_lines(outline(box_mask(seen.window, size)), WINDOW_COLOUR, line)
    row, col = seen.query
    add_lines(outline(box_mask(np.array([(row, col, row + 1, col + 1)]), size)), QUERY_COLOUR, 1.5 * line)

    bottom, right = visible_size(seen, levels)
    margin = 0.004 * max(bottom, right)  # for the outer half of lines along the edge
    axes.set(xlim=(-margin, right + margin), ylim=(bottom + margin, -margin), xticks=[], yticks=[], anchor="NW")
    axes.spines[:].set_visible(False)


def new_figure(width: float, height: float, title: str) -> "Figure":
    """A `matplotlib.figure.Figure` of a size in inches, without a window and outside of pyplot's state."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Figures need matplotlib: pip install 'focal-hf[visualization]'.") from error
    figure = Figure(figsize=(width, height), layout="compressed")
    figure.suptitle(title, x=0.01, horizontalalignment="left", weight="bold", size=12)
    return figure


def level_name(level: LevelAttention) -> str:
    return "tokens" if level.level == 0 else f"cells of {level.cell} x {level.cell} tokens"


def plot_query(image: np.ndarray, seen: QueryAttention) -> "Figure":
    """The paper's Figure 1 for any image, as a `matplotlib.figure.Figure`: all levels together, then each level.

    Args:
        image, seen:
            As in [`shaded`].
    """
    height, width = visible_size(seen)
    heads = "mean of its heads" if seen.head is None else f"head {seen.head}"
    figure = new_figure(
        *(SIDE * (1 + len(seen.levels)), SIDE * height / width + 1.8),
        f"Where a token looks: row {seen.query[0]}, column {seen.query[1]} of the map of stage {seen.stage}, "
        f"layer {seen.layer}, {heads}",
    )
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, PowerNorm
    from matplotlib.lines import Line2D

    panels, bars = figure.subplots(2, 1 + len(seen.levels), height_ratios=(SIDE * height / width, 0.15))
    draw_query(panels[0], image, seen)
    panels[0].set_title("near finely, far coarsely", loc="left", size=11)
    for axes, bar_axes, level in zip(panels[1:], bars[1:], seen.levels, strict=True):
        draw_query(axes, image, seen, [level.level])
        axes.set_title(f"level {level.level}: {level_name(level)}", loc="left", size=11)
        dark, colour = np.full(3, 0.2), np.array(matplotlib_colour(level_colour(level.level)))
        colours = LinearSegmentedColormap.from_list("level", [dark, dark + STRONGEST * (colour - dark)])
        highest = level.plane.max() * level.cell**2
        bar = figure.colorbar(
            ScalarMappable(PowerNorm(0.5, vmin=0, vmax=highest or 1), colours),
            cax=bar_axes,
            orientation="horizontal",
            ticks=[highest * part for part in (0, 1 / 16, 1 / 4, 1)],
            format=lambda value, _: f"{100 * value:.2g} %",
        )
        key = "token" if level.level == 0 else "cell"
        bar.set_label(f"weight of a {key}; together {100 * level.weights.sum():.1f} %")

    def entry(colour: tuple[int, int, int], label: str, filled: bool = True) -> "Line2D":
        face, edge = matplotlib_colour(colour) if filled else "none", matplotlib_colour(colour)
        style: dict[str, Any] = {
            "marker": "s",
            "markersize": 9,
            "markerfacecolor": face,
            "markeredgecolor": edge,
            "markeredgewidth": 2,
        }
        return Line2D([], [], linestyle="none", label=label, **style)

    entries = [entry(QUERY_COLOUR, "query", False), entry(WINDOW_COLOUR, "its window", False)]
    entries += [entry(level_colour(level.level), level_name(level)) for level in seen.levels]
    if any(level.wrapped.any() for level in seen.levels):
        entries.append(Line2D([], [], color="white", label="across the edge", linestyle=DASHED))
    if any(level.outside.any() for level in seen.levels):
        entries.append(entry(PADDING_COLOUR, "padding"))
    style = {"facecolor": "#505050", "labelcolor": "white", "fontsize": 9, "borderaxespad": 0}
    bars[0].legend(handles=entries, loc="upper left", ncols=2, **style)
    bars[0].set_axis_off()
    return figure


def plot_grid(image: np.ndarray, record: AttentionRecord, at: tuple[float, float], layer: int = -1) -> "Figure":
    """What a point attends to in every head of one layer of every stage, as a `matplotlib.figure.Figure`.

    Args:
        image:
            As in [`shaded`].
        record, at, layer:
            As in [`query_attention`].
    """
    lines = []
    for stage, blocks in enumerate(record.stages):
        block = blocks[checked_number(f"stage {stage}, layer", layer, len(blocks))]
        views = [query_attention(record, at, stage, layer, head) for head in range(block.weights.shape[1])]
        lines += [views[first : first + HEADS_PER_LINE] for first in range(0, len(views), HEADS_PER_LINE)]
    columns, ratio = max(map(len, lines)), record.image_size[0] / record.image_size[1]
    side = max(1.3, 8 / columns)
    figure = new_figure(columns * side, 0.5 + len(lines) * (side * ratio + 0.2), "Where it looks, by stage and head")
    for views, row in zip(lines, figure.subplots(len(lines), columns, squeeze=False), strict=True):
        for seen, axes in zip(views, row, strict=False):
            draw_query(axes, image, seen, line=0.5)
            name = f"stage {seen.stage}, head 0" if seen.head == 0 else f"{seen.head}"
            axes.set_title(name, size=8, loc="left", pad=3)
        for axes in row[len(views) :]:
            axes.remove()
    return figure


def plot_saliency(image: np.ndarray, saliency: np.ndarray, patch_size: int, title: str) -> "Figure":
    """The image, and beside it the result of [`attention_rollout`], as a `matplotlib.figure.Figure`.

    Args:
        image (`np.ndarray` of shape `(height, width, 3)`):
            The model's input as pixels of type uint8.
        saliency (`np.ndarray` of shape `(rows, columns)`), patch_size (`int`):
            From [`attention_rollout`], and the record's.
        title (`str`):
            The figure's title, such as the class.
    """
    height, width = image.shape[:2]
    figure = new_figure(2 * SIDE + 1.2, SIDE * height / width + 0.6, title)
    plain, heated = figure.subplots(1, 2)
    plain.imshow(image, extent=(0, width, height, 0))
    heated.imshow(image.mean(2), cmap="gray", vmin=0, vmax=255, extent=(0, width, height, 0))
    extent = (0, saliency.shape[1] * patch_size, saliency.shape[0] * patch_size, 0)
    heat = heated.imshow(saliency, cmap="inferno", alpha=0.7, vmin=0, extent=extent, interpolation="nearest")
    for axes in (plain, heated):
        axes.set(xlim=(0, width), ylim=(height, 0), xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    figure.colorbar(heat, ax=heated, label="share of a patch", format=lambda value, _: f"{100 * value:.2g} %")
    return figure
