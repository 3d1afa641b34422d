"""Measure an image classifier, Focal or any other of transformers, on a folder of images or a data set from the Hub.

Plain PyTorch with Accelerate, on a CPU, one GPU or several. See `--help` and examples/README.md.
"""

import argparse
import csv
import math
import re
import time
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from matplotlib.figure import Figure
from tqdm.auto import tqdm
from transformers import AutoModelForImageClassification

from common.batches import Batches, load_batches, load_split, run_inference
from common.data import check_columns
from common.files import check_new, write_results
from common.models import load_trained, resize_views, run_on_plain_images
from common.options import (
    Problem,
    batch_size_option,
    image_size_option,
    no_readable_images,
    printable,
    script_parser,
    workers_option,
)

EXAMPLES = """\
examples:
  ImageNet's validation images, in one folder for each WordNet id:
    accelerate launch examples/evaluate.py --model focal-tiny --data imagenet/val

  your own pictures, with the accuracy of each class as a table and a figure:
    accelerate launch examples/evaluate.py --model my_model --data my_images --report report

  a data set from the Hub, read without storing it, by two GPUs in bfloat16:
    accelerate launch --num_processes 2 --mixed_precision bf16 examples/evaluate.py --model focal-tiny \\
        --data ILSVRC/imagenet-1k --streaming --labels-by-number

  at another image size than the model's own:
    accelerate launch examples/evaluate.py --model focal-tiny --data imagenet/val --image-size 288
"""

IMAGENET_CLASSES = 1000
FEW_CLASSES = 50  # the figure names all classes if there are no more than this
NAMED = 12  # otherwise it names this many of the worst and of the best classes
BLUE = "#2456c8"


def parse_arguments() -> argparse.Namespace:
    parser = script_parser(__doc__, EXAMPLES)

    group = parser.add_argument_group("model")
    group.add_argument("--model", required=True, metavar="NAME", help="a folder or a name on the Hub")
    image_size_option(group)

    group = parser.add_argument_group("data")
    group.add_argument(
        "--data",
        required=True,
        metavar="NAME",
        help="a folder FOLDER/CLASS/*.png or FOLDER/SPLIT/CLASS/*.png, a folder of Parquet or WebDataset files, or the "
        "name of a data set on the Hub",
    )
    group.add_argument(
        "--split", metavar="NAME", help="default: the first of validation, val and test that exists, or all of the data"
    )
    group.add_argument("--image-column", default="image", metavar="NAME", help="default: image")
    group.add_argument("--label-column", default="label", metavar="NAME", help="default: label")
    group.add_argument(
        "--labels-by-number",
        action="store_true",
        help="match the classes of the data and of the model by number (default: match them by name, and ImageNet's "
        "WordNet ids by their order)",
    )
    group.add_argument(
        "--streaming", action="store_true", help="read the data during evaluation, without a copy on this disk"
    )
    group.add_argument(
        "--strict",
        action="store_true",
        help="stop at a picture that cannot be read (default: skip the picture and print its name)",
    )

    group = parser.add_argument_group("result")
    group.add_argument(
        "--report",
        type=Path,
        metavar="FOLDER",
        help="write results.json, classes.csv and classes.png into this folder, which must be new or empty",
    )

    group = parser.add_argument_group("speed")
    batch_size_option(group)
    workers_option(group)
    return parser.parse_args()


# -------------------------------------------------------------------------------------------------------------- labels


def classes_by_name(args: argparse.Namespace, names: list[str], labels: list[str]) -> dict[str, int]:
    """The number of the model's class for each class name of the data."""
    numbers = {label: number for number, label in enumerate(labels)}
    several = {label for label, count in Counter(labels).items() if count > 1}
    unknown = [name for name in names if name not in numbers or name in several]
    if not unknown:
        return numbers
    if all(re.fullmatch(r"n\d{8}", name) for name in names):
        if len(names) == len(labels) == IMAGENET_CLASSES:
            return {name: number for number, name in enumerate(sorted(names))}
        raise Problem(
            f"The classes of --data {args.data} are {len(names)} WordNet ids, and --model {args.model} has "
            f"{len(labels)} classes: ids mean ImageNet's {IMAGENET_CLASSES} classes in the ids' order, which takes "
            f"{IMAGENET_CLASSES} of both. Name the folders as the model's classes, as in {labels[0]!r}."
        )
    raise Problem(
        f"{len(unknown)} of the {len(names)} classes of --data {args.data} are not among those of --model "
        f"{args.model}: {', '.join(unknown[:5])}; it knows {', '.join(labels[:5])}{', ...' * (len(labels) > 5)}. Name "
        "them alike, or add --labels-by-number if both have the same classes in the same order."
    )


