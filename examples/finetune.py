"""Fine-tune Focal, or any image classifier of transformers, on a folder of images or a data set from the Hub.

Plain Accelerate and PyTorch, the same file on a laptop, one GPU or several. See `--help` and examples/README.md.
"""

import argparse
import json
import math
import os
import random
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import datasets
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from PIL import Image, ImageOps
from tqdm.auto import tqdm
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    BitImageProcessorPil,
    PreTrainedConfig,
    PreTrainedModel,
    get_cosine_schedule_with_warmup,
)
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from transformers.utils import logging

import focal_hf  # noqa: F401  # makes the Auto classes know "focal"

EXAMPLES = """\
examples:
  start from a checkpoint (a converted or a fine-tuned folder, or a name on the Hub):
    accelerate launch examples/finetune.py --model focal-tiny --data my_images --output my_model

  train from scratch, the network described by a config.json ("model_type": "focal"):
    accelerate launch examples/finetune.py --config my_config.json --data my_images --output my_model --epochs 300

  a data set from the Hub that calls its columns and splits its own way:
    accelerate launch examples/finetune.py --model focal-tiny --data uoft-cs/cifar100 --output my_model \\
        --image-column img --label-column fine_label --validation-split test

  two GPUs in bfloat16:
    accelerate launch --num_processes 2 --mixed_precision bf16 examples/finetune.py ...
"""


class Problem(Exception):
    """Something only the user can put right: shown as one line, without a traceback."""


def positive(kind: type, or_zero: bool = False) -> Callable[[str], int | float]:
    """An argparse type: an int or a float above zero, or zero where that has a meaning."""

    def parse(text: str) -> int | float:
        value = kind(text)
        if not (math.isfinite(value) and (value > 0 or (or_zero and value == 0))):
            raise argparse.ArgumentTypeError(f"{text} is not {'zero or ' if or_zero else ''}above zero")
        return value

    parse.__name__ = kind.__name__  # argparse puts it into "invalid int value"
    return parse


def fraction(text: str) -> float:
    """An argparse type: above 0, at most 1."""
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and at most 1")
    return value


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    group = parser.add_argument_group("model (one of the two)").add_mutually_exclusive_group(required=True)
    group.add_argument("--model", metavar="NAME", help="checkpoint to start from: a folder or a name on the Hub")
    group.add_argument("--config", metavar="PATH", help="train from scratch: a config.json, or a folder with one")

    group = parser.add_argument_group("data")
    group.add_argument(
        "--data",
        required=True,
        metavar="NAME",
        help="a folder FOLDER/train/CLASS/*.png with FOLDER/validation/CLASS/*.png, or a data set's name on the Hub",
    )
    group.add_argument("--image-column", default="image", metavar="NAME", help="default: image")
    group.add_argument("--label-column", default="label", metavar="NAME", help="default: label")
    group.add_argument("--validation-split", default="validation", metavar="NAME", help="default: validation")
    group.add_argument(
        "--validation-fraction",
        type=fraction,
        default=0.1,
        metavar="F",
        help="share of the training images held out where the data has no such split (default: 0.1)",
    )

    group = parser.add_argument_group("result")
    group.add_argument("--output", required=True, type=Path, metavar="FOLDER", help="where the best model goes")
    group.add_argument("--overwrite", action="store_true", help="replace the model that FOLDER holds")

    group = parser.add_argument_group("training")
    group.add_argument("--epochs", type=positive(int), default=10, metavar="N", help="default: 10")
    group.add_argument(
        "--batch-size", type=positive(int), default=64, metavar="N", help="images per process (default: 64)"
    )
    group.add_argument(
        "--accumulate", type=positive(int), default=1, metavar="N", help="batches per optimizer step (default: 1)"
    )
    group.add_argument(
        "--learning-rate",
        type=positive(float),
        metavar="LR",
        help="the highest, reached after the warm-up (default: 5e-5 with --model, 5e-4 with --config)",
    )
    group.add_argument("--warmup", type=fraction, default=0.1, metavar="F", help="share of all steps (default: 0.1)")
    group.add_argument(
        "--weight-decay", type=positive(float, or_zero=True), default=0.05, metavar="WD", help="default: 0.05"
    )
    group.add_argument(
        "--clip", type=positive(float), default=5.0, metavar="NORM", help="largest gradient norm (default: 5)"
    )
    group.add_argument("--seed", type=int, default=0, metavar="N", help="default: 0")

    group = parser.add_argument_group("images")
    group.add_argument(
        "--crop-scale",
        type=fraction,
        default=0.35,
        metavar="F",
        help="in training, the smallest share of a picture's area that a random crop keeps (default: 0.35)",
    )
    group.add_argument(
        "--flip",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="in training, mirror half of the pictures; switch off for digits, letters or signs (default: on)",
    )
    group.add_argument(
        "--crop",
        type=fraction,
        default=0.875,
        metavar="F",
        help="in evaluation, the share of the shorter side that the central crop keeps, for a model that brings no "
        "image processor; 1.0 where the subject fills the picture (default: 0.875)",
    )
    group.add_argument(
        "--workers",
        type=positive(int, or_zero=True),
        default=4,
        metavar="N",
        help="helpers of each process that read images, or 0 (default: 4)",
    )
    return parser.parse_args()


