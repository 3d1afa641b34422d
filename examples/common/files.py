"""Output folders: checks before anything is overwritten, and writes that never leave incomplete files."""

import argparse
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError
from transformers import CONFIG_MAPPING, BitImageProcessorPil, PreTrainedModel

import focal_hf  # noqa: F401  CONFIG_MAPPING then knows its model_type

from .options import Problem, first_line

# Patterns of all files and folders that the training scripts write, relative to --output.
MODEL_FILES = (
    r"config\.json|model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json|preprocessor_config\.json"
    r"|README\.md|results\.json(\.part)?|(curves|confusion|reconstructions|predictions|detections)\.png"
    r"|adapter/(adapter_config\.json|adapter_model\.safetensors|README\.md)"
)
STATE_FOLDER = r"step_\d{9,}"
KNOWN_FILES = re.compile(
    rf"(last/)?(\.part/)?({MODEL_FILES})"
    rf"|(checkpoints|\.part)/({STATE_FOLDER}|part|old)/(tensors\.safetensors|state\.json|checksums\.json)"
    r"|logs/(.*/)?(events\.out\.tfevents\.[^/]*|hparams\.yml)"
)
KNOWN_FOLDERS = re.compile(
    rf"(last/)?(\.part/)?adapter|last|(last/)?\.part|checkpoints|(checkpoints|\.part)/({STATE_FOLDER}|part|old)|logs(/.*)?"
)


def check_place(option: str, folder: Path, data: str) -> None:
    """Raise an error if files cannot be written to the folder, or if the next run would read them as data."""
    if Path(data).is_dir() and folder.resolve().is_relative_to(Path(data).resolve()):
        raise Problem(
            f"{option} {folder} is in --data {data}: the next run would read its files as data. Name a folder outside."
        )
    if folder.is_symlink() and not folder.exists():
        raise Problem(f"{option} {folder} is a link to a folder that does not exist: name another folder.")
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


def check_new(option: str, folder: Path, data: str) -> None:
    """Raise an error unless the folder is new or empty, and outside of the data."""
    check_place(option, folder, data)
    if folder.is_dir() and any(folder.iterdir()):
        raise Problem(f"{option} {folder} exists and is not an empty folder: name another one.")


def check_output(args: argparse.Namespace) -> None:
    """Raise an error if the run would overwrite the output folder by mistake."""
    folder = args.output
    check_place("--output", folder, args.data)
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if args.resume and (is_complete(folder) or states_in(folder)):
        return
    if args.resume and not is_unfinished(folder):
        raise Problem(f"--output {folder} holds nothing to --resume: name the folder of the stopped run.")
    if not args.resume and not args.overwrite:
        raise Problem(
            f"--output {folder} exists and is not empty: name another folder, or add --overwrite. To go on with a "
            "run that was stopped there, add --resume."
        )
    check_replaceable(folder)
    for option in ("data", "config", "model", "head"):
        source = getattr(args, option, None)
        if source and Path(source).resolve().is_relative_to(folder.resolve()):
            raise Problem(f"--output {folder} contains the --{option} of this run: name another folder.")


def states_in(folder: Path) -> list[Path]:
    """The states in an output folder, the latest first. A stopped run continues from a state."""
    states = [state for state in folder.glob("checkpoints/step_*") if re.fullmatch(STATE_FOLDER, state.name)]
    return sorted(states, key=lambda state: int(state.name.removeprefix("step_")), reverse=True)


def is_complete(folder: Path) -> bool:
    """Whether the run in an output folder is finished."""
    return (folder / "last").is_dir() and not (folder / "checkpoints").is_dir()


def is_unfinished(folder: Path) -> bool:
    """Whether an output folder belongs to a run that was stopped."""
    return (folder / "checkpoints").is_dir() or {entry.name for entry in folder.iterdir()} <= {".part", "logs"}


def holds_model(folder: Path) -> bool:
    """Whether the folder has a config.json of a model that transformers knows."""
    file = folder / "config.json"
    try:
        return file.is_file() and json.loads(file.read_bytes())["model_type"] in CONFIG_MAPPING
    except (OSError, ValueError, TypeError, LookupError, RecursionError):
        return False


def first_unknown(folder: Path) -> Path | None:
    """The first entry of `folder` that no training script writes, as a path relative to `folder`."""
    for place, folders, files in os.walk(folder):
        for name in sorted(files + folders):
            path = Path(place, name)
            relative = path.relative_to(folder)
            known = KNOWN_FOLDERS if name in folders else KNOWN_FILES
            if path.is_symlink() or not known.fullmatch(relative.as_posix()):
                return relative
    return None


def check_replaceable(folder: Path) -> None:
    """Raise an error unless the folder holds only the result of a training script, finished or not."""
    if not holds_model(folder) and not is_unfinished(folder):
        raise Problem(
            f"--output {folder} holds no model (a config.json with a model_type of transformers): --overwrite replaces "
            "nothing else. Name another folder."
        )
    if unknown := first_unknown(folder):
        raise Problem(
            f"--output {folder} holds {unknown}, which this script does not write: it is not deleted. Move it away, or "
            "name another folder."
        )


def clear_output(folder: Path) -> None:
    """Delete the result of an earlier run. The folder itself stays, since it may be a link or the working folder.

    The folder `checkpoints` is made first and stays. It marks an unfinished run if the deletion is interrupted.
    """
    if folder.is_dir() and any(folder.iterdir()):
        check_replaceable(folder)
    try:
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        for state in states_in(folder):
            remove_folder(state, folder / "checkpoints" / "old")
        for entry in folder.iterdir():
            if entry.is_dir() and entry.name != "checkpoints":
                shutil.rmtree(entry)
            elif entry.is_file():
                entry.unlink()
    except OSError as error:
        raise Problem(f"Cannot replace what --output {folder} holds: {first_line(error)}.") from error


def remove_folder(folder: Path, temporary: Path) -> None:
    """Delete a folder atomically: it is renamed to `temporary` before its files are deleted."""
    shutil.rmtree(temporary, ignore_errors=True)
    if folder.is_dir():
        folder.rename(temporary)
        shutil.rmtree(temporary)


def sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_results(folder: Path, results: dict) -> None:
    temporary = folder / "results.json.part"
    temporary.write_text(json.dumps(results, indent=2) + "\n")
    temporary.replace(folder / "results.json")


def save_model(
    folder: Path,
    model: PreTrainedModel,
    processor: BitImageProcessorPil,
    results: dict,
    weights: dict | None = None,
    add: Callable[[Path], None] = lambda folder: None,
) -> None:
    """Write all files to a temporary folder, then move them one by one, config.json last.

    The folder can be loaded even if the move is interrupted: within a run, only the weights differ between the models
    that are saved.
    """
    temporary = folder / ".part"  # inside the folder, since its parent may be on another disk
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        model.save_pretrained(temporary, state_dict=weights)
        processor.save_pretrained(temporary)
        add(temporary)
        write_results(temporary, results)
        files = sorted(
            (file for file in temporary.rglob("*") if file.is_file()), key=lambda file: file.name == "config.json"
        )
        for file in files:
            sync(file)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise Problem(f"Cannot save the model ({first_line(error)}); the files in {folder} are unchanged.") from error
    for file in files:
        place = folder / file.relative_to(temporary)
        place.parent.mkdir(parents=True, exist_ok=True)
        file.replace(place)
    shutil.rmtree(temporary)