def match_labels(
    args: argparse.Namespace,
    data: datasets.Dataset | datasets.IterableDataset,
    feature: datasets.ClassLabel | datasets.Value,
    labels: list[str],
) -> dict[str | int, int]:
    """The number of the model's class for each value of the label column."""
    numbers = {number: number for number in range(len(labels))}
    if isinstance(feature, datasets.ClassLabel):
        if not args.labels_by_number:
            classes = classes_by_name(args, feature.names, labels)
            return {number: classes[name] for number, name in enumerate(feature.names)}
        if feature.num_classes != len(labels):
            raise Problem(
                f"--labels-by-number needs the same classes on both sides: --data {args.data} has "
                f"{feature.num_classes}, --model {args.model} {len(labels)}."
            )
        return numbers
    if "int" in str(feature.dtype):
        names = all(label.isdigit() for label in labels) and not args.labels_by_number
        return {int(label): number for number, label in enumerate(labels)} if names else numbers
    if args.labels_by_number:
        raise Problem(
            f"--labels-by-number: column {args.label_column} of --data {args.data} has text instead of numbers: leave "
            "out --labels-by-number."
        )
    # The names in a stream are only known at its end.
    return classes_by_name(args, labels if args.streaming else sorted(data.unique(args.label_column)), labels)


# ---------------------------------------------------------------------------------------------------------- evaluation


@torch.no_grad()
def measure(args: argparse.Namespace, accelerator: Accelerator) -> tuple[np.ndarray, dict, list[str]]:
    """Evaluate the model.

    Returns:
        A row for each image (class, predicted class, whether the class is among the best five, loss), the results, and
        the names of the classes.
    """
    if args.report:
        check_new("--report", args.report, args.data)
    with accelerator.local_main_process_first():  # the other processes use its downloads and caches
        model, processor = load_trained(args.model, AutoModelForImageClassification)
        data = load_split(args.data, args.split, ("validation", "val", "test"), args.streaming, drop_labels=False)
    check_columns(args, data.features, others=("label",))
    labels = [model.config.id2label[number] for number in range(model.config.num_labels)]
    classes = match_labels(args, data, data.features[args.label_column], labels)
    if args.image_size:
        resize_views(processor, args.image_size)
    model = accelerator.prepare_model(model, evaluation_mode=True)
    _, image_size = run_on_plain_images(model, processor, args.model)

    count = data.num_shards if args.streaming else math.ceil(len(data) / args.batch_size)
    batches = Batches(
        data,
        (args.image_column, args.label_column),
        processor,
        args.batch_size,
        count,
        list(range(accelerator.process_index, count, accelerator.num_processes)),
        args.data,
        needs_label=True,
    )
    started, rows, unreadable = time.perf_counter(), [], []
    with tqdm(
        total=None if args.streaming else len(data) // accelerator.num_processes,
        unit="image",
        desc="main process" if accelerator.num_processes > 1 else None,
        disable=not accelerator.is_main_process,
    ) as bar:
        for batch in load_batches(args, accelerator, batches, unreadable):
            if not batch["names"]:
                continue
            for name, label in zip(batch["names"], batch["labels"], strict=True):
                if label not in classes:
                    raise Problem(
                        f"{name} in --data {args.data} has the label {label}, which --model {args.model} does not "
                        f"know; it knows {', '.join(map(str, list(classes)[:5]))}{', ...' * (len(classes) > 5)}. (Test "
                        "splits on the Hub often have no labels but -1.)"
                    )
            pixel_values = batch["pixel_values"].to(accelerator.device, non_blocking=True)
            logits = model(pixel_values=pixel_values).logits.float().cpu()
            truth = torch.tensor([classes[label] for label in batch["labels"]])
            best = logits.topk(min(5, len(labels))).indices
            losses = torch.nn.functional.cross_entropy(logits, truth, reduction="none")
            rows.append(np.column_stack((truth, best[:, 0], (best == truth[:, None]).any(1), losses)))
            bar.update(len(truth))
    rows = np.concatenate(gather_object([np.concatenate(rows or [np.empty((0, 4))])]))
    unreadable = sorted(gather_object(unreadable))
    seconds = time.perf_counter() - started
    if not len(rows):
        raise no_readable_images(args.data, unreadable)

    results = {
        "model": args.model,
        "data": args.data,
        "split": args.split,
        "image_size": image_size,
        "images": len(rows),
        "unreadable": unreadable,
        "top1": (rows[:, 0] == rows[:, 1]).mean(),
        "top5": rows[:, 2].mean() if len(labels) >= 5 else None,
        "loss": math.fsum(rows[:, 3]) / len(rows),  # exact, so it does not depend on the order of the processes
        "images_per_second": round(len(rows) / seconds, 2),
        "processes": accelerator.num_processes,
        "precision": accelerator.mixed_precision,
    }
    return rows, results, labels


# -------------------------------------------------------------------------------------------------------------- report


