"""Convert a checkpoint of the original Focal Transformer to the format of transformers.

The checkpoint may be a file of the authors, a PaddleViT copy, or a detector or segmenter with a Focal backbone. Without
--checkpoint, the PaddleViT copy of the released model is downloaded.
"""

import argparse
import copy
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from transformers import BitImageProcessorPil
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from checkpoint_files import read_checkpoint
from download import (
    KNOWN_SHA256,
    PUBLIC_COPIES,
    add_cache_dir,
    cached_checkpoint,
    check_sha256,
    download_checkpoint,
)
from focal_hf import FocalBackbone, FocalConfig, FocalForImageClassification, FocalPreTrainedModel
from hub import check_login, push_to_hub, repository_name
from messages import ConversionError, print_progress, printable_line, wrap_errors
from model_card import model_card
from original import (
    RELEASED,
    backbone_out_indices,
    backbone_state_dict,
    build_on_meta,
    config_from_settings,
    from_original,
    list_prefixes,
    to_original,
    why_original_cannot_run,
)
from output_files import check_output_folder, move_into_place, run_script, staging_folder
from settings_files import read_settings

EPILOG = f"""\
The output folder holds config.json, model.safetensors, preprocessor_config.json, README.md (a model card) and
conversion.json (the source, size and SHA-256 of the checkpoint). With --with-code it also holds the Python modules of
the model. Before the folder appears, the converter loads the converted model, compares its logits with those of the
checkpoint's weights, converts the weights back and compares them bit for bit. No code in the checkpoint is run. yacs,
mmengine and Paddle are not needed. Only downloads and --push-to-hub need a network.

From a detector or segmenter (of mmdetection or mmsegmentation, with tensor names that begin with backbone. or norm0),
only the backbone is converted. Load it with FocalBackbone.from_pretrained. It returns the feature maps of the stages
that have an output norm in the checkpoint. The converter then compares feature maps instead of logits, and writes no
preprocessor_config.json, because the detector or segmenter prepares the images.

examples:
  a released model, downloaded from PaddleViT (needs gdown):
    python convert/convert_focal_to_hf.py --config focal_tiny_patch4_window7_224 --output focal-tiny

  a released model from a file of the authors:
    python convert/convert_focal_to_hf.py --checkpoint focal-tiny-is224-ws7.pth \\
        --config focal_tiny_patch4_window7_224 --output focal-tiny

  a released model from a file of PaddleViT, in bfloat16:
    python convert/convert_focal_to_hf.py --checkpoint focal_tiny_patch4_window7_224.pdparams \\
        --config focal_tiny_patch4_window7_224 --output focal-tiny --dtype bfloat16

  a model that you trained at 384 pixels, uploaded to the Hub (log in first: hf auth login) with its code, so that it
  can be loaded without focal_hf:
    python convert/convert_focal_to_hf.py --checkpoint ckpt_epoch_299.pth --config my_focal.yaml --image-size 384 \\
        --output my-focal --push-to-hub me/my-focal --with-code

  the backbone of a detector that was built for images of 800 x 1333 pixels:
    python convert/convert_focal_to_hf.py --checkpoint epoch_12.pth --config focal_tiny_patch4_window7_224 \\
        --image-size 800 1333 --output focal-tiny-coco

released models:
  {chr(10).join(RELEASED).replace(chr(10), chr(10) + "  ")}
"""

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

# Files with the names of the classes in order. The names are WordNet's, but "crane" has an addition for each meaning.
LABEL_FILES = {"imagenet": Path(__file__).with_name("imagenet_labels.json")}


