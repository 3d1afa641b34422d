"""How maps, windows and heads lie in memory: the tensor operations that several modules share."""

import torch


def at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    """Biases and softmax are computed in float32 even where the weights are bfloat16."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def cat_unless_single(tensors: list[torch.Tensor], dim: int = 0) -> torch.Tensor:
    """Concatenates tensors; a single one is returned without a copy."""
    return torch.cat(tensors, dim=dim) if len(tensors) > 1 else tensors[0]


def split_windows(maps: torch.Tensor, side: int) -> torch.Tensor:
    """(batch, height, width, channels) maps as a view (batch, rows, cols, side, side, channels) of windows."""
    return maps.unflatten(2, (-1, side)).unflatten(1, (-1, side)).transpose(2, 3)


def head_index(index: torch.Tensor, heads: int) -> torch.Tensor:
    """An index (..., keys) of tokens as one (..., heads, keys) of their heads.

    A token's heads are contiguous: [head 0 of token 0 | head 1 of token 0 | … | head 0 of token 1 | …]. Hidden keys
    (-1) become token 0, since their bias is -inf.
    """
    head = torch.arange(heads, dtype=index.dtype, device=index.device)[:, None]
    return index.clamp(min=0)[..., None, :] * heads + head


def gather_heads(tokens: torch.Tensor, index: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Gathers heads of tokens (..., channels) by an index from `head_index`, into (*index.shape, head_dim)."""
    return tokens.reshape(-1, head_dim).index_select(0, index.reshape(-1)).view(*index.shape, head_dim)


def fold_windows(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, index: torch.Tensor, window_size: int, head_dim: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries of every window, and the keys and values that its index lists.

    Windows are folded into the head dimension, so that all images share one bias.

    Args:
        query: (batch, height · width, channels).
        key, value: (batch, tokens, channels).
        index: (rows, cols, keys).

    Returns:
        Three tensors (batch, windows · heads, queries or keys, head_dim).
    """
    batch, tokens, channels = key.shape
    heads = channels // head_dim
    of_image = head_index(index.flatten(0, 1), heads)  # (windows, heads, keys)
    first = torch.arange(batch, device=index.device) * (tokens * heads)
    of_batch = first[:, None, None, None] + of_image
    windows = _query_windows(query, index, window_size).reshape(*of_batch.shape[:2], -1, heads, head_dim)
    keys, values = (gather_heads(tensor, of_batch, head_dim).flatten(1, 2) for tensor in (key, value))
    return windows.transpose(2, 3).flatten(1, 2), keys, values


def unfold_windows(output: torch.Tensor, query: torch.Tensor, index: torch.Tensor, window_size: int) -> torch.Tensor:
    """The output (batch, windows · heads, queries, head_dim) of attention over `fold_windows`, in query's shape."""
    windows = _query_windows(query, index, window_size)
    output = output.unflatten(1, (index.shape[0] * index.shape[1], -1)).transpose(2, 3).reshape(windows.shape)
    return output.transpose(2, 3).reshape(query.shape)


def _query_windows(query: torch.Tensor, index: torch.Tensor, window_size: int) -> torch.Tensor:
    """Queries (batch, height · width, channels) as windows (batch, rows, cols, side, side, channels)."""
    return split_windows(query.unflatten(1, [length * window_size for length in index.shape[:2]]), window_size)
