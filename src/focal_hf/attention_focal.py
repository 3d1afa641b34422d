"""How the queries of a window attend to their neighbourhood: the implementations, and the choice between them.

Every implementation takes the queries of a map's tokens, the keys and values of the map's and the pooled tokens, and a
[`Neighborhood`]. It derives from the latter the form that it needs.

| implementation | `attn_implementation` | where |
|---|---|---|
| in chunks | `"sdpa"` | on a CPU |
| dense | `"sdpa"` | on a CPU, in inference, on small maps |
| Triton | `"triton"` | on NVIDIA GPUs, opt-in |
| gathered | any other name; `"sdpa"` where no row above applies | everywhere, by transformers' `AttentionInterface` |
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn
from transformers.modeling_utils import AttentionInterface
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, is_triton_available

from .cpu_attention_focal import (
    attend_densely,
    attend_in_chunks,
    dense_padding,
    reason_against_cpu_attention,
    reason_against_dense_attention,
)
from .layout_focal import at_least_float32, fold_windows, unfold_windows
from .neighborhood_focal import Neighborhood

if TYPE_CHECKING:
    from .modeling_focal import FocalAttention

ALL_ATTENTION_FUNCTIONS = AttentionInterface()
# Old versions of transformers log in this function, which cannot be compiled.
TRITON_IS_INSTALLED = is_triton_available()


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Unpack[TransformersKwargs],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention in plain operations, with windows folded into the head dimension.

    Returns the output (batch, queries, windows · heads, head_dim) and the weights (batch · windows, heads, queries,
    keys).
    """
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling + attention_mask
    weights = nn.functional.softmax(at_least_float32(scores), dim=-1).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    # The output is computed from the returned tensor, so that gradients reach it.
    weights = weights.unflatten(1, (-1, module.num_heads)).flatten(0, 1)
    return torch.matmul(weights.view(scores.shape), value).transpose(1, 2).contiguous(), weights


def attend_gathered(
    module: "FocalAttention",
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    neighborhood: Neighborhood,
    **kwargs: Unpack[TransformersKwargs],
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Gathers the keys and values of all windows, for the function that transformers has for `attn_implementation`."""
    attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
        module.config._attn_implementation, eager_attention_forward
    )
    index, window_size = neighborhood.index, module.window_size
    output, weights = attention_interface(
        module,
        *fold_windows(query, key, value, index, window_size, module.head_dim),
        neighborhood.bias().to(query.dtype).flatten(0, 1)[None],
        dropout=module.active_dropout,
        scaling=module.scaling,
        **kwargs,
    )
    return unfold_windows(output.transpose(1, 2), query, index, window_size), weights


def reason_against_triton(module: "FocalAttention", query: torch.Tensor, neighborhood: Neighborhood) -> str | None:
    """Why the kernels of `triton_attention_focal` cannot be used, or None if they can."""
    if not TRITON_IS_INSTALLED:
        return "it needs the package triton: pip install triton"
    # Triton is imported only where it was asked for: the import takes time, and may fail.
    from .triton_attention_focal import reason_against

    return reason_against(query.device, query.dtype, module.head_dim, module.active_dropout, neighborhood)


class Attention(NamedTuple):
    """An implementation of attention.

    Args:
        attend (`Callable`):
            Takes the [`FocalAttention`], the query (batch, height · width, channels), the key and value (batch, tokens,
            channels) and the neighbourhood. Returns the output in query's shape and, with eager attention, the weights
            (batch · windows, heads, queries, keys).
        padding (`int`, *optional*, defaults to 0):
            Number of zero tokens to append to those whose keys and values it takes.
    """

    attend: Callable
    padding: int = 0


def choose_attention(module: "FocalAttention", query: torch.Tensor, neighborhood: Neighborhood) -> Attention:
    """The implementation with which a block attends.

    Raises:
        ValueError: where `attn_implementation="triton"` cannot be used; the message says why.
    """
    implementation = module.config._attn_implementation
    if implementation == "triton":
        if reason := reason_against_triton(module, query, neighborhood):
            raise ValueError(
                f"attn_implementation='triton' cannot be used here: {reason}. For another implementation, call "
                "model.set_attn_implementation('sdpa')."
            )
        from .triton_attention_focal import attend_by_triton

        return Attention(attend_by_triton)
    if implementation != "sdpa" or module.active_dropout or reason_against_cpu_attention(query):
        return Attention(attend_gathered)
    if reason_against_dense_attention(module, query, neighborhood):
        return Attention(attend_in_chunks)
    return Attention(attend_densely, dense_padding(neighborhood))
