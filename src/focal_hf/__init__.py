"""The Focal Transformer as a transformers model. Importing this registers it with transformers' Auto classes."""

from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForMaskedImageModeling,
    BitImageProcessorPil,
)
from transformers.utils import is_torchvision_available

from .configuration_focal import FocalConfig
from .modeling_focal import (
    FocalBackbone,
    FocalForImageClassification,
    FocalForMaskedImageModeling,
    FocalModel,
    FocalPreTrainedModel,
)

__version__ = "0.1.0"

AutoConfig.register(FocalConfig.model_type, FocalConfig)
AutoModel.register(FocalConfig, FocalModel)
AutoModelForImageClassification.register(FocalConfig, FocalForImageClassification)
AutoModelForMaskedImageModeling.register(FocalConfig, FocalForMaskedImageModeling)
AutoBackbone.register(FocalConfig, FocalBackbone)

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
]