def results_per_class(rows: np.ndarray, labels: list[str]) -> list[dict]:
    """The results of each class that has images, in the order of the model's classes."""
    classes = []
    for number in np.unique(rows[:, 0]).astype(int):
        own = rows[rows[:, 0] == number]
        wrong, counts = np.unique(own[own[:, 1] != number, 1].astype(int), return_counts=True)
        classes.append(
            {
                "class": labels[number],
                "images": len(own),
                "top1": (own[:, 1] == number).mean(),
                "top5": own[:, 2].mean() if len(labels) >= 5 else "",
                "most frequent wrong answer": labels[wrong[counts.argmax()]] if len(wrong) else "",
            }
        )
    return classes


def draw_bars(axes, classes: list[dict], title: str) -> None:
    """Draw a bar for the accuracy of each class."""
    axes.barh(range(len(classes)), [100 * row["top1"] for row in classes], color=BLUE)
    axes.set_yticks(range(len(classes)), [shorten_name(row["class"]) for row in classes])
    axes.set(xlim=(0, 100), ylim=(len(classes) - 0.5, -0.5), xlabel="top-1 (%)")
    axes.set_title(title, loc="left")


def shorten_name(name: str) -> str:
    """The first synonym in an ImageNet class name, at most 24 characters."""
    name = name.split(", ")[0]
    return name if len(name) <= 24 else name[:23] + "…"


def draw_confusion(axes, rows: np.ndarray, labels: list[str]) -> None:
    """Draw the confusion matrix in %. All classes without images share one column."""
    numbers = np.unique(rows[:, 0])
    columns = [rows[:, 1] == number for number in numbers]
    names = [shorten_name(labels[int(number)]) for number in numbers]
    others = ~np.isin(rows[:, 1], numbers)
    shares = [
        [(rows[:, 0] == number)[answered].sum() / (rows[:, 0] == number).sum() for answered in [*columns, others]]
        for number in numbers
    ]
    width = len(names) + bool(others.any())
    axes.imshow(100 * np.array(shares)[:, :width], cmap="Blues", vmin=0, vmax=100, aspect="auto")
    if len(names) <= 12:
        for row, column in np.ndindex(len(names), width):
            share = shares[row][column]
            colour = "white" if share > 0.5 else "black"
            axes.text(column, row, f"{100 * share:.0f}", ha="center", va="center", color=colour)
    axes.set_xticks(range(width), [*names, "any other"][:width], rotation=90 if len(names) > 5 else 0)
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel="answer", ylabel="class")
    axes.set_title("answers to the pictures of each class (%)", loc="left")


def draw_figure(file: Path, classes: list[dict], rows: np.ndarray, labels: list[str], summary: str) -> None:
    """Draw the accuracy of each class, with a confusion matrix for few classes, or the worst and best classes."""
    ordered = sorted(classes, key=lambda row: row["top1"])
    few = len(classes) <= FEW_CLASSES
    height = 3 + 0.25 * len(classes) if few else 6.5
    figure = Figure(figsize=(height + 8 if few else 13, height), layout="constrained")
    left, right = figure.subplots(1, 2)
    figure.suptitle(summary, x=0.01, ha="left")
    if few:
        draw_bars(left, ordered, "every class, worst first")
        draw_confusion(right, rows, labels)
    else:
        left.fill_between(range(len(ordered)), [100 * row["top1"] for row in ordered], color=BLUE)
        left.set(xlim=(0, len(ordered) - 1), ylim=(0, 100), xlabel="classes, worst first", ylabel="top-1 (%)")
        left.set_title(f"all {len(ordered)} classes", loc="left")
        draw_bars(right, ordered[:NAMED] + ordered[-NAMED:], f"the {NAMED} worst and the {NAMED} best")
        right.axhline(NAMED - 0.5, color="black", linewidth=1)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=120)


def write_report(folder: Path, rows: np.ndarray, results: dict, labels: list[str], summary: str) -> None:
    """Write the report. results.json is written last, so a folder with it is complete."""
    folder.mkdir(parents=True, exist_ok=True)
    classes = results_per_class(rows, labels)
    with (folder / "classes.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, fieldnames=list(classes[0]))
        table.writeheader()
        table.writerows(classes)
    draw_figure(folder / "classes.png", classes, rows, labels, summary)
    write_results(folder, results)


def evaluate(args: argparse.Namespace, accelerator: Accelerator) -> None:
    rows, results, labels = measure(args, accelerator)
    if accelerator.is_main_process:
        unreadable = results["unreadable"]
        for item in unreadable:
            print(f"Not a readable image, left out: {printable(item)}")
        top5 = "" if results["top5"] is None else f"top-5 {100 * results['top5']:.2f} %, "
        summary = f"{args.model} on {args.data}: top-1 {100 * results['top1']:.2f} %, {top5}loss "
        summary += f"{results['loss']:.4f}; {results['images']} images of {' x '.join(map(str, results['image_size']))}"
        print(
            f"{summary} pixels, {results['images_per_second']} a second, {results['processes']} process(es)"
            f"{f'; {len(unreadable)} left out' if unreadable else ''}."
        )
        if args.report:
            write_report(args.report, rows, results, labels, summary + " pixels")


if __name__ == "__main__":
    run_inference(parse_arguments(), evaluate)
