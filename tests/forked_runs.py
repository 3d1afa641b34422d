"""Scripts of examples/ in processes of their own that begin as forks of one which has imported everything.

So a run takes no longer than what it does. It can be stopped before any change to the files in a folder.
"""

import contextlib
import json
import os
import runpy
import subprocess
import sys
import traceback
from pathlib import Path
from typing import NamedTuple

from example_runs import EXAMPLES, example_command

CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir"}  # audit events; `open` to write is one, too


class Ended(NamedTuple):
    status: int
    said: str
    complained: str


class ForkedRuns:
    """Runs in `folder`, one after the other."""

    def __init__(self, folder: Path):
        command = example_command("finetune.py", folder=folder)
        command["args"] = [sys.executable, __file__]
        self.folder = folder
        self.process = subprocess.Popen(**command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(self, script: str, *arguments: object, inside: str = "", before: int | None = None, by: int = 9) -> Ended:
        """Send signal `by` before change number `before` to files whose path has `inside` in it."""
        line = [str(EXAMPLES / script), "--workers", "0", *map(str, arguments)]
        print(json.dumps([line, inside, before, by]), file=self.process.stdin, flush=True)
        return Ended(*json.loads(self.process.stdout.readline()))

    def end(self) -> None:
        self.process.stdin.close()
        assert self.process.wait(timeout=60) == 0


def fork(*request: object) -> Ended:
    names = [f"output_of_{os.getpid()}_{kind}" for kind in ("said", "complained")]
    child = os.fork()
    if not child:
        for descriptor, name in enumerate(names, 1):
            os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
        os.close(0)
        os._exit(act(*request))
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    said, complained = (Path(name).read_text() for name in names)
    for name in names:
        os.remove(name)
    return Ended(status, said, complained)


def act(line: list[str], inside: str, before: int | None, by: int) -> int:
    changes = 0

    def watch(event: str, args: tuple) -> None:
        nonlocal changes
        relative = event in ("os.remove", "os.rmdir") and args[1] != -1  # to a folder that is being removed
        writes = event == "open" and isinstance(args[0], str | os.PathLike) and args[2] & (os.O_WRONLY | os.O_RDWR)
        if (event in CHANGES or writes) and (relative or inside in os.fspath(args[0])):
            if changes == before:
                os.kill(os.getpid(), by)
            changes += 1

    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
    if inside:
        sys.addaudithook(watch)
    sys.argv = line
    try:
        runpy.run_path(line[0], run_name="__main__")
    except SystemExit as end:
        return end.code or 0
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(EXAMPLES))
    answers = os.dup(1)
    os.dup2(2, 1)
    for module in ("finetune", "pretrain_mim"):
        with contextlib.suppress(ImportError):
            __import__(module)
    for request in sys.stdin:
        os.write(answers, json.dumps(fork(*json.loads(request))).encode() + b"\n")