def sha256_digest(text: str) -> str:
    """An argparse type: a SHA-256 in hexadecimal."""
    if not re.fullmatch("[0-9a-fA-F]{64}", text):
        raise argparse.ArgumentTypeError(f"expected 64 hexadecimal digits; got {text!r}")
    return text.lower()


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--checkpoint",
        type=Path,
        metavar="FILE",
        help="a .pth file of the original (a released model, a state dict or a training checkpoint), of a detector or "
        "of a segmenter, or a .pdparams file of Paddle (default: download the PaddleViT copy of the released model)",
    )
    parser.add_argument(
        "--config",
        required=True,
        metavar="FILE|NAME",
        help="the YAML file that the checkpoint was trained with (its BASE files are read too), or the name of a "
        "released model",
    )
    add_cache_dir(parser)
    parser.add_argument(
        "--expect-sha256",
        type=sha256_digest,
        metavar="DIGEST",
        help="SHA-256 of the checkpoint; another file is rejected",
    )
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="output folder")
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace DIR if it is empty or holds only a model, after the converted model is checked",
    )
    parser.add_argument(
        "--image-size",
        type=int,
        nargs="+",
        metavar="PIXELS",
        help="image size that the checkpoint was trained at: one side, or height and width (default: DATA.IMG_SIZE of "
        "the settings)",
    )
    parser.add_argument(
        "--labels",
        choices=LABEL_FILES,
        help="names of the classes (default: imagenet for a released model, otherwise none)",
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="dtype of the converted weights (default: float32)"
    )
    parser.add_argument(
        "--with-code",
        action="store_true",
        help="also write the Python modules of the model, so that transformers can load it with "
        "trust_remote_code=True, without focal_hf",
    )
    parser.add_argument(
        "--push-to-hub",
        type=repository_name,
        metavar="REPO",
        help="upload DIR to this repository on the Hub, which is created if it does not exist",
    )
    options = parser.parse_args(arguments)
    if options.checkpoint is not None and options.cache_dir is not None:
        parser.error("argument --cache-dir: only for downloads; leave it out, or leave out --checkpoint")
    if options.image_size is not None:
        if len(options.image_size) > 2 or min(options.image_size) < 1:
            given = " ".join(map(str, options.image_size))
            parser.error(f"argument --image-size: expected one side, or height and width, in pixels; got {given}")
        options.image_size = options.image_size[0] if len(options.image_size) == 1 else options.image_size
    return options


