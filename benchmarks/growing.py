"""Compares ways to train a Focal that starts from a trained Swin, on two small tasks.

1. A small Swin of transformers is trained from scratch.
2. It is converted (convert/swin.py) and grown to two levels (focal_hf.add_focal_levels), and trained on. The start of
   the new weights differs: shares of the attention, or what FocalConfig's from_pretrained does where a checkpoint lacks
   tables (the bias of the nearest offset, random pooling).
3. For comparison, the Swin is trained on for as many epochs, and a Swin and a Focal are trained from scratch for the
   epochs of both phases, in one schedule with the learning rate of the first.

Tasks. "digits": the data of learning.py, classification of scikit-learn's 1797 digits, 1144 of them for training;
accuracy on 450 others. "scenes": segmentation of scenes like those of dense_learning.py, 64 x 64 pixels, 400 for
training; mean IoU on 100 others. Recipe: AdamW, a cosine schedule in each phase. All random numbers follow from a seed,
and all runs of a seed see the same images in the same order. The results are the mean and standard deviation over
seeds.

Writes growing.md into --folder. Finished runs in the folder are reused.
"""

import argparse
import copy
import json
import math
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from learning_runs import table_by_epoch
from sklearn.datasets import load_digits, load_sample_images
from sklearn.model_selection import train_test_split
from torch import nn
from transformers import SwinBackbone, SwinConfig, SwinForImageClassification
from transformers.utils import logging

from focal_hf import FocalBackbone, FocalConfig, FocalForImageClassification, FocalPreTrainedModel, add_focal_levels

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "convert"), str(ROOT / "examples")]

from make_scenes import NAMES, compose  # noqa: E402
from swin import focal_from_swin  # noqa: E402

SHARES = (0.01, 0.1)
BATCH_SIZE = {"digits": 32, "scenes": 8}
FIRST_RATE, SECOND_RATE = 1.5e-3, 5e-4  # learning rates from scratch, and of a trained model
NETWORKS = {
    "digits": {"image_size": 32, "embed_dim": 48, "depths": [2, 2], "num_heads": [3, 6], "window_size": 4},
    "scenes": {"image_size": 64, "embed_dim": 32, "depths": [1, 2, 2], "num_heads": [2, 4, 8], "window_size": 4},
}
LEVELS = {
    "digits": {"focal_levels": [2, 2], "focal_windows": [3, 1], "expand_sizes": [2, 2]},
    "scenes": {"focal_levels": [2, 2, 2], "focal_windows": [5, 3, 1], "expand_sizes": [2, 2, 2]},
}
MEASURES = {"digits": "Accuracy on unseen digits", "scenes": "Mean IoU on unseen scenes"}


class Segmenter(nn.Module):
    """A backbone, and a head that adds linear layers of all its maps, at the size of the first."""

    def __init__(self, backbone: nn.Module):
        super().__init__()
        self.backbone = backbone
        self.layers = nn.ModuleList(nn.Conv2d(channels, 48, 1) for channels in backbone.channels)
        self.head = nn.Sequential(nn.ReLU(), nn.Conv2d(48, 48, 3, padding=1), nn.ReLU(), nn.Conv2d(48, len(NAMES), 1))

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        maps = [layer(maps) for layer, maps in zip(self.layers, self.backbone(pixel_values).feature_maps, strict=True)]
        size = maps[0].shape[2:]
        summed = sum(nn.functional.interpolate(each, size, mode="bilinear", align_corners=False) for each in maps)
        logits = self.head(summed)
        return nn.functional.interpolate(logits, pixel_values.shape[2:], mode="bilinear", align_corners=False)


class Classifier(nn.Module):
    def __init__(self, backbone: nn.Module):
        super().__init__()
        self.backbone = backbone

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.backbone(pixel_values).logits


# --- Data -------------------------------------------------------------------------------------------------------------


