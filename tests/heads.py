"""Every head of transformers whose config takes a `backbone_config`, small, on a Focal and on a Swin backbone.

`python tests/heads.py --write` writes the table of docs/heads.md, which says which of them work.
"""

import dataclasses
import functools
import importlib
import re
import sys
import tempfile
from collections.abc import Callable

import torch
import transformers
from transformers import (
    BertConfig,
    CLIPTextConfig,
    DetrConfig,
    DetrForObjectDetection,
    PreTrainedConfig,
    PreTrainedModel,
    SwinConfig,
)
from transformers.backbone_utils import BackboneMixin
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from conftest import ROOT
from focal_hf import FocalBackbone, FocalConfig
from small_models import randomized

PAGE = ROOT / "docs" / "heads.md"
IMAGE = 64
CLASSES = 3
SMALL = {"image_size": IMAGE, "embed_dim": 16, "depths": (1, 1, 1, 1), "num_heads": (2, 2, 4, 4)}
SMALL |= {"window_size": 2, "expand_sizes": (1, 1, 1, 1)}
STAGES = ["stage1", "stage2", "stage3", "stage4"]
CHANNELS = [16, 32, 64, 128]
BACKBONES = {"Focal": FocalConfig, "Swin": SwinConfig}


def pixels(channels: int = 3) -> torch.Tensor:
    return torch.randn((2, channels, IMAGE, IMAGE), generator=torch.Generator().manual_seed(0))


def images() -> dict:
    return {"pixel_values": pixels()}


def objects(masks: bool = False) -> dict:
    """Returns the labels of two images with two objects each."""
    targets = []
    for shift in (0.0, 0.1):
        boxes = torch.tensor([[0.3, 0.3, 0.3, 0.4], [0.6, 0.5, 0.4, 0.3]]) + shift
        targets.append({"class_labels": torch.tensor([0, 2]), "boxes": boxes})
        if masks:
            targets[-1]["masks"] = torch.zeros(2, IMAGE, IMAGE)
            targets[-1]["masks"][0, 10:30, 10:30] = targets[-1]["masks"][1, 20:50, 30:60] = 1
    return images() | {"labels": targets}


def segments() -> dict:
    masks = [target["masks"] for target in objects(masks=True)["labels"]]
    return images() | {"mask_labels": masks, "class_labels": [torch.tensor([0, 2])] * 2}


def named_segments() -> dict:
    task = torch.ones(2, 8, dtype=torch.long)
    return segments() | {"task_inputs": task, "text_inputs": torch.ones(2, 4, 8, dtype=torch.long)}


def classes_of_pixels() -> dict:
    return images() | {"labels": (pixels()[:, 0] > 0).long()}


def named_objects() -> dict:
    # As BERT's tokenizer would have "x. y. z."
    text = torch.tensor([[101, 5, 1012, 6, 1012, 7, 1012, 102]] * 2)
    return objects() | {"input_ids": text, "attention_mask": torch.ones_like(text)}


def asked_objects() -> dict:
    text = torch.tensor([[0, 5, 6, 7, 1, 1]] * 4)
    classes = {"classes_input_ids": text, "classes_attention_mask": torch.ones_like(text)}
    tasks = {"tasks_input_ids": text[:2], "tasks_attention_mask": torch.ones_like(text[:2])}
    return images() | classes | tasks | {"classes_structure": torch.tensor([2, 2])}


def frames() -> dict:
    text = torch.ones(1, 6, dtype=torch.long)
    inputs = {"input_ids": text, "attention_mask": text, "labels": torch.tensor([[10.0], [2.0], [5.0]])}
    return inputs | {"pixel_values": pixels()[None]}


def line_of_text() -> dict:
    return {"pixel_values": pixels()[:, :, :48]}


@dataclasses.dataclass(frozen=True)
class Head:
    """How to build a small model with a head, its inputs, and a note for the table in the documentation.

    `backbone` are settings of the backbone's config, `prepare` is done to the model once it is built or loaded.
    """

    settings: dict = dataclasses.field(default_factory=dict)
    inputs: Callable[[], dict] = images
    backbone: dict = dataclasses.field(default_factory=dict)
    prepare: Callable[[PreTrainedModel], None] = lambda model: None
    remark: str = ""


def without_reassembly(model: PreTrainedModel) -> None:
    model.neck.reassemble_stage = None


LAST, THIRD = {"out_features": STAGES[3:]}, {"out_features": STAGES[2:3]}
FIRST_THREE, LAST_THREE = {"out_features": STAGES[:3]}, {"out_features": STAGES[1:]}
HGNET = {"stage_out_channels": CHANNELS}
PP_LCNET = {"block_configs": [[(0, 0, CHANNELS[2])]], "scale": 1, "divisor": 1}

