"""Writes the model card of a converted checkpoint: usage, published accuracies, licence and origin."""

import re
from collections.abc import Mapping

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from focal_hf import FocalConfig, FocalPreTrainedModel
from settings_files import parse_yaml

ORIGINAL = "https://github.com/microsoft/Focal-Transformer"
PADDLEVIT = "https://github.com/BR-IDL/PaddleViT"

# Top-1 and top-5 accuracy on ImageNet-1K in per cent, at 224 pixels.
PUBLISHED_ACCURACIES = {
    "focal_tiny_patch4_window7_224": (82.2, 95.9),
    "focal_tiny_useconv_patch4_window7_224": (82.7, 96.1),
    "focal_small_patch4_window7_224": (83.6, 96.2),
    "focal_small_useconv_patch4_window7_224": (83.8, 96.5),
    "focal_base_patch4_window7_224": (84.0, 96.5),
    "focal_base_useconv_patch4_window7_224": (84.2, 97.1),
    "focalv2_tiny_useconv_patch4_window7_224": (82.4, 96.0),
    "focalv2_small_useconv_patch4_window7_224": (83.6, 96.4),
    "focalv2_base_useconv_patch4_window7_224": (84.0, 96.6),
}
PADDLEVIT_ACCURACIES = {
    "focal_tiny_patch4_window7_224": (82.03, 95.86),
    "focal_tiny_useconv_patch4_window7_224": (82.70, 96.14),
    "focal_small_patch4_window7_224": (83.55, 96.29),
    "focal_small_useconv_patch4_window7_224": (83.85, 96.47),
    "focal_base_patch4_window7_224": (83.98, 96.48),
    "focal_base_useconv_patch4_window7_224": (84.18, 96.61),
}

CITATION = """\
@inproceedings{yang2021focal,
  title     = {Focal Self-attention for Local-Global Interactions in Vision Transformers},
  author    = {Yang, Jianwei and Li, Chunyuan and Zhang, Pengchuan and Dai, Xiyang and Xiao, Bin and Yuan, Lu and
               Gao, Jianfeng},
  booktitle = {Advances in Neural Information Processing Systems},
  volume    = {34},
  year      = {2021},
  url       = {https://arxiv.org/abs/2107.00641}
}"""


def model_card(
    name: str,
    config: FocalConfig,
    released: bool,
    source: Mapping[str, str | int],
    model_id: str,
    with_code: bool = False,
    is_backbone: bool = False,
) -> ModelCard:
    """Returns the model card of a converted model.

    Args:
        name: Title of the card. If `released`, the name of the released model.
        config: The model's config.
        released: Whether the weights are released ones. The card gives accuracies only for those.
        source: Content of conversion.json: the source, name, size and SHA-256 of the checkpoint.
        model_id: The folder or the repository from which the examples load the model.
        with_code: Whether the model's folder holds its code.
        is_backbone: Whether the model is the backbone of a detector or segmenter, and not a classifier.
    """
    from_paddle = source["file"].endswith(".pdparams")
    accuracies = []
    if released:
        accuracies.append(("published by the authors", PUBLISHED_ACCURACIES[name]))
        if from_paddle and name in PADDLEVIT_ACCURACIES:
            accuracies.append(("PaddleViT's evaluation of its copy", PADDLEVIT_ACCURACIES[name]))
    results = [
        EvalResult(
            task_type="image-classification",
            task_name="Image Classification",
            dataset_type="ILSVRC/imagenet-1k",
            dataset_name="ImageNet-1K",
            dataset_split="validation",
            metric_type=metric,
            metric_name=f"{label}, {publisher}",
            metric_value=value,
        )
        for publisher, values in accuracies
        for metric, label, value in zip(("accuracy", "top_5_accuracy"), ("Top-1", "Top-5"), values, strict=True)
    ]
    data = ModelCardData(
        license="mit",
        library_name="transformers",
        pipeline_tag="image-feature-extraction" if is_backbone else "image-classification",
        tags=["focal-transformer", "vision"],
        datasets=["ILSVRC/imagenet-1k"] if released else None,
        model_name=name if results else None,  # huggingface_hub needs it for results, and writes it empty without them
        eval_results=results or None,
    )
    sections = [
        f"# {name}{', a backbone for dense prediction' if is_backbone else ''}",
        _summary(config, is_backbone),
        "## Use\n\n" + _use(config, model_id, with_code, is_backbone),
        "## Evaluation\n\n" + _evaluation(name, accuracies) if accuracies else "",
        "## Licence and origin\n\n" + _origin(released, source, from_paddle, is_backbone),
        f"## Citation\n\n```bibtex\n{CITATION}\n```",
    ]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(filter(None, sections)) + "\n")


