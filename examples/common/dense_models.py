"""Build models for detection and segmentation, and their image processors."""

import argparse
import inspect
import itertools
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from transformers import (
    MODEL_FOR_OBJECT_DETECTION_MAPPING,
    AutoBackbone,
    AutoConfig,
    AutoModelForObjectDetection,
    AutoModelForSemanticSegmentation,
    AutoModelForUniversalSegmentation,
    BaseImageProcessor,
    BeitImageProcessorPil,
    Mask2FormerConfig,
    MaskFormerConfig,
    PreTrainedConfig,
    PreTrainedModel,
    RTDetrImageProcessorPil,
    UperNetConfig,
)
from transformers.backbone_utils import BackboneMixin
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING

from .models import (
    check_config,
    decay_groups,
    errors_only,
    explain_missing_torchvision,
    load_model,
    resize_views,
    stored_processor_if_any,
)
from .options import Problem, first_line
from .recipe import drop_path_by_size
from .segmentation_data import LONGEST, NO_CLASS

# Types of models that take images and give a class and a mask for each of their queries.
MASK_MODELS = (Mask2FormerConfig, MaskFormerConfig)


def backbone_of(model: torch.nn.Module) -> torch.nn.Module | None:
    return next((module for module in model.modules() if isinstance(module, BackboneMixin)), None)


def patch_of(config: PreTrainedConfig) -> int:
    """The stride of a backbone's finest map. Convolutional networks, which have no patches, have 4."""
    patch = getattr(config, "patch_size", 4)
    return patch if isinstance(patch, int) else max(patch)


def stride_of(model: torch.nn.Module) -> int:
    """The stride of the coarsest feature map. The height and width of a batch must be multiples of it."""
    config = getattr(backbone_of(model), "config", model.config)
    return patch_of(config) * 2 ** (len(getattr(config, "depths", range(4))) - 1)


def stages_of_backbone(source: str, config: PreTrainedConfig) -> list[str]:
    """The names of a backbone's stages, which give maps from the finest to the coarsest."""
    if not hasattr(config, "stage_names"):
        raise Problem(f"{source} ({config.model_type}) is no backbone with stages, as Focal and Swin are.")
    return config.stage_names[1:]  # the first is the stem


def read_config(args: argparse.Namespace) -> PreTrainedConfig:
    """The config of --config or --model."""
    check_config(args)
    option, source = ("--config", args.config) if args.config else ("--model", args.model)
    try:
        return AutoConfig.from_pretrained(source)
    except Exception as error:
        raise Problem(f"Cannot read {option} {source}: {first_line(error)}") from error


@errors_only()
def build_on_backbone(
    args: argparse.Namespace, kind: type, config: PreTrainedConfig, log: Callable[[str], None]
) -> PreTrainedModel:
    """A model with a new head, whose backbone has the weights of the checkpoint --model, if there is one.

    Args:
        kind: an Auto class.
        config: the config of the model, with that of the backbone.
    """
    source = args.model or args.config
    try:
        model = kind.from_config(config)
    except Exception as error:
        raise Problem(f"Cannot put {source} into a new {config.model_type}: {first_line(error)}") from error
    reset_batch_norms(model)
    if not args.model:
        return model
    new_backbone = backbone_of(model)

    def set_maps(config: PreTrainedConfig) -> None:
        config.out_features = new_backbone.config.out_features

    # A backbone has a norm for each feature map. Checkpoints of other models do not have these norms.
    backbone, _ = load_model(args, type(new_backbone), "a backbone", ("hidden_states_norms.",), log, set_maps)
    new_backbone.load_state_dict(backbone.state_dict())
    log(f"{args.model} is the backbone. The head ({config.model_type}) is new, for the classes of the data.")
    return model


def kind_of(config: PreTrainedConfig) -> type | None:
    """The Auto class of a model that predicts masks or boxes, or `None` for other models."""
    if type(config) in MASK_MODELS:
        return AutoModelForUniversalSegmentation
    return AutoModelForObjectDetection if type(config) in MODEL_FOR_OBJECT_DETECTION_MAPPING else None


