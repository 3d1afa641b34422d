"""Training in several processes, without a GPU, with PyTorch's own engines."""

import importlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from PIL import Image

from common.engine import NEEDS_WHOLE_MODEL
from common.options import Problem
from detection_scenes import LEVELS, STAGES, detector_config, draw_scenes
from example_runs import BIN, EXAMPLES, curve, draw_noise, example_command, tiny_config
from focal_hf import FocalForImageClassification
from forked_scripts import ForkedScript
from fsdp_training import STEPS, batch, build, optimizer_of
from small_models import BOTH


@BOTH
def test_fsdp_over_the_declared_blocks(attention_type, tmp_path):
    """Two processes, stopped and resumed, train the weights of one process, and save a model that loads anywhere."""
    script = Path(__file__).with_name("fsdp_training.py")
    run = ForkedScript(str(script), tmp_path, attention_type, folder=tmp_path, processes=2).wait()
    assert run.returncode == 0, run.stderr[-3000:]

    model = build(attention_type)
    optimizer = optimizer_of(model)
    losses = []
    for step in range(STEPS):
        images, labels = batch(step)
        loss = model(images, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert [float(line.split()[1]) for line in run.stdout.splitlines()] == pytest.approx(losses, rel=1e-4)
    assert losses[-1] < losses[0]
    loaded = FocalForImageClassification.from_pretrained(tmp_path / "model")
    for (name, value), other in zip(loaded.state_dict().items(), model.state_dict().values(), strict=True):
        torch.testing.assert_close(value, other, rtol=1e-3, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="without a GPU, Accelerate takes DDP in place of FSDP2")
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_engines_through_accelerate(engine, precision, tmp_path):
    """On all GPUs: a run that is killed and resumed ends like one that is not. The script prints the engine."""
    for split in ("train", "validation"):
        draw_noise(tmp_path / "data" / split, 8)
    tiny_config(drop_path_rate=0.0).save_pretrained(tmp_path / "config")
    settings = "--config_file", EXAMPLES / "engines" / f"{engine}.yaml", "--mixed_precision", precision
    launcher = BIN / "accelerate", "launch", *settings, "--num_processes", str(torch.cuda.device_count())
    options = "--config", "config", "--data", "data", "--epochs", 4, "--batch-size", 4, "--save-every", 1

    def command(output: str) -> dict:
        command = example_command(
            "finetune.py", *options, "--output", output, "--resume", folder=tmp_path, launcher=launcher
        )
        del command["env"]["ACCELERATE_USE_CPU"]
        return command

    killed = subprocess.Popen(**command("model"), start_new_session=True)
    while not any(int(state.name[5:]) >= 2 for state in (tmp_path / "model" / "checkpoints").glob("step_*")):
        assert killed.poll() is None
        time.sleep(0.01)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    for output in ("model", "whole"):
        run = subprocess.run(**command(output), capture_output=True, text=True)
        assert run.returncode == 0, run.stderr[-3000:]
        assert f"on cuda ({'FSDP' if engine == 'fsdp2' else 'MULTI_GPU'})" in run.stdout
    assert curve(tmp_path / "model") == pytest.approx(curve(tmp_path / "whole"), rel=0.05)
    FocalForImageClassification.from_pretrained(tmp_path / "model")


@pytest.mark.parametrize("engine", [DistributedType.FSDP, DistributedType.DEEPSPEED])
@pytest.mark.parametrize("script", ["finetune_detection", "finetune_segmentation"])
def test_scripts_for_whole_models_refuse_engines_that_shard(script, engine, tmp_path, monkeypatch):
    """The scripts refuse before they read or write. On a CPU, the test must set the engine in Accelerate's state."""
    arguments = ["--model", "none", "--data", "none", "--output", str(tmp_path / "none")]
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    module = importlib.import_module(script)
    accelerator = Accelerator(cpu=True)
    monkeypatch.setitem(AcceleratorState._shared_state, "distributed_type", engine)
    with pytest.raises(Problem, match=rf"^{engine.value} shards the model among processes, and {NEEDS_WHOLE_MODEL}\.$"):
        module.train(module.parse_arguments(), accelerator)
    assert not (tmp_path / "none").exists()


def test_scripts_for_whole_models_refuse_sharded_ones(tmp_path):
    """In two processes, each of which refuses both scripts' models, sharded by FSDP2, and writes nothing."""
    for split, count in {"train": 4, "validation": 2}.items():
        draw_scenes(tmp_path / "scenes", split, count)  # boxes; for segmentation, a map with the class of each pixel
        maps = tmp_path / "scenes" / "annotations" / split
        maps.mkdir()
        for number in range(count):
            Image.new("L", (64, 48), number % 2).save(maps / f"{number}.png")
    (tmp_path / "scenes" / "annotations" / "classes.txt").write_text("dark\nlight")
    detector_config("rt_detr").save_pretrained(tmp_path / "detector")
    tiny_config(**STAGES | LEVELS).save_pretrained(tmp_path / "backbone")

    script = Path(__file__).with_name("sharded_training.py")
    run = ForkedScript(str(script), folder=tmp_path, processes=2).wait()
    assert run.returncode == 0, run.stderr[-3000:]
    refused = [line for line in run.stdout.splitlines() if line.startswith("refused: ")]
    line = f"refused: The parameters of the model are sharded among processes, and {NEEDS_WHOLE_MODEL}."
    assert refused == [line] * 4
    assert not (tmp_path / "detected").exists()
    assert not (tmp_path / "segmented").exists()