def _summary(config: FocalConfig, is_backbone: bool) -> str:
    paper = "A [Focal Transformer](https://arxiv.org/abs/2107.00641) (Yang et al., NeurIPS 2021)"
    if is_backbone:
        return (
            f"{paper}: the backbone of a detector or segmenter. It returns the feature maps of "
            f"{', '.join(config.out_features)}, for images of any size. `focal_hf` converted it from the original's "
            "format, and checked that the converted model gives the same feature maps."
        )
    size = config.image_size if isinstance(config.image_size, int) else " x ".join(map(str, config.image_size))
    return (
        f"{paper} for image classification, with {config.num_labels} classes, for images of {size} pixels. `focal_hf` "
        "converted it from the original's format, and checked that the converted model gives the same logits."
    )


def _use(config: FocalConfig, model_id: str, with_code: bool, is_backbone: bool) -> str:
    mode = "L" if config.num_channels == 1 else "RGB"
    if with_code:
        code = (
            "This repository holds the model's code, and `trust_remote_code=True` runs that code. Read the code first, "
            "and pass the `revision` that you have read. If you import the Python package `focal_hf`, transformers "
            "uses the package, and `trust_remote_code` is not needed."
        )
        package, trust = "", ", trust_remote_code=True"
        load_weights = "then load the weights into its backbone with `load_state_dict`."
    else:
        code = "The model's code is in the Python package `focal_hf`. Importing it adds the model to transformers."
        package, trust = "\nimport focal_hf\n", ""
        load_weights = f'then load the weights with `focal_hf.load_backbone_weights(model, "{model_id}")`.'
    if is_backbone:
        source, load = ("transformers", "AutoBackbone") if with_code else ("focal_hf", "FocalBackbone")
        hub = "  # a repository on the Hub: AutoBackbone does not load from folders" if with_code else ""
        return f"""\
{code}

```python
import torch
from {source} import {load}

backbone = {load}.from_pretrained("{model_id}"{trust}).eval(){hub}
pixel_values = torch.rand(1, {config.num_channels}, 480, 640, dtype=backbone.dtype)  # an image of any size
with torch.no_grad():
    feature_maps = backbone(pixel_values).feature_maps
```

To use it in a detector or segmenter of transformers, build that model with `backbone_config=backbone.config`,
{load_weights}"""
    return f"""\
{code}

```python
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification
{package}
processor = AutoImageProcessor.from_pretrained("{model_id}")
model = AutoModelForImageClassification.from_pretrained("{model_id}"{trust}).eval()

image = Image.open("picture.jpg").convert("{mode}")
inputs = processor(image, return_tensors="pt").to(model.dtype)
with torch.no_grad():
    logits = model(**inputs).logits
print(model.config.id2label[logits.argmax(-1).item()])
```"""


def _evaluation(name: str, accuracies: list[tuple[str, tuple[float, float]]]) -> str:
    rows = "\n".join(f"| {publisher} | {top_1} | {top_5} |" for publisher, (top_1, top_5) in accuracies)
    paragraphs = [
        "Accuracy on the validation split of ImageNet-1K, in per cent. The publishers of the released weights state "
        "these figures. They were not measured again on the converted model.",
        f"| | top-1 | top-5 |\n|---|---|---|\n{rows}",
    ]
    if name == "focal_base_useconv_patch4_window7_224" and len(accuracies) == 2:
        paragraphs.append(
            "The two figures for the top-5 accuracy differ by more than for any other model. The authors' figure is "
            "probably a mistake."
        )
    return "\n\n".join(paragraphs)


def _origin(released: bool, source: Mapping[str, str | int], from_paddle: bool, is_backbone: bool) -> str:
    file = source["file"].replace("`", "'")
    download = f", downloaded from [Google Drive]({source['source']})" if "file_id" in source else ""
    paragraphs = [
        f"The model was converted from `{file}`{download}: {source['size']:,} bytes, SHA-256 `{source['sha256']}`.",
        f"The original's code and released weights ([microsoft/Focal-Transformer]({ORIGINAL})) are under the "
        f"[MIT License]({ORIGINAL}/blob/main/LICENSE), Copyright (c) Microsoft Corporation.",
    ]
    if from_paddle:
        paragraphs.append(
            f"The file is in Paddle's format. [PaddleViT]({PADDLEVIT}), a repository under the Apache License 2.0, "
            "publishes such files, which are conversions of the original's MIT weights."
        )
    if is_backbone:
        paragraphs.append(
            "These weights were trained in a detector or segmenter. The authors did not release such weights, so "
            "whoever trained them decides on the licence. If it is another one, correct this section and `license` "
            "above."
        )
    elif not released:
        paragraphs.append(
            "The settings came from a file, so the converter cannot know whether these are the released weights. If "
            "they are neither the released weights nor derived from them, whoever trained them decides on the "
            "licence: then correct this section and `license` above."
        )
    return "\n\n".join(paragraphs)


