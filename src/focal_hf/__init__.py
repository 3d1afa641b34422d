"""The Focal Transformer as a transformers model. Importing this registers it with transformers' Auto classes."""

import torch
import transformers
from transformers.utils import is_torchvision_available

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

from transformers import AutoConfig, BitImageProcessorPil

# Of its own module: up to 5.17, transformers gives a stand-in for it where torchvision is absent.
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from . import modeling_focal as _modeling
from .backbone_weights_focal import load_backbone_weights
from .configuration_focal import AUTO_CLASSES, FocalConfig
from .modeling_focal import (
    FocalBackbone,
    FocalForImageClassification,
    FocalForMaskedImageModeling,
    FocalModel,
    FocalPreTrainedModel,
)

__version__ = "0.2.0"

AutoConfig.register(FocalConfig.model_type, FocalConfig)
for _auto_class, _model_class in AUTO_CLASSES.items():
    getattr(transformers, _auto_class).register(FocalConfig, getattr(_modeling, _model_class))

_image_processors = {"pil": BitImageProcessorPil}
if is_torchvision_available():
    from transformers import BitImageProcessor

    _image_processors["torchvision"] = BitImageProcessor
AutoImageProcessor.register(FocalConfig, image_processor_classes=_image_processors)

__all__ = [
    "FocalBackbone",
    "FocalConfig",
    "FocalForImageClassification",
    "FocalForMaskedImageModeling",
    "FocalModel",
    "FocalPreTrainedModel",
    "load_backbone_weights",
]