def first_line(error: Exception) -> str:
    """An error's first line of text: what libraries write after it is advice that does not fit here."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


# ---------------------------------------------------------------------------------------------------------------- data


def load_splits(name: str) -> datasets.DatasetDict:
    """The splits of a folder of images or of a data set on the Hub."""
    folder = Path(name).expanduser()
    if folder.is_file():
        raise Problem(f"--data {name} is a file: give a folder of images or the name of a data set on the Hub.")
    if folder.is_dir():
        # drop_labels=False: by default a single class, or classes at different depths, would silently have no labels.
        source = {"path": "imagefolder", "data_dir": str(folder), "drop_labels": False}
        suffixes = {*Image.registered_extensions(), ".zip", ".tar", ".gz"}
        if not any(file.suffix.lower() in suffixes for file in folder.rglob("*")):
            raise Problem(f"No images found in --data {name}: expected {name}/train/CLASS/*.png, *.jpg or the like.")
    elif name.count("/") > 1 or name.startswith((".", "/", "~")):
        raise Problem(f"No such folder: --data {name}. Give an existing folder or the name of a data set on the Hub.")
    else:
        source = {"path": name}
    try:
        return datasets.load_dataset(**source)
    except Exception as error:
        where = "as a folder of images" if folder.is_dir() else "(no such folder here, nor a readable Hub data set)"
        raise Problem(f"Cannot read --data {name} {where}: {first_line(error)}") from error


def label_names(split: datasets.Dataset, column: str) -> list[str]:
    """The class of every row, as text."""
    feature = split.features[column]
    if isinstance(feature, datasets.ClassLabel):
        return [feature.names[index] for index in split[column]]
    return [str(value) for value in split[column]]


def hold_out(labels: list[str], share: float, seed: int) -> tuple[list[int], list[int]]:
    """Rows to train on and rows to hold out, `share` of each class (at least one image of any class that has two)."""
    rows: dict[str, list[int]] = {}
    for row, label in enumerate(labels):
        rows.setdefault(label, []).append(row)
    train, held = [], []
    shuffle = random.Random(seed).shuffle
    for _, members in sorted(rows.items()):
        shuffle(members)
        count = min(max(1, round(share * len(members))), len(members) - 1)
        held += members[:count]
        train += members[count:]
    return sorted(train), sorted(held)


def check_pictures(split: datasets.Dataset, column: str) -> None:
    """Open every file of a local folder as far as its header, so that a broken one is found now and not hours later."""
    for cell in split.cast_column(column, datasets.Image(decode=False))[column]:
        if cell["path"] and os.path.isfile(cell["path"]):
            try:
                Image.open(cell["path"]).close()
            except OSError as error:
                raise Problem(f"Not a readable image: {cell['path']}. Repair or remove it.") from error


def read_data(args: argparse.Namespace, say: Callable[[str], None]) -> tuple[dict, dict, list[str]]:
    """The rows and labels to train on, the same to validate on, and the classes' names in order."""
    splits = load_splits(args.data)
    if "train" not in splits:
        raise Problem(f"--data {args.data} has no split called train, only {', '.join(splits)}.")
    train = splits["train"]
    for option, column in (("--image-column", args.image_column), ("--label-column", args.label_column)):
        if column not in train.column_names:
            raise Problem(
                f"--data {args.data} has no column {column}; its columns are {', '.join(train.column_names)}. "
                f"Name the right one with {option}."
            )
    if not isinstance(train.features[args.image_column], datasets.Image):
        raise Problem(f"Column {args.image_column} of --data {args.data} holds no images: see --image-column.")

    labels = label_names(train, args.label_column)
    feature = train.features[args.label_column]
    names = feature.names if isinstance(feature, datasets.ClassLabel) else sorted(set(labels))
    if len(set(labels)) < 2:
        raise Problem(
            f"--data {args.data} has only one class ({labels[0]}) to train on: a classifier needs at least two, "
            f"each in a folder of its own, as in {args.data}/train/CLASS/*.png."
        )

    if args.validation_split in splits:
        validation = splits[args.validation_split]
        validation_labels = label_names(validation, args.label_column)
        unknown = sorted(set(validation_labels) - set(labels))
        if unknown:
            raise Problem(
                f"The {args.validation_split} split has classes that have no training images: {', '.join(unknown[:5])}."
                " Spell the classes alike in both, or remove them."
            )
    else:
        others = [split for split in splits if split != "train"]
        rows, held = hold_out(labels, args.validation_fraction, args.seed)
        if not held or not rows:
            raise Problem(f"--data {args.data} has too few images to hold some out: add a validation split.")
        say(
            f"No split called {args.validation_split}: holding out {len(held)} of {len(labels)} training images, "
            f"{args.validation_fraction:.0%} of each class (seed {args.seed})."
            + (f" Not used: {', '.join(others)} (see --validation-split)." if others else "")
        )
        validation, validation_labels = train.select(held), [labels[row] for row in held]
        train, labels = train.select(rows), [labels[row] for row in rows]
    return {"rows": train, "labels": labels}, {"rows": validation, "labels": validation_labels}, names


