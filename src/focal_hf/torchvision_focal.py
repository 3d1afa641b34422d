"""A feature pyramid on a backbone of transformers, for torchvision's detectors. Only this module needs torchvision."""

from collections import OrderedDict

import torch
from torch import nn

try:
    from torchvision.ops.feature_pyramid_network import ExtraFPNBlock, FeaturePyramidNetwork, LastLevelMaxPool
except ImportError as error:
    raise ImportError(
        "focal_hf.torchvision_focal needs torchvision, of a build that fits PyTorch's (here "
        f"{torch.__version__}): pip install 'focal-hf[torchvision]', from the index that PyTorch came from."
    ) from error


class BackboneWithFPN(nn.Module):
    """What torchvision's detectors take: a backbone and a feature pyramid (Lin et al. 2017,
    https://arxiv.org/abs/1612.03144).

    torchvision's class of this name needs a backbone whose modules follow one another; this one is for those of
    transformers, such as [`FocalBackbone`] and `SwinBackbone`.

    Args:
        backbone (`nn.Module`):
            A backbone of transformers. The pyramid has a level for each of its `out_features`, finest first: four for
            `MaskRCNN` and `FasterRCNN`, the last three for `RetinaNet` and `FCOS`, whose anchors start at stride 8.
        out_channels (`int`, *optional*, defaults to 256):
            Channels of every level.
        extra_blocks (`ExtraFPNBlock`, *optional*):
            Adds coarser levels. The default, `LastLevelMaxPool()`, adds one level, as `MaskRCNN` and `FasterRCNN`
            expect. `LastLevelP6P7(backbone.channels[-1], out_channels)` adds two, as `RetinaNet` and `FCOS` expect.

    Example:

    ```python
    >>> import torch
    >>> from focal_hf import FocalBackbone, FocalConfig
    >>> from focal_hf.torchvision_focal import BackboneWithFPN

    >>> backbone = FocalBackbone(FocalConfig(out_features=["stage1", "stage2", "stage3", "stage4"]))
    >>> maps = BackboneWithFPN(backbone)(torch.rand(1, 3, 224, 320))
    >>> {name: list(map.shape) for name, map in maps.items()}
    {'0': [1, 256, 56, 80], '1': [1, 256, 28, 40], '2': [1, 256, 14, 20], '3': [1, 256, 7, 10], 'pool': [1, 256, 4, 5]}
    ```"""

    def __init__(self, backbone: nn.Module, out_channels: int = 256, extra_blocks: ExtraFPNBlock | None = None):
        super().__init__()
        self.body = backbone
        self.fpn = FeaturePyramidNetwork(backbone.channels, out_channels, extra_blocks or LastLevelMaxPool())
        self.out_channels = out_channels

    def forward(self, pixel_values: torch.Tensor) -> OrderedDict[str, torch.Tensor]:
        """(batch, channels, height, width) images, normalised, to maps (batch, out_channels, height / stride, width /
        stride), finest first. Their names are the levels' numbers, then those that `extra_blocks` give."""
        maps = self.body(pixel_values).feature_maps
        return self.fpn(OrderedDict((str(level), features) for level, features in enumerate(maps)))
