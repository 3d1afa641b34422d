"""What a run leaves for people to read: curves, a confusion matrix, reconstructions and a model card."""

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


def write_card(
    file: Path, name: str, model_type: str, data: str, base: str | None, best: dict, settings: dict, on_hub: dict
) -> None:
    """A model card with the results as metadata, as the Hub shows them."""
    data, base = public(data), public(base)
    measures = {
        "accuracy": ("Top-1 accuracy", best["accuracy"]),
        "top_5_accuracy": ("Top-5 accuracy", best["top5_accuracy"]),
        "cross_entropy": ("Cross-entropy", best["loss"]),
    }
    pictures = {"curves.png": "Curves", "confusion.png": "Confusion matrix"}
    shown = "\n".join(f"![{title}]({name})" for name, title in pictures.items() if (file.parent / name).exists())
    metadata = results_metadata("image-classification", [model_type], name, data, measures, settings, on_hub)
    text = f"""\
An image classifier ({model_type}), trained on {data} {"from " + base if base else "from scratch"} with Focal's
`examples/finetune.py`.

| | |
|---|---|
| top-1 accuracy | {best["accuracy"]:.4f} ({best["correct"]} of {best["images"]} validation images) |
| top-5 accuracy | {best["top5_accuracy"]:.4f} |
| cross-entropy | {best["loss"]:.4f} |
| epoch | {best["epoch"]} |

```python
import focal_hf  # pip install focal-hf
from transformers import pipeline

pipeline("image-classification", model="{name}")("picture.jpg")
```

{shown}
"""
    save_card(file, name, metadata, text, settings)


def write_pretraining_card(
    file: Path, name: str, model_type: str, data: str, base: str | None, entry: dict, settings: dict, on_hub: dict
) -> None:
    """A model card for a model that is to be fine-tuned."""
    data, base = public(data), public(base)
    metadata = ModelCardData(
        library_name="transformers", tags=["masked-image-modeling", "simmim", model_type], model_name=name, **on_hub
    )
    text = f"""A model ({model_type}) that reconstructs hidden parts of images, pre-trained with
[SimMIM](https://arxiv.org/abs/2111.09886) on {data} {"from " + base if base else "from scratch"} with Focal's
`examples/pretrain_mim.py`. Fine-tune it:

    accelerate launch examples/finetune.py --model {name} --data my_images --output my_model

| | |
|---|---|
| mean absolute error of hidden pixels, normalised | {entry["loss"]:.4f} ({entry["images"]} validation images) |
| epoch | {entry["epoch"]} |

![Curves](curves.png)
![Reconstructions](reconstructions.png)
"""
    save_card(file, name, metadata, text, settings)


def public(value: object) -> object:
    """Of a local path the last part alone: where it was is no one else's concern."""
    return Path(str(value)).name if Path(str(value)).exists() else value


def results_metadata(
    task: str,
    tags: list[str],
    name: str,
    data: object,
    measures: dict[str, tuple[str, float]],
    settings: dict,
    on_hub: dict,
) -> ModelCardData:
    """What a model card tells the Hub: the task, and what was measured, for each metric its title and value."""
    split = settings["--validation-split"]
    results = [
        EvalResult(task, data, data, metric, value, metric_name=title, dataset_split=split)
        for metric, (title, value) in measures.items()
    ]
    return ModelCardData(
        library_name="transformers",
        pipeline_tag=task,
        tags=[task, *tags],
        model_name=name,
        eval_results=results,
        **on_hub,
    )


def save_card(file: Path, name: str, metadata: ModelCardData, text: str, settings: dict) -> None:
    given = {option: public(value) for option, value in settings.items() if value is not None and value is not False}
    table = "\n".join(f"| `{option}` | {value} |" for option, value in given.items())
    content = f"""---
{metadata.to_yaml()}
---

# {name}

{text}
| setting | |
|---|---|
{table}
"""
    ModelCard(content, ignore_metadata_errors=True).save(file)