class Pictures(torch.utils.data.Dataset):
    """Pairs of pixel values (channels, height, width) and a class index."""

    def __init__(self, rows: datasets.Dataset, labels: list[int], column: str, transform: Callable):
        self.rows, self.labels, self.column, self.transform = rows, labels, column, transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict:
        image = ImageOps.exif_transpose(self.rows[index][self.column]).convert("RGB")
        return {"pixel_values": self.transform(image), "labels": self.labels[index]}


def random_view(image: Image.Image, size: tuple[int, int], scale: float, flip: bool, resample: int) -> Image.Image:
    """A random part of the image, resized to (height, width) and at most 4:3 out of its shape.

    Its area is `scale` to 1 of the image's, or what fits into the image of a part so large.
    """
    area = image.width * image.height * random.uniform(scale, 1)
    ratio = size[1] / size[0] * math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
    width, height = min(image.width, math.sqrt(area * ratio)), min(image.height, math.sqrt(area / ratio))
    left, top = random.uniform(0, image.width - width), random.uniform(0, image.height - height)
    box = (left, top, min(left + width, image.width), min(top + height, image.height))
    image = image.resize((size[1], size[0]), resample, box=box)
    return ImageOps.mirror(image) if flip and random.random() < 0.5 else image


# --------------------------------------------------------------------------------------------------------------- model


def build_model(
    args: argparse.Namespace, names: list[str], say: Callable[[str], None]
) -> tuple[PreTrainedModel, BitImageProcessorPil]:
    """The model, its id2label being the data's classes, and the image processor that goes with it."""
    source = args.config or args.model
    if args.config and not Path(args.config).exists():
        raise Problem(f"No such file or folder: --config {args.config}. Give a config.json, or a folder with one.")
    try:
        config = AutoConfig.from_pretrained(source)
        same_labels = args.model and set(config.id2label.values()) == set(names)
        if not same_labels:  # equal sets keep the checkpoint's order, to which its classifier is trained
            config.id2label = dict(enumerate(names))
        config.label2id = {name: index for index, name in config.id2label.items()}
        if args.config:
            model = AutoModelForImageClassification.from_config(config)
        else:
            model, loading = AutoModelForImageClassification.from_pretrained(
                source, config=config, ignore_mismatched_sizes=True, output_loading_info=True, dtype=torch.float32
            )
    except Exception as error:
        option = "--config" if args.config else "--model"
        raise Problem(f"Cannot build an image classifier from {option} {source}: {first_line(error)}") from error
    if getattr(config, "num_channels", 3) != 3:
        raise Problem(f"{source} takes {config.num_channels} channels; this script feeds colour images (3 channels).")

    if args.model and not same_labels:
        if not loading["mismatched_keys"] and not loading["missing_keys"]:  # as many classes, but other ones
            torch.nn.init.trunc_normal_(model.classifier.weight, std=0.02)
            torch.nn.init.zeros_(model.classifier.bias)
        say(f"{source} knows other classes: its classifier starts anew, with the {len(names)} classes of the data.")

    if args.model:
        try:
            return model, AutoImageProcessor.from_pretrained(source)
        except OSError:
            say(f"{source} brings no image processor: using ImageNet's statistics and --crop {args.crop}.")
    return model, default_processor(config, args.crop)


