"""Convert a checkpoint of the original Focal Transformer, or PaddleViT's copy of one, to transformers' format.

Or the backbone in that of a detector or segmenter.
"""

import argparse
import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import BitImageProcessorPil
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from transformers.utils import logging

from checkpoint_files import read_checkpoint
from focal_hf import FocalBackbone, FocalConfig, FocalForImageClassification, FocalPreTrainedModel
from messages import ConversionError, failing_as, say
from model_card import model_card
from original import (
    RELEASED,
    build_empty,
    config_from_settings,
    dense_backbone,
    from_original,
    output_indices,
    prefixes,
    reason_against_original,
    to_original,
)
from output_files import check_output_folder, move_into_place, run, staging_folder
from settings_files import read_settings

EPILOG = f"""\
--output then holds config.json, model.safetensors, preprocessor_config.json and README.md, a model card. Before it
appears, the converter loads what it has written, compares its logits with those of the weights that it read, and
converts the weights back to compare them bit for bit. Nothing in the checkpoint is run; yacs, mmengine and Paddle are
not needed, nor a network but for --push-to-hub. With --with-code the folder also holds the model's Python modules.

From a detector or segmenter (mmdetection, mmsegmentation: names that begin with backbone., or norm0 and so on) it takes
the backbone, for FocalBackbone.from_pretrained. Which stages' maps that returns follows from the norms that are there.
It compares feature maps in place of logits, and writes no preprocessor_config.json, since images are the head's matter.

examples:
  a released model, by name:
    python convert/convert_focal_to_hf.py --checkpoint focal-tiny-is224-ws7.pth \\
        --config focal_tiny_patch4_window7_224 --output focal-tiny

  PaddleViT's copy of it, in bfloat16:
    python convert/convert_focal_to_hf.py --checkpoint focal_tiny_patch4_window7_224.pdparams \\
        --config focal_tiny_patch4_window7_224 --output focal-tiny --dtype bfloat16

  your own training run, with its settings, at 384 pixels, and on to the Hub (log in first: hf auth login), with the
  code for those who do not have focal_hf:
    python convert/convert_focal_to_hf.py --checkpoint ckpt_epoch_299.pth --config my_focal.yaml --image-size 384 \\
        --output my-focal --push-to-hub me/my-focal --with-code

  the backbone of a detector that was built for more than 224 pixels, so that its last stage has surroundings, too:
    python convert/convert_focal_to_hf.py --checkpoint epoch_12.pth --config focal_tiny_patch4_window7_224 \\
        --image-size 800 1333 --output focal-tiny-coco

released models:
  {chr(10).join(RELEASED).replace(chr(10), chr(10) + "  ")}
"""

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

