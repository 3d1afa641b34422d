"""The model card of a converted checkpoint: where it comes from, its licence, what it is known to achieve."""

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from focal_hf import FocalConfig

ORIGINAL = "https://github.com/microsoft/Focal-Transformer"
PADDLEVIT = "https://github.com/BR-IDL/PaddleViT"

# ImageNet-1K top-1 and top-5 accuracy in per cent, at 224 pixels.
PUBLISHED = {
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
PADDLEVIT_EVALUATION = {
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
    from_paddle: bool,
    model_id: str,
    with_code: bool = False,
    backbone: bool = False,
) -> ModelCard:
    """The card of a model called `name`, to be loaded as `model_id`; `with_code` if its folder holds its code, too.

    It is a classifier or, with `backbone`, the backbone of a detector or segmenter. Accuracies are given only where the
    weights are `released` ones, under which `name` is one of theirs.
    """
    evaluations = []
    if released:
        evaluations.append(("published by the authors", PUBLISHED[name]))
        if from_paddle and name in PADDLEVIT_EVALUATION:
            evaluations.append(("PaddleViT's evaluation of its copy", PADDLEVIT_EVALUATION[name]))
    results = [
        EvalResult(
            task_type="image-classification",
            task_name="Image Classification",
            dataset_type="ILSVRC/imagenet-1k",
            dataset_name="ImageNet-1K",
            dataset_split="validation",
            metric_type=kind,
            metric_name=f"{label}, {whose}",
            metric_value=value,
        )
        for whose, values in evaluations
        for kind, label, value in zip(("accuracy", "top_5_accuracy"), ("Top-1", "Top-5"), values, strict=True)
    ]
    data = ModelCardData(
        license="mit",
        library_name="transformers",
        pipeline_tag="image-feature-extraction" if backbone else "image-classification",
        tags=["focal-transformer", "vision"],
        datasets=["ILSVRC/imagenet-1k"] if released else None,
        model_name=name if results else None,  # needed with results, and empty without
        eval_results=results or None,
    )
    sections = [
        f"# {name}{', a backbone for dense prediction' if backbone else ''}",
        _summary(config, backbone),
        "## Use\n\n" + _use(config, model_id, with_code, backbone),
        "## Evaluation\n\n" + _evaluation(evaluations) if evaluations else "",
        "## Licence and origin\n\n" + _origin(released, from_paddle, backbone),
        f"## Citation\n\n```bibtex\n{CITATION}\n```",
    ]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(filter(None, sections)) + "\n")


def _summary(config: FocalConfig, backbone: bool) -> str:
    paper = "A [Focal Transformer](https://arxiv.org/abs/2107.00641) (Yang et al., NeurIPS 2021)"
    if backbone:
        return (
            f"{paper}, taken from a detector or segmenter: the maps of {', '.join(config.out_features)}, for images of "
            "any size. Converted from the original's format with `focal_hf`, which checked that these files give the "
            "feature maps of the weights that it read."
        )
    size = config.image_size if isinstance(config.image_size, int) else " x ".join(map(str, config.image_size))
    return (
        f"{paper} for image classification: {config.num_labels} classes, made for images of {size} pixels. Converted "
        "from the original's format with `focal_hf`, which checked that these files give the logits of the weights "
        "that it read."
    )


def _use(config: FocalConfig, model_id: str, with_code: bool, backbone: bool) -> str:
    mode = "L" if config.num_channels == 1 else "RGB"
    if with_code:
        code = (
            "The model's code comes with it, and `trust_remote_code=True` runs it: read it first, and name the "
            "`revision` that you have read. With the Python package `focal_hf` imported, that is used in its place, "
            "and `trust_remote_code` is not needed."
        )
        package, trust = "", ", trust_remote_code=True"
        inside = "`load_state_dict` then takes the weights into the backbone that it has."
    else:
        code = "The model's code is the Python package `focal_hf`; importing it makes transformers know the model."
        package, trust = "\nimport focal_hf\n", ""
        inside = f'`focal_hf.load_backbone_weights(model, "{model_id}")` then puts the weights into it.'
    if backbone:
        source, load = ("transformers", "AutoBackbone") if with_code else ("focal_hf", "FocalBackbone")
        hub = "  # by its name on the Hub: this class does not look into folders" if with_code else ""
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

A detector or segmenter of transformers is built for it with `backbone_config=backbone.config`;
{inside}"""
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


def _evaluation(evaluations: list[tuple[str, tuple[float, float]]]) -> str:
    rows = "\n".join(f"| {whose} | {top_1} | {top_5} |" for whose, (top_1, top_5) in evaluations)
    return (
        "ImageNet-1K validation, accuracy in per cent. These figures are of the released weights, as their publishers "
        "state them; they were not measured again on this conversion.\n\n"
        f"| | top-1 | top-5 |\n|---|---|---|\n{rows}"
    )


def _origin(released: bool, from_paddle: bool, backbone: bool) -> str:
    paragraphs = [
        f"The original's code and released weights ([microsoft/Focal-Transformer]({ORIGINAL})) are under the MIT "
        f"License, Copyright (c) Microsoft Corporation: [its text]({ORIGINAL}/blob/main/LICENSE)."
    ]
    if from_paddle:
        paragraphs.append(
            f"This model was converted from a file in Paddle's format. [PaddleViT]({PADDLEVIT}), a repository under "
            "the Apache License 2.0, publishes such files; they are conversions of the original's MIT weights."
        )
    if backbone:
        paragraphs.append(
            "These weights were trained in a detector or segmenter, and the authors released none: their licence is "
            "for whoever trained them to say. Correct this section and `license` above where it is another."
        )
    elif not released:
        paragraphs.append(
            "The settings were given by hand, so nothing here tells whether these are the released weights. If they "
            "are not, nor derived from them, their licence is for whoever trained them to say: then correct this "
            "section and `license` above."
        )
    return "\n\n".join(paragraphs)
