"""The whole way in one go: pictures in folders, training, the saved model, predictions. Run it with `make quickstart`.

Trains a small Focal from scratch on the handwritten digits that come with scikit-learn (1797 scans of 8 x 8 pixels), as
you would on your own pictures: it writes them out as folders of PNG files and hands those to examples/finetune.py.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

# Everything is on this machine: no look-ups on the Hub, which would stall without a network.
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "TOKENIZERS_PARALLELISM": "false"}

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from transformers import AutoModelForImageClassification, pipeline
from transformers.utils import logging

from focal_hf import FocalConfig

GOAL = 0.95
WRITTEN = {"digits", "config", "model", "cache", "result.json", "predictions.png"}
INK, GREY, BLUE, RED = "#1d2433", "#8a93a6", "#2456c8", "#d1372c"


def write_pictures(folder: Path) -> None:
    """The digits as FOLDER/{train,validation,test}/CLASS/NUMBER.png, 64 : 11 : 25 of each class."""
    digits = load_digits()
    rows, test = train_test_split(range(len(digits.target)), test_size=0.25, stratify=digits.target, random_state=0)
    train, validation = train_test_split(rows, test_size=0.15, stratify=digits.target[rows], random_state=0)
    for split, members in {"train": train, "validation": validation, "test": test}.items():
        for row in members:
            file = folder / split / str(digits.target[row]) / f"{row:04}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((digits.images[row] * (255 / 16)).round().astype("uint8")).save(file)
    print(f"Wrote {len(train)} training, {len(validation)} validation and {len(test)} test pictures to {folder}.")


def small_config() -> FocalConfig:
    """A Focal of two stages for pictures of 32 x 32 pixels: maps of 8 x 8 and 4 x 4 tokens."""
    return FocalConfig(
        image_size=32,
        patch_size=4,
        embed_dim=48,
        depths=(2, 2),
        num_heads=(3, 6),
        window_size=4,
        focal_levels=(2, 2),
        focal_windows=(3, 1),
        expand_sizes=(2, 2),
        use_conv_embed=True,
        encoder_stride=8,
        drop_path_rate=0.05,
        initializer_range=0.1,  # 0.02 suits hundreds of channels; with 48, the first epochs would learn little
    )


def train(folder: Path) -> None:
    """Print and run the command that a user would type."""
    command = [
        os.path.relpath(Path(__file__).with_name("finetune.py")),
        *("--config", str(folder / "config"), "--data", str(folder / "digits"), "--output", str(folder / "model")),
        *("--epochs", "10", "--batch-size", "32", "--learning-rate", "2e-3"),
        *("--crop-scale", "0.7", "--no-flip", "--crop", "1.0", "--workers", "0"),
    ]
    # One thread: layers of this size gain little from two threads. If another program uses the second core, two threads
    # are up to fifty times slower, since every layer waits for both.
    print("\n$ OMP_NUM_THREADS=1 python " + " ".join(command), flush=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(folder / "cache")}
    if subprocess.run([sys.executable, *command], env=environment).returncode:
        sys.exit("error: the training failed; its own message is above.")


def draw_figure(file: Path, rows: list[dict], history: list[dict], summary: str) -> None:
    """Draw test pictures with the predictions of the model, and its learning curves."""
    figure = Figure(figsize=(12, 7.6), facecolor="white")
    outer = figure.add_gridspec(
        1, 2, width_ratios=(2.35, 1), left=0.03, right=0.965, top=0.83, bottom=0.09, wspace=0.12
    )
    figure.text(0.03, 0.935, "A small Focal Transformer reads handwritten digits", size=19, weight="bold", color=INK)
    figure.text(0.03, 0.89, summary, size=11.5, color=GREY)
    figure.text(0.03, 0.035, "Above each picture: the answer, and how sure it is. Red: wrong.", size=10.5, color=GREY)

    wrong = [row for row in rows if row["prediction"] != row["truth"]]
    shown = wrong[:8] + [row for row in rows if row["prediction"] == row["truth"]]
    grid = outer[0].subgridspec(5, 8, hspace=0.42, wspace=0.12)
    for place, row in enumerate(shown[:40]):
        axes = figure.add_subplot(grid[place // 8, place % 8], xticks=[], yticks=[])
        axes.imshow(Image.open(row["file"]), cmap="gray_r", vmin=0, vmax=255)
        good = row["prediction"] == row["truth"]
        text = f"{row['prediction']}  {row['score']:.0%}" if good else f"{row['prediction']}, not {row['truth']}"
        axes.set_title(text, size=11, color=BLUE if good else RED, weight="normal" if good else "bold", pad=4)
        for spine in axes.spines.values():
            spine.set(color="#dfe3ea" if good else RED, linewidth=1 if good else 2)

    axes = figure.add_subplot(outer[1].subgridspec(2, 1, hspace=0.5)[0])
    epochs = [entry["epoch"] for entry in history]
    axes.plot(epochs, [entry["accuracy"] for entry in history], color=BLUE, linewidth=2)
    axes.set(ylim=(0, 1.02), yticks=(0, 0.25, 0.5, 0.75, 1), xlabel="epoch")
    axes.set_title("validation accuracy", size=11.5, color=INK, loc="left")
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    lower = figure.add_subplot(outer[1].subgridspec(2, 1, hspace=0.5)[1])
    lower.plot(epochs, [entry["train_loss"] for entry in history], color=GREY, linewidth=2, label="training")
    lower.plot(epochs, [entry["loss"] for entry in history], color=BLUE, linewidth=2, label="validation")
    lower.set(ylim=(0, None), xlabel="epoch")
    lower.set_title("loss", size=11.5, color=INK, loc="left")
    lower.legend(frameon=False, labelcolor=INK)
    for plot in (axes, lower):
        plot.grid(axis="y", color="#eceff4")
        plot.set_axisbelow(True)
        plot.xaxis.set_major_locator(MaxNLocator(integer=True))
        plot.tick_params(colors=GREY, length=0)
        plot.xaxis.label.set_color(GREY)
        plot.spines[["top", "right", "left"]].set_visible(False)
        plot.spines["bottom"].set_color("#c9cfda")
    figure.savefig(file, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("quickstart"), help="where to work (default: quickstart)")
    folder = parser.parse_args().folder
    started = time.perf_counter()

    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if folder.is_file() or (names and "digits" not in names) or names - WRITTEN:
        strange = ", ".join(sorted(names - WRITTEN)) or "no digits"
        sys.exit(f"error: --folder {folder} holds something else than an earlier quickstart ({strange}): name another.")
    for part in ("digits", "config", "model", "cache"):  # of an earlier run
        shutil.rmtree(folder / part, ignore_errors=True)
    write_pictures(folder / "digits")
    small_config().save_pretrained(folder / "config")
    train(folder)

    logging.disable_progress_bar()
    # What is saved is an ordinary transformers model: reload it the ordinary ways.
    model = AutoModelForImageClassification.from_pretrained(folder / "model")
    classify = pipeline("image-classification", model=str(folder / "model"))
    files = sorted((folder / "digits" / "test").glob("*/*.png"), key=lambda file: file.name)
    rows = [
        {"file": file, "truth": file.parent.name, "prediction": answer[0]["label"], "score": answer[0]["score"]}
        for file, answer in zip(files, classify([str(file) for file in files], top_k=1, batch_size=64), strict=True)
    ]
    correct = sum(row["prediction"] == row["truth"] for row in rows)
    accuracy = correct / len(rows)

    print(f"\nReloaded {type(model).__name__} from {folder / 'model'}. Pictures that it has never seen:\n")
    print("  picture    truth  prediction  score")
    for row in rows[:10]:
        mark = "" if row["truth"] == row["prediction"] else "   wrong"
        print(f"  {row['file'].name:9}  {row['truth']:>5}  {row['prediction']:>10}  {row['score']:5.0%}{mark}")
    seconds = time.perf_counter() - started
    parameters = sum(parameter.numel() for parameter in model.parameters())
    result = {"accuracy": accuracy, "correct": correct, "images": len(rows), "seconds": round(seconds, 1)}
    (folder / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    history = json.loads((folder / "model" / "results.json").read_text())["history"]
    draw_figure(
        folder / "predictions.png",
        rows,
        history,
        f"{correct} of {len(rows)} unseen pictures right ({accuracy:.1%}).  "
        f"{parameters / 1e3:.0f} thousand parameters, {len(history)} epochs from scratch.",
    )
    print(f"\nAccuracy on {len(rows)} unseen pictures: {accuracy:.4f} ({correct} right), after {seconds:.0f} s.")
    print(f"Look at {folder / 'predictions.png'}. The model is in {folder / 'model'}.")
    if accuracy < GOAL:
        sys.exit(f"error: expected an accuracy of at least {GOAL}. Something is wrong with the model or its training.")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("Stopped by Ctrl-C.")
