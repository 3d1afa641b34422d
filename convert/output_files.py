"""Writes outputs that are complete or absent, and replaces only files that the converters write."""

import json
import os
import secrets
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub.utils import logging as hub_logging
from transformers import CONFIG_MAPPING
from transformers.utils import logging

import focal_hf
from messages import ConversionError, printable_line

_staging_folders: dict[Path, tuple[Path, ...]] = {}  # staging folders in use, with their outputs

# Files that the converter writes to the folder of a classifier.
MODEL_FILES = ("model.safetensors", "config.json", "preprocessor_config.json", "README.md", "conversion.json")
# With a graph, and with the modules of --with-code.
_REPLACED_FILES = {*MODEL_FILES, "model.onnx", *(module.name for module in Path(focal_hf.__file__).parent.glob("*.py"))}


@contextmanager
def staging_folder(*outputs: Path) -> Iterator[Path]:
    """Yields a new folder in which to write `outputs` under their names, for `move_into_place`.

    The folder is on the file system of `outputs`, and is deleted afterwards, also after an error or a signal. Only
    SIGKILL leaves it behind, under a hidden name that ends in `.partial`.
    """
    folder = _existing_parent(outputs[0]) / f".{outputs[0].name}.{secrets.token_hex(4)}.partial"
    _staging_folders[folder] = outputs
    try:
        (folder / "new").mkdir(parents=True)
        yield folder / "new"
    finally:
        _clean_up(folder, outputs)
        del _staging_folders[folder]


def _existing_parent(output: Path) -> Path:
    return next(parent for parent in output.parents if parent.exists())


def move_into_place(staging: Path, *outputs: Path) -> None:
    """Replaces `outputs`, files or a folder, by those of the same names in `staging`.

    The first output is removed first and written last, so that it never lies beside another version of the others.
    SIGKILL leaves all old outputs or all new ones. Between two renames, it leaves no first output, and the old outputs
    are in the staging folder.
    """
    outputs[0].parent.mkdir(parents=True, exist_ok=True)
    old = staging.with_name("old")
    old.mkdir()
    for output in outputs:
        if output.exists():
            output.rename(old / output.name)
    for output in reversed(outputs):
        (staging / output.name).rename(output)


def _clean_up(folder: Path, outputs: tuple[Path, ...]) -> None:
    """Restores the old outputs if `move_into_place` was interrupted, and deletes the staging folder."""
    new, old = folder / "new", folder / "old"
    if old.exists() and any(new.iterdir()):
        for output in outputs:
            if (old / output.name).exists():
                (old / output.name).replace(output)
            elif not (new / output.name).exists():
                output.unlink()
    # `old` first: if a signal interrupts this, its handler finds nothing more to restore.
    shutil.rmtree(old, ignore_errors=True)
    shutil.rmtree(folder, ignore_errors=True)


def check_output_folder(output: Path, overwrite: bool, inputs: tuple[Path, ...]) -> None:
    """Checks that `output` does not exist or, with `overwrite`, is empty or holds only a model.

    `output` is a resolved path: the target, if the user gave a symbolic link.

    Raises:
        ConversionError: if `output` is another file or folder, or cannot be written.
    """
    for path in inputs:
        if output in path.resolve().parents:
            raise ConversionError(f"--output {output} holds the input {path}. Choose another folder.")
    if not output.exists():
        _check_parent(output)
        return
    if not overwrite:
        raise ConversionError(f"--output {output} exists. Choose another folder, or add --overwrite to replace it.")
    if not output.is_dir():
        raise ConversionError(f"--output {output} is a file. Choose a folder.")
    if output == Path.cwd():
        raise ConversionError(f"--output {output} is the working folder. Choose another folder.")
    entries = sorted(output.iterdir())
    if entries and not _is_model_config(output / "config.json"):
        raise ConversionError(
            f"--output {output} holds no model: --overwrite replaces only folders with a config.json of transformers. "
            "Choose another folder."
        )
    for entry in entries:
        if entry.name not in _REPLACED_FILES or entry.is_symlink() or not entry.is_file():
            raise ConversionError(
                f"--output {output} holds {entry.name}, which --overwrite does not delete: this script does not write "
                f"it. Move {entry.name} away, or choose another folder."
            )
    _check_parent(output)


def _check_parent(output: Path) -> None:
    parent = _existing_parent(output)
    if not (parent.is_dir() and os.access(parent, os.W_OK)):
        raise ConversionError(
            f"--output {output} cannot be written: {parent} is not a folder, or is write-protected. Choose another "
            "--output."
        )


def _is_model_config(file: Path) -> bool:
    try:
        return json.loads(file.read_text())["model_type"] in CONFIG_MAPPING if file.is_file() else False
    except (ValueError, TypeError, LookupError, RecursionError):
        return False


def check_output_files(files: tuple[Path, ...], overwrite: bool) -> None:
    """Checks that the files do not exist or, with `overwrite`, are regular files.

    Raises:
        ConversionError: if one of them exists, is a folder or a symbolic link, or cannot be written.
    """
    for file in files:
        if file.is_symlink() or file.is_dir():
            kind = "symbolic link" if file.is_symlink() else "folder"
            raise ConversionError(f"{file} is a {kind}, and is not replaced. Choose another --output.")
        if file.exists() and not overwrite:
            raise ConversionError(f"{file} exists. Add --overwrite to replace it, or choose another --output.")
    _check_parent(files[0])


# --- The command line -------------------------------------------------------------------------------------------------

# Windows has only SIGINT and SIGTERM.
_SIGNALS = [getattr(signal, f"SIG{name}") for name in ("INT", "TERM", "HUP", "QUIT") if hasattr(signal, f"SIG{name}")]


def run_script(main: Callable[[], None]) -> None:
    """Runs `main`. An error that the user can correct is printed to stderr as one line, and the exit code is 1."""
    # Without the warnings and progress bars of libraries, of which some have many lines.
    logging.set_verbosity_error()
    hub_logging.set_verbosity_error()
    logging.disable_progress_bar()
    for number in _SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(number, _exit_on_signal)
    try:
        main()
    except (ConversionError, OSError) as error:
        sys.exit(f"error: {printable_line(str(error))}")


def _exit_on_signal(number: int, _) -> None:
    for other in _SIGNALS:
        signal.signal(other, signal.SIG_IGN)
    # Does not raise an exception: Python drops exceptions that occur while it frees an object, and would go on.
    for folder, outputs in list(_staging_folders.items()):
        _clean_up(folder, outputs)
    os._exit(128 + number)
