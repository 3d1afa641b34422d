"""Convert a Focal Transformer of transformers to a checkpoint that the original code loads.

The model may be an image classifier or a FocalBackbone.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
import yaml

from checkpoint_files import read_checkpoint
from focal_hf import FocalBackbone, FocalConfig, FocalPreTrainedModel
from messages import ConversionError, print_progress, wrap_errors
from original import (
    config_from_settings,
    from_original,
    has_remainder,
    settings_from_config,
    to_original,
    why_original_cannot_run,
)
from output_files import check_output_files, move_into_place, run_script, staging_folder
from saved_models import load_focal
from settings_files import read_settings

EPILOG = """\
FILE.pth holds {"model": state dict} with the weights and buffers of the original. FILE.yaml, in the same folder, holds
the settings. The original's format has no place for the names of the classes. The output norms of a backbone are called
norm0, norm1 and so on. Before the files appear, the converter reads them back and compares all weights bit for bit.

examples:
  a folder with a converted or fine-tuned model:
    python convert/convert_hf_to_focal.py --model focal-tiny --output focal-tiny.pth

  a model on the Hub, and the written checkpoint back to transformers:
    python convert/convert_hf_to_focal.py --model me/focal-tiny --output focal-tiny.pth
    python convert/convert_focal_to_hf.py --checkpoint focal-tiny.pth --config focal-tiny.yaml --output focal-tiny-again
"""


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, metavar="DIR|NAME", help="folder of a model, or its name on the Hub")
    parser.add_argument("--output", required=True, type=Path, metavar="FILE.pth", help="checkpoint to write")
    parser.add_argument("--overwrite", action="store_true", help="replace FILE.pth and FILE.yaml if they exist")
    return parser.parse_args(arguments)


def load_model(name: str) -> FocalPreTrainedModel:
    """Loads the classifier or backbone, and checks that the original can compute its outputs."""
    model = load_focal(name)
    is_backbone = isinstance(model, FocalBackbone)
    if is_backbone and "stem" in model.out_features:
        raise ConversionError(
            f"--model {name} returns the map of the stem, for which the original has no norm. Load it with other "
            "out_features, save it, and convert that."
        )
    check_original_computes_the_same(name, model.config, is_backbone)
    return model


def check_original_computes_the_same(name: str, config: FocalConfig, is_backbone: bool) -> None:
    """Raises ConversionError if the original cannot run the model at `image_size`, or would give other outputs."""
    if is_backbone and config.drop_remainder:
        raise ConversionError(
            f"--model {name} has drop_remainder=True, but the original backbones of detectors and segmenters pad odd "
            "maps. Load the model with drop_remainder=False, save it, and convert that."
        )
    if not is_backbone and not config.drop_remainder and has_remainder(config):
        raise ConversionError(
            f"--model {name} pads images of its image_size, {config.image_size} pixels, where the original drops the "
            "last rows and columns and would give other logits. Load the model with drop_remainder=True, or with "
            "another image_size, save it, and convert that."
        )
    # The topk indices are made for maps of one size, in a backbone too.
    if (not is_backbone or config.attention_type == "topk") and (reason := why_original_cannot_run(config)):
        raise ConversionError(
            f"The original cannot run --model {name}: {reason}. Load the model with another image_size, save it, and "
            "convert that."
        )


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    checkpoint = options.output.resolve()
    if checkpoint.suffix != ".pth":
        raise ConversionError(
            f"--output {options.output} must end in .pth. The settings are written to a .yaml file of the same name."
        )
    settings = checkpoint.with_suffix(".yaml")
    check_output_files((checkpoint, settings), options.overwrite)

    print_progress(f"Reading {options.model}")
    model = load_model(options.model)
    weights, original_settings = model.state_dict(), settings_from_config(model.config, checkpoint.stem)

    with staging_folder(checkpoint, settings) as staging:
        print_progress(f"Writing {options.output} and {settings.name}")
        new_checkpoint, new_settings = staging / checkpoint.name, staging / settings.name
        # What torch.save raises for a full disk does not say so.
        with wrap_errors(f"Writing {options.output}", "Check the free space of the disk."):
            torch.save({"model": to_original(weights, model.config)}, new_checkpoint)
            new_settings.write_text(yaml.safe_dump(original_settings, sort_keys=False))

        print_progress("Checking the written files")
        config = config_from_settings(read_settings(str(new_settings)))
        # The original's settings hold neither.
        config.out_indices, config.drop_remainder = model.config.out_indices, model.config.drop_remainder
        converted_back = from_original(read_checkpoint(new_checkpoint), config, type(model))
        for name, tensor in weights.items():
            if not torch.equal(converted_back[name], tensor):
                raise ConversionError(
                    f"The written checkpoint differs from the model in {name}. Nothing was kept. Check the disk, and "
                    "try again."
                )

        check_output_files((checkpoint, settings), options.overwrite)
        move_into_place(staging, checkpoint, settings)
    print_progress(f"Done: {options.output}")


if __name__ == "__main__":
    run_script(main)