LAYERS = {"encoder_layers": 1, "decoder_layers": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "num_queries": 8}
LAYERS |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
DETR = LAYERS | {"d_model": 32}
MASK_DETR = LAYERS | {"d_model": 64, "encoder_attention_heads": 8, "decoder_attention_heads": 8}
RT_DETR = DETR | {"encoder_hidden_dim": 32, "encoder_in_channels": CHANNELS[1:], "decoder_in_channels": [32, 32, 32]}
RT_DETR |= {"num_denoising": 4}
DOCUMENT = RT_DETR | {"num_denoising": 0}
ENCODER = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
BERT = BertConfig(vocab_size=1100, **ENCODER)
CLIP = CLIPTextConfig(vocab_size=50, projection_dim=64, bos_token_id=0, eos_token_id=1, **ENCODER | {"hidden_size": 64})
GROUNDED = DETR | {"text_config": BERT, "max_text_len": 8}
MASKED = {"num_queries": 8, "hidden_dim": 32, "encoder_feedforward_dim": 32, "dim_feedforward": 32, "encoder_layers": 1}
MASKED |= {"decoder_layers": 2, "num_attention_heads": 2, "train_num_points": 64}
FUSED = {"neck_hidden_sizes": CHANNELS, "fusion_hidden_size": 32}

RATIOS = [
    f"{direction}_{ratio}"
    for direction in ("vertical_long_to_small_conv", "horizontal_small_to_long_conv", "symmetric_conv_long")
    for ratio in ("longratio", "midratio", "shortratio")
]
TEXT_REGIONS = {"neck_out_channels": 32, "scale_factor_list": [1, 2, 4, 8], "kernel_list": [3, 2, 2]}
TEXT_REGIONS["intraclass_block_config"] = {name: [1, 1, 0] for name in ("reduce_channel", "return_channel", *RATIOS)}

NO_LOSS = "no loss"
WARNS = "logs a warning that Focal is unknown"
ONE_MAP = 'reads only the last map: set `out_features=["stage4"]`; the norms of other maps would get no gradient'
THREE_MAPS = '`out_features=["stage2", "stage3", "stage4"]`; `encoder_in_channels` are the channels of these maps'
THIRD_MAP = 'reads one map of stride 16: `out_features=["stage3"]`; stage 4 gets no gradient'
REASSEMBLY = (
    "set `model.neck.reassemble_stage = None` after building or loading, or the maps are read as the tokens of a ViT "
    "(transformers skips this step only for the model type `swinv2`); `neck_hidden_sizes` are the channels of the "
    f"maps; {NO_LOSS}"
)
STAGE_CHANNELS = (
    "the head reads `stage_out_channels`, the numbers of channels of the maps, from the backbone's config: set it there"
)
LINE_OF_TEXT = f"the images are 48 pixels high; {THIRD_MAP}; {NO_LOSS}"
BLOCKS = (
    "the head reads `block_configs`, `scale` and `divisor` from the backbone's config: set them there to "
    f"`[[(0, 0, channels)]]`, 1 and 1, with the number of channels of the map; {LINE_OF_TEXT}"
)
TOKENS = "expects the tokens of a ViT: maps with the same number of channels and the same stride"
CLASS_TOKEN = "also reads the class token of a ViT"
OWN = "builds its own backbone and ignores the type of `backbone_config`"

