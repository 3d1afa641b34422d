"""Focal attention the slow way: one window, one key at a time, listed as the original lists them.

Written from the definition, with loops and without focal_hf's geometry: what `FocalAttention` is compared with.
"""

import functools
import itertools
import math

import torch


def pooled_token(attention, level, cell):
    """(side, side, channels) tokens of a cell to one token."""
    pool = attention.config.focal_pool
    if pool == "mean":
        return cell.mean(dim=(0, 1))
    if pool == "max":
        return cell.amax(dim=(0, 1))
    layer = attention.pooling.layers[level]
    if pool == "fc":
        return torch.einsum("n,nc->c", layer.weight[0], cell.flatten(0, 1)) + layer.bias
    return torch.einsum("chw,hwc->c", layer.weight[:, 0], cell) + layer.bias


def pooled_map(attention, maps, level):
    """(height, width, channels) to the pooled map of a level."""
    window = attention.window_size
    cell = window // 2**level
    rows, cols = maps.shape[0] // window * 2**level, maps.shape[1] // window * 2**level
    top, left = (maps.shape[0] - rows * cell) // 2, (maps.shape[1] - cols * cell) // 2
    pooled = maps.new_zeros(rows, cols, maps.shape[2])
    for row, col in itertools.product(range(rows), range(cols)):
        r, c = top + row * cell, left + col * cell
        pooled[row, col] = pooled_token(attention, level, maps[r : r + cell, c : c + cell])
    return pooled


def focal_keys(attention, maps, pooled_maps, i, j):
    """Keys of window (i, j): (token or None outside of the map, bias (heads, queries), hidden from which queries)."""
    near, geometry = attention.neighborhood, attention.neighborhood.geometry
    window, expand, shift = geometry.window_size, geometry.expand_size, geometry.shift_size
    height, width = maps.shape[:2]
    queries = list(itertools.product(range(window), range(window)))

    def region(row, col):
        def part(place, length):
            return (place >= length - window) + (place >= length - shift)

        return (part(row, height), part(col, width)) if shift else None

    keys = []
    for row, col in queries:
        place = [(a - row + window - 1) * (2 * window - 1) + b - col + window - 1 for a, b in queries]
        own = region(i * window + row, j * window + col)
        hidden = [region(i * window + a, j * window + b) != own for a, b in queries]
        keys.append((maps[i * window + row, j * window + col], near.relative_position_bias_table[place].T, hidden))

    slot = 0
    for down, right in itertools.product((expand, -expand), repeat=2) if expand else ():
        for row, col in queries:
            r, c = row + down, col + right
            if 0 <= r < window and 0 <= c < window:
                continue
            token = maps[(i * window + r) % height, (j * window + c) % width]
            keys.append((token, near.relative_position_bias_table_to_neighbors[0, :, :, slot], None))
            slot += 1

    for level in range(geometry.pooled_levels):
        pooled = pooled_maps(level)
        side = geometry.focal_window + 2**level - 1
        table = near.pooled_tables()[level]
        for row, col in itertools.product(range(side), range(side)):
            r = i * 2**level - geometry.focal_window // 2 + row
            c = j * 2**level - geometry.focal_window // 2 + col
            inside = 0 <= r < pooled.shape[0] and 0 <= c < pooled.shape[1]
            place = [(a - row + side - 1) * (window + side - 1) + b - col + side - 1 for a, b in queries]
            keys.append((pooled[r, c] if inside else None, table[:, place], None))
    return keys


def topk_keys(attention, maps, pooled_maps, i, j):
    near = attention.neighborhood
    window = near.window_size
    queries = torch.tensor(list(itertools.product(range(window), range(window)))) - window // 2
    keys = []
    for level in range(near.levels):
        tokens = pooled_maps(0) if level else maps
        center = (i, j) if level else (i * window + window // 2, j * window + window // 2)
        places = itertools.product(range(tokens.shape[0]), range(tokens.shape[1]))
        nearest = sorted(places, key=lambda place: math.dist(place, center))[: near.topk]
        for place in nearest:
            offset = (torch.tensor(center) - torch.tensor(place)) * (window if level else 1) + queries
            bias = near.coordinate_mlps[level](offset.to(maps.dtype)).T
            keys.append((tokens[place], bias, None))
    return keys


def reference_attention(attention, maps):
    """(batch, height, width, channels) maps to the same, as `attention(maps)[0]`."""
    window, shift, heads = attention.window_size, attention.shift_size, attention.config.num_heads[0]
    batch, height, width, channels = maps.shape
    padded = maps.new_zeros(batch, -(-height // window) * window, -(-width // window) * window, channels)
    padded[:, :height, :width] = maps
    padded = padded.roll((-shift, -shift), dims=(1, 2))
    list_keys = focal_keys if attention.config.attention_type == "focal" else topk_keys

    output = torch.zeros_like(padded)
    for image in range(batch):
        pooled_maps = functools.cache(functools.partial(pooled_map, attention, padded[image]))
        for i, j in itertools.product(range(padded.shape[1] // window), range(padded.shape[2] // window)):
            rows, cols = slice(i * window, (i + 1) * window), slice(j * window, (j + 1) * window)
            query = attention.q_proj(padded[image, rows, cols].flatten(0, 1)).unflatten(1, (heads, -1))
            tokens, biases, hidden = zip(*list_keys(attention, padded[image], pooled_maps, i, j), strict=True)
            nothing = maps.new_zeros(channels)
            # Outside of the map key and value are zero: the score is the bias.
            inside = torch.tensor([token is not None for token in tokens], dtype=maps.dtype)
            tokens = torch.stack([nothing if token is None else token for token in tokens])
            key = (attention.k_proj(tokens) * inside[:, None]).unflatten(1, (heads, -1))
            value = (attention.v_proj(tokens) * inside[:, None]).unflatten(1, (heads, -1))
            nowhere = [False] * window**2
            hidden = torch.tensor([nowhere if queries is None else queries for queries in hidden], dtype=maps.dtype)
            scores = torch.einsum("qhd,khd->hqk", query, key) * attention.scaling + torch.stack(biases, dim=-1)
            weights = (scores - 100 * (1 - inside) - 100 * hidden.T).softmax(dim=-1)  # (heads, queries, keys)
            mixed = torch.einsum("hqk,khd->qhd", weights, value).flatten(1)
            output[image, rows, cols] = attention.o_proj(mixed).unflatten(0, (window, window))
    return output.roll((shift, shift), dims=(1, 2))[:, :height, :width]
