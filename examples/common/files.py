"""Output folders: nothing is lost by mistake, and what is there is complete."""

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError
from transformers import BitImageProcessorPil, PreTrainedModel

from .options import Problem, first_line


def check_new(option: str, folder: Path) -> None:
    """Refuse a folder that holds something."""
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise Problem(f"{option} {folder} exists and is not an empty folder: name another one.")


def check_output(args: argparse.Namespace) -> None:
    """Refuse an output folder whose content would be lost by mistake."""
    folder = args.output
    if folder.exists() and not folder.is_dir():
        raise Problem(f"--output {folder} is a file: name a folder that is new or empty.")
    if folder.is_dir() and any(folder.iterdir()):
        if args.resume:
            if not (folder / "checkpoints").is_dir() and not (folder / "last").is_dir():
                raise Problem(f"--output {folder} holds nothing to --resume: name the folder of the stopped run.")
            return
        if not args.overwrite:
            raise Problem(
                f"--output {folder} exists and is not empty: name another folder, or add --overwrite. To go on with a "
                "run that was stopped there, add --resume."
            )
        if not (folder / "config.json").is_file() and not (folder / "checkpoints").is_dir():
            raise Problem(f"--output {folder} holds something else than a model: --overwrite will not delete that.")
        sources = (source for source in (args.data, args.config, args.model) if source)
        if any(Path(source).resolve().is_relative_to(folder.resolve()) for source in sources):
            raise Problem(f"--output {folder} contains the --data, --config or --model of this run: name another.")


def write_results(folder: Path, results: dict) -> None:
    aside = folder / "results.json.part"
    aside.write_text(json.dumps(results, indent=2) + "\n")
    aside.replace(folder / "results.json")


def save_model(
    folder: Path,
    model: PreTrainedModel,
    processor: BitImageProcessorPil,
    results: dict,
    weights: dict | None = None,
    add: Callable[[Path], None] = lambda folder: None,
) -> None:
    """Write everything aside, then move file by file: wherever the run is stopped, what is there can be loaded.

    Of one run, no file but that of the weights differs in what a model does, and a folder gets its config last.
    """
    folder = folder.resolve()
    aside = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        model.save_pretrained(aside, state_dict=weights)
        processor.save_pretrained(aside)
        add(aside)
        write_results(aside, results)
    except (OSError, SafetensorError) as error:
        raise Problem(f"Cannot save the model ({first_line(error)}); what {folder} holds is as it was.") from error
    for file in sorted(aside.rglob("*"), key=lambda file: file.name == "config.json"):
        if file.is_file():
            place = folder / file.relative_to(aside)
            place.parent.mkdir(parents=True, exist_ok=True)
            file.replace(place)
    shutil.rmtree(aside)
