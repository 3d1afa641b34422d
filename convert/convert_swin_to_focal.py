"""Convert a Swin of transformers to a Focal Transformer that computes the same, and grow it on request.

The Swin may be an image classifier, a backbone, a model for masked images (SimMIM) or a model without a head.
"""

import argparse
import copy
import json
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from transformers import BaseImageProcessor, PreTrainedConfig, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file
from transformers.utils.hub import extract_commit_hash

from convert_focal_to_hf import relative_difference
from download import check_sha256
from focal_hf import FocalBackbone, FocalConfig, FocalForMaskedImageModeling, FocalPreTrainedModel, add_focal_levels
from focal_hf.compatibility_focal import AutoImageProcessor
from focal_hf.growing_focal import NEW_SHARE
from messages import ConversionError, print_progress, printable_line, short_repr, wrap_errors
from model_card import swin_model_card
from output_files import check_output_folder, move_into_place, run_script, staging_folder
from saved_models import load_whole_model, local_files, read_config
from swin import MODEL_CLASSES, config_from_swin, focal_from_swin

EPILOG = """\
The output folder holds config.json, model.safetensors, README.md (a model card with that of the Swin), conversion.json
(the source, and the size and SHA-256 of its weights) and, if the Swin has one, preprocessor_config.json. Before the
folder appears, the converter compares the outputs of the converted model with those of the Swin, and reads the written
weights back. The names of the classes are kept. No code of the Swin's repository is run.

With --levels, the windows of the converted model also attend to the tokens around them and to pooled tokens. The new
keys begin with a small share of the attention. Fine-tune the model then.

examples:
  a Swin on the Hub:
    python convert/convert_swin_to_focal.py --model microsoft/swin-tiny-patch4-window7-224 --output swin-tiny-as-focal

  the same with the levels of Focal-Tiny:
    python convert/convert_swin_to_focal.py --model microsoft/swin-tiny-patch4-window7-224 --output focal-from-swin \\
        --levels 2 2 2 2
"""

# What Swin's successors and relatives have that Focal has not.
RELATIVES = {
    "swinv2": "attention by cosine similarity, with a bias from an MLP and norms behind the layers",
    "swin2sr": "attention by cosine similarity, with a bias from an MLP and norms behind the layers",
}
LARGEST_CARD = 1_000_000  # bytes


def share(text: str) -> float:
    """An argparse type: a share of the attention."""
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"expected a number of at least 0 and below 1; got {text}")
    return value


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, metavar="DIR|NAME", help="folder of a Swin, or its name on the Hub")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="output folder")
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace DIR if it is empty or holds only a model, after the converted model is checked",
    )
    growing = parser.add_argument_group("growing", "Numbers are one value per stage.")
    growing.add_argument(
        "--levels",
        type=int,
        nargs="+",
        metavar="N",
        help="focal levels: 0 for the window alone, 1 for the tokens around it too, 2 for pooled tokens too",
    )
    growing.add_argument(
        "--focal-windows", type=int, nargs="+", metavar="N", help="default: 7 5 3 1 for four stages, as in Focal-Tiny"
    )
    growing.add_argument(
        "--expand-sizes", type=int, nargs="+", metavar="N", help="default: 3, or half of a window that is below 6"
    )
    growing.add_argument(
        "--new-share",
        type=share,
        metavar="SHARE",
        help="share of the attention that the new keys of a query have at the start; with 0 the outputs stay exactly "
        f"those of the Swin, but the new weights do not learn (default: {NEW_SHARE})",
    )
    options = parser.parse_args(arguments)
    if options.levels is None:
        for name in ("focal_windows", "expand_sizes", "new_share"):
            if getattr(options, name) is not None:
                parser.error(f"argument --{name.replace('_', '-')}: needs --levels")
    elif options.new_share is None:
        options.new_share = NEW_SHARE
    return options


def focal_class(name: str, config: PreTrainedConfig) -> type[FocalPreTrainedModel]:
    """Returns the class of Focal for the Swin of that config."""
    if config.model_type != "swin":
        relative = RELATIVES.get(config.model_type)
        reason = f" It has {relative}, which Focal does not have." if relative else ""
        raise ConversionError(
            f"--model {name} is a {config.model_type} model.{reason} Give a Swin Transformer of model_type swin."
        )
    for architecture, model_class in MODEL_CLASSES.items():
        if config.architectures == [architecture]:
            return model_class
    raise ConversionError(
        f"--model {name} has architectures = {short_repr(config.architectures)} in its config.json; expected one of "
        f"{', '.join(MODEL_CLASSES)}."
    )


def check_levels(config: FocalConfig, settings: dict) -> None:
    """Raises ConversionError if the model cannot have these levels, before its weights are downloaded."""
    trial = copy.deepcopy(config)
    for name, value in settings.items():
        if value is not None:
            setattr(trial, name, value)
    try:
        trial.validate()
    except Exception as error:  # huggingface_hub wraps the ValueError of FocalConfig
        raise ConversionError(f"The model cannot have these levels: {error.__cause__ or error}") from error


