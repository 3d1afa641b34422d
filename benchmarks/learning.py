"""Trains Focal and transformers' Swin of the same size on handwritten digits, from scratch and pre-trained.

The data are scikit-learn's digits, 1797 scans of 8 x 8 pixels. Both networks use the same recipe: examples/finetune.py
on 1144 training images, from scratch and from a checkpoint that examples/pretrain_mim.py trains on the same images
without labels. The accuracy is measured on 450 other images after each epoch. No epoch is selected by it. All random
numbers follow from a seed. The results are the mean and standard deviation over several seeds.

Writes learning.md and learning.png into --folder. Finished runs in the folder are reused, and interrupted ones are
resumed.
"""

import argparse
import statistics
import sys
from pathlib import Path

from learning_runs import EXAMPLES, run_example, table_by_epoch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from transformers import AutoModelForImageClassification, PreTrainedConfig, SwinConfig

sys.path.insert(0, str(EXAMPLES))

from quickstart import small_config, write_pictures

COLOURS = {"focal": "#2456c8", "swin": "#d1372c"}
STARTS = {"scratch": "from scratch", "mim": "pre-trained"}


def configs() -> dict[str, PreTrainedConfig]:
    """The Focal of quickstart.py with the patch embedding of Swin, and a Swin of its width and depth; 10 classes."""
    focal = small_config()
    focal.use_conv_embed = False
    names = "image_size", "patch_size", "embed_dim", "depths", "num_heads", "window_size", "drop_path_rate"
    shared = {name: getattr(focal, name) for name in (*names, "initializer_range")}
    configs = {
        "focal": focal,
        "swin": SwinConfig(**shared | {name: list(shared[name]) for name in ("depths", "num_heads")}),
    }
    for config in configs.values():
        config.num_labels = 10
    return configs


def measure(folder: Path, seeds: list[int], epochs: int, pretraining_epochs: int) -> dict[tuple[str, str], list]:
    """The accuracies by epoch: for each network and start, a curve per seed."""
    shared = ("--data", "digits", "--batch-size", 32, "--learning-rate", 1.5e-3, "--crop-scale", 0.7, "--no-flip")
    shared += ("--crop", 1.0)
    curves = {(name, start): [] for name in COLOURS for start in STARTS}
    for seed in seeds:
        for name in COLOURS:
            config = (*shared, "--config", name, "--seed", seed)
            pretrained = f"{name}-{seed}-pretrained"
            run_example("pretrain_mim.py", folder, pretrained, pretraining_epochs, *config, "--mask-patch", 8)
            starts = {"scratch": config, "mim": (*shared, "--model", pretrained, "--seed", seed)}
            for start, options in starts.items():
                output = f"{name}-{seed}-{start}"
                history = run_example("finetune.py", folder, output, epochs, *options, "--validation-split", "test")
                curves[name, start].append({entry["epoch"]: entry["accuracy"] for entry in history})
    return curves


def write_table(file: Path, curves: dict, parameters: dict[str, int], seeds: int, epochs: int) -> None:
    """Writes the accuracies after some epochs, including the last."""
    shown = sorted({epoch for epoch in (1, 2, 3, 5, 10, 20, 40, 80) if epoch < epochs} | {epochs})
    rows = {f"{name.capitalize()}, {STARTS[start]}": (parameters[name], runs) for (name, start), runs in curves.items()}
    lines = [
        f"Accuracy on unseen digits in %, mean and standard deviation of {seeds} seed(s), by number of epochs.",
        "",
        *table_by_epoch("network", rows, shown),
    ]
    file.write_text("\n".join(lines) + "\n")
    print("\n" + file.read_text())


def draw(file: Path, curves: dict) -> None:
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for (name, start), runs in curves.items():
        by_epoch = [*zip(*(curve.values() for curve in runs), strict=True)]
        epochs = range(1, len(by_epoch) + 1)
        style = {"color": COLOURS[name], "linestyle": "--" if start == "scratch" else "-"}
        label = f"{name.capitalize()}, {STARTS[start]}"
        axes.plot(epochs, [statistics.mean(values) for values in by_epoch], label=label, **style)
        axes.fill_between(
            epochs,
            [min(values) for values in by_epoch],
            [max(values) for values in by_epoch],
            color=COLOURS[name],
            alpha=0.12,
        )
    axes.set(xlabel="epoch", title="accuracy on unseen digits: mean and range over seeds")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(file, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("learning"), help="working folder (default: learning)")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="random seeds (default: 0 1 2)"
    )
    parser.add_argument("--epochs", type=int, default=16, metavar="N", help="epochs of training (default: 16)")
    parser.add_argument(
        "--pretraining-epochs",
        type=int,
        default=50,
        metavar="N",
        help="epochs of pre-training without labels (default: 50)",
    )
    args = parser.parse_args()

    write_pictures(args.folder / "digits")
    parameters = {}
    for name, config in configs().items():
        config.save_pretrained(args.folder / name)
        model = AutoModelForImageClassification.from_config(config)
        parameters[name] = sum(parameter.numel() for parameter in model.parameters())
    curves = measure(args.folder, args.seeds, args.epochs, args.pretraining_epochs)
    write_table(args.folder / "learning.md", curves, parameters, len(args.seeds), args.epochs)
    draw(args.folder / "learning.png", curves)


if __name__ == "__main__":
    main()
