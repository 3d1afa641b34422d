"""Scripts of examples/ in processes that are forked from one which has imported all that they need.

So a run does not begin with ten seconds of imports.
"""

import atexit
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from ports import reserve_port

EXAMPLES = Path(__file__).parents[1] / "examples"
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    ["evaluate", "extract_features", "finetune", "finetune_detection", "finetune_segmentation", "pretrain_mim"]
)
# For the process that imports the scripts, which reads some of it only then.
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}


def run(
    command: list[str],
    folder: Path,
    environment: dict[str, str],
    output: str,
    prepare: Callable | None,
    online: bool,
) -> None:
    """In the new process: as `python COMMAND` does."""
    import datasets
    from huggingface_hub import constants

    os.setsid()
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{output}.{name}", os.O_WRONLY | os.O_CREAT), descriptor)
    multiprocessing.set_start_method(None, force=True)  # of processes that the script starts: the default again
    os.chdir(folder)
    os.environ.update(environment)
    datasets.config.HF_DATASETS_CACHE = folder / "cache"
    if online:
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = False
        constants.HF_HUB_CACHE = str(folder / "hub")
    sys.argv = command
    if prepare:
        prepare()
    try:
        runpy.run_path(command[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()


class ForkedScript:
    """examples/SCRIPT in one process, or in several as torchrun starts them. On a CPU, in `folder`.

    If `folder` is a list, there is one process in each folder, as on machines of their own. Each process gets the
    variables of `environment`, and calls `prepare` before the script runs. Processes that are `online` are logged in to
    the server of hub_server.py.
    """

    def __init__(
        self,
        script: str,
        *arguments: object,
        folder: Path | list[Path],
        processes: int = 1,
        environment: dict[str, str] | None = None,
        prepare: Callable | None = None,
        online: bool = False,
    ):
        self.command = [str(EXAMPLES / script), *map(str, arguments)]
        self.outputs = tempfile.TemporaryDirectory()
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(reserve_port())}
        folders = folder if isinstance(folder, list) else [folder] * processes
        one_each = folder is folders
        own = os.environ.copy()
        os.environ.update(ENVIRONMENT | {"PYTHONPATH": f"{EXAMPLES}{os.pathsep}{own.get('PYTHONPATH', '')}"})
        try:
            self.processes = []
            for rank, own_folder in enumerate(folders):
                place = {"RANK": rank, "LOCAL_RANK": 0 if one_each else rank}
                place |= {"WORLD_SIZE": len(folders), "LOCAL_WORLD_SIZE": 1 if one_each else len(folders)}
                place = {name: str(number) for name, number in place.items()} | meeting if len(folders) > 1 else {}
                place |= environment or {}
                place |= {"HF_TOKEN": "hf_test"} if online else {}
                arguments = (self.command, own_folder, place, f"{self.outputs.name}/{rank}", prepare, online)
                process = FORKS.Process(target=run, args=arguments)
                process.start()
                self.processes.append(process)
        finally:
            os.environ.clear()
            os.environ.update(own)

    def poll(self) -> int | None:
        """The exit status, or None while it runs. One that fails ends the others, as under torchrun."""
        codes = [process.exitcode for process in self.processes]
        failed = [code for code in codes if code]
        if failed:
            self.kill()
            return failed[0]
        return None if None in codes else 0

    def kill(self) -> None:
        """SIGKILL to the processes and to those that they started."""
        for process in self.processes:
            if process.exitcode is None:
                os.killpg(process.pid, signal.SIGKILL)
        for process in self.processes:
            process.join()

    def wait(self, timeout: float = 300) -> subprocess.CompletedProcess:
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                self.kill()
                raise TimeoutError(f"{self.command} did not end in {timeout} s. It wrote:\n{self.written('stderr')}")
            time.sleep(0.01)
        texts = (self.written("stdout"), self.written("stderr"))
        return subprocess.CompletedProcess(self.command, code, *texts)

    def written(self, stream: str) -> str:
        return "".join(file.read_text() for file in sorted(Path(self.outputs.name).glob(f"*.{stream}")))
