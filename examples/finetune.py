"""Fine-tune Focal, or any image classifier of transformers, on a folder of images or a data set from the Hub.

Plain Accelerate and PyTorch, the same file on a laptop, one GPU or several. See `--help` and examples/README.md.
"""

import argparse
import math
import time
from pathlib import Path

import datasets
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from PIL import Image
from tqdm.auto import tqdm
from transformers import get_cosine_schedule_with_warmup
from transformers.utils import logging

from common.data import Pictures, check_pictures, random_view, read_data
from common.files import check_output, save_model, write_results
from common.models import build_model, decay_groups, input_size
from common.options import Problem, fraction, positive, stop

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


# --------------------------------------------------------------------------------------------------------------- model


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
        stop(problem, accelerator.is_main_process)
    accelerator.end_training()


if __name__ == "__main__":
    main()