def image_processor(config: FocalConfig) -> BitImageProcessorPil:
    """Returns the preprocessing of the original's evaluation: a resize, and a centre crop of 7/8 of that size.

    For a square model, the shorter side of the image is resized. For a rectangular model, both sides are: otherwise the
    crop could be larger than the image. If the model does not have three channels, each channel gets the average of
    ImageNet's mean and standard deviation.
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


def set_labels(config: FocalConfig, labels: str | None) -> None:
    """Sets the names of the classes in `config` to those of `labels`, if given."""
    if labels is None:
        return
    names = json.loads(LABEL_FILES[labels].read_text())
    if config.num_labels != len(names):
        raise ConversionError(
            f"--labels {labels} has names for {len(names)} classes; this model has {config.num_labels} classes. Leave "
            "--labels out."
        )
    config.id2label = dict(enumerate(names))
    config.label2id = {name: index for index, name in enumerate(names)}


OUTPUT_NAMES = {FocalForImageClassification: "logits", FocalBackbone: "feature maps"}


@torch.no_grad()
def compute_outputs(model: FocalPreTrainedModel) -> list[torch.Tensor]:
    """Returns the logits or feature maps of a fixed random image, in float32."""
    height, width = model.config.image_sides
    image = torch.randn(1, model.config.num_channels, height, width, generator=torch.Generator().manual_seed(0))
    outputs = model(image.to(model.dtype))
    outputs = outputs.feature_maps if isinstance(model, FocalBackbone) else [outputs.logits]
    return [output.float() for output in outputs]


def relative_difference(outputs: list[torch.Tensor], references: list[torch.Tensor]) -> float:
    """Returns the largest difference between two outputs, relative to the largest absolute value of the reference."""
    return max(
        ((output - reference).abs().max() / reference.abs().max().clamp(min=1e-12)).item()
        for output, reference in zip(outputs, references, strict=True)
    )


def check_written_model(
    folder: Path,
    model_class: type[FocalPreTrainedModel],
    expected_outputs: list[torch.Tensor],
    original_state: Mapping[str, torch.Tensor],
) -> None:
    """Raises ConversionError unless the model in `folder` gives `expected_outputs` and converts to `original_state`."""
    # A copy has aligned tensors, like the model that gave `expected_outputs`: kernels may round by alignment.
    model = copy.deepcopy(model_class.from_pretrained(folder).eval())
    outputs, output_name = compute_outputs(model), OUTPUT_NAMES[model_class]
    if not all(output.isfinite().all() for output in outputs):
        raise ConversionError(f"The {output_name} are not finite in {model.dtype}. Use another --dtype.")
    if (error := relative_difference(outputs, expected_outputs)) > 16 * torch.finfo(model.dtype).eps:
        raise ConversionError(
            f"The written model gives other {output_name} than the checkpoint, with a relative difference of "
            f"{error:.1e}. Nothing was kept. Check the disk, and try again."
        )
    converted_back = to_original(model.state_dict(), model.config)
    for name, tensor in original_state.items():
        if converted_back[name].shape != tensor.shape or not torch.equal(
            converted_back[name], tensor.to(converted_back[name].dtype)
        ):
            raise ConversionError(
                f"The written model differs from the checkpoint in {name}. Nothing was kept. Check the disk, and try "
                "again."
            )


def convert(options: argparse.Namespace) -> None:
    """Writes the converted model to `options.output`, after all checks. Uploads nothing.

    The examples of the model card load the model from `options.push_to_hub` or, if it is None, from the folder.
    """
    output, dtype = options.output.resolve(), DTYPES[options.dtype]
    path = options.checkpoint or cached_checkpoint(options.config, options.cache_dir)
    inputs = (path, Path(options.config))
    check_output_folder(output, options.overwrite, inputs)

    config = config_from_settings(read_settings(options.config), options.image_size)
    if options.with_code:
        FocalConfig.register_for_auto_class()
    name = options.config if options.config in RELEASED else Path(options.config).stem

    expected_sha256, source = options.expect_sha256, {"source": "local file"}
    if options.checkpoint is None:
        expected_sha256 = expected_sha256 or KNOWN_SHA256.get(options.config)
        download_checkpoint(options.config, path, expected_sha256)
        public_copy = PUBLIC_COPIES[options.config]
        source = {"source": public_copy.page, "file_id": public_copy.drive_id}
    print_progress(f"Reading {path}")
    checkpoint = read_checkpoint(path)
    sha256 = check_sha256(path, expected_sha256)
    source |= {"file": printable_line(path.name), "size": path.stat().st_size, "sha256": sha256}
    backbone = backbone_state_dict(checkpoint)
    is_backbone = backbone is not None
    if is_backbone:
        if options.labels is not None:
            raise ConversionError("--labels needs a classifier, but the checkpoint holds a backbone. Leave it out.")
        model_class, state = FocalBackbone, backbone
        config.out_indices = backbone_out_indices(state, config)
        config.drop_remainder = False  # detectors and segmenters pad images, and their backbones pad odd maps
        config.num_labels = FocalConfig().num_labels  # the default, for which no label names are written
        print_progress(f"The checkpoint holds a backbone that returns the maps of {', '.join(config.out_features)}")
        if len(state) < len(checkpoint):
            other_names = [name for name in checkpoint if not name.startswith("backbone.")]
            print_progress(f"Ignored {len(other_names)} tensors outside the backbone, of {list_prefixes(other_names)}")
    else:
        if reason := why_original_cannot_run(config):
            raise ConversionError(
                f"The original cannot run a model of these settings: {reason}. Give the image size that the checkpoint "
                "was trained at with --image-size."
            )
        model_class, state = FocalForImageClassification, checkpoint
        set_labels(config, options.labels or ("imagenet" if options.config in RELEASED else None))
    weights = from_original(state, config, model_class)
    model = build_on_meta(config, model_class).to_empty(device="cpu").eval()
    model.load_state_dict(weights)
    print_progress(f"Converted all {len(state)} tensors: {model.num_parameters():,} parameters")
    # With another image size, or in a detector, the weights are not the released ones.
    released = options.config in RELEASED and config.image_size == 224 and not is_backbone
    float32_outputs = compute_outputs(model)
    expected_outputs = compute_outputs(model.to(dtype))
    if dtype != torch.float32:
        change = relative_difference(expected_outputs, float32_outputs)
        print_progress(
            f"{options.dtype} changes the {OUTPUT_NAMES[model_class]} by {change:.1e} of their largest value"
        )

    with staging_folder(output) as staging:
        print_progress(f"Writing {options.output}")
        folder = staging / output.name
        model_id = options.push_to_hub or output.name
        card = model_card(name, config, released, source, model_id, options.with_code, is_backbone)
        with wrap_errors(f"Writing {options.output}"):
            model.save_pretrained(folder)
            if not is_backbone:
                image_processor(config).save_pretrained(folder)
            card.save(folder / "README.md")
            (folder / "conversion.json").write_text(json.dumps(source, indent=2) + "\n")
        print_progress("Checking the written model")
        check_written_model(folder, model_class, expected_outputs, state)
        check_output_folder(output, options.overwrite, inputs)
        move_into_place(staging, output)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    repository = options.push_to_hub
    if repository is not None:
        check_login(repository.rpartition("/")[0])
    convert(options)
    print_progress(f"Done: {options.output}")
    if repository is not None:
        advice = (
            f"The converted model is in {options.output}. To try again, run: hf upload {repository} {options.output}"
        )
        push_to_hub(options.output, repository, None, advice)


if __name__ == "__main__":
    run_script(main)