HEADS = {
    "UperNetForSemanticSegmentation": Head(
        {"hidden_size": 16, "auxiliary_channels": 16, "auxiliary_in_channels": CHANNELS[2]},
        classes_of_pixels,
        remark="`auxiliary_in_channels` is the number of channels of the third map",
    ),
    "MaskFormerForInstanceSegmentation": Head(
        {"fpn_feature_size": 32, "mask_feature_size": 32, "decoder_config": DetrConfig(**DETR)},
        segments,
        remark=f"{WARNS}; for Swin, which it detects by name, MaskFormer builds a Swin backbone of its own",
    ),
    "Mask2FormerForUniversalSegmentation": Head(
        MASKED | {"feature_size": 32, "mask_feature_size": 32}, segments, remark=WARNS
    ),
    "OneFormerForUniversalSegmentation": Head(
        MASKED
        | {"conv_dim": 64, "mask_dim": 64, "hidden_dim": 64, "task_seq_len": 8, "text_encoder_width": 64}
        | {"text_encoder_num_layers": 1, "text_encoder_vocab_size": 50, "text_encoder_context_length": 8}
        | {"text_encoder_n_ctx": 4, "is_training": True},
        named_segments,
        remark="`hidden_dim` must equal `conv_dim`, because the layers that project one to the other are neither "
        "trained nor saved",
    ),
    "DetrForObjectDetection": Head(DETR, objects, LAST, remark=ONE_MAP),
    "DetrForSegmentation": Head(MASK_DETR, lambda: objects(masks=True)),
    "ConditionalDetrForObjectDetection": Head(DETR, objects, LAST, remark=ONE_MAP),
    "ConditionalDetrForSegmentation": Head(MASK_DETR, lambda: objects(masks=True)),
    "DabDetrForObjectDetection": Head(LAYERS | {"hidden_size": 32}, objects, LAST, remark=ONE_MAP),
    "DeformableDetrForObjectDetection": Head(DETR, objects),
    "TableTransformerForObjectDetection": Head(DETR, objects, LAST, remark=ONE_MAP),
    "RTDetrForObjectDetection": Head(RT_DETR, objects, LAST_THREE, remark=THREE_MAPS),
    "RTDetrV2ForObjectDetection": Head(RT_DETR, objects, LAST_THREE, remark=THREE_MAPS),
    "DFineForObjectDetection": Head(RT_DETR, objects, LAST_THREE, remark=THREE_MAPS),
    "Deimv2ForObjectDetection": Head(RT_DETR, objects, LAST_THREE, remark=THREE_MAPS),
    "PPDocLayoutV2ForObjectDetection": Head(
        DOCUMENT
        | {"class_thresholds": [0.5] * 3, "class_order": [0, 1, 2]}
        | {"reading_order_config": ENCODER | {"coordinate_size": 6, "shape_size": 4}},
        images,
        LAST_THREE,
        remark=f"{THREE_MAPS}; {NO_LOSS}",
    ),
    "PPDocLayoutV3ForObjectDetection": Head(
        DOCUMENT | {"x4_feat_dim": CHANNELS[0]},
        remark="`encoder_in_channels` are the channels of the last three maps, `x4_feat_dim` is the number of channels "
        f"of the first map; {NO_LOSS}",
    ),
    "PPDocLayoutV4ForObjectDetection": Head(DOCUMENT, images, LAST_THREE, remark=f"{THREE_MAPS}; {NO_LOSS}"),
    "GroundingDinoForObjectDetection": Head(GROUNDED, named_objects),
    "MMGroundingDinoForObjectDetection": Head(GROUNDED, named_objects),
    "OmDetTurboForObjectDetection": Head(
        {"encoder_in_channels": CHANNELS[1:], "apply_layernorm_after_vision_backbone": False, "num_queries": 8}
        | {"text_config": CLIP, "text_projection_in_dim": 64, "text_projection_out_dim": 64, "class_embed_dim": 64}
        | {"task_encoder_hidden_dim": 64, "encoder_hidden_dim": 32, "vision_features_channels": [32, 32, 32]}
        | {"encoder_attention_heads": 2, "encoder_dim_feedforward": 32, "decoder_hidden_dim": 32}
        | {"decoder_num_heads": 2, "decoder_num_layers": 2, "decoder_dim_feedforward": 32},
        asked_objects,
        LAST_THREE,
        remark=f"{THREE_MAPS}; `apply_layernorm_after_vision_backbone=False`; {NO_LOSS}",
    ),
    "LwDetrForObjectDetection": Head(remark=OWN),
    "RfDetrForObjectDetection": Head(remark=OWN),
    "RfDetrForInstanceSegmentation": Head(remark=OWN),
    "DPTForDepthEstimation": Head(FUSED, prepare=without_reassembly, remark=REASSEMBLY),
    "DPTForSemanticSegmentation": Head(
        ENCODER
        | {"is_hybrid": True, "backbone_featmap_shape": [1, CHANNELS[2], 4, 4], "image_size": IMAGE}
        | {"hidden_size": CHANNELS[3], "num_hidden_layers": 2, "backbone_out_indices": [0, 0, 0, 1]}
        | FUSED,
        classes_of_pixels,
        FIRST_THREE,
        remark="only as DPT-Hybrid (`is_hybrid=True`), with the maps of stages 1, 2 and 3; stage 4 gets no gradient; "
        "`neck_hidden_sizes` begins with the channels of the first two maps, `backbone_featmap_shape` is the shape of "
        "the third map, `hidden_size` is that of the backbone",
    ),
    "ZoeDepthForDepthEstimation": Head(
        FUSED
        | {"bottleneck_features": 32, "num_relative_features": 32}
        | {"bin_configurations": [{"n_bins": 16, "min_depth": 0.001, "max_depth": 10.0, "name": "rooms"}]},
        prepare=without_reassembly,
        remark=REASSEMBLY,
    ),
    "DepthAnythingForDepthEstimation": Head(remark=TOKENS),
    "PromptDepthAnythingForDepthEstimation": Head(remark=TOKENS),
    "CHMv2ForDepthEstimation": Head(remark=CLASS_TOKEN),
    "Tipsv2DptForDensePrediction": Head(remark=CLASS_TOKEN),
    "Tipsv2DptForDepthEstimation": Head(remark=CLASS_TOKEN),
    "Tipsv2DptForNormalEstimation": Head(remark=CLASS_TOKEN),
    "Tipsv2DptForSemanticSegmentation": Head(remark=CLASS_TOKEN),
    "VitMatteForImageMatting": Head(
        {"hidden_size": 64, "fusion_hidden_sizes": [16, 16, 16, 16], "convstream_hidden_sizes": [8, 8, 8]},
        lambda: {"pixel_values": pixels(4)},
        THIRD | {"num_channels": 4},
        remark="`hidden_size` is the number of channels of the map; the backbone has `num_channels=4`; "
        f"{THIRD_MAP}; {NO_LOSS}",
    ),
    "VitPoseForPoseEstimation": Head(remark=TOKENS),
    "TvpForVideoGrounding": Head(
        ENCODER | {"num_frames": 2, "max_img_size": IMAGE, "visual_prompt_size": 8},
        frames,
        LAST | {"hidden_sizes": CHANNELS},
        remark="reads one feature map; set `hidden_sizes` in the backbone's config to a list whose last value is the "
        "number of channels of this map",
    ),
    "UVDocModel": Head(remark=OWN),
    "SLANetForTableRecognition": Head(
        {"max_text_length": 4, "hidden_size": 16, "post_conv_out_channels": 16},
        images,
        LAST_THREE,
        remark=f'`out_features=["stage2", "stage3", "stage4"]`; {NO_LOSS}',
    ),
    "PPOCRV5MobileDetForObjectDetection": Head(remark=NO_LOSS),
    "PPOCRV5ServerDetForObjectDetection": Head(TEXT_REGIONS, images, HGNET, remark=f"{STAGE_CHANNELS}; {NO_LOSS}"),
    "PPOCRV6MediumDetForObjectDetection": Head(TEXT_REGIONS, images, HGNET, remark=f"{STAGE_CHANNELS}; {NO_LOSS}"),
    "PPOCRV6SmallDetForObjectDetection": Head(
        {"layer_list_out_channels": CHANNELS},
        remark=f"`layer_list_out_channels` are the channels of the maps; {NO_LOSS}",
    ),
    "PPOCRV5ServerRecForTextRecognition": Head(
        {}, line_of_text, THIRD | {"stage_out_channels": CHANNELS[:3]}, remark=f"{STAGE_CHANNELS}; {LINE_OF_TEXT}"
    ),
    "PPOCRV5MobileRecForTextRecognition": Head({}, line_of_text, THIRD | PP_LCNET, remark=BLOCKS),
    "PPOCRV6SmallRecForTextRecognition": Head({}, line_of_text, THIRD | PP_LCNET, remark=BLOCKS),
    "PPOCRV6TinyRecForTextRecognition": Head({}, line_of_text, THIRD | PP_LCNET, remark=BLOCKS),
    "Sam2VisionModel": Head(remark="reads the `intermediate_hidden_states` of Hiera from a bare model, not a backbone"),
    "Sam3VisionModel": Head(remark="reads the last hidden state of a bare model as the tokens of a ViT, one per patch"),
    "EdgeTamVisionModel": Head(remark="reads a list of maps from a bare timm model, not from a backbone"),
}