def input_size(config: PreTrainedConfig) -> tuple[int, int]:
    """Height and width of the images that a model takes."""
    size = config.image_size
    return (size, size) if isinstance(size, int) else tuple(size)


def default_processor(config: PreTrainedConfig, crop: float) -> BitImageProcessorPil:
    """Shorter side to image_size / crop, then the central crop; ImageNet's mean and deviation."""
    height, width = input_size(config)
    return BitImageProcessorPil(
        size={"shortest_edge": round(max(height, width) / crop)},
        crop_size={"height": height, "width": width},
        resample=Image.Resampling.BICUBIC,
        image_mean=IMAGENET_DEFAULT_MEAN,
        image_std=IMAGENET_DEFAULT_STD,
    )


def decay_groups(model: torch.nn.Module, weight_decay: float) -> list[dict]:
    """Weight decay for matrices and kernels; none for biases, norms and tables of positions (as in the paper)."""
    positions = ("position_embeddings", "relative_position_bias_table")
    groups: dict[bool, list] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = parameter.ndim > 1 and not name.endswith(".bias") and not any(key in name for key in positions)
            groups[decays].append(parameter)
    return [{"params": groups[True], "weight_decay": weight_decay}, {"params": groups[False], "weight_decay": 0.0}]


# ------------------------------------------------------------------------------------------------------------- results


def check_output(args: argparse.Namespace) -> None:
    """Refuse an output folder whose content would be lost by mistake."""
    folder = args.output
    if folder.exists() and not folder.is_dir():
        raise Problem(f"--output {folder} is a file: name a folder that is new or empty.")
    if folder.is_dir() and any(folder.iterdir()):
        if not args.overwrite:
            raise Problem(f"--output {folder} exists and is not empty: name another folder, or add --overwrite.")
        if not (folder / "config.json").is_file():
            raise Problem(f"--output {folder} holds something else than a model: --overwrite will not delete that.")
        if any(Path(source).resolve().is_relative_to(folder.resolve()) for source in (args.data, args.config or "/")):
            raise Problem(f"--output {folder} contains the --data or --config of this run: name another folder.")


def write_results(folder: Path, results: dict) -> None:
    aside = folder / "results.json.part"
    aside.write_text(json.dumps(results, indent=2) + "\n")
    aside.replace(folder / "results.json")


def save_model(folder: Path, model: PreTrainedModel, processor: BitImageProcessorPil, results: dict) -> None:
    """Write everything aside, then rename: whenever the run is stopped, a folder that is there is complete."""
    folder = folder.resolve()
    aside, old = (folder.with_name(f".{folder.name}.{suffix}") for suffix in ("part", "old"))
    for leftover in (aside, old):
        shutil.rmtree(leftover, ignore_errors=True)
    aside.mkdir(parents=True)
    model.save_pretrained(aside)
    processor.save_pretrained(aside)
    write_results(aside, results)
    if folder.exists():
        folder.rename(old)
    aside.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


# ------------------------------------------------------------------------------------------------------------ training


@torch.no_grad()  # not inference_mode: tensors that a model caches there could not be used in training later
def evaluate(accelerator: Accelerator, model: torch.nn.Module, loader: torch.utils.data.DataLoader) -> dict:
    """Top-1 accuracy and mean loss, each image counted once on any number of processes."""
    model.eval()
    correct, loss, images = 0, 0.0, 0
    for batch in loader:
        logits = model(pixel_values=batch["pixel_values"]).logits.float()
        losses = torch.nn.functional.cross_entropy(logits, batch["labels"], reduction="none")
        # Processes get equal batches, so the last is filled up with repeated images; gather_for_metrics drops those.
        hits, losses = accelerator.gather_for_metrics((logits.argmax(-1) == batch["labels"], losses))
        correct, loss, images = correct + hits.sum().item(), loss + losses.sum().item(), images + len(hits)
    return {"accuracy": correct / images, "correct": correct, "images": images, "loss": loss / images}