# --- Models that were a Swin ------------------------------------------------------------------------------------------

SWIN_CITATION = """\
@inproceedings{liu2021swin,
  title     = {Swin Transformer: Hierarchical Vision Transformer using Shifted Windows},
  author    = {Liu, Ze and Lin, Yutong and Cao, Yue and Hu, Han and Wei, Yixuan and Zhang, Zheng and Lin, Stephen and
               Guo, Baining},
  booktitle = {Proceedings of the IEEE/CVF International Conference on Computer Vision},
  year      = {2021},
  url       = {https://arxiv.org/abs/2103.14030}
}"""

# Entries of a card's metadata that hold for the converted model, too.
_KEPT_METADATA = ("license", "license_name", "license_link", "language", "datasets")


def swin_model_card(
    name: str,
    model_class: type[FocalPreTrainedModel],
    config: FocalConfig,
    source: Mapping,
    source_card: str | None,
    new_share: float | None,
) -> ModelCard:
    """Returns the model card of a converted Swin.

    Args:
        name: Title of the card, and the folder from which the examples load the model.
        model_class: Class of the model.
        config: The model's config.
        source: Content of conversion.json.
        source_card: Text of the Swin's card, if it has one.
        new_share: Share of the attention of new keys, if the model has grown.
    """
    metadata, source_text = _split_card(source_card or "")
    on_hub = source["source"] != "local folder"
    data = ModelCardData(
        **metadata,
        library_name="transformers",
        pipeline_tag=_PIPELINES.get(model_class.__name__, "image-feature-extraction"),
        tags=["focal-transformer", "swin", "vision"],
        base_model=source["source"] if on_hub else None,
    )
    origin = f"[{source['source']}](https://huggingface.co/{source['source']})" if on_hub else "a local folder"
    licence = metadata.get("license_name") or metadata.get("license")
    sections = [
        f"# {name}",
        _swin_summary(config, new_share),
        "## Use\n\n" + _use_of_class(model_class, config, name),
        "## Licence and origin\n\n"
        f"The weights are those of {origin}{', revision `' + source['revision'] + '`' if source['revision'] else ''}. "
        + (
            f"Its card states the licence `{licence}`, which holds for these weights, too."
            if licence
            else "It states no licence. Whoever trained the weights decides on their licence."
        ),
        f"## Citation\n\n```bibtex\n{SWIN_CITATION}\n\n{CITATION}\n```",
        f"## The card of the Swin\n\n{source_text}" if source_text else "",
    ]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(filter(None, sections)) + "\n")


_PIPELINES = {
    "FocalForImageClassification": "image-classification",
    "FocalForMaskedImageModeling": "image-feature-extraction",
}


def _split_card(card: str) -> tuple[dict[str, str | list[str]], str]:
    """Returns the metadata to keep and the text of a card. Invalid metadata is dropped: anyone can have written it."""
    match = re.match(r"\s*---\n(.*?)\n---\s*(?:\n|$)", card, re.DOTALL)
    if not match:
        return {}, card.strip()
    try:
        metadata = parse_yaml(match[1])
    except Exception:
        metadata = None
    kept = {}
    for key in _KEPT_METADATA:
        value = metadata.get(key) if isinstance(metadata, dict) else None
        if isinstance(value, str) or (isinstance(value, list) and all(isinstance(item, str) for item in value)):
            kept[key] = value
    return kept, card[match.end() :].strip()


def _swin_summary(config: FocalConfig, new_share: float | None) -> str:
    summary = (
        "A [Swin Transformer](https://arxiv.org/abs/2103.14030) (Liu et al., ICCV 2021) as a [Focal "
        "Transformer](https://arxiv.org/abs/2107.00641) (Yang et al., NeurIPS 2021). "
    )
    if new_share is None:
        return summary + "`focal_hf` converted it, and checked that the converted model gives the same outputs."
    return (
        f"{summary}`focal_hf` converted it and added the tokens around each window and pooled tokens, with "
        f"`focal_levels={list(config.focal_levels)}`. The weights for these are not trained. They start with a share "
        f"of {new_share} of the attention: fine-tune the model."
    )


def _use_of_class(model_class: type[FocalPreTrainedModel], config: FocalConfig, model_id: str) -> str:
    class_name = model_class.__name__
    if class_name in ("FocalForImageClassification", "FocalBackbone"):
        return _use(config, model_id, with_code=False, is_backbone=class_name == "FocalBackbone")
    return f"""\
The model's code is in the Python package `focal_hf`.

```python
from focal_hf import {class_name}

model = {class_name}.from_pretrained("{model_id}")
```"""