def detector_config(args: argparse.Namespace) -> tuple[PreTrainedConfig, PreTrainedConfig | None]:
    """The config of --config or --model; or, where --model is no detector, those of --head and of --model."""
    given = read_config(args)
    if args.config or kind_of(given):
        return given, None
    described = Path(args.head).exists()
    try:
        config = AutoConfig.from_pretrained(args.head) if described else AutoConfig.for_model(args.head)
    except Exception as error:
        why = f" ({first_line(error)})" if described else ""  # for a name, the error lists hundreds of other names
        raise Problem(
            f"No such detector: --head {args.head}{why}. Name a type that transformers knows, such as "
            "rt_detr, d_fine or mask2former, or a config.json."
        ) from error
    if kind_of(config) is None or not hasattr(config, "backbone_config"):
        raise Problem(f"--head {args.head} is no detector with a backbone, such as rt_detr, d_fine or mask2former.")
    return config, given


def finds_masks(args: argparse.Namespace) -> bool:
    return type(detector_config(args)[0]) in MASK_MODELS


def add_backbone(args: argparse.Namespace, config: PreTrainedConfig, backbone: PreTrainedConfig) -> None:
    """Put the config of --model into that of --head."""
    stages = stages_of_backbone(args.model, backbone)
    levels = len(getattr(config, "encoder_in_channels", ())) or min(3, len(stages))
    if type(config) in MASK_MODELS:  # all stages, since masks use the finest map
        levels = max(3, len(stages))
    if config.model_type in ("detr", "conditional_detr", "dab-detr"):  # they use the last map only
        levels = 1
    if levels > len(stages):
        raise Problem(
            f"--head {args.head} takes {levels} feature maps, but {args.model} has {len(stages)} stages: change --head."
        )
    backbone.out_features = stages[-levels:]
    config.backbone_config = backbone
    strides = [patch_of(backbone) * 2 ** (index - 1) for index in backbone.out_indices]
    for name in ("use_timm_backbone", "use_pretrained_backbone"):
        if hasattr(config, name):
            setattr(config, name, False)
    if hasattr(config, "encoder_in_channels"):
        with torch.device("meta"):
            config.encoder_in_channels = AutoBackbone.from_config(backbone).channels
        config.feat_strides = strides
    if hasattr(config, "feature_strides"):
        config.feature_strides, config.common_stride = strides, strides[0]


def reset_batch_norms(model: PreTrainedModel) -> None:
    """Initialize the weights of batch norms to 1. transformers initializes them near 0, where they hardly learn."""
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.ones_(module.weight)


def build_detector(
    args: argparse.Namespace, names: list[str], log: Callable[[str], None]
) -> tuple[PreTrainedModel, BaseImageProcessor]:
    """The detector, with the classes of the data as its id2label, and its image processor."""
    config, backbone = detector_config(args)

    def set_labels(config: PreTrainedConfig) -> None:
        if kind_of(config) is None:
            raise ValueError(f"{config.model_type} is no detector")
        if not args.model or set(config.id2label.values()) != set(names):
            if args.model:
                log(f"{args.model} has other classes: class layers whose size differs are newly initialized.")
            config.id2label = dict(enumerate(names))
        config.label2id = {name: index for index, name in config.id2label.items()}

    if backbone is None:
        model, _ = load_model(args, kind_of(config), "a detector", (), log, set_labels)
        if args.config:
            reset_batch_norms(model)
    else:
        add_backbone(args, config, backbone)
        config.id2label = dict(enumerate(names))
        config.label2id = {name: index for index, name in config.id2label.items()}
        model = build_on_backbone(args, kind_of(config), config, log)

    processor = stored_processor_if_any(args.model) if args.model and backbone is None else None
    if processor is None:  # types without an own processor, such as D-FINE, use that of RT-DETR
        kinds = IMAGE_PROCESSOR_MAPPING.get(type(model.config), {})
        with explain_missing_torchvision():
            processor = (kinds.get("pil") or RTDetrImageProcessorPil)(do_normalize=True)
    if args.image_size:
        resize_views(processor, args.image_size)
    return model, processor


def rate_groups(model: torch.nn.Module, args: argparse.Namespace) -> list[dict]:
    """The groups of [`decay_groups`], divided into backbone and head, which have different learning rates."""
    backbone = backbone_of(model)
    in_backbone = {id(parameter) for parameter in backbone.parameters()} if backbone is not None else set()
    groups = []
    for group, within in itertools.product(decay_groups(model, args.weight_decay), (True, False)):
        parameters = [parameter for parameter in group["params"] if (id(parameter) in in_backbone) == within]
        rate = args.learning_rate * (args.backbone_rate if within else 1)
        if parameters:
            groups.append(group | {"params": parameters, "lr": rate})
    return groups


