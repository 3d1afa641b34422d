"""Training on GPUs through `accelerate launch`, with the settings of examples/engines.

A file of its own, which needs no package of detection: benchmarks/on_a_gpu.sh runs it.
"""

import subprocess
import sys
import time

import psutil
import pytest
import torch

from example_runs import EXAMPLES, curve, draw_noise, example_command, tiny_config
from focal_hf import FocalForImageClassification
from ports import reserve_port


@pytest.mark.skipif(not torch.cuda.is_available(), reason="without a GPU, Accelerate takes DDP in place of FSDP2")
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_engines_through_accelerate(engine, precision, tmp_path):
    """On all GPUs: a run that is killed and resumed ends like one that is not. The script prints the engine."""
    for split in ("train", "validation"):
        draw_noise(tmp_path / "data" / split, 8)
    tiny_config(drop_path_rate=0.0).save_pretrained(tmp_path / "config")
    settings = "--config_file", EXAMPLES / "engines" / f"{engine}.yaml", "--mixed_precision", precision
    # A port of its own, because these tests run at the same time on a GPU (benchmarks/on_a_gpu.sh).
    settings += "--num_processes", torch.cuda.device_count(), "--main_process_port", reserve_port()
    launcher = [sys.executable, "-m", "accelerate.commands.launch", *map(str, settings)]
    options = "--config", "config", "--data", "data", "--epochs", 4, "--batch-size", 4, "--save-every", 1

    def command(output: str) -> dict:
        command = example_command(
            "finetune.py", *options, "--output", output, "--resume", folder=tmp_path, launcher=launcher
        )
        del command["env"]["ACCELERATE_USE_CPU"]
        return command

    killed = subprocess.Popen(**command("model"))
    while not any(int(state.name[5:]) >= 2 for state in (tmp_path / "model" / "checkpoints").glob("step_*")):
        assert killed.poll() is None
        time.sleep(0.01)
    # Not by their process group: the launcher gives each process that it starts a group of its own.
    for process in (killed, *psutil.Process(killed.pid).children(recursive=True)):
        process.kill()
    killed.wait()
    for output in ("model", "whole"):
        run = subprocess.run(**command(output), capture_output=True, text=True)
        assert run.returncode == 0, run.stderr[-3000:]
        assert f"on cuda ({'FSDP' if engine == 'fsdp2' else 'MULTI_GPU'})" in run.stdout
    assert curve(tmp_path / "model") == pytest.approx(curve(tmp_path / "whole"), rel=0.05)
    FocalForImageClassification.from_pretrained(tmp_path / "model")
