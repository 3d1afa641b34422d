"""Writes so that nothing half-written looks whole, and replaces only what the converters write."""

import json
import os
import secrets
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers import CONFIG_MAPPING

import focal_hf
from messages import ConversionError, printable

_staged: dict[Path, tuple[Path, ...]] = {}  # what to clear when a signal ends the process: staging folder, outputs

# Files of a folder that the converter writes, with the modules of --with-code.
_WRITTEN = {"README.md", "config.json", "model.safetensors", "preprocessor_config.json"}
_WRITTEN |= {module.name for module in Path(focal_hf.__file__).parent.glob("*.py")}


@contextmanager
def staging_folder(*outputs: Path) -> Iterator[Path]:
    """A new folder, on the file system of `outputs`, to build them in under their names; for `move_into_place`.

    It is gone afterwards, however that comes about. Only SIGKILL leaves it, and then its name, hidden and ending in
    `.partial`, tells what it is.
    """
    existing = next(parent for parent in outputs[0].parents if parent.exists())
    folder = existing / f".{outputs[0].name}.{secrets.token_hex(4)}.partial"
    _staged[folder] = outputs
    try:
        (folder / "new").mkdir(parents=True)
        yield folder / "new"
    finally:
        _clear(folder, outputs)
        del _staged[folder]


def move_into_place(staging: Path, *outputs: Path) -> None:
    """Replaces `outputs`, files or a folder, by those of the same names in `staging`.

    The first output is removed first and appears last: wherever this is stopped, it stands beside no other outputs
    than its own. SIGKILL leaves all old outputs, all new ones, or, between calls that take microseconds, no first
    output, with the old ones whole in the staging folder.
    """
    outputs[0].parent.mkdir(parents=True, exist_ok=True)
    old = staging.with_name("old")
    old.mkdir()
    for output in outputs:
        if output.exists():
            output.rename(old / output.name)
    for output in reversed(outputs):
        (staging / output.name).rename(output)


def _clear(folder: Path, outputs: tuple[Path, ...]) -> None:
    new, old = folder / "new", folder / "old"
    if old.exists() and any(new.iterdir()):  # the move was stopped: the old outputs come back
        for output in outputs:
            if (old / output.name).exists():
                (old / output.name).replace(output)
            elif not (new / output.name).exists():
                output.unlink()
    shutil.rmtree(folder, ignore_errors=True)


def check_output_folder(output: Path, overwrite: bool, inputs: tuple[Path, ...]) -> None:
    """Raises ConversionError unless `output` is free or, with `overwrite`, an empty folder or a model alone.

    `output` is what a symbolic link points to, if it was given as one.
    """
    if not output.exists():
        return
    if not overwrite:
        raise ConversionError(f"--output {output} exists. Choose another folder, or add --overwrite to replace it.")
    if not output.is_dir():
        raise ConversionError(f"--output {output} is a file: choose a folder.")
    for path in inputs:
        if output in path.resolve().parents:
            raise ConversionError(f"--output {output} is not replaced: {path} lies in it.")
    if output == Path.cwd():
        raise ConversionError(f"--output {output} is not replaced: it is the working folder.")
    entries = sorted(output.iterdir())
    if entries and not _is_config(output / "config.json"):
        raise ConversionError(
            f"--output {output} holds no model (a config.json with a model_type of transformers): --overwrite replaces "
            "nothing else. Choose another folder."
        )
    for entry in entries:
        if entry.name not in _WRITTEN or entry.is_symlink() or not entry.is_file():
            raise ConversionError(
                f"--output {output} holds {entry.name}, which this script does not write: it is not deleted. Move it "
                "away, or choose another folder."
            )


def _is_config(file: Path) -> bool:
    try:
        return json.loads(file.read_text())["model_type"] in CONFIG_MAPPING if file.is_file() else False
    except (ValueError, TypeError, LookupError, RecursionError):
        return False


def check_output_files(files: tuple[Path, ...], overwrite: bool) -> None:
    """Raises ConversionError unless the files are free or, with `overwrite`, files indeed."""
    for file in files:
        if file.is_symlink() or file.is_dir():
            raise ConversionError(f"{file} is a {'link' if file.is_symlink() else 'folder'}: choose another --output.")
        if file.exists() and not overwrite:
            raise ConversionError(f"{file} exists; add --overwrite to replace it, or choose another --output.")


# --- The command line -------------------------------------------------------------------------------------------------

# Windows has only the first two.
_STOPPING = [getattr(signal, f"SIG{name}") for name in ("INT", "TERM", "HUP", "QUIT") if hasattr(signal, f"SIG{name}")]


def run(main: Callable[[], None]) -> None:
    """Runs a script: what the user can put right becomes one line on stderr and exit code 1."""
    for number in _STOPPING:
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup sets SIGHUP
            signal.signal(number, _stop)
    try:
        main()
    except (ConversionError, OSError) as error:
        sys.exit(f"error: {printable(str(error))}")


def _stop(number: int, _) -> None:
    for other in _STOPPING:
        signal.signal(other, signal.SIG_IGN)
    # Not by an exception: one that comes up while Python frees an object is lost, and the process goes on.
    for folder, outputs in list(_staged.items()):
        _clear(folder, outputs)
    os._exit(128 + number)
