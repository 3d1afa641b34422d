"""What a run leaves for people to read: curves, a confusion matrix and a model card."""

from pathlib import Path

import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

DRAWN, TOLD = 1000, 40  # classes of which there is a confusion matrix, and with names


def draw_curves(file: Path, history: list[dict]) -> None:
    """Losses and accuracies over the epochs."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    epochs = [entry["epoch"] for entry in history]
    for axes, title, curves in zip(
        figure.subplots(1, 2),
        ("loss", "validation accuracy"),
        ({"train_loss": "training", "loss": "validation"}, {"accuracy": "top-1", "top5_accuracy": "top-5"}),
        strict=True,
    ):
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
    """A model card with the results as metadata, as the Hub shows them. Of local paths it has the last part alone."""
    settings = {
        option: Path(str(value)).name if Path(str(value)).exists() else value
        for option, value in settings.items()
        if value is not None and value is not False
    }
    data, base = (Path(source).name if source and Path(source).exists() else source for source in (data, base))
    split = settings["--validation-split"]
    results = [
        EvalResult("image-classification", data, data, metric, best[key], metric_name=shown, dataset_split=split)
        for key, metric, shown in (
            ("accuracy", "accuracy", "Top-1 accuracy"),
            ("top5_accuracy", "top_5_accuracy", "Top-5 accuracy"),
            ("loss", "cross_entropy", "Cross-entropy"),
        )
    ]
    pictures = {"curves.png": "Curves", "confusion.png": "Confusion matrix"}
    shown = "\n".join(f"![{title}]({name})" for name, title in pictures.items() if (file.parent / name).exists())
    metadata = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-classification",
        tags=["image-classification", model_type],
        model_name=name,
        eval_results=results,
        **on_hub,
    )
    table = "\n".join(f"| `{option}` | {value} |" for option, value in settings.items())
    ModelCard(
        f"""---
{metadata.to_yaml()}
---

# {name}

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

| setting | |
|---|---|
{table}
""",
        ignore_metadata_errors=True,
    ).save(file)