def digits_data() -> tuple[torch.Tensor, ...]:
    """Training images and labels, test images and labels: the split of examples/quickstart.py."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None].expand(-1, 3, -1, -1) / 8 - 1
    images = nn.functional.interpolate(images, size=(32, 32), mode="bilinear", align_corners=False)
    labels = torch.tensor(digits.target)
    rows, test = train_test_split(range(len(labels)), test_size=0.25, stratify=labels, random_state=0)
    train, _ = train_test_split(rows, test_size=0.15, stratify=labels[rows], random_state=0)
    return images[train], labels[train], images[test], labels[test]


def scenes_data() -> tuple[torch.Tensor, ...]:
    """As `digits_data`, with a class for each pixel. Training and test scenes share no digit and no part."""
    digits = load_digits()
    photographs = [photograph[::2, ::2] for photograph in load_sample_images().images]
    train, test = train_test_split(range(len(digits.target)), test_size=0.25, stratify=digits.target, random_state=0)
    data = []
    for rows, scenes, columns in ((train, 400, slice(None, 200)), (test, 100, slice(200, None))):
        draw = np.random.default_rng(len(rows))
        parts = [photograph[:, columns] for photograph in photographs]
        members = [(digits.images[row], digits.target[row]) for row in rows]
        found = [compose(64, True, parts, members, draw) for _ in range(scenes)]
        images = torch.tensor(np.stack([pixels for pixels, _, _ in found])).permute(0, 3, 1, 2) / 127.5 - 1
        labels = [np.array([0, *(value + 1 for value in values)])[front] for _, front, values in found]
        data += [images, torch.tensor(np.stack(labels))]
    return tuple(data)


def augmented(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Digits, each scaled by 0.8 to 1.2 and moved by up to a tenth of its size."""
    draws = torch.rand(len(images), 3, generator=generator)
    transforms = torch.zeros(len(images), 2, 3)
    transforms[:, 0, 0] = transforms[:, 1, 1] = 0.8 + 0.4 * draws[:, 0]
    transforms[:, :, 2] = 0.4 * draws[:, 1:] - 0.2
    grid = nn.functional.affine_grid(transforms, images.shape, align_corners=False)
    return nn.functional.grid_sample(images, grid, padding_mode="border", align_corners=False)


# --- Training ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def score(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    """Accuracy, or for a class per pixel the mean IoU over classes."""
    model.eval()
    predictions = torch.cat([model(batch).argmax(1) for batch in images.split(100)])
    if labels.ndim == 1:
        return (predictions == labels).float().mean().item()
    pairs = torch.bincount(labels.flatten() * len(NAMES) + predictions.flatten(), minlength=len(NAMES) ** 2)
    pairs = pairs.view(len(NAMES), -1)
    return (pairs.diag() / (pairs.sum(0) + pairs.sum(1) - pairs.diag())).nanmean().item()


def train(model: nn.Module, data: tuple, batch_size: int, epochs: int, rate: float, seed: int) -> list[float]:
    """Trains the model. Returns its score before training and after each epoch."""
    images, labels, *test = data
    generator = torch.Generator().manual_seed(seed)
    decayed = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0}]
    optimizer = torch.optim.AdamW(groups, lr=rate)
    steps, warm_up = epochs * -(-len(images) // batch_size), -(-len(images) // batch_size)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm_up, 0.5 + 0.5 * math.cos(math.pi * step / steps))
    )
    scores = [score(model, *test)]
    for _ in range(epochs):
        model.train()
        for batch in torch.randperm(len(images), generator=generator).split(batch_size):
            pixels = augmented(images[batch], generator) if labels.ndim == 1 else images[batch]
            loss = nn.functional.cross_entropy(model(pixels), labels[batch])
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
        scores.append(score(model, *test))
    return scores


# --- Starts -----------------------------------------------------------------------------------------------------------


def build(task: str, swin: bool) -> nn.Module:
    shared = NETWORKS[task] | {"patch_size": 4, "drop_path_rate": 0.0, "initializer_range": 0.1}
    config = SwinConfig(**shared) if swin else FocalConfig(**shared, **LEVELS[task])
    if task == "digits":
        config.num_labels = 10
        return Classifier((SwinForImageClassification if swin else FocalForImageClassification)(config))
    config.out_features = config.stage_names[1:]
    return Segmenter((SwinBackbone if swin else FocalBackbone)(config))


