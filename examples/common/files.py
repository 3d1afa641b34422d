"""Output folders: nothing is lost by mistake, and what is there is complete."""

import argparse
import json
import shutil
from pathlib import Path

from transformers import BitImageProcessorPil, PreTrainedModel

from .options import Problem


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
        if not args.overwrite:
            raise Problem(f"--output {folder} exists and is not empty: name another folder, or add --overwrite.")
        if not (folder / "config.json").is_file():
            raise Problem(f"--output {folder} holds something else than a model: --overwrite will not delete that.")
        if any(Path(source).resolve().is_relative_to(folder.resolve()) for source in (args.data, args.config or "/")):
            raise Problem(f"--output {folder} contains the --data or --config of this run: name another folder.")


def write_results(folder: Path, results: dict) -> None:
    aside = folder / "results.json.part"
    aside.write_text(json.dumps(results, indent=2) + "\n")
    aside.replace(folder / "results.json")


def save_model(folder: Path, model: PreTrainedModel, processor: BitImageProcessorPil, results: dict) -> None:
    """Write everything aside, then rename: whenever the run is stopped, a folder that is there is complete."""
    folder = folder.resolve()
    aside, old = (folder.with_name(f".{folder.name}.{suffix}") for suffix in ("part", "old"))
    for leftover in (aside, old):
        shutil.rmtree(leftover, ignore_errors=True)
    aside.mkdir(parents=True)
    model.save_pretrained(aside)
    processor.save_pretrained(aside)
    write_results(aside, results)
    if folder.exists():
        folder.rename(old)
    aside.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
