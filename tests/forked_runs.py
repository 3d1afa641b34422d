"""Runs of scripts of examples/ that can be stopped before any change to the files in a folder."""

import os
import signal
import sys
from functools import partial
from pathlib import Path
from typing import NamedTuple

from example_runs import run_example

CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir"}  # audit events; `open` to write is one, too


class Ended(NamedTuple):
    status: int
    said: str
    complained: str


class ForkedRuns:
    """Runs in `folder`, one after the other."""

    def __init__(self, folder: Path):
        self.folder = folder

    def run(
        self, script: str, *arguments: object, inside: str = "", before: int | None = None, by: int = signal.SIGKILL
    ) -> Ended:
        """Send signal `by` before change number `before` to files whose path has `inside` in it."""
        prepare = partial(watch, inside, before, by) if inside else None
        ended = run_example(script, *arguments, folder=self.folder, prepare=prepare)
        return Ended(ended.returncode, ended.stdout, ended.stderr)


def watch(inside: str, before: int | None, by: int) -> None:
    changes = 0

    def hook(event: str, args: tuple) -> None:
        nonlocal changes
        relative = event in ("os.remove", "os.rmdir") and args[1] != -1  # to a folder that is being removed
        writes = event == "open" and isinstance(args[0], str | os.PathLike) and args[2] & (os.O_WRONLY | os.O_RDWR)
        if (event in CHANGES or writes) and (relative or inside in os.fspath(args[0])):
            if changes == before:
                os.kill(os.getpid(), by)
            changes += 1

    sys.addaudithook(hook)
