"""Training in several processes, without a GPU, with PyTorch's own engines."""

import importlib
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

from common.engine import NEEDS_WHOLE_MODEL, convert_images
from common.options import Problem
from detection_scenes import LEVELS, STAGES, detector_config, draw_scenes
from example_runs import (
    BIN,
    EXAMPLES,
    assert_same,
    curve,
    draw_noise,
    example_command,
    results,
    run_example,
    tiny_config,
)
from focal_hf import FocalForImageClassification
from forked_scripts import ForkedScript
from fsdp_training import STEPS, batch, build, optimizer_of
from ports import reserve_port
from small_models import BOTH, PILLOW_PROCESSORS


@BOTH
@pytest.mark.skipif(torch.__version__ < "2.11", reason="torch before 2.11 cannot shard models on a CPU")
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


def test_deepspeed_in_one_process(tmp_path):
    """With the settings of examples/engines. Accelerate has no DeepSpeed of several processes on a CPU."""
    pytest.importorskip("deepspeed")
    for split in ("train", "validation"):
        draw_noise(tmp_path / "data" / split, 2)
    tiny_config().save_pretrained(tmp_path / "config")
    settings = "--config_file", str(EXAMPLES / "engines" / "deepspeed_zero2.yaml"), "--num_processes", "1"
    command = example_command(
        *("finetune.py", "--config", "config", "--data", "data", "--output", "model", "--epochs", 2),
        folder=tmp_path,
        launcher=(sys.executable, "-m", "accelerate.commands.launch", *settings),
    )
    del command["env"]["ACCELERATE_USE_CPU"]
    run = subprocess.run(**command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    assert "(DEEPSPEED), precision bf16" in run.stdout
    FocalForImageClassification.from_pretrained(tmp_path / "model")


def test_images_are_converted_to_the_dtype_of_the_weights():
    """Which DeepSpeed requires in bfloat16."""
    model = FocalForImageClassification(tiny_config()).bfloat16()
    model.register_forward_pre_hook(convert_images, with_kwargs=True)
    assert model(pixel_values=torch.zeros(1, 3, 16, 16)).logits.dtype == torch.bfloat16


class Launched:
    """examples/SCRIPT on two machines, as examples/README.md says: the launcher of each runs in a folder of its own."""

    def __init__(self, machines: list[Path], script: str, *arguments: object):
        settings = "--config_file", EXAMPLES / "engines" / "ddp.yaml", "--mixed_precision", "no", "--num_processes", 2
        settings += "--num_machines", 2, "--main_process_ip", "127.0.0.1", "--main_process_port", reserve_port()
        self.launchers = []
        for rank, machine in enumerate(machines):
            launcher = map(str, (BIN / "accelerate", "launch", "--quiet", *settings, "--machine_rank", rank))
            command = example_command(script, *arguments, folder=machine, launcher=[*launcher])
            # Files, since a pipe that no one reads stops the writer when it is full.
            with open(machine / "stdout", "w") as stdout, open(machine / "stderr", "w") as stderr:
                self.launchers.append(subprocess.Popen(**command, stdout=stdout, stderr=stderr))

    def wait(self) -> list[int]:
        return [launcher.wait(timeout=300) for launcher in self.launchers]


def test_two_machines(tmp_path):
    """Two machines share only the output folder. One of them is killed; resumed, the run ends with the same bytes.

    Launchers start the resumed run. The environment that launchers set starts the others, which takes less time.
    """
    machines = [tmp_path / "first", tmp_path / "second"]
    for machine in machines:
        for split, count in (("train", 4), ("validation", 3)):
            draw_noise(machine / "data" / split, count)
        tiny_config(drop_path_rate=0.0).save_pretrained(machine / "config")
    shared, whole, alone = tmp_path / "shared", tmp_path / "whole", tmp_path / "alone"
    options = "--config", "config", "--data", "data", "--epochs", 3, "--learning-rate", 5e-3
    launched = "finetune.py", *options, "--batch-size", 2, "--output", shared / "out"

    def errors() -> str:
        return "\n".join((machine / "stderr").read_text() for machine in machines)

    killed = ForkedScript(*launched, "--save-every", 1, folder=machines)
    while not any(int(state.name[5:]) >= 2 for state in (shared / "out" / "checkpoints").glob("step_*")):
        assert killed.poll() is None, killed.written("stderr")
        time.sleep(0.01)
    killed.processes[1].kill()
    for process in killed.processes:
        process.join(300)
    assert [process.exitcode for process in killed.processes] == [1, -signal.SIGKILL], killed.written("stderr")
    assert Launched(machines, *launched, "--resume").wait() == [0, 0], errors()
    said = (machines[0] / "stdout").read_text()
    assert "2 process(es) on cpu (MULTI_CPU)" in said
    assert "Resuming after step" in said

    def run(folder: Path | list[Path], *command: object) -> None:
        ended = run_example(*command, folder=folder)
        assert ended.returncode == 0, ended.stderr

    run(machines, "finetune.py", *options, "--batch-size", 2, "--output", whole / "out")
    assert_same(shared / "out", whole / "out")
    run(machines[0], "finetune.py", *options, "--batch-size", 4, "--output", alone / "out")
    assert curve(shared / "out") == pytest.approx(curve(alone / "out"), rel=1e-4)

    trained = "--model", shared / "out", "--data", "data"
    for folder, output in ((machines, shared), (machines[0], alone)):
        run(folder, "evaluate.py", *trained, "--report", output / "report")
        run(folder, "extract_features.py", *trained, "--split", "train", "--shards", 4, "--output", output / "features")
    of_two, of_one = results(shared / "report"), results(alone / "report")
    assert (of_two.pop("processes"), of_one.pop("processes")) == (2, 1)
    del of_two["images_per_second"], of_one["images_per_second"]
    assert of_two == of_one
    assert_same(shared / "features", alone / "features")

    # An output folder that is not shared is refused, whether or not each machine has one of that name.
    for machine in machines:
        (machine / "made").mkdir()
    for output, missing in (("own", "own"), ("made", "made/features-00001-of-00002.parquet")):
        options = "--split", "train", "--shards", 2, "--output", output
        ended = run_example("extract_features.py", *trained, *options, folder=machines)
        assert ended.returncode == 1
        assert f"error: {missing}, from another machine, is missing: name an --output" in ended.stderr


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


@PILLOW_PROCESSORS
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
