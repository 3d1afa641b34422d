"""Names of torch and transformers outside their documented interfaces. No other module imports such names.

Without a name that the models need, importing this module raises an ImportError. Without a name that only allows caches
and custom operators, the models run without those, and a warning says so.
"""

import torch
import transformers
from torch.autograd import forward_ad
from torch.fx.experimental import symbolic_shapes
from transformers.utils import logging
from transformers.utils.versions import require_version

# The oldest and the newest minor version of transformers in the table of docs/versions.md.
OLDEST_TRANSFORMERS, NEWEST_TRANSFORMERS = "5.4", "5.24"
HINT = (
    f"focal_hf is tested with transformers {OLDEST_TRANSFORMERS} to {NEWEST_TRANSFORMERS}. Install a version in this "
    f"range (pip install 'transformers~={NEWEST_TRANSFORMERS}.0'), or a newer focal_hf."
)

logger = logging.get_logger(f"transformers.{__name__}")

require_version(f"transformers>={OLDEST_TRANSFORMERS}", HINT)
try:
    from transformers.backbone_utils import filter_output_hidden_states
    from transformers.conversion_mapping import (
        get_checkpoint_conversion_mapping,
        register_checkpoint_conversion_mapping,
    )
    from transformers.core_model_loading import ConversionOps, WeightConverter
    from transformers.utils.generic import merge_with_config_defaults
    from transformers.utils.output_capturing import OutputRecorder, capture_outputs
except ImportError as error:
    installed = transformers.__version__
    raise ImportError(f"focal_hf cannot be used with transformers {installed}: {error}. {HINT}") from error

try:
    # Up to transformers 5.17, the public name can only be used with torchvision.
    from transformers.models.auto.image_processing_auto import AutoImageProcessor
except ImportError:
    from transformers import AutoImageProcessor

try:
    from torch._C import _are_functorch_transforms_active
    from torch._guards import detect_fake_mode
    from torch.autograd.forward_ad import _current_level  # noqa: F401
except ImportError as error:
    SEES_TRANSFORMS = False
    logger.warning(
        f"focal_hf runs without caches and custom operators, which is slower, because torch {torch.__version__} does "
        f"not say when a transform is active: {error}. Install an older torch or a newer focal_hf."
    )
else:
    SEES_TRANSFORMS = True

# torch before 2.8 cannot tell.
has_static_value = getattr(symbolic_shapes, "has_static_value", lambda size: False)


def may_be_fake() -> bool:
    """Whether a fake mode is active, or torch cannot tell."""
    return not SEES_TRANSFORMS or detect_fake_mode() is not None


def may_be_exporting() -> bool:
    """Whether a graph is being exported, or torch cannot tell it from compiling."""
    # In graphs that torch 2.9 to 2.11 compile, `torch.compiler.is_exporting()` is always True.
    if hasattr(torch.compiler, "_is_exporting_flag"):
        return torch.compiler._is_exporting_flag
    # torch before 2.7 has neither.
    return getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)()


def may_be_transforming() -> bool:
    """Whether a transform of `torch.func` or forward-mode differentiation is active, or torch cannot tell."""
    return not SEES_TRANSFORMS or _are_functorch_transforms_active() or forward_ad._current_level >= 0


__all__ = [
    "AutoImageProcessor",
    "ConversionOps",
    "OutputRecorder",
    "WeightConverter",
    "capture_outputs",
    "filter_output_hidden_states",
    "get_checkpoint_conversion_mapping",
    "has_static_value",
    "may_be_exporting",
    "may_be_fake",
    "may_be_transforming",
    "merge_with_config_defaults",
    "register_checkpoint_conversion_mapping",
]