@torch.no_grad()
def compute_outputs(model: PreTrainedModel, pixel_values: torch.Tensor, **options) -> list[torch.Tensor]:
    """Returns the outputs of a Swin or of the Focal for it, in float32."""
    outputs = copy.deepcopy(model).float().eval()(pixel_values, **options)
    for name in ("logits", "reconstruction", "last_hidden_state"):
        if name in outputs:
            return [outputs[name]]
    return list(outputs.feature_maps)


def check_same_outputs(swin: PreTrainedModel, focal: FocalPreTrainedModel) -> None:
    """Raises ConversionError if the outputs differ for a random image, of the model's own size where Swin runs it."""
    config = focal.config
    stride = config.patch_size * 2 ** (config.num_layers - 1)
    sides, options = config.image_sides, {}
    is_masked, is_backbone = isinstance(focal, FocalForMaskedImageModeling), isinstance(focal, FocalBackbone)
    # Except in a backbone, Swin runs no map that is smaller than its window. It reconstructs square images only.
    least = 0 if is_backbone else (config.window_size - 1) * stride + 1
    if min(sides) < least or (is_masked and (sides[0] != sides[1] or sides[0] % stride)):
        sides = (-(-max(*sides, least) // stride) * stride,) * 2
        options = {"interpolate_pos_encoding": True} if config.use_absolute_embeddings else {}
    image = torch.randn(1, config.num_channels, *sides, generator=torch.Generator().manual_seed(0))
    with wrap_errors("Running the Swin"):
        expected = compute_outputs(swin, image, **options)
    error = relative_difference(compute_outputs(focal, image), expected)
    print_progress(f"The outputs of the Swin and of the converted model differ by {error:.1e} of the largest value")
    if not error <= 1e-4:
        raise ConversionError("The converted model does not compute what the Swin computes. Please report this.")


def read_card(name: str) -> str | None:
    """Returns the text of the model card, or None if there is none."""
    try:
        path = Path(cached_file(name, "README.md"))
        return path.read_text(errors="replace") if path.stat().st_size <= LARGEST_CARD else None
    except OSError:
        return None


def read_image_processor(name: str) -> BaseImageProcessor | None:
    """Returns the image processor, or None if there is none."""
    try:
        return AutoImageProcessor.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # transformers raises exceptions of almost any type
        print_progress(f"There is no image processor that can be loaded: {error}")
        return None


def describe_source(name: str) -> dict:
    """Returns the content of conversion.json."""
    try:
        paths = [cached_file(name, SAFE_WEIGHTS_NAME)]
    except OSError:
        index = json.loads(Path(cached_file(name, SAFE_WEIGHTS_INDEX_NAME)).read_text())
        paths = [cached_file(name, file) for file in sorted(set(index["weight_map"].values()))]
    files = [
        {"file": printable_line(path.name), "size": path.stat().st_size, "sha256": check_sha256(path, None)}
        for path in map(Path, paths)
    ]
    is_folder = Path(name).is_dir()
    return {
        "source": "local folder" if is_folder else name,
        "revision": None if is_folder else extract_commit_hash(paths[0], None),
        "files": files,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    output, inputs = options.output.resolve(), local_files(options.model)
    check_output_folder(output, options.overwrite, inputs)

    swin_config = read_config(options.model)
    model_class = focal_class(options.model, swin_config)
    config = config_from_swin(swin_config, model_class)
    names = {"focal_levels": "levels", "focal_windows": "focal_windows", "expand_sizes": "expand_sizes"}
    settings = {setting: getattr(options, name) for setting, name in names.items()}
    if options.levels is not None:
        check_levels(config, settings)

    print_progress(f"Reading {options.model}")
    swin_class = getattr(transformers, swin_config.architectures[0])
    swin = load_whole_model(options.model, swin_class, "a Swin Transformer")
    model = focal_from_swin(swin)
    print_progress(f"Converted all {len(swin.state_dict())} tensors: {model.num_parameters():,} parameters")
    check_same_outputs(swin, model)
    del swin
    if options.levels is not None:
        with wrap_errors("Adding levels"):
            model = add_focal_levels(model, **settings, new_share=options.new_share)
        print_progress(f"Added levels: {model.num_parameters():,} parameters")
    processor, card = read_image_processor(options.model), read_card(options.model)
    with wrap_errors(f"Reading {options.model}"):
        source = describe_source(options.model)

    with staging_folder(output) as staging:
        print_progress(f"Writing {options.output}")
        folder = staging / output.name
        with wrap_errors(f"Writing {options.output}"):
            model.save_pretrained(folder)
            if processor is not None:
                processor.save_pretrained(folder)
            text = swin_model_card(output.name, model_class, model.config, source, card, options.new_share)
            text.save(folder / "README.md")
            (folder / "conversion.json").write_text(json.dumps(source, indent=2) + "\n")
        print_progress("Checking the written model")
        written = model_class.from_pretrained(folder).state_dict()
        for name, tensor in model.state_dict().items():
            if not torch.equal(written[name], tensor):
                raise ConversionError(
                    f"The written model differs from the converted one in {name}. Nothing was kept. Check the disk, "
                    "and try again."
                )
        check_output_folder(output, options.overwrite, inputs)
        move_into_place(staging, output)
    print_progress(f"Done: {options.output}")


if __name__ == "__main__":
    run_script(main)
