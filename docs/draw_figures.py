"""Draws the figures of docs/model.md: `python docs/draw_figures.py [FOLDER]`.

They show the keys of a query, shaded by attention weight. The models have random weights.
"""

import functools
import sys
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from focal_hf import FocalConfig, FocalModel
from focal_hf.visualization import AttentionRecord, draw_query, query_attention, record_attention

SIDE = 224
INSIDE, CORNER = (0.55, 0.55), (0.03, 0.05)
FOCAL, TOPK = {}, {"attention_type": "topk"}

# For each file its panels: (title, settings that differ from Focal-Tiny's, query point, stage).
FIGURES = {
    "levels.png": [
        ("0: window, as in Swin", {"focal_levels": (0,) * 4}, INSIDE, 0),
        ("1: + tokens around it", {"focal_levels": (1,) * 4}, INSIDE, 0),
        ("2: + pooled tokens", FOCAL, INSIDE, 0),
    ],
    "stages.png": [(f"stage {stage + 1}", FOCAL, INSIDE, stage) for stage in range(4)],
    "types.png": [
        ("focal", FOCAL, INSIDE, 0),
        ("focal, at a corner", FOCAL, CORNER, 0),
        ("topk", TOPK, INSIDE, 0),
        ("topk, at a corner", TOPK, CORNER, 0),
    ],
}


def picture() -> np.ndarray:
    """The sun over hills."""
    row, col = np.mgrid[:SIDE, :SIDE] / SIDE
    light = 0.6 + 0.4 * row
    light[(row - 0.25) ** 2 + (col - 0.7) ** 2 < 0.01] = 1.2
    for horizon, shade in ((0.55, 0.5), (0.7, 0.35), (0.85, 0.2)):
        light[row > horizon + 0.06 * np.sin(14 * col + 30 * horizon)] = shade
    return (light[..., None].repeat(3, 2) * 210).astype(np.uint8)


@functools.cache
def record(**settings) -> AttentionRecord:
    torch.manual_seed(0)
    model = FocalModel(FocalConfig(initializer_range=0.12, **settings)).eval()
    return record_attention(model, torch.from_numpy(picture()).permute(2, 0, 1)[None] / 255)


def draw(panels: list[tuple[str, dict, tuple[float, float], int]]) -> Figure:
    figure = Figure(figsize=(3 * len(panels), 3.25), layout="constrained")
    for axes, (title, settings, at, stage) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        draw_query(axes, picture(), query_attention(record(**settings), at, stage))
        axes.set_title(title, loc="left", size=12)
    return figure


if __name__ == "__main__":
    folder = Path(*sys.argv[1:2] or [Path(__file__).parent])
    for name, panels in FIGURES.items():
        draw(panels).savefig(folder / name, dpi=100)
