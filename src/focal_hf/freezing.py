"""Models for images of one size, whose indices and biases are constants: for inference, compiled or exported."""

import copy
from collections.abc import Sequence
from functools import partial
from numbers import Integral

import torch
from torch import nn
from transformers import PreTrainedModel

from .cpu_attention_focal import KEY_ELEMENTS_PER_CHUNK
from .indexed_attention_focal import attention_tables, dense_tables
from .layout_focal import split_windows
from .modeling_focal import FocalAttention, FocalDownsample, FocalEncoder, crop, pad_to_multiple
from .neighborhood_focal import AttentionTables, BiasPart, Neighborhood
from .run_state_focal import is_compiling, is_exporting, is_static

# Elements of all keys that a compiled block gathers at most at once. With more, chunks are faster.
KEY_ELEMENTS_BY_INDEX = 2 * KEY_ELEMENTS_PER_CHUNK


class FrozenProjection(nn.Linear):
    """A convolution of cells that do not overlap, as a linear layer, which is faster where weights are constants."""

    def __init__(self, convolution: nn.Conv2d):
        super().__init__(convolution.weight[0].numel(), convolution.out_channels, device="meta")
        self.side = convolution.kernel_size[0]
        self.weight = nn.Parameter(convolution.weight.permute(0, 2, 3, 1).flatten(1), requires_grad=False)
        assert convolution.bias is not None
        self.bias = nn.Parameter(convolution.bias, requires_grad=False)

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        """(batch, channels, height, width) maps to maps of cells, in the same layout. Incomplete cells are dropped."""
        height, width = (size // self.side * self.side for size in maps.shape[2:])
        cells = split_windows(crop(maps.permute(0, 2, 3, 1), height, width), self.side)
        return super().forward(cells.flatten(3)).permute(0, 3, 1, 2)


class FrozenNeighborhood(nn.Module):
    """The neighbourhoods of a [`FocalAttention`] for maps of one size, in buffers that are not saved."""

    index: torch.Tensor
    table_queries: torch.Tensor | None
    table_keys: torch.Tensor | None
    table_outputs: torch.Tensor | None
    table_bias: torch.Tensor | None

    def __init__(self, attention: FocalAttention, height: int, width: int):
        super().__init__()
        maps = attention.o_proj.weight.new_empty(1, attention.o_proj.in_features, height, width)
        maps = pad_to_multiple(maps, attention.window_size).permute(0, 2, 3, 1)
        shift_size = attention.shift_of(height, width)
        neighborhood = attention.neighborhood_of(maps, shift_size)
        tables = attention_tables(attention, neighborhood, height, width, shift_size)
        dense = dense_tables(attention, neighborhood, tables)
        self.squares, self.shift_size = neighborhood.squares, neighborhood.shift_size
        tensors: dict[str, torch.Tensor | None] = {"index": neighborhood.index}
        for number, part in enumerate(neighborhood.parts):
            tensors |= {f"source_{number}": part.source, f"pattern_{number}": part.pattern}
        tables = dense or tables
        tensors |= {"table_queries": tables.queries, "table_keys": tables.keys, "table_outputs": tables.outputs}
        self.is_dense = dense is not None
        self.batch_by_index = KEY_ELEMENTS_BY_INDEX // (neighborhood.index.numel() * maps.shape[3])
        # Elsewhere the bias follows from the parts, and a constant of all windows would be large.
        tensors["table_bias"] = tables.bias if dense or self.batch_by_index else None
        tensors |= {f"cells_{level}": cells for level, cells in enumerate(tables.cells)}
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor, persistent=False)
        self.parts, self.levels = len(neighborhood.parts), len(tables.cells)

    def forward(self, maps: torch.Tensor, shift_size: int | None = None) -> Neighborhood:
        """The neighbourhood of (batch, height, width, channels) maps of the frozen size, which determines the shift."""
        parts = [BiasPart(getattr(self, f"source_{n}"), getattr(self, f"pattern_{n}")) for n in range(self.parts)]
        neighborhood = Neighborhood(self.index, parts, self.squares, self.shift_size)
        batch = maps.shape[0]
        bias = None
        if self.is_dense or (is_compiling() and is_static(batch) and batch <= self.batch_by_index):
            bias = self.table_bias
        elif is_exporting():
            bias = neighborhood.exported_bias()
        if bias is not None:
            cells = [getattr(self, f"cells_{level}") for level in range(self.levels)]
            neighborhood.tables = AttentionTables(self.table_queries, self.table_keys, self.table_outputs, cells, bias)
        return neighborhood


