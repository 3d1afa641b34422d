"""examples/finetune.py: breaks, processes, batches and recipes. Real processes on small pictures."""

import random
import re
from argparse import Namespace
from functools import partial
from pathlib import Path
from resource import RLIMIT_FSIZE, setrlimit

import datasets
import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel
from PIL import Image
from sklearn.utils.class_weight import compute_class_weight
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoConfig, AutoModelForImageClassification

from common.loading import IGNORED, TrainingBatches, shuffled
from common.models import decay_groups, default_processor, freeze
from common.options import Problem
from common.recipe import Augmentation, balanced_weights
from common.streams import Stream
from example_runs import (
    CLASSES,
    Run,
    assert_same,
    contents,
    curve,
    draw_noise,
    results,
    run_example,
    run_examples_in_turn,
    tiny_config,
    write_tar,
)
from focal_hf import FocalForImageClassification

# Whatever is random in training.
RANDOM = (
    *("--mixup", 0.8, "--cutmix", 1, "--rand-augment", 9, "--erasing", 0.5, "--color-jitter", 0.4),
    *("--drop-path", 0.3, "--ema", 0.9, "--accumulate", 2, "--batch-size", 3, "--workers", 2, "--save-every", 2),
)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """48 training and 9 validation pictures in folders and as shards, and configs without and with dropout."""
    place = tmp_path_factory.mktemp("training")
    (place / "shards").mkdir()
    (place / "classes.txt").write_text("\n".join(CLASSES))
    for split, count in (("train", 16), ("validation", 3)):
        draw_noise(place / "data" / split, count)
        write_tar(place / "shards" / f"{split}-00000.tar", place / "data" / split)
    tiny_config(drop_path_rate=0.0).save_pretrained(place / "config")
    tiny_config(hidden_dropout_prob=0.1).save_pretrained(place / "dropping")
    return place


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
        assert "killed/out cannot be resumed with other settings: --epochs was 3 and is now 4;" in error
        assert "--batch-size was 3 and is now 2" in error
        assert "Traceback" not in error
        assert contents(killed) == before

    def test_full_disk_leaves_the_checkpoint_whole(self, place, killed):
        """No file may grow beyond 20 kB, which those of weights do."""
        before = contents(max((killed / "checkpoints").glob("step_*")))
        limit = partial(setrlimit, RLIMIT_FSIZE, (20_000, 20_000))
        _, error = Run(place, *self.options, "--resume", prepare=limit).end(1)
        assert "error: Cannot save" in error
        latest = max((killed / "checkpoints").glob("step_*"))
        assert contents(latest) == before

    def test_goes_on_to_the_same_bytes(self, place, killed, random_run):
        said, _ = Run(place, *self.options, "--resume").end()
        assert "Resuming after step" in said
        assert not (killed / "checkpoints").exists()
        assert_same(killed, random_run)
        said, _ = Run(place, *self.options, "--resume").end()
        assert "Training is complete" in said


# A stream of shards, which has an order of its own, too.
PLAIN = (
    *("--config", "config", "--data", "shards", "--streaming", "--train-images", 48, "--classes", "classes.txt"),
    *("--image-column", "png", "--label-column", "cls", "--epochs", 3, "--save-every", 2),
)


@pytest.fixture(scope="module")
def two_processes(place) -> Path:
    Run(place, *PLAIN, "--output", "two/out", "--batch-size", 5, processes=2).end()
    return place / "two" / "out"


def test_two_processes_killed_go_on_to_the_same_bytes(place, two_processes):
    options = (*PLAIN, "--output", "two_killed/out", "--batch-size", 5)
    folder = place / "two_killed" / "out"
    Run(place, *options, processes=2).kill_after(folder / "checkpoints", random.randrange(2, 14, 2))
    Run(place, *options, "--resume", processes=2).end()
    assert_same(folder, two_processes)


def test_processes_and_batches_divide_the_same_work(place, two_processes):
    """Steps of 10 images, the last of an epoch of 8: at once, 5 in each of two processes, or 4 and 4 and 2."""
    Run(place, *PLAIN, "--output", "one/out", "--batch-size", 10).end()
    Run(place, *PLAIN, "--output", "two_batches/out", "--batch-size", 5, "--accumulate", 2).end()
    assert results(two_processes)["processes"] == 2
    expected = curve(place / "one" / "out")
    assert expected[0] > 1.1 * expected[-3]  # it learns
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


