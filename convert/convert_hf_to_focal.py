"""Convert a Focal image classifier of transformers to a checkpoint that the original Focal Transformer loads.

Or a FocalBackbone to one for a detector's or segmenter's backbone.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
import yaml
from transformers import AutoConfig
from transformers.utils import logging

from checkpoint_files import read_checkpoint
from focal_hf import FocalBackbone, FocalConfig, FocalForImageClassification, FocalPreTrainedModel
from messages import ConversionError, failing_as, say
from original import (
    config_from_settings,
    from_original,
    leaves_remainder,
    reason_against_original,
    settings_from_config,
    to_original,
)
from output_files import check_output_files, move_into_place, run, staging_folder
from settings_files import read_settings

EPILOG = """\
FILE.pth holds {"model": state dict}, the original's fixed tensors included; FILE.yaml, beside it, the settings. Names
of classes are left behind: the original's format has no place for them. Before the files appear, the converter reads
them back and compares all weights bit for bit. A backbone has its output norms as norm0, norm1 and so on.

examples:
  a converted or fine-tuned folder:
    python convert/convert_hf_to_focal.py --model focal-tiny --output focal-tiny.pth

  a model on the Hub, and what was written converted again:
    python convert/convert_hf_to_focal.py --model me/focal-tiny --output focal-tiny.pth
    python convert/convert_focal_to_hf.py --checkpoint focal-tiny.pth --config focal-tiny.yaml --output again
"""


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, metavar="DIR|NAME", help="a folder, or a name on the Hub")
    parser.add_argument("--output", required=True, type=Path, metavar="FILE.pth", help="file to write")
    parser.add_argument("--overwrite", action="store_true", help="replace FILE.pth and FILE.yaml where they exist")
    return parser.parse_args(arguments)


def load(name: str) -> FocalPreTrainedModel:
    """The classifier or backbone, every weight of it from its files."""
    if strange := [entry for entry in Path(name).glob("*") if not entry.is_file() and not entry.is_dir()]:
        raise ConversionError(f"--model {name} is not read: {strange[0].name} in it is neither a file nor a folder.")
    try:
        config = AutoConfig.from_pretrained(name)
        kind = config.model_type
        if kind == "focal":
            is_backbone = config.architectures == [FocalBackbone.__name__]
            model_class = FocalBackbone if is_backbone else FocalForImageClassification
            model, report = model_class.from_pretrained(name, output_loading_info=True)
    except Exception as error:  # a folder that is no model, or a damaged one, makes transformers raise almost anything
        raise ConversionError(
            f"--model {name} is neither a folder with a model nor the name of one on the Hub, as far as can be read: "
            f"{error or type(error).__name__}"
        ) from None
    if kind != "focal":
        raise ConversionError(f"--model {name} is a {kind} model; the original knows only Focal Transformers.")
    if problems := sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"], *report["unexpected_keys"]])):
        raise ConversionError(
            f"--model {name} is not an image classifier or backbone with all its weights: {', '.join(problems[:4])} do "
            "not fit."
        )
    if model_class is FocalBackbone and "stem" in model.out_features:
        raise ConversionError(f"--model {name} returns the stem's map, for which the original has no norm.")
    check_size(name, model.config, model_class is FocalBackbone)
    return model


def check_size(name: str, config: FocalConfig, is_backbone: bool) -> None:
    """Raises ConversionError where the original would not compute the same."""
    if is_backbone and config.drop_remainder:
        raise ConversionError(
            f"--model {name} has drop_remainder=True, but the backbones of detectors and segmenters pad odd maps. Load "
            "it with drop_remainder=False, save that and convert it."
        )
    if not is_backbone and not config.drop_remainder and leaves_remainder(config):
        raise ConversionError(
            f"--model {name} pads at its image_size of {config.image_size} pixels, where the original drops the last "
            "rows and columns and would give other logits. Load it with drop_remainder=True, to compute what the "
            "original does, or with another image_size; save that and convert it."
        )
    # The indices of focalv2 are for maps of one size, in a backbone, too.
    if (not is_backbone or config.attention_type == "topk") and (reason := reason_against_original(config)):
        raise ConversionError(
            f"The original cannot run --model {name}: {reason}. Load it with another image_size, save that and convert "
            "it."
        )


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    logging.disable_progress_bar()
    checkpoint = options.output.resolve()
    if checkpoint.suffix != ".pth":
        raise ConversionError(f"--output {options.output} must end in .pth: the settings go beside it, into a .yaml.")
    settings = checkpoint.with_suffix(".yaml")
    check_output_files((checkpoint, settings), options.overwrite)

    say(f"Reading {options.model}")
    model = load(options.model)
    weights = model.state_dict()

    with staging_folder(checkpoint, settings) as staging:
        say(f"Writing {options.output} and {settings.name}")
        built, built_settings = staging / checkpoint.name, staging / settings.name
        described = settings_from_config(model.config, checkpoint.stem)
        with failing_as(f"Writing {options.output}"):
            torch.save({"model": to_original(weights, model.config)}, built)
            built_settings.write_text(yaml.safe_dump(described, sort_keys=False))

        say("Checking what was written")
        config = config_from_settings(read_settings(str(built_settings)))
        config.out_indices = model.config.out_indices
        again = from_original(read_checkpoint(built), config, type(model))
        for name, tensor in weights.items():
            if not torch.equal(again[name], tensor):
                raise ConversionError(f"What was written does not convert back: {name} is not what it was.")

        check_output_files((checkpoint, settings), options.overwrite)
        move_into_place(staging, checkpoint, settings)
    say(f"Done: {options.output}")


if __name__ == "__main__":
    run(main)
