"""What a run leaves for people to read: curves, a confusion matrix, reconstructions and model cards."""

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from transformers import BaseImageProcessor

DRAWN, TOLD = 1000, 40  # classes of which there is a confusion matrix, and with names


CURVES = {
    "loss": {"train_loss": "training", "loss": "validation"},
    "validation accuracy": {"accuracy": "top-1", "top5_accuracy": "top-5"},
    "validation AP": {"ap": "AP", "ap50": "AP50", "ap75": "AP75", "box_ap": "AP of boxes"},
    "validation": {"mean_iou": "mean IoU", "mean_accuracy": "mean accuracy", "pixel_accuracy": "pixel accuracy"},
}


def draw_curves(file: Path, history: list[dict]) -> None:
    """Losses over the epochs, and accuracies where there are any."""
    shown = {title: curves for title, curves in CURVES.items() if curves.keys() & history[0].keys()}
    figure = Figure(figsize=(5 * len(shown), 4), layout="constrained")
    epochs = [entry["epoch"] for entry in history]
    for axes, (title, curves) in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown.items(), strict=True):
        for name, label in curves.items():
            if name in history[0]:
                axes.plot(
                    epochs, [entry[name] for entry in history], label=label, marker="." if len(epochs) < 20 else ""
                )
        axes.set(title=title, xlabel="epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(file, dpi=120)


def to_picture(processor: BaseImageProcessor, pixels: torch.Tensor) -> torch.Tensor:
    """Pixel values (channels, height, width) back to 0 … 1."""
    if processor.do_normalize:
        mean, std = (torch.tensor(values)[:, None, None] for values in (processor.image_mean, processor.image_std))
        pixels = pixels * std + mean
    return pixels / (255 * processor.rescale_factor) if processor.do_rescale else pixels / 255


def draw_reconstructions(file: Path, rows: dict[str, list[torch.Tensor]]) -> None:
    """Pictures (channels, height, width) in 0 … 1, a row for each name."""
    columns = max(map(len, rows.values()))
    figure = Figure(figsize=(0.6 + 1.5 * columns, 1.5 * len(rows)), layout="constrained")
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for line, (name, pictures) in zip(grid, rows.items(), strict=True):
        line[0].set_ylabel(name)
        for axes, picture in zip(line, pictures, strict=True):
            axes.imshow(picture.permute(1, 2, 0).clamp(0, 1).numpy())
            axes.set(xticks=[], yticks=[])
    figure.savefig(file, dpi=120)


def draw_confusion(file: Path, answers: torch.Tensor, names: list[str]) -> None:
    """(images, 2) true and predicted classes, as shares of the true class; no picture of more than DRAWN classes."""
    if len(names) > DRAWN:
        return
    cells = answers[:, 0] * len(names) + answers[:, 1]
    counts = torch.bincount(cells, minlength=len(names) ** 2).view(len(names), -1)
    shares = counts / counts.sum(1, keepdim=True).clamp(min=1)
    side = min(16, 4 + 0.3 * min(len(names), TOLD))
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.subplots()
    figure.colorbar(axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1), label="share of the true class")
    if len(names) <= TOLD:
        places = range(len(names))
        axes.set_xticks(places, names, rotation=90)
        axes.set_yticks(places, names)
    axes.set(xlabel="predicted", ylabel="true", title=f"{int(counts.sum())} validation images")
    if len(names) <= 20:
        for row, column in counts.nonzero().tolist():
            colour = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, int(counts[row, column]), ha="center", va="center", color=colour)
    figure.savefig(file, dpi=120)