def inputs_of(model: torch.nn.Module) -> tuple[str, ...]:
    """The names of the tensors of a batch that the model takes as inputs."""
    known = inspect.signature(model.forward).parameters
    return tuple(name for name in ("pixel_values", "pixel_mask") if name in known)


def build_segmenter(args: argparse.Namespace, names: list[str], log: Callable[[str], None]) -> PreTrainedModel:
    """Build UperNet for these classes from --config or --model.

    The weights of a checkpoint for another task go into the backbone, and both heads are newly initialized.
    """
    source = args.config or args.model
    same_labels = False

    def set_drop_path(config: PreTrainedConfig) -> None:
        if args.drop_path is None and hasattr(config, "depths") and hasattr(config, "embed_dim"):
            args.drop_path = drop_path_by_size(config)
        if args.drop_path is not None:
            config.drop_path_rate = args.drop_path

    def set_labels(config: PreTrainedConfig) -> None:
        nonlocal same_labels
        same_labels = bool(args.model) and config.id2label == dict(enumerate(names))
        config.id2label = dict(enumerate(names))
        config.label2id = {name: index for index, name in enumerate(names)}
        config.loss_ignore_index = NO_CLASS
        set_drop_path(config.backbone_config)

    config = read_config(args)
    heads = ("decode_head.classifier", "auxiliary_head.classifier")
    if isinstance(config, UperNetConfig):
        what = "a segmentation model"
        model, loading = load_model(args, AutoModelForSemanticSegmentation, what, heads, log, set_labels)
        if args.model and not same_labels:
            log(f"{source} has other classes: new classifiers for the data's {len(names)} classes.")
            if not loading["mismatched_keys"]:  # the same number of classes, but other names
                for name, module in model.named_modules():
                    if name in heads:
                        torch.nn.init.normal_(module.weight, std=config.initializer_range)
                        torch.nn.init.zeros_(module.bias)
        return model

    config.out_features = stages_of_backbone(source, config)
    if len(config.out_features) < 3:  # the auxiliary head of UperNet takes the third map
        raise Problem(
            f"{source} has {len(config.out_features)} stages, but UperNet takes at least 3: use another model."
        )
    set_drop_path(config)
    # Small networks start from larger weights, and so should their heads.
    settings = {"initializer_range": config.initializer_range}
    settings |= {"hidden_size": args.head_channels, "auxiliary_channels": args.head_channels // 2}
    config = UperNetConfig(backbone_config=config, **settings)
    set_labels(config)
    return build_on_backbone(args, AutoModelForSemanticSegmentation, config, log)


def freeze_unused_parameters(model: PreTrainedModel, side: int) -> None:
    """Freeze parameters that get no gradient, such as the last norm of Swin's backbone: DDP would wait for them."""
    model.eval()
    try:
        loss = model(torch.zeros(1, 3, side, side), labels=torch.zeros(1, side, side, dtype=torch.long)).loss
    except Exception as error:
        raise Problem(f"This model cannot process crops of {side} x {side} pixels: {first_line(error)}") from error
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True):
        parameter.requires_grad_(gradient is not None)


def segmentation_processor(args: argparse.Namespace, log: Callable[[str], None]) -> BaseImageProcessor:
    """The image processor for whole images, with the mean and standard deviation of the checkpoint or of ImageNet."""
    statistics = {"image_mean": IMAGENET_DEFAULT_MEAN, "image_std": IMAGENET_DEFAULT_STD}
    if args.model:
        known = stored_processor_if_any(args.model)
        if known is None:
            log(f"{args.model} has no image processor: using the mean and standard deviation of ImageNet.")
        else:
            names = ("image_mean", "image_std", "do_normalize", "do_rescale", "rescale_factor")
            statistics = {name: getattr(known, name) for name in names}
    # Segformer's processor does the same, but requires torchvision in transformers 5.18.
    with explain_missing_torchvision():
        processor = BeitImageProcessorPil(
            **statistics,
            resample=Image.Resampling.BILINEAR,
            do_center_crop=False,
            do_reduce_labels=args.reduce_labels,
        )
    set_size(processor, args.image_size or args.crop_size)
    return processor


def set_size(processor: BaseImageProcessor, side: int) -> None:
    """Resize whole images to `side` pixels on the shorter side, or fewer if the longer side would exceed its limit."""
    processor.size = {"shortest_edge": side, "longest_edge": LONGEST * side}
