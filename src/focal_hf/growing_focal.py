"""More levels for a trained model whose windows attend to their own tokens alone, such as a converted Swin."""

import copy
import math
from collections.abc import Sequence

import torch

from .modeling_focal import FocalAttention, FocalPreTrainedModel
from .neighborhood_focal import FocalNeighborhood

# Default share of the attention of new keys: see benchmarks/growing.py.
NEW_SHARE = 0.01
# With this bias, the weight of a key is 0 in floating point: e^-10000 beside any practical score.
NO_SHARE = -1e4


def add_focal_levels(
    model: FocalPreTrainedModel,
    focal_levels: Sequence[int],
    focal_windows: Sequence[int] | None = None,
    expand_sizes: Sequence[int] | None = None,
    new_share: float = NEW_SHARE,
) -> FocalPreTrainedModel:
    r"""
    Lets the windows of a trained model attend to the tokens around them and to pooled tokens. The model must have
    `focal_levels` of 0, such as a Swin that `convert_swin_to_focal.py` has converted.

    The new keys begin with a small share of the attention, so that the new model computes almost what `model` computes.
    All new keys of a head have the same bias, and pooled tokens are the means of their cells.

    Args:
        model (`FocalPreTrainedModel`):
            A Focal model of any class, with `attention_type="focal"`. It is not changed.
        focal_levels, focal_windows, expand_sizes (`Sequence[int]`, the last two *optional*):
            The settings of [`FocalConfig`] with the same names, one value per stage. By default `focal_windows` and
            `expand_sizes` are those of the model.
        new_share (`float`, *optional*, defaults to 0.01):
            The share of the attention that the new keys of a query have together, if all products of queries and keys
            are equal and no key is beyond the edge of the map. At least 0 and below 1. At 0 the new model computes
            exactly what `model` computes, but its new weights receive no gradients.

    Returns:
        A new model of the same class, on the same device, with the same dtype and mode.

    Raises:
        ValueError: for another model, or for a share out of bounds.
        StrictDataclassClassValidationError: where settings contradict each other; the message names them.

    Example:

    ```python
    >>> from focal_hf import FocalForImageClassification, add_focal_levels

    >>> model = FocalForImageClassification.from_pretrained("swin-tiny-as-focal")
    >>> grown = add_focal_levels(model, focal_levels=(2, 2, 2, 2))
    ```"""
    if not isinstance(model, FocalPreTrainedModel):
        raise ValueError(f"add_focal_levels takes a Focal model; got {type(model).__name__}.")
    if not 0 <= new_share < 1:
        raise ValueError(f"new_share must be at least 0 and below 1; got {new_share}.")
    if model.config.attention_type != "focal" or any(model.config.focal_levels):
        raise ValueError(
            "add_focal_levels takes a model with attention_type='focal' and focal_levels of 0; this one has "
            f"attention_type={model.config.attention_type!r} and focal_levels={tuple(model.config.focal_levels)}."
        )
    config = copy.deepcopy(model.config)
    config.focal_levels = list(focal_levels)
    config.focal_windows = list(focal_windows or config.focal_windows)
    config.expand_sizes = list(expand_sizes or config.expand_sizes)
    with torch.device("meta"):
        grown = type(model)(config)
    grown = grown.to(dtype=model.dtype)  # type: ignore[call-arg]  # transformers wraps the method
    grown = grown.to_empty(device=model.device).train(model.training)
    loaded = grown.load_state_dict(model.state_dict(), strict=False)
    # `_start_attention` fills the new tables and the weights of pooling.
    new = ("_bias_table_to_", ".pooling.")
    missing = [name for name in loaded.missing_keys if not any(part in name for part in new)]
    if missing or loaded.unexpected_keys:
        raise ValueError(
            f"this {type(model).__name__} has other weights than its config says: it lacks {missing[:3]}, and has "
            f"{loaded.unexpected_keys[:3]}. Add levels before adapters or the like, and before freezing."
        )
    old_modules = dict(model.named_modules())
    with torch.no_grad():
        for name, module in grown.named_modules():
            if isinstance(module, FocalAttention):
                _start_attention(module, old_modules[name], new_share)
    return grown


def _start_attention(new: FocalAttention, old: FocalAttention, new_share: float) -> None:
    """Initialises the weights of `new` that `old` does not have."""
    if new.pooling is not None:
        for layer in new.pooling.layers:
            weight = layer.get_parameter("weight")  # (pooled tokens or channels, …, tokens of a cell)
            weight.fill_(1 / weight[0].numel())
            layer.get_parameter("bias").zero_()
    own, neighborhood = old.neighborhood, new.neighborhood
    assert isinstance(own, FocalNeighborhood)
    assert isinstance(neighborhood, FocalNeighborhood)
    tables = neighborhood.bias_tables()[1:]
    if not tables:
        return
    if new_share == 0:
        for table in tables:
            table.fill_(NO_SHARE)
        return
    # Of the old keys of a query, the logarithm of the sum of exp(bias): with equal products, what their share is
    # proportional to. A head has one bias for all queries, so the mean over them.
    old_sum = own.fine_bias().logsumexp(dim=-1).mean(dim=-1)
    bias = old_sum + math.log(new_share / (1 - new_share)) - math.log(_new_keys(neighborhood))
    for table in tables:
        table.copy_(bias.view(-1, 1, 1) if table.ndim == 4 else bias[:, None])


def _new_keys(neighborhood: FocalNeighborhood) -> int:
    """The number of keys of a query in the surroundings and in the pooled levels, where none is beyond the edge."""
    around = neighborhood.relative_position_bias_table_to_neighbors
    pooled = sum(square.side**2 for square in neighborhood.pooled_squares())
    return (0 if around is None else around.shape[-1]) + pooled


__all__ = ["add_focal_levels"]