def train(args: argparse.Namespace, accelerator: Accelerator) -> None:
    say = accelerator.print
    check_output(args)
    with accelerator.local_main_process_first():  # the others find what it downloaded and prepared
        train_data, validation_data, names = read_data(args, say)
    if accelerator.is_local_main_process and Path(args.data).expanduser().is_dir():
        check_pictures(train_data["rows"], args.image_column)
        check_pictures(validation_data["rows"], args.image_column)

    set_seed(args.seed)
    with accelerator.local_main_process_first():
        model, processor = build_model(args, names, say)
    set_seed(args.seed, device_specific=True)  # every process draws its own crops and dropped paths

    config = model.config
    size = input_size(config)

    def training_view(image: Image.Image) -> torch.Tensor:
        image = random_view(image, size, args.crop_scale, args.flip, processor.resample)
        return processor(image, do_resize=False, do_center_crop=False, return_tensors="pt")["pixel_values"][0]

    def central_view(image: Image.Image) -> torch.Tensor:
        return processor(image, return_tensors="pt")["pixel_values"][0]

    loaders = []
    for data, view, shuffle in ((train_data, training_view, True), (validation_data, central_view, False)):
        indices = [config.label2id[label] for label in data["labels"]]
        loaders.append(
            torch.utils.data.DataLoader(
                Pictures(data["rows"], indices, args.image_column, view),
                batch_size=args.batch_size,
                shuffle=shuffle,
                num_workers=args.workers,
                persistent_workers=args.workers > 0,
                pin_memory=accelerator.device.type == "cuda",
            )
        )

    learning_rate = args.learning_rate or (5e-5 if args.model else 5e-4)
    optimizer = torch.optim.AdamW(decay_groups(model, args.weight_decay), lr=learning_rate)
    model, wrapped_optimizer, train_loader, validation_loader = accelerator.prepare(model, optimizer, *loaders)
    epoch_steps = math.ceil(len(train_loader) / args.accumulate)
    steps = epoch_steps * args.epochs
    # Not prepared: Accelerate would step it once per process, where here a step is a step of all processes together.
    scheduler = get_cosine_schedule_with_warmup(optimizer, round(args.warmup * steps), steps)

    parameters = sum(parameter.numel() for parameter in model.parameters())
    say(
        f"{config.model_type}, {parameters / 1e6:.2f} M parameters, {len(names)} classes; "
        f"{len(train_data['labels'])} training and {len(validation_data['labels'])} validation images of "
        f"{size[0]} x {size[1]} pixels; {accelerator.num_processes} process(es) on {accelerator.device.type}, "
        f"precision {accelerator.mixed_precision}; {args.epochs} epochs, {steps} steps."
    )

    history, best = [], None
    bar = tqdm(total=steps, unit="step", disable=not accelerator.is_main_process, smoothing=0.05)
    for epoch in range(1, args.epochs + 1):
        model.train()
        started, total = time.perf_counter(), torch.zeros((), device=accelerator.device)
        for batch in train_loader:
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), args.clip)
                wrapped_optimizer.step()
                wrapped_optimizer.zero_grad()
            total += loss.detach()
            if accelerator.sync_gradients:
                if not accelerator.optimizer_step_was_skipped:  # fp16 skips steps until it has found its scale
                    scheduler.step()
                bar.update()
        train_loss = (accelerator.reduce(total, "mean") / len(train_loader)).item()
        if not math.isfinite(train_loss):
            raise Problem(f"The loss became {train_loss} in epoch {epoch}: lower --learning-rate, or leave fp16.")

        measured = evaluate(accelerator, model, validation_loader)
        history.append({"epoch": epoch, "train_loss": train_loss, **measured})
        better = best is None or (measured["accuracy"], -measured["loss"]) > (best["accuracy"], -best["loss"])
        best = history[-1] if better else best
        if accelerator.is_main_process:
            results = {"best": best, "processes": accelerator.num_processes, "history": history}
            if better:
                save_model(args.output, accelerator.unwrap_model(model), processor, results)
            else:
                write_results(args.output, results)
            bar.write(
                f"epoch {epoch:3}/{args.epochs}  train loss {train_loss:.3f}  validation loss {measured['loss']:.3f}  "
                f"accuracy {measured['accuracy']:.4f} ({measured['correct']} of {measured['images']})  "
                f"{time.perf_counter() - started:.1f} s{'  saved' if better else ''}"
            )
    bar.close()
    accelerator.wait_for_everyone()
    say(f"Best: epoch {best['epoch']}, validation accuracy {best['accuracy']:.4f}. The model is in {args.output}.")


def main() -> None:
    args = parse_arguments()
    accelerator = Accelerator(gradient_accumulation_steps=args.accumulate)
    logging.disable_progress_bar()  # its bars, one for every file saved, would break up the bar of the training
    if not accelerator.is_local_main_process:
        datasets.disable_progress_bars()
    try:
        train(args, accelerator)
    except Problem as problem:
        # All processes meet the same problem and one should report it. It ends the others by failing; where it is not
        # the one in trouble, the others speak for themselves.
        if not accelerator.is_main_process:
            time.sleep(5)
        print(f"error: {problem}", file=sys.stderr, flush=True)
        sys.exit(1)
    accelerator.end_training()


if __name__ == "__main__":
    main()
