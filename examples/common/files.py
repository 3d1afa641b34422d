"""Output folders: nothing is lost by mistake, and what is there is complete."""

import argparse
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError
from transformers import BitImageProcessorPil, PreTrainedModel

from .options import Problem, first_line


def check_place(option: str, folder: Path) -> None:
    """Refuse what cannot be a folder to write into."""
    if folder.exists() and not folder.is_dir():
        raise Problem(f"{option} {folder} is a file: name a folder.")
    there = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise Problem(
            f"Cannot write into {option} {folder} ({there}: {error.strerror}): name another folder."
        ) from error


def check_new(option: str, folder: Path) -> None:
    """Refuse a folder that holds something."""
    check_place(option, folder)
    if folder.is_dir() and any(folder.iterdir()):
        raise Problem(f"{option} {folder} exists and is not an empty folder: name another one.")


def check_output(args: argparse.Namespace) -> None:
    """Refuse an output folder whose content would be lost by mistake."""
    folder = args.output
    check_place("--output", folder)
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
        for option in ("data", "config", "model", "head"):
            source = getattr(args, option, None)
            if source and Path(source).resolve().is_relative_to(folder.resolve()):
                raise Problem(f"--output {folder} contains the --{option} of this run: name another folder.")


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
    aside = folder / ".part"  # not beside it, which may be another disk
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        model.save_pretrained(aside, state_dict=weights)
        processor.save_pretrained(aside)
        add(aside)
        write_results(aside, results)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise Problem(f"Cannot save the model ({first_line(error)}); what {folder} holds is as it was.") from error
    for file in sorted(aside.rglob("*"), key=lambda file: file.name == "config.json"):
        if file.is_file():
            place = folder / file.relative_to(aside)
            place.parent.mkdir(parents=True, exist_ok=True)
            file.replace(place)
    shutil.rmtree(aside)