def check_map(patches: tuple[int, int], encoder: nn.Module, inputs: tuple) -> None:
    """A hook before the encoder of a frozen model, which gets tokens and the height and width of their map."""
    if tuple(inputs[1]) != patches:
        raise ValueError(
            f"This model was frozen for images of another size: its encoder expects a map of {patches} patches, and "
            f"got {tuple(inputs[1])}. Freeze the model for this size, or use the model that is not frozen."
        )


def refuse_to_save(*arguments: object, **options: object) -> None:
    """`save_pretrained` and `push_to_hub` of a frozen model."""
    raise ValueError("A frozen model cannot be saved as a model. Save the model that was frozen, or export this one.")


def refuse_to_load(*arguments: object) -> None:
    """A hook before `load_state_dict` of a frozen model, whose constant biases would stay those of the old weights."""
    raise ValueError("A frozen model cannot load weights. Load them into the model that was frozen, and freeze that.")


@torch.no_grad()
def freeze(model: nn.Module, image_size: tuple[int, int]) -> nn.Module:
    """A copy of a model, for inference with images of one size.

    The indices and biases of all blocks are constants in it, which a compiled or exported graph does not compute. Where
    windows attend to most of a map, all queries attend to all tokens. Patch merging is a linear layer.

    Args:
        model (`nn.Module`):
            A Focal Transformer, or a head of transformers with a [`FocalBackbone`] in it.
        image_size (`tuple[int, int]`):
            Height and width in pixels. Other images raise a ValueError.

    Raises:
        ValueError: if the model has no Focal Transformer or is frozen already, if its weights are quantized, sharded or
            offloaded, or if it cannot run images of this size.
    """
    for name, parameter in model.named_parameters():
        if parameter.is_meta or type(parameter.data) is not torch.Tensor:
            kind = "on the meta device" if parameter.is_meta else type(parameter.data).__name__
            raise ValueError(
                f"model must have weights that are neither quantized, sharded nor offloaded; {name} is {kind}. Load it "
                "without quantization_config and on one device."
            )
    frozen = copy.deepcopy(model).eval().requires_grad_(False)
    encoders = [module for module in frozen.modules() if isinstance(module, FocalEncoder)]
    if not encoders:
        raise ValueError(f"model must contain a Focal Transformer; got {type(model).__name__}.")
    if any(isinstance(module, FrozenNeighborhood) for module in frozen.modules()):
        raise ValueError("model is frozen already. Freeze the model that it was made from.")
    least = max(encoder.config.least_side for encoder in encoders)
    sides = tuple(image_size) if isinstance(image_size, Sequence) else ()
    if len(sides) != 2 or not all(isinstance(side, Integral) and side >= least for side in sides):
        raise ValueError(
            f"image_size must be the height and width of images in pixels, both at least {least} for this model; got "
            f"{image_size!r}."
        )
    for encoder in encoders:
        config = encoder.config
        encoder.register_forward_pre_hook(partial(check_map, config.reduced_size(image_size, config.patch_size)))
        for number, stage in enumerate(encoder.layers):
            size = config.reduced_size(image_size, config.patch_size * 2**number)
            for attention in [module for module in stage.modules() if isinstance(module, FocalAttention)]:
                attention.add_module("neighborhood", FrozenNeighborhood(attention, *size))
        for downsample in [module for module in encoder.modules() if isinstance(module, FocalDownsample)]:
            projection = downsample.projection
            # An adapter in the place of the convolution is called as it is.
            if type(projection) is nn.Conv2d and projection.kernel_size == projection.stride:
                downsample.add_module("projection", FrozenProjection(projection))
    for module in frozen.modules():
        module.register_load_state_dict_pre_hook(refuse_to_load)
        if isinstance(module, PreTrainedModel):
            module.save_pretrained = module.push_to_hub = refuse_to_save  # type: ignore[assignment, method-assign]
    return frozen


__all__ = ["freeze"]
