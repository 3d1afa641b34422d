"""examples/pretrain_mim.py: real processes that learn to fill in plain pictures, and what finetune.py makes of them."""

import random
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoModelForImageClassification,
    AutoModelForMaskedImageModeling,
    SwinConfig,
    SwinForMaskedImageModeling,
)

from common.options import Problem
from example_runs import (
    Run,
    assert_same,
    curve,
    draw_noise,
    draw_pictures,
    results,
    tiny_config,
    write_tar,
)
from focal_hf import FocalForMaskedImageModeling
from focal_hf.compatibility_focal import AutoImageProcessor
from pretrain_mim import check_masks, with_mask
from small_models import SWIN_OF_5_9

SCRIPT = "pretrain_mim.py"
MASKS = ("--mask-patch", 4, "--crop", 1.0)
# 34 pictures to train on, of which one cannot be read, in steps of 4, and 8 to validate on.
OPTIONS = (
    *("--config", "config", "--data", "pictures", "--validation-fraction", 0.2, *MASKS),
    *("--epochs", 4, "--learning-rate", 2e-2, "--save-every", 2),
)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Draws plain pictures of random colours, without classes."""
    place = tmp_path_factory.mktemp("pretraining")
    (place / "pictures").mkdir()
    colours = random.Random(0)
    for number in range(42):
        colour = tuple(colours.randrange(256) for _ in range(3))
        Image.new("RGB", (18, 22), colour).save(place / "pictures" / f"{number:02}.png")
    Image.effect_noise((18, 22), 50).save(place / "pictures" / "01.png")
    whole = (place / "pictures" / "01.png").read_bytes()
    (place / "pictures" / "01.png").write_bytes(whole[: len(whole) // 2])
    tiny_config(encoder_stride=32, drop_path_rate=0.0, initializer_range=0.1).save_pretrained(place / "config")
    return place


@pytest.fixture(scope="module")
def pretrained(place) -> tuple[Path, str]:
    """The output folder of an uninterrupted run, and what the run printed."""
    said, _ = Run(place, *OPTIONS, "--output", "whole/out", "--batch-size", 4, script=SCRIPT).end()
    return place / "whole" / "out", said


def test_reconstructs_masked_pixels(place, pretrained):
    folder, said = pretrained
    assert "holding out 8 of 42 training images, 20% of all" in said
    assert "10 of 16 squares of 4 pixels hidden; 34 training images of 16 x 16 pixels" in said
    assert "Skipped 1 training images that cannot be read: " in said
    history = results(folder)["history"]
    assert results(folder)["best"] == min(history, key=lambda entry: entry["loss"])
    assert [entry["images"] for entry in history] == [8] * 4
    card = (folder / "README.md").read_text()
    assert f"normalised | {results(folder)['best']['loss']:.4f} |" in card
    assert "| validation images | 8 |" in card
    assert str(place) not in card

    model = AutoModelForMaskedImageModeling.from_pretrained(folder).eval()
    assert isinstance(model, FocalForMaskedImageModeling)
    processor = AutoImageProcessor.from_pretrained(folder)
    pictures = [Image.open(file) for file in sorted(place.glob("pictures/*.png")) if file.name != "01.png"]
    pixel_values = processor(pictures, return_tensors="pt")["pixel_values"]
    constant = pixel_values.median(0, keepdim=True).values  # no other has a lower error
    error = (pixel_values - constant).abs().mean().item()
    mask = (torch.rand(len(pictures), 4, 4) < 0.6).repeat_interleave(2, 1).repeat_interleave(2, 2).flatten(1)
    with torch.no_grad():
        loss = model(pixel_values, bool_masked_pos=mask).loss.item()
    assert loss < 0.75 * error
    assert history[-1]["loss"] < 0.75 * error < error < history[0]["train_loss"]


def test_draws_reconstructions(pretrained):
    """The figure has four rows of eight plain pictures. Only the second row has grey squares, the masked ones."""
    with Image.open(pretrained[0] / "last" / "reconstructions.png") as drawn:
        pixels = np.asarray(drawn.convert("RGB")).astype(int)
    rows = np.array_split(pixels[:, 60:], 4)
    grey = [(np.abs(row - 128) < 2).all(-1).mean() for row in rows]
    assert 0.35 < grey[1] < 0.65
    assert max(grey[0], grey[2], grey[3]) < 0.1


def test_killed_goes_on_to_the_same_bytes(place, pretrained):
    options = (*OPTIONS, "--output", "killed/out", "--batch-size", 4)
    folder = place / "killed" / "out"
    Run(place, *options, script=SCRIPT).kill_after(folder / "checkpoints", random.randrange(2, 30, 2))
    said, _ = Run(place, *options, "--resume", script=SCRIPT).end()
    assert "Resuming after step" in said
    assert_same(folder, pretrained[0])


@pytest.mark.skipif(torch.__version__ < "2.13", reason="older versions of torch add up in another order")
def test_processes_divide_the_same_work(place, pretrained):
    """Each picture has the same crop and mask in any process."""
    Run(place, *OPTIONS, "--output", "two", "--batch-size", 2, processes=2, script=SCRIPT).end()
    assert results(place / "two")["processes"] == 2
    assert curve(place / "two") == pytest.approx(curve(pretrained[0]), abs=2e-4)


def test_finetune_starts_from_all_of_its_encoder(place, pretrained):
    draw_pictures(place / "colours", {"red": 4, "blue": 4})
    said, complained = Run(
        *(place, "--model", pretrained[0], "--data", "colours", "--output", "tuned", "--epochs", 1),
        *("--learning-rate", 1e-12),
    ).end()
    assert "has no classifier: one is newly initialized for the 2 classes of the data." in said
    assert "does not use: decoder.0.bias, decoder.0.weight, focal.embeddings.mask_token." in said
    assert "LOAD REPORT" not in said + complained

    before = AutoModelForMaskedImageModeling.from_pretrained(pretrained[0]).focal.state_dict()
    after = AutoModelForImageClassification.from_pretrained(place / "tuned").focal.state_dict()
    assert before.keys() - after.keys() == {"embeddings.mask_token"}
    del before["embeddings.mask_token"]
    torch.testing.assert_close(after, before, atol=1e-9, rtol=0)


@SWIN_OF_5_9
def test_swin_on_a_stream_of_shards(place):
    (place / "shards").mkdir()
    for split, count in (("train", 8), ("validation", 2)):
        draw_noise(place / "noise" / split, count)
        write_tar(place / "shards" / f"{split}-00000.tar", place / "noise" / split)
    settings = {"image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2]}
    SwinConfig(**settings, window_size=4).save_pretrained(place / "swin_config")
    Run(
        *(place, "--config", "swin_config", "--data", "shards", "--streaming", "--train-images", 24, *MASKS),
        *("--image-column", "png", "--output", "swin", "--epochs", 4, "--batch-size", 4),
        script=SCRIPT,
    ).end()
    assert isinstance(AutoModelForMaskedImageModeling.from_pretrained(place / "swin"), SwinForMaskedImageModeling)
    history = results(place / "swin")["history"]
    assert history[-1]["loss"] < 0.9 * history[0]["loss"]
    assert {entry["images"] for entry in history} == {6}


def test_masks_are_squares_of_one_number():
    def view(image: Image.Image, draw: random.Random) -> dict:
        return {"pixel_values": torch.zeros(3, 24, 32)}

    args = Namespace(mask_patch=8, mask_ratio=0.6)
    masks = [
        with_mask(args, 2, view, None, random.Random(seed))["bool_masked_pos"].view(3, 4, 4, 4).transpose(1, 2)
        for seed in range(200)
    ]
    squares = torch.stack(masks).flatten(3).float()
    assert squares.eq(squares[..., :1]).all()
    assert squares[..., 0].sum((1, 2)).eq(8).all()  # 0.6 of 12, rounded up
    assert squares[..., 0].mean(0).sub(8 / 12).abs().max() < 0.15


def test_masks_that_do_not_fit_are_one_clear_line(place):
    _, complained = Run(place, *OPTIONS, "--output", "none", "--mask-patch", 6, script=SCRIPT).end(1)
    errors = [line for line in complained.splitlines() if line.startswith("error: ")]
    assert errors == [
        "error: --mask-patch 6 does not divide images of 16 x 16 pixels in patches of 2: choose one of 2, 4, 8, 16."
    ]
    assert "Traceback" not in complained
    assert not (place / "none").exists()
    with pytest.raises(Problem, match="hide 4 of 4 squares, which is all of images of 16 x 16 pixels"):
        check_masks(Namespace(mask_patch=8, mask_ratio=0.8), tiny_config(), 16, 16)


def test_images_too_small_for_the_model_replace_nothing(place):
    """Swin fails on maps that are smaller than a window."""
    small = SwinConfig(image_size=16, patch_size=2, embed_dim=8, depths=[1, 1, 1], num_heads=[1, 1, 1], window_size=4)
    for name in ("small_swin", "kept"):
        small.save_pretrained(place / name)
    options = ("--config", "small_swin", "--output", "kept", "--overwrite")
    _, complained = Run(place, *OPTIONS, *options, script=SCRIPT).end(1)
    (error,) = (line for line in complained.splitlines() if line.startswith("error: "))
    assert error.startswith("error: The model (swin) cannot process training images of 16 x 16 pixels: RuntimeError: ")
    assert [file.name for file in (place / "kept").iterdir()] == ["config.json"]
