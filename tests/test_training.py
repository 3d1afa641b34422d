"""examples/finetune.py: breaks, processes, batches and recipes. Real processes on small pictures."""

import os
import random
import resource
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common.loading import IGNORED
from common.models import default_processor
from common.recipe import Augmentation
from example_runs import EXAMPLES, TWO_PROCESSES, tiny_config
from test_finetune import results

CLASSES = ("blue", "green", "red")
# Whatever is random in training.
RANDOM = (
    *("--mixup", 0.8, "--cutmix", 1, "--rand-augment", 9, "--erasing", 0.5, "--color-jitter", 0.4),
    *("--drop-path", 0.3, "--ema", 0.9, "--accumulate", 2, "--batch-size", 3, "--workers", 2, "--save-every", 2),
)


def draw_noise(folder: Path, count: int) -> None:
    """FOLDER/CLASS/NUMBER.png, no two alike, with no symmetry, each class brighter in a colour of its own."""
    generator = np.random.default_rng(count)
    for channel, name in enumerate(CLASSES):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            pixels = generator.integers(0, 160, (20, 24, 3), dtype=np.uint8)
            pixels[..., 2 - channel] += 90
            Image.fromarray(pixels).save(folder / name / f"{number}.png")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with 48 training and 9 validation pictures and configs without and with dropout."""
    place = tmp_path_factory.mktemp("training")
    draw_noise(place / "data" / "train", 16)
    draw_noise(place / "data" / "validation", 3)
    tiny_config(drop_path_rate=0.0).save_pretrained(place / "config")
    tiny_config(hidden_dropout_prob=0.1).save_pretrained(place / "dropping")
    return place


class Run:
    """Training in processes of its own."""

    def __init__(self, place: Path, *arguments: object, launcher: tuple | list = (sys.executable,), largest_file=None):
        environment = os.environ | {
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_CACHE": str(place / "cache"),
            "OMP_NUM_THREADS": "1",
            "ACCELERATE_USE_CPU": "true",
        }

        def limit():
            if largest_file:
                resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))

        self.process = subprocess.Popen(
            [
                *launcher,
                str(EXAMPLES / "finetune.py"),
                "--workers",
                "0",
                "--learning-rate",
                "5e-3",
                *map(str, arguments),
            ],
            env=environment,
            cwd=place,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            preexec_fn=limit,
        )

    def end(self, code: int = 0) -> tuple[str, str]:
        """What it wrote."""
        said, complained = self.process.communicate(timeout=300)
        assert self.process.returncode == code, complained
        return said, complained

    def kill_after(self, checkpoints: Path, step: int) -> None:
        """SIGKILL to all its processes, some time after it has saved that step."""
        deadline = time.monotonic() + 200
        while not any(int(folder.name[5:]) >= step for folder in checkpoints.glob("step_*")):
            assert self.process.poll() is None, self.process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.002)
        time.sleep(random.uniform(0, 0.1))
        os.killpg(self.process.pid, signal.SIGKILL)
        assert self.process.wait() == -signal.SIGKILL


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def assert_same(first: Path, second: Path) -> None:
    first, second = contents(first), contents(second)
    assert first.keys() == second.keys()
    assert [name for name in first if first[name] != second[name]] == []


@pytest.fixture(scope="module")
def random_run(place) -> Path:
    """A run with all that is random, never interrupted."""
    Run(place, "--config", "dropping", "--data", "data", "--output", "whole/out", "--epochs", 3, *RANDOM).end()
    return place / "whole" / "out"


class TestKilled:
    """Killed at any step, a run goes on to the very bytes of one that was not."""

    options = ("--config", "dropping", "--data", "data", "--output", "killed/out", "--epochs", 3, *RANDOM)

    @pytest.fixture(scope="class")
    @classmethod
    def killed(cls, place) -> Path:
        folder = place / "killed" / "out"
        step = random.randrange(2, 18, 2)
        Run(place, *cls.options).kill_after(folder / "checkpoints", step)
        assert not (folder / "last").exists()
        return folder

    def test_does_not_go_on_with_other_settings(self, place, killed):
        before = contents(killed)
        _, error = Run(place, *self.options, "--resume", "--epochs", 4, "--batch-size", 2).end(1)
        assert "killed/out cannot go on with other settings: --epochs was 3 and is now 4;" in error
        assert "--batch-size was 3 and is now 2" in error
        assert "Traceback" not in error
        assert contents(killed) == before

    def test_full_disk_leaves_the_checkpoint_whole(self, place, killed):
        """No file may grow beyond 20 kB, which those of weights do."""
        before = contents(max((killed / "checkpoints").glob("step_*")))
        _, error = Run(place, *self.options, "--resume", largest_file=20_000).end(1)
        assert "error: Cannot save" in error
        latest = max((killed / "checkpoints").glob("step_*"))
        assert contents(latest) == before

    def test_goes_on_to_the_same_bytes(self, place, killed, random_run):
        said, _ = Run(place, *self.options, "--resume").end()
        assert "Going on after step" in said
        assert not (killed / "checkpoints").exists()
        assert_same(killed, random_run)
        said, _ = Run(place, *self.options, "--resume").end()
        assert "Training is complete" in said


PLAIN = ("--config", "config", "--data", "data", "--epochs", 3, "--save-every", 2)


@pytest.fixture(scope="module")
def two_processes(place) -> Path:
    Run(place, *PLAIN, "--output", "two/out", "--batch-size", 5, launcher=TWO_PROCESSES).end()
    return place / "two" / "out"


def curve(folder: Path) -> list[float]:
    return [value for entry in results(folder)["history"] for value in (entry["train_loss"], entry["loss"])]


def test_two_processes_killed_go_on_to_the_same_bytes(place, two_processes):
    options = (*PLAIN, "--output", "two_killed/out", "--batch-size", 5)
    folder = place / "two_killed" / "out"
    Run(place, *options, launcher=TWO_PROCESSES).kill_after(folder / "checkpoints", random.randrange(2, 14, 2))
    Run(place, *options, "--resume", launcher=TWO_PROCESSES).end()
    assert_same(folder, two_processes)


def test_processes_and_batches_divide_the_same_work(place, two_processes):
    """Steps of 10 images, the last of an epoch of 8: at once, 5 in each of two processes, or 4 and 4 and 2."""
    Run(place, *PLAIN, "--output", "one/out", "--batch-size", 10).end()
    Run(place, *PLAIN, "--output", "two_batches/out", "--batch-size", 5, "--accumulate", 2).end()
    assert results(two_processes)["processes"] == 2
    expected = curve(place / "one" / "out")
    assert expected[0] > 1.1 * expected[-2]  # it learns
    assert curve(two_processes) == pytest.approx(expected, abs=1e-5)
    assert curve(place / "two_batches" / "out") == pytest.approx(expected, abs=1e-5)


def augmentation(**settings) -> Augmentation:
    """Of nothing but `settings`, for 8 classes, without normalising."""
    nothing = dict.fromkeys(("mixup", "cutmix", "rand_augment", "color_jitter", "erasing"), 0.0)
    processor = default_processor(tiny_config(), crop=1.0)
    processor.do_normalize = False
    processor.rescale_factor = 1 / 255
    return Augmentation(Namespace(**nothing | settings), processor, classes=8)


LABELS = torch.arange(8)


@pytest.mark.parametrize("settings", [{"mixup": 0.8}, {"cutmix": 1.0}, {"mixup": 0.8, "cutmix": 1.0}], ids="+".join)
def test_targets_are_the_shares_of_the_mixed_images(settings):
    """Of image k, channel k is one and all others are zero. One image could not be read."""
    torch.manual_seed(0)
    mix = augmentation(**settings)
    images = torch.eye(8)[:, :, None, None].expand(8, 8, 16, 16)
    seen = []
    for _ in range(20):
        pixels, targets = mix(images, LABELS)
        torch.testing.assert_close(pixels.mean((2, 3)), targets, atol=1e-5, rtol=0)
        seen.append(targets)
        blended = ((pixels > 0) & (pixels < 1)).any()
        assert blended == ("mixup" in settings) or len(settings) == 2
    seen = torch.stack(seen)
    assert ((seen > 0) & (seen < 1)).any(-1).float().mean() > 0.5  # most are mixed
    assert 0.2 < seen.diagonal(dim1=1, dim2=2).mean() < 0.8

    _, targets = mix(images, LABELS.where(LABELS != 3, IGNORED))
    assert targets[:, 3].eq(0).all()
    assert targets.sum() < 8


def test_each_augmentation_changes_what_it_says():
    torch.manual_seed(0)
    ramp = torch.linspace(0.2, 0.8, 32)
    images = torch.stack([ramp.expand(32, 32), ramp[:, None].expand(32, 32), torch.full((32, 32), 0.5)]).repeat(
        8, 1, 1, 1
    )

    same, targets = augmentation()(images, LABELS)
    torch.testing.assert_close(same, images)
    assert targets.equal(torch.eye(8))

    shares = []
    for _ in range(40):
        pixels, _ = augmentation(erasing=0.5)(images, LABELS)
        erased = (pixels == 0).all(1)
        assert pixels.where(erased[:, None], images).equal(pixels)
        assert torch.where(erased[:, None], images, pixels).equal(images)
        shares += [share for share in erased.float().mean((1, 2)).tolist() if share]
    assert 120 < len(shares) < 200  # half of 320
    assert 0.01 < min(shares) < 0.06
    assert 0.25 < max(shares) < 0.36

    jittered, _ = augmentation(color_jitter=0.4)(images, LABELS)
    assert (jittered - images).abs().amax((1, 2, 3)).min() > 0.01
    assert jittered.min() >= 0
    assert jittered.max() <= 1

    unchanged, groups = 0, set()
    randomly = augmentation(rand_augment=9.0)
    for _ in range(40):
        pixels, _ = randomly(images, LABELS)
        assert pixels.isfinite().all()
        assert -1e-6 < pixels.min() <= pixels.max() < 1 + 1e-6
        unchanged += pixels.equal(images)
        groups.add(round(pixels.mean().item(), 4))
    assert 2 < unchanged < 22  # a quarter, and what no operation changes
    assert len(groups) > 12
