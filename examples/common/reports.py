"""Figures and model cards: learning curves, confusion matrices and reconstructions."""

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from transformers import BaseImageProcessor

MOST_DRAWN_CLASSES = 1000  # no confusion matrix is drawn for more classes
MOST_NAMED_CLASSES = 40  # the axes of a confusion matrix name the classes if there are no more

CURVES = {
    "loss": {"train_loss": "training", "loss": "validation"},
    "validation accuracy": {"accuracy": "top-1", "top5_accuracy": "top-5"},
    "validation AP": {"ap": "AP", "ap50": "AP50", "ap75": "AP75", "box_ap": "AP of boxes"},
    "validation": {"mean_iou": "mean IoU", "mean_accuracy": "mean accuracy", "pixel_accuracy": "pixel accuracy"},
}


def draw_curves(file: Path, history: list[dict]) -> None:
    """Plot losses, and accuracies if there are any, over the epochs."""
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
    """Undo the normalisation of pixel values (channels, height, width). Returns pixels in 0 … 1."""
    if processor.do_normalize:
        mean, std = (torch.tensor(values)[:, None, None] for values in (processor.image_mean, processor.image_std))
        pixels = pixels * std + mean
    return pixels / (255 * processor.rescale_factor) if processor.do_rescale else pixels / 255


def draw_reconstructions(file: Path, rows: dict[str, list[torch.Tensor]]) -> None:
    """Draw a row of pictures (channels, height, width) in 0 … 1 for each name."""
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
    """Draw the confusion matrix of true and predicted classes (images, 2), as shares of the true class."""
    if len(names) > MOST_DRAWN_CLASSES:
        return
    cells = answers[:, 0] * len(names) + answers[:, 1]
    counts = torch.bincount(cells, minlength=len(names) ** 2).view(len(names), -1)
    shares = counts / counts.sum(1, keepdim=True).clamp(min=1)
    side = min(16, 4 + 0.3 * min(len(names), MOST_NAMED_CLASSES))
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.subplots()
    figure.colorbar(axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1), label="share of the true class")
    if len(names) <= MOST_NAMED_CLASSES:
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
    """The parts of a model card that depend on the kind of model.

    Args:
        kind: the kind of model, for the first sentence.
        script: the script that trains it.
        measures: the title and the value of each metric, by the metric's name on the Hub.
        task: the task of its pipeline. Without a task, the card shows how to fine-tune the model.
        pipeline_options: further arguments of the pipeline's call, as source code.
        classes: the title of a measure, and its value for each class.
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
    kind = (
        f"A model ({model_type}) that reconstructs hidden parts of images ([SimMIM](https://arxiv.org/abs/2111.09886))"
    )
    measures = {"mean_absolute_error": ("Mean absolute error of the hidden pixels, normalised", entry["loss"])}
    return Card(kind, "pretrain_mim.py", ["masked-image-modeling", "simmim", model_type], measures)


def write_card(folder: Path, card: Card, args: argparse.Namespace, settings: dict, entry: dict) -> None:
    """Write the model card, README.md: results (also as metadata for the Hub), usage and settings.

    Args:
        settings: the settings that determine the result, by option name.
        entry: the measures after the epoch of the model.
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
    """The last part of a local path, so that a card does not publish the folders of this machine."""
    return Path(str(value)).name if Path(str(value)).exists() else value
