"""The Focal Transformer as a transformers model. Importing this registers it with transformers' Auto classes."""

import torch
import transformers
from transformers.utils import is_torchvision_available, logging

if is_torchvision_available():
    try:
        import torchvision  # noqa: F401
    except Exception as error:
        # transformers would fail below, and not say why.
        raise ImportError(
            f"torchvision is installed but does not run with PyTorch {torch.__version__} ({error}), and transformers "
            "cannot be imported beside it. Install torchvision from the index that PyTorch came from, in the version "
            "that fits, or remove it (pip uninstall torchvision): focal_hf works without it."
        ) from error

from transformers import AutoConfig

from . import modeling_focal as _modeling
from .backbone_weights_focal import load_backbone_weights
from .compatibility_focal import AutoImageProcessor
from .configuration_focal import AUTO_CLASSES, FocalConfig
from .freezing import freeze
from .growing_focal import add_focal_levels
from .modeling_focal import (
    FocalBackbone,
    FocalForImageClassification,
    FocalForMaskedImageModeling,
    FocalModel,
    FocalPreTrainedModel,
)

__version__ = "0.2.0"

try:
    AutoConfig.register(FocalConfig.model_type, FocalConfig)
except ValueError:
    logging.get_logger(f"transformers.{__name__}").warning(
        f"transformers {transformers.__version__} has a model type 'focal' of its own, and its Auto classes load that "
        "model. Load focal_hf's models with their own classes, as in FocalForImageClassification.from_pretrained(...)."
    )
# The Auto classes also know models by the name of their config class, which transformers' own model may share.
for _auto_class, _model_class in AUTO_CLASSES.items():
    getattr(transformers, _auto_class).register(FocalConfig, getattr(_modeling, _model_class), exist_ok=True)

_image_processors: dict[str, type] = {"pil": transformers.BitImageProcessorPil}
if is_torchvision_available():
    _image_processors["torchvision"] = transformers.BitImageProcessor
AutoImageProcessor.register(FocalConfig, image_processor_classes=_image_processors, exist_ok=True)

__all__ = [
    "FocalBackbone",
    "FocalConfig",
    "FocalForImageClassification",
    "FocalForMaskedImageModeling",
    "FocalModel",
    "FocalPreTrainedModel",
    "add_focal_levels",
    "freeze",
    "load_backbone_weights",
]