# Names of ImageNet's 1000 classes in order: WordNet's words for each, but for `crane`, which names two of them.
LABELS = {"imagenet": Path(__file__).with_name("imagenet_labels.json")}


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--checkpoint",
        required=True,
        type=Path,
        metavar="FILE",
        help="the original's .pth (released, bare state dict, or saved during training), a .pdparams of Paddle, or a "
        "detector's or segmenter's .pth",
    )
    parser.add_argument(
        "--config",
        required=True,
        metavar="FILE|NAME",
        help="the YAML file that it was trained with (its BASE files are read, too), or a released model's name",
    )
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="folder to write the model to")
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace DIR where it is empty or holds a model and nothing else, once the new one is checked",
    )
    parser.add_argument(
        "--image-size",
        type=int,
        nargs="+",
        metavar="PIXELS",
        help="the size that the checkpoint was trained at, where it is not the settings': a side, or height and width",
    )
    parser.add_argument(
        "--labels", choices=LABELS, help="names for the classes; a released model, by name, has ImageNet's without it"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the written weights (default: float32)")
    parser.add_argument(
        "--with-code",
        action="store_true",
        help="write the model's code, too: then transformers loads it with trust_remote_code=True, without focal_hf",
    )
    parser.add_argument("--push-to-hub", metavar="REPO", help="then upload DIR to this repository, created if need be")
    options = parser.parse_args(arguments)
    if options.image_size is not None:
        if len(options.image_size) > 2 or min(options.image_size) < 1:
            parser.error(f"argument --image-size: expected a side, or height and width; got {options.image_size}")
        options.image_size = options.image_size[0] if len(options.image_size) == 1 else options.image_size
    return options


def check_repository(name: str) -> None:
    """Raises ConversionError for what would otherwise fail only after the conversion."""
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ConversionError(
            f"--push-to-hub {name!r} is not a repository's name such as me/focal-tiny. {error}"
        ) from None
    if get_token() is None:
        raise ConversionError("--push-to-hub needs a login: run `hf auth login`, or set HF_TOKEN.")


def image_processor(config: FocalConfig) -> BitImageProcessorPil:
    """The original's evaluation: a resize, and of that the central 7/8.

    The shorter side is resized, but for a rectangular model both: its images have its shape, and a centre crop of
    others could reach beyond their edge. ImageNet's statistics are averaged where there are not three channels.
    """
    height, width = config.image_sides
    rgb = config.num_channels == 3
    mean, std = IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    return BitImageProcessorPil(
        size={"shortest_edge": round(height / 0.875)}
        if height == width
        else {"height": round(height / 0.875), "width": round(width / 0.875)},
        crop_size={"height": height, "width": width},
        image_mean=list(mean) if rgb else [round(sum(mean) / 3, 3)] * config.num_channels,
        image_std=list(std) if rgb else [round(sum(std) / 3, 3)] * config.num_channels,
        do_convert_rgb=rgb,
    )


def name_classes(config: FocalConfig, labels: str | None) -> None:
    """The names of `labels`, if any, for the classes."""
    if labels is None:
        return
    names = json.loads(LABELS[labels].read_text())
    if config.num_labels != len(names):
        raise ConversionError(f"--labels {labels} names {len(names)} classes; this model has {config.num_labels}.")
    config.id2label = dict(enumerate(names))
    config.label2id = {label: number for number, label in enumerate(names)}


OUTPUTS = {FocalForImageClassification: "logits", FocalBackbone: "feature maps"}


@torch.no_grad()
def outputs_of(model: FocalPreTrainedModel) -> list[torch.Tensor]:
    """Logits, or feature maps, of one random image, the same one every time, as float32."""
    height, width = model.config.image_sides
    image = torch.randn(1, model.config.num_channels, height, width, generator=torch.Generator().manual_seed(0))
    outputs = model(image.to(model.dtype))
    outputs = outputs.feature_maps if isinstance(model, FocalBackbone) else [outputs.logits]
    return [output.float() for output in outputs]


def difference(outputs: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """The largest difference, in units of the largest value that was expected of the same output."""
    return max(
        ((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-12)).item()
        for ours, theirs in zip(outputs, expected, strict=True)
    )


def check(
    folder: Path,
    model_class: type[FocalPreTrainedModel],
    expected: list[torch.Tensor],
    state: Mapping[str, torch.Tensor],
) -> None:
    """Raises ConversionError unless the model in `folder` gives the outputs `expected` and has the weights `state`."""
    # A copy, whose tensors are aligned as those of the model that gave `expected`: kernels may round by alignment.
    model = copy.deepcopy(model_class.from_pretrained(folder).eval())
    outputs, what = outputs_of(model), OUTPUTS[model_class]
    if not all(output.isfinite().all() for output in outputs):
        raise ConversionError(f"The {what} are not finite in {model.dtype}: use another --dtype.")
    if (error := difference(outputs, expected)) > 16 * torch.finfo(model.dtype).eps:
        raise ConversionError(f"What was written gives other {what} than what was read, by {error:.1e} of their scale.")
    back = to_original(model.state_dict(), model.config)
    for name, tensor in state.items():
        if back[name].shape != tensor.shape or not torch.equal(back[name], tensor.to(back[name].dtype)):
            raise ConversionError(f"What was written does not convert back: {name} is not what it was.")


def push(folder: Path, repository: str) -> None:
    advice = f"The model is in {folder}. To try again: hf upload {repository} {folder}"
    with failing_as("Uploading the model", advice):
        repository = HfApi().create_repo(repository, exist_ok=True).repo_id  # with the user's name, if left out
        commit = HfApi().upload_folder(repo_id=repository, folder_path=folder, commit_message="Convert to transformers")
    say(f"Uploaded: {commit.commit_url}")


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    logging.disable_progress_bar()
    output, dtype = options.output.resolve(), DTYPES[options.dtype]
    inputs = (options.checkpoint, Path(options.config))
    check_output_folder(output, options.overwrite, inputs)
    if options.push_to_hub is not None:
        check_repository(options.push_to_hub)

    config = config_from_settings(read_settings(options.config), options.image_size)
    if options.with_code:
        FocalConfig.register_for_auto_class()
    name = options.config if options.config in RELEASED else Path(options.config).stem

    say(f"Reading {options.checkpoint}")
    whole = read_checkpoint(options.checkpoint)
    backbone = dense_backbone(whole)
    is_backbone = backbone is not None
    if is_backbone:
        if options.labels is not None:
            raise ConversionError("--labels is for classifiers; the checkpoint holds a backbone.")
        model_class, state = FocalBackbone, backbone
        config.out_indices = output_indices(state, config)
        config.drop_remainder = False  # Detectors and segmenters pad images, and their backbones odd maps.
        config.num_labels = FocalConfig().num_labels  # for which no names are written: classes are the head's matter
        say(f"It holds a backbone that returns the maps of {', '.join(config.out_features)}")
        if len(state) < len(whole):
            others = [name for name in whole if not name.startswith("backbone.")]
            say(f"Left aside: {len(others)} tensors of {prefixes(others)}")
    else:
        if reason := reason_against_original(config):
            raise ConversionError(
                f"The original cannot run a model of these settings: {reason}. Give the size that the checkpoint was "
                "trained at as --image-size."
            )
        model_class, state = FocalForImageClassification, whole
        name_classes(config, options.labels or ("imagenet" if options.config in RELEASED else None))
    weights = from_original(state, config, model_class)
    model = build_empty(config, model_class).to_empty(device="cpu").eval()
    model.load_state_dict(weights)
    say(f"All {len(state)} tensors are accounted for: {model.num_parameters():,} parameters")
    # Under the name of a released model, but at another size or from a detector, the weights are not the released ones.
    released = options.config in RELEASED and config.image_size == 224 and not is_backbone
    exact = outputs_of(model)
    expected = outputs_of(model.to(dtype))
    if dtype != torch.float32:
        say(f"{options.dtype} moves the {OUTPUTS[model_class]} by {difference(expected, exact):.1e} of their scale")

    with staging_folder(output) as staging:
        say(f"Writing {options.output}")
        built = staging / output.name
        from_paddle = options.checkpoint.suffix == ".pdparams"
        model_id = options.push_to_hub or output.name
        card = model_card(name, config, released, from_paddle, model_id, options.with_code, is_backbone)
        with failing_as(f"Writing {options.output}"):
            model.save_pretrained(built)
            if not is_backbone:
                image_processor(config).save_pretrained(built)
            card.save(built / "README.md")
        say("Checking what was written")
        check(built, model_class, expected, state)
        check_output_folder(output, options.overwrite, inputs)
        move_into_place(staging, output)
    say(f"Done: {options.output}")
    if options.push_to_hub:
        push(output, options.push_to_hub)


if __name__ == "__main__":
    run(main)
