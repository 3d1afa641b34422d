"""What a Focal Transformer attends to, on the image.

One forward pass is recorded. Everything else is computed from the record in milliseconds:

    record = record_attention(model, pixel_values)                     # one image, any Focal model
    seen = query_attention(record, at=(0.4, 0.6), stage=0)             # what one point attends to
    seen.levels[0].plane                                               # (rows, columns), weights of the fine tokens
    saliency = attention_rollout(record, label)                        # (rows, columns), for a class
    plot_query(image, seen).savefig("attention.png")                   # needs matplotlib

Level 0 is the map's own tokens, those of the window and around it. Level k ≥ 1 is pooled tokens, each of which stands
for a square cell of tokens: whole windows at level 1, then smaller cells. Positions are rows and columns of tokens of a
stage's map, from the top left; `to_pixels` converts a plane of tokens to pixels. Planes include the padding at the
bottom and right that fills the map to whole windows, because it has weight, too.
"""

from .attention_figures import draw_query, plot_grid, plot_query, plot_saliency, shaded
from .attention_records import (
    AttentionRecord,
    BlockAttention,
    LevelAttention,
    QueryAttention,
    attention_rollout,
    query_attention,
    record_attention,
    to_pixels,
)

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