@pytest.fixture(scope="module")
def paper_run(place) -> tuple[Path, str]:
    """The whole recipe, shortened, on pictures of which one is cut off and one is none, and what was printed."""
    draw_noise(place / "spoilt" / "train", 8)
    draw_noise(place / "spoilt" / "validation", 2)
    whole = (place / "spoilt" / "train" / "red" / "0.png").read_bytes()
    (place / "spoilt" / "train" / "red" / "0.png").write_bytes(whole[: len(whole) // 2])
    (place / "spoilt" / "validation" / "green" / "none.png").write_text("no picture")
    said, _ = Run(
        *(place, "--recipe", "paper", "--config", "config", "--data", "spoilt", "--output", "paper"),
        *("--epochs", 3, "--warmup-epochs", 1, "--batch-size", 8, "--report-to", "tensorboard"),
        *("--class-weights", "balanced", "--gradient-checkpointing", "--layer-decay", 0.9),
    ).end()
    return place / "paper", said


def test_unreadable_images_are_skipped_and_told(paper_run):
    folder, said = paper_run
    assert re.search(r"Skipping 1 image that cannot be read: \S*green/none.png\n", said)
    assert len(re.findall(r"Skipped 1 training images that cannot be read: \S*red/0.png \(OSError: .*", said)) == 1
    assert [entry["images"] for entry in results(folder)["history"]] == [6, 6, 6]


def test_recipe_of_the_paper(paper_run):
    config = AutoConfig.from_pretrained(paper_run[0])
    assert config.drop_path_rate == 0.2
    # What is told is what was done: tests of each piece are above and below.
    card = (paper_run[0] / "README.md").read_text()
    assert "from scratch" in card
    assert "| `--model` |" not in card  # which was not given
    for option, value in (("mixup", 0.8), ("cutmix", 1.0), ("rand-augment", 9.0), ("erasing", 0.25), ("clip", 5.0)):
        assert f"| `--{option}` | {value} |" in card
    assert f"| `--learning-rate` | {5e-3} |" in card
    assert f"| `--min-learning-rate` | {5e-5} |" in card


def test_results_are_reported_to_people_and_trackers(paper_run):
    folder, _ = paper_run
    written = results(folder)
    logs = EventAccumulator(str(next((folder / "logs").glob("*")))).Reload()
    for name in ("train_loss", "loss", "accuracy", "top5_accuracy"):
        assert [event.value for event in logs.Scalars(name)] == pytest.approx(
            [entry[name] for entry in written["history"]]
        )
    assert [event.step for event in logs.Scalars("loss")] == [3, 6, 9]
    assert logs.Scalars("learning_rate")[-1].value == pytest.approx(5e-5)

    for place, entry in ((folder, written["best"]), (folder / "last", written["history"][-1])):
        card = ModelCard.load(place / "README.md")
        measured = {result.metric_type: result.metric_value for result in card.data.eval_results}
        assert measured == {
            "accuracy": entry["accuracy"],
            "top_5_accuracy": entry["top5_accuracy"],
            "cross_entropy": entry["loss"],
        }
        assert card.data.pipeline_tag == "image-classification"
        for picture in ("curves.png", "confusion.png"):
            with Image.open(place / picture) as image:
                assert min(image.size) > 300
        AutoModelForImageClassification.from_pretrained(place)


def test_adapters_are_merged_and_kept_in_mixed_precision_too(place, paper_run):
    base, _ = paper_run
    run = run_example(
        *("finetune.py", "--model", base, "--data", "data", "--output", "lora", "--epochs", 1),
        *("--learning-rate", 5e-3, "--lora", 2, "--ema", 0.5, "--gradient-checkpointing"),
        folder=place,
        environment={"ACCELERATE_MIXED_PRECISION": "bf16"},  # as with `accelerate launch --mixed_precision bf16`
    )
    assert run.returncode == 0, run.stderr
    assert "precision bf16" in run.stdout
    card = (place / "lora" / "README.md").read_text()
    assert "from paper with Focal's" in card
    assert str(place) not in card  # a path on this machine is no one else's concern
    merged = AutoModelForImageClassification.from_pretrained(place / "lora").eval()
    assert merged.dtype == torch.float32
    model = AutoModelForImageClassification.from_pretrained(base).eval()
    before = model.state_dict()
    changed = {name for name, values in merged.state_dict().items() if not values.equal(before[name])}
    assert {name.split(".")[-2] for name in changed} == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2", "classifier")
    }
    adapted = PeftModel.from_pretrained(model, place / "lora" / "adapter").eval()
    pixels = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(adapted(pixel_values=pixels).logits, merged(pixels).logits)


def test_frozen_stages_do_not_learn():
    model = FocalForImageClassification(tiny_config(num_labels=3))
    freeze(model, 1)
    names = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert names == {
        name for name, _ in model.named_parameters() if ".embeddings." in name or ".encoder.layers.0." in name
    }
    with pytest.raises(Problem, match="--freeze 3 is too large: the model has 2 stages"):
        freeze(model, 3)


def test_learning_rate_decays_from_block_to_block():
    model = FocalForImageClassification(tiny_config(depths=(2, 1), num_labels=3))
    rates = {}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for group in decay_groups(model, weight_decay=0.1, rate=1.0, layer_decay=0.5):
        for parameter in group["params"]:
            name = names.pop(id(parameter))
            rates.setdefault(
                re.sub(r"((blocks\.\d|downsample|norm|embeddings|classifier)\.).*", r"\1", name), set()
            ).add(group["lr"])
    assert not names
    assert rates == {
        "classifier.": {1.0},
        "focal.layernorm.": {1.0},
        "focal.encoder.layers.1.blocks.0.": {0.5},
        "focal.encoder.layers.0.downsample.": {0.25},
        "focal.encoder.layers.0.blocks.1.": {0.25},
        "focal.encoder.layers.0.blocks.0.": {0.125},
        "focal.embeddings.": {0.0625},
    }


def test_balanced_weights_are_those_of_scikit_learn():
    labels = [0] * 5 + [1] * 2 + [3] * 9
    expected = compute_class_weight("balanced", classes=np.unique(labels), y=labels)
    weights = balanced_weights(labels, 4)
    torch.testing.assert_close(weights[[0, 1, 3]] * 4 / 3, torch.tensor(expected).float())  # class 2 has no images


CONTRADICTIONS = {
    "--lora already freezes the weights of the model: leave out --freeze.": ("--lora", 2, "--freeze", 1),
    "--freeze keeps the weights of a checkpoint, but --config starts from random weights: use --model.": (
        "--freeze",
        1,
    ),
    "--warmup-epochs 20 is above --epochs 5: lower one or raise the other.": ("--recipe", "paper", "--epochs", 5),
    "--min-learning-rate 0.1 is above --learning-rate 0.01: lower one or raise the other.": (
        "--min-learning-rate",
        0.1,
        "--learning-rate",
        0.01,
    ),
    "--rand-augment 10 is too large: it must be below 10.": ("--rand-augment", 10),
    "--train-images needs --streaming: add --streaming, or leave out --train-images.": ("--train-images", 9),
    "--class-weights counts the images of each class, which --streaming cannot do": (
        *("--streaming", "--class-weights", "balanced"),
    ),
    "No such file: --classes missing.txt.": ("--streaming", "--classes", "missing.txt"),
    "--report-to dvclive: that tracker is not installed here.": ("--report-to", "dvclive"),
    "Images cannot be held out of a stream: name the split with --validation-split.": (
        "--streaming",
        "--validation-split",
        "val",
    ),
    "a stream is not read in advance: write the names to a file, one a line in the order of": (
        *("--streaming", "--data", "shards", "--image-column", "png", "--label-column", "cls"),
    ),
    "does not state its number of images: add --train-images N.": (
        *("--streaming", "--data", "shards", "--image-column", "png", "--label-column", "cls"),
        *("--classes", "classes.txt"),
    ),
    "--output config holds nothing to --resume: name the folder of the stopped run.": (
        "--output",
        "config",
        "--resume",
    ),
}


def test_contradictions_are_told_before_training(place):
    lines = [
        ("--config", "config", "--data", "data", "--output", "no", *options) for options in CONTRADICTIONS.values()
    ]
    answers = run_examples_in_turn("finetune.py", lines, place)
    for message, (status, said, complained) in zip(CONTRADICTIONS, answers, strict=True):
        assert status == 1, complained
        assert message in complained
        assert "epoch" not in said
    assert not (place / "no").exists()


def numbered_stream(labels: list[int]) -> Stream:
    cells = [{"path": str(number), "bytes": None} for number in range(len(labels))]
    rows = datasets.Dataset.from_dict(
        {"image": cells, "label": labels},
        features=datasets.Features({"image": datasets.Image(decode=False), "label": datasets.Value("int64")}),
    )
    columns = Namespace(data="numbers", image_column="image", label_column="label", seed=0)
    return Stream(rows.to_iterable_dataset(num_shards=2), columns, names=["cat", "dog"])


@pytest.mark.parametrize(
    "keys", [shuffled(23, seed=1), numbered_stream([0, 1] * 11 + [0]).epoch], ids=["list", "stream"]
)
def test_order_shows_every_image_once_and_starts_anywhere(keys):
    orders = [TrainingBatches(keys, 23, batch_size=3, accumulate=2, processes=2, rank=rank, seed=1) for rank in (0, 1)]
    passes = [list(order) for order in orders]
    for batches in passes:
        assert [len(batch) for batch in batches] == [3, 3, 3, 2]
    seen = [item for batches in passes for batch in batches for item in batch]
    assert len({str(item.key) for item in seen}) == len({item.seed for item in seen}) == 22  # 23 images on 2 processes

    for order, batches in zip(orders, passes, strict=True):
        order.start(0, 1)
        assert list(order) == batches[2:]
        order.start(1, 0)
        assert [item.key for item in next(iter(order))] != [item.key for item in batches[0]]


def test_stream_names_an_unknown_label():
    assert [name for _, name in numbered_stream([0, 1, 1]).once()] == ["cat", "dog", "dog"]
    for label in (-1, 2):
        with pytest.raises(Problem, match=f"a label that its classes do not include: {label}."):
            list(numbered_stream([0, label]).once())