@functools.cache
def installed_heads() -> dict[str, type[PreTrainedModel]]:
    """Returns the models of the installed transformers, by name, whose config has a field `backbone_config`.

    Of each config those for a task (`…For…`), or the bare model where there is none.
    """
    found = {}
    for model_type in CONFIG_MAPPING:
        config_class = CONFIG_MAPPING[model_type]
        if "backbone_config" in {field.name for field in dataclasses.fields(config_class)}:
            module = importlib.import_module(config_class.__module__.replace(".configuration_", ".modeling_"))
            models = [name for name in module.__all__ if not name.endswith("PreTrainedModel")]
            models = [name for name in models if getattr(getattr(module, name), "config_class", None) is config_class]
            heads = [name for name in models if re.search("For[A-Z]", name)]
            heads = heads or [name for name in models if name.endswith("Model")]
            found |= {name: getattr(module, name) for name in heads}
    return found


def build(name: str, backbone_class: type[PreTrainedConfig]) -> PreTrainedModel:
    torch.manual_seed(0)
    head = HEADS[name]
    model_class = installed_heads()[name]
    backbone_config = backbone_class(**SMALL | {"out_features": STAGES} | head.backbone)
    config = model_class.config_class(backbone_config=backbone_config, num_labels=CLASSES, **head.settings)
    model = model_class(config)
    head.prepare(model)
    return model