def grown_with_nearest_offsets(model: FocalPreTrainedModel, levels: dict) -> FocalPreTrainedModel:
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return type(model).from_pretrained(folder, **levels)


def starts(task: str) -> dict[str, Callable[[nn.Module], nn.Module]]:
    """Each start by its name in the table: from the trained backbone to the one that is trained on."""
    levels = LEVELS[task]
    named = {"Swin, trained on": copy.deepcopy}
    for share in SHARES:
        name = f"Focal from Swin, new share {share}"
        named[name] = lambda swin, share=share: add_focal_levels(focal_from_swin(swin), **levels, new_share=share)
    named["Focal from Swin, nearest offsets"] = lambda swin: grown_with_nearest_offsets(focal_from_swin(swin), levels)
    return named


def measure(task: str, folder: Path, seeds: list[int], first: int, second: int) -> dict[str, tuple[int, list]]:
    """By the name of each start, the number of parameters and, for each seed, the scores in the second phase."""
    data = digits_data() if task == "digits" else scenes_data()
    rows = {}

    def run(name: str, seed: int, make: Callable[[], nn.Module], epochs: int, rate: float) -> Path:
        """Trains a model, unless its files are there. Returns the file with its scores."""
        file = folder / f"{task}-{first}+{second}-{seed}-{name.replace(' ', '_').replace(',', '')}.json"
        if not file.exists():
            torch.manual_seed(seed)
            model = make()
            result = train(model, data, BATCH_SIZE[task], epochs, rate, seed)
            if name == "Swin":
                torch.save(model.state_dict(), file.with_suffix(".pth"))
            count = sum(parameter.numel() for parameter in model.parameters())
            file.write_text(json.dumps({"scores": result, "parameters": count}))
        result = json.loads(file.read_text())
        if name != "Swin":
            _, curves = rows.setdefault(name, (result["parameters"], []))
            curves.append(dict(enumerate(result["scores"][-(second + 1) :])))
        print(f"{task}, seed {seed}, {name}: {100 * result['scores'][-1]:.1f}", flush=True)
        return file

    for seed in seeds:
        scores = run("Swin", seed, lambda: build(task, swin=True), first, FIRST_RATE)
        swin = build(task, swin=True)
        swin.load_state_dict(torch.load(scores.with_suffix(".pth")))

        def grown(start: Callable, swin: nn.Module = swin) -> nn.Module:
            model = copy.deepcopy(swin)
            model.backbone = start(model.backbone)
            return model

        for name, start in starts(task).items():
            run(name, seed, lambda start=start: grown(start), second, SECOND_RATE)
        for name, swin in (("Swin from scratch", True), ("Focal from scratch", False)):
            run(name, seed, lambda swin=swin: build(task, swin), first + second, FIRST_RATE)
    return rows


def table(task: str, rows: dict, seeds: int, first: int, second: int) -> list[str]:
    return [
        f"{MEASURES[task]} in %, mean and standard deviation of {seeds} seed(s), by number of epochs of the second "
        f"phase. The first phase has {first}.",
        "",
        *table_by_epoch("start", rows, sorted({0, 1, second // 2, second})),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("growing"), help="working folder (default: growing)")
    parser.add_argument("--task", choices=NETWORKS, nargs="+", default=[*NETWORKS], help="default: both")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="random seeds (default: 0 1 2)"
    )
    parser.add_argument("--first", type=int, default=12, metavar="N", help="epochs of the first phase (default: 12)")
    parser.add_argument("--second", type=int, default=8, metavar="N", help="epochs of the second phase (default: 8)")
    args = parser.parse_args()
    if min(args.first, args.second) < 1:
        parser.error("--first and --second must be at least 1.")

    torch.set_num_threads(1)  # small networks gain nothing from more threads
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    args.folder.mkdir(parents=True, exist_ok=True)
    tables = []
    for task in args.task:
        phases = args.first, args.second
        tables += [*table(task, measure(task, args.folder, args.seeds, *phases), len(args.seeds), *phases), ""]
    (args.folder / "growing.md").write_text("\n".join(tables))
    print("\n" + "\n".join(tables))


if __name__ == "__main__":
    main()