@dataclass
class Card:
    """What the model cards of one kind of model say, beside what all model cards say.

    Args:
        kind: the kind of model, for the first sentence.
        script: the script that trains it.
        measures: the title and the value of each metric, by the metric's name on the Hub.
        task: the task of its pipeline; without one, the model is to be fine-tuned by finetune.py.
        pipeline_options: further arguments of the pipeline's call, as source code.
        classes: the title and the values of a measure of each class.
    """

    kind: str
    script: str
    tags: list[str]
    measures: dict[str, tuple[str, float]]
    task: str | None = None
    pipeline_options: str = ""
    classes: tuple[str, dict[str, float | None]] | None = None


def classification_card(model_type: str, entry: dict) -> Card:
    measures = {
        "accuracy": ("Top-1 accuracy", entry["accuracy"]),
        "top_5_accuracy": ("Top-5 accuracy", entry["top5_accuracy"]),
        "cross_entropy": ("Cross-entropy", entry["loss"]),
    }
    kind = f"An image classifier ({model_type})"
    return Card(kind, "finetune.py", [model_type], measures, "image-classification")


def pretraining_card(model_type: str, entry: dict) -> Card:
    kind = f"A model ({model_type}) that fills in hidden parts of images ([SimMIM](https://arxiv.org/abs/2111.09886))"
    measures = {"mean_absolute_error": ("Mean absolute error of hidden pixels, normalised", entry["loss"])}
    return Card(kind, "pretrain_mim.py", ["masked-image-modeling", "simmim", model_type], measures)


def write_card(folder: Path, card: Card, args: argparse.Namespace, settings: dict, entry: dict) -> None:
    """The README.md beside a model and its figures: results, for people and for the Hub, usage and settings.

    Args:
        settings: what the result follows from, by the names of options.
        entry: what was measured after the epoch that the model is from.
    """
    name, data, base = args.push_to_hub or args.output.resolve().name, public(args.data), public(args.model)
    on_hub = {"base_model": args.model} if args.model and not Path(args.model).exists() else {}
    if not Path(args.data).expanduser().exists():
        on_hub["datasets"] = args.data
    if card.task:
        on_hub |= {
            "pipeline_tag": card.task,
            "eval_results": [
                EvalResult(
                    *(card.task, data, data, metric, value), metric_name=title, dataset_split=args.validation_split
                )
                for metric, (title, value) in card.measures.items()
            ],
        }
        usage = f"""\
```python
import focal_hf  # pip install focal-hf
from transformers import pipeline

pipeline("{card.task}", model="{name}")("picture.jpg"{card.pipeline_options})
```"""
    else:
        usage = f"""\
Fine-tune it:

    accelerate launch examples/finetune.py --model {name} --data my_images --output my_model"""
    metadata = ModelCardData(
        library_name="transformers", tags=[*filter(None, [card.task]), *card.tags], model_name=name, **on_hub
    )
    measured = {title: f"{value:.4f}" for title, value in card.measures.values()}
    measured |= {"validation images": entry["images"], "epoch": entry["epoch"]}
    classes = ""
    if card.classes:
        title, values = card.classes
        known = {label: f"{value:.4f}" for label, value in values.items() if value is not None}
        classes = table("class", title, known) + "\n"
    figures = "\n".join(f"![{file.stem.capitalize()}]({file.name})" for file in sorted(folder.glob("*.png")))
    given = {
        f"`{option}`": public(value) for option, value in settings.items() if value is not None and value is not False
    }
    content = f"""---
{metadata.to_yaml()}
---

# {name}

{card.kind}, trained on {data} {"from " + base if base else "from scratch"} with Focal's `examples/{card.script}`.

{table("measured", "", measured)}
{usage}

{figures}

{classes}{table("setting", "", given)}"""
    ModelCard(content, ignore_metadata_errors=True).save(folder / "README.md")


def table(first: str, second: str, rows: dict[str, object]) -> str:
    """A table in Markdown."""
    lines = [f"| {first} | {second} |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())]
    return "\n".join(lines) + "\n"


def public(value: object) -> object:
    """Of a local path the last part alone: where it was is no one else's concern."""
    return Path(str(value)).name if Path(str(value)).exists() else value