def small_config(attention_type: str = "focal", **changes) -> FocalConfig:
    options = {"attention_type": attention_type, "out_features": STAGES, "use_absolute_embeddings": True}
    return FocalConfig(**SMALL | options | changes)


def small_detr(*arguments, **changes) -> DetrForObjectDetection:
    return randomized(DetrForObjectDetection(DetrConfig(backbone_config=small_config(*arguments, **changes), **DETR)))


def tensors(value: object) -> list[torch.Tensor]:
    """Returns all floating point tensors in a nested output."""
    if isinstance(value, torch.Tensor):
        return [value] if value.is_floating_point() else []
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, tuple | list) else ()
    return [tensor for part in parts for tensor in tensors(part)]


def backbone_of(model: PreTrainedModel) -> PreTrainedModel:
    return next(module for module in model.modules() if isinstance(module, BackboneMixin))


def train_step(model: PreTrainedModel, inputs: dict) -> None:
    """Runs a training step. Raises unless every trainable parameter of the backbone gets a finite gradient.

    The stages behind the last map that the head asks for cannot, nor can the final norm that a Swin has.
    """
    outputs = model.train()(**inputs)
    loss = getattr(outputs, "loss", None)
    if loss is None:
        loss = sum(tensor.square().mean() for tensor in tensors(outputs) if tensor.requires_grad)
    loss.backward()
    backbone = backbone_of(model)
    last = backbone.out_indices[-1]
    behind = tuple(f"encoder.layers.{stage}." for stage in range(last, len(backbone.config.depths)))
    behind += (f"encoder.layers.{last - 1}.downsample.",)
    if not isinstance(backbone, FocalBackbone):
        behind += ("layernorm.",)
    for name, parameter in backbone.named_parameters():
        if not name.split(".", 1)[1].startswith(behind):
            assert parameter.grad is not None, f"no gradient: {name}"
            assert parameter.grad.isfinite().all(), f"not finite: {name}"
    torch.optim.SGD(model.parameters(), lr=1e-3).step()


def answers(model: PreTrainedModel, inputs: dict) -> list[torch.Tensor]:
    torch.manual_seed(0)
    with torch.no_grad():
        return tensors(model.eval()(**{name: value for name, value in inputs.items() if not name.endswith("labels")}))


def trial(name: str, backbone_class: type[PreTrainedConfig]) -> None:
    """Builds, saves, loads and trains a head. Raises an exception if it does not work."""
    head = HEADS[name]
    model = build(name, backbone_class)
    expected = answers(model, head.inputs())
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = type(model).from_pretrained(folder)
    head.prepare(loaded)
    for value, other in zip(answers(loaded, head.inputs()), expected, strict=True):
        torch.testing.assert_close(value, other, rtol=0, atol=0)
    train_step(loaded, head.inputs())


@functools.cache
def failure(name: str, backbone: str) -> str | None:
    """Returns the exception with which a head fails with a backbone of BACKBONES, as text; None if it works."""
    try:
        trial(name, BACKBONES[backbone])
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def table() -> str:
    """Returns the table of all heads of the installed transformers. Heads that are not in HEADS are at the end."""
    heads = installed_heads()
    lines = [
        f"| head of transformers {transformers.__version__} | {' | '.join(BACKBONES)} | remark |",
        "|---|---|---|---|",
    ]
    for name in sorted(heads, key=[*HEADS, *heads].index):
        works = ["works" if failure(name, backbone) is None else "no" for backbone in BACKBONES]
        lines.append(f"| `{name}` | {' | '.join(works)} | {HEADS[name].remark if name in HEADS else ''} |")
    return "\n".join(lines) + "\n"


def committed_table() -> str:
    return re.search(r"(?ms)^\| head of transformers.*^\|[^\n]*\n", PAGE.read_text())[0]


def main() -> None:
    if sys.argv[1:] != ["--write"]:
        sys.exit("usage: python tests/heads.py --write")
    PAGE.write_text(PAGE.read_text().replace(committed_table(), table()))


if __name__ == "__main__":
    main()
