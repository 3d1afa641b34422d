"""Writes so that nothing half-written looks whole, and replaces only what the converters write."""

import os
import secrets
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from messages import ConversionError, printable

_staged: dict[Path, Path] = {}  # what to clear when a signal ends the process: staging folder, output


@contextmanager
def staging_folder(output: Path) -> Iterator[Path]:
    """A new folder, on the file system of `output`, to build in. It is gone afterwards, however that comes about.

    Only SIGKILL leaves it, and then its name, hidden and ending in `.partial`, tells what it is.
    """
    existing = next(parent for parent in output.parents if parent.exists())
    folder = existing / f".{output.name}.{secrets.token_hex(4)}.partial"
    _staged[folder] = output
    try:
        folder.mkdir()
        yield folder
    finally:
        _clear(folder, output)
        del _staged[folder]


def _clear(folder: Path, output: Path) -> None:
    if (folder / "replaced").exists() and not output.exists():
        (folder / "replaced").rename(output)
    shutil.rmtree(folder, ignore_errors=True)


def check_output_folder(output: Path, overwrite: bool, inputs: tuple[Path, ...]) -> None:
    """Raises ConversionError unless `output` is free or, with `overwrite`, is a model's or empty, and no input's."""
    if not output.exists():
        return
    if not overwrite:
        raise ConversionError(f"--output {output} exists. Choose another folder, or add --overwrite to replace it.")
    entries = list(output.iterdir()) if output.is_dir() else None
    named = {entry.name for entry in entries or ()}
    if entries is None or (entries and ("config.json" not in named or any(entry.is_dir() for entry in entries))):
        raise ConversionError(
            f"--output {output} is not replaced, since it may hold more than a model: --overwrite is for an empty "
            "folder, or one with a config.json and no folders in it."
        )
    for path in inputs:
        if output in path.resolve().parents:
            raise ConversionError(f"--output {output} is not replaced: {path} lies in it.")


def move_into_place(built: Path, output: Path) -> None:
    """Makes the folder `built` in a staging folder `output`. What stood there goes with the staging folder.

    SIGKILL leaves the old folder, the new one, or, between two calls that take microseconds, neither, with the old one
    whole in the staging folder.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    if output.exists():
        output.rename(built.with_name("replaced"))
    built.rename(output)


# --- The command line -------------------------------------------------------------------------------------------------


def run(main: Callable[[], None]) -> None:
    """Runs a script: what the user can put right becomes one line on stderr and exit code 1."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    try:
        main()
    except (ConversionError, OSError) as error:
        sys.exit(f"error: {printable(str(error))}")


def _stop(number: int, _) -> None:
    # Not by an exception: one that comes up while Python frees an object is lost, and the process goes on.
    for folder, output in list(_staged.items()):
        _clear(folder, output)
    os._exit(128 + number)
