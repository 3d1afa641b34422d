"""The parts that all training scripts share: checks, loaders, start, saving and upload."""

import argparse
import copy
import functools
import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import peft
import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedType, ProjectConfiguration
from huggingface_hub import HfApi
from transformers import BaseImageProcessor

from .checkpoints import keeps_states
from .engine import Training
from .files import check_output, clear_output, is_complete, save_model, write_results
from .fingerprint import fingerprint
from .loading import EvaluationBatches, Images, Loader, TrainingBatches
from .models import check_size, decay_groups
from .options import Problem, first_line, run_script
from .recipe import schedule
from .reports import Card, draw_curves, write_card

# Options that may change when a run is resumed, since the result does not depend on them.
CHANGEABLE_OPTIONS = ("output", "overwrite", "resume", "save_every", "workers", "report_to", "push_to_hub", "strict")


def run_training(args: argparse.Namespace, train: Callable[[argparse.Namespace, Accelerator], None]) -> None:
    accelerator = Accelerator(
        gradient_accumulation_steps=args.accumulate,
        log_with=args.report_to or None,
        project_config=ProjectConfiguration(str(args.output), logging_dir=str(args.output / "logs")),
    )
    advice = " To continue, run the same command with --resume."
    run_script(accelerator, functools.partial(train, args, accelerator), advice)


def check_training(args: argparse.Namespace) -> None:
    """Raise an error for contradictory options, among those that all training scripts share."""
    if args.warmup_epochs > args.epochs:
        raise Problem(
            f"--warmup-epochs {args.warmup_epochs:g} is above --epochs {args.epochs}: lower one or raise the other."
        )
    if args.min_learning_rate > args.learning_rate:
        raise Problem(
            f"--min-learning-rate {args.min_learning_rate:g} is above --learning-rate {args.learning_rate:g}: "
            "lower one or raise the other."
        )
    if args.train_images and not args.streaming:
        raise Problem("--train-images needs --streaming: add --streaming, or leave out --train-images.")
    available = [tracker.value for tracker in get_available_trackers()]
    for tracker in args.report_to:
        if tracker not in available:
            raise Problem(f"--report-to {tracker}: that tracker is not installed here. Install it, or name another.")


def needs_training(args: argparse.Namespace, accelerator: Accelerator) -> bool:
    """Whether there is something left to train. Raises an error if --output cannot be used."""
    if not keeps_states(accelerator) and (args.resume or args.save_every):
        raise Problem(
            f"--resume and --save-every do not work with {accelerator.distributed_type.value}: its checkpoints are "
            "pickles, which can execute code. Leave both options out, or use FSDP 2."
        )
    check_output(args)
    if args.resume and is_complete(args.output):
        if accelerator.is_main_process:
            shutil.rmtree(args.output / ".part", ignore_errors=True)
        accelerator.print(f"Training is complete: {args.output} holds the best model, {args.output / 'last'} the last.")
        return False
    return True


def make_loaders(
    args: argparse.Namespace,
    accelerator: Accelerator,
    keys: Callable,
    images: int,
    validation_keys: Callable,
    fetchers: Sequence[Callable],
    views: Sequence[Callable],
    kind: Callable[..., Images] = Images,
) -> tuple[TrainingBatches, Loader, Loader]:
    """The batch sampler of training, the training loader and the validation loader.

    Args:
        keys, images: as in [`TrainingBatches`], for training.
        validation_keys: as in [`EvaluationBatches`], for validation.
        fetchers, views: as in [`Images`], for training and for validation.
        kind: given a fetcher and a view, the data set that loads images.
    """
    place = accelerator.num_processes, accelerator.process_index
    train_batches = TrainingBatches(keys, images, args.batch_size, args.accumulate, *place, args.seed)
    batches = train_batches, EvaluationBatches(validation_keys, args.batch_size, *place)
    return train_batches, *(
        Loader(kind(fetch, view), parts, args.workers, accelerator.device, args.strict)
        for fetch, view, parts in zip(fetchers, views, batches, strict=True)
    )


def result_settings(args: argparse.Namespace, accelerator: Accelerator, images: int, data: Iterable) -> dict:
    """The settings that determine the result, by option name. `data` is as for [`fingerprint`]."""
    options = {
        f"--{name.replace('_', '-')}": value for name, value in vars(args).items() if name not in CHANGEABLE_OPTIONS
    }
    return options | {
        "the number of processes": accelerator.num_processes,
        "the precision": accelerator.mixed_precision,
        "the number of training images": images,
        "the fingerprint of pictures and labels": fingerprint(accelerator, data),
    }


def begin(
    args: argparse.Namespace,
    accelerator: Accelerator,
    model: torch.nn.Module,
    train_batches: TrainingBatches,
    loader: Loader,
    settings: dict,
    about: str,
    size: tuple[int, int],
    *,
    pixels: str | None = None,
    decay: Callable = schedule,
    ema: float | None = None,
    layer_decay: float = 1.0,
    groups: list[dict] | None = None,
    unsharded: str | None = None,
) -> Training:
    """Create the training run, resume it with --resume, and print a summary.

    Args:
        about: a text about the data and the model, for the summary.
        size: height and width of the smallest training images.
        pixels: the size of the training images as a text, for the summary (default: `size`).
        decay: the learning rate schedule.
        groups: the parameter groups of the optimizer (default: those of [`decay_groups`]).
        ema, unsharded: as in [`Training`].
    """
    check_size(model, *size)
    groups = groups or decay_groups(model, args.weight_decay, args.learning_rate, layer_decay)
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate)
    training = Training(
        *(accelerator, model, optimizer, functools.partial(decay, args), train_batches, loader),
        epochs=args.epochs,
        output=args.output,
        settings=settings,
        clip=args.clip,
        ema=ema,
        save_every=args.save_every,
        unsharded=unsharded,
    )
    resumed = args.resume and training.load_state()
    if args.push_to_hub and accelerator.is_main_process:
        try:  # before training, since this shows whether the user may upload
            HfApi().create_repo(args.push_to_hub, exist_ok=True)
        except Exception as error:
            raise Problem(
                f"Cannot create the repository --push-to-hub {args.push_to_hub}: {first_line(error)}"
            ) from error
    if accelerator.is_main_process and not resumed:
        if args.overwrite or args.resume:
            clear_output(args.output)
        # The folder marks an unfinished run.
        training.checkpoints.folder.mkdir(parents=True, exist_ok=True)
    accelerator.wait_for_everyone()
    if args.report_to:
        written = {name: value for name, value in settings.items() if isinstance(value, int | float | str)}
        accelerator.init_trackers(args.output.resolve().name, written)

    alone = accelerator.distributed_type == DistributedType.NO
    engine = "" if alone else f" ({accelerator.distributed_type.value})"
    parameters = sum(parameter.numel() for parameter in model.parameters())
    learning = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    accelerator.print(
        f"{model.config.model_type}, {parameters / 1e6:.2f} M parameters"
        + (f" ({learning / 1e6:.2f} M trainable)" if learning < parameters else "")
        + f", {about}; {settings['the number of training images']} training images of "
        f"{pixels or '{} x {}'.format(*size)} pixels; "
        f"{accelerator.num_processes} process(es) on {accelerator.device.type}{engine}, "
        f"precision {accelerator.mixed_precision}; {args.epochs} epochs, {train_batches.steps * args.epochs} steps."
    )
    if resumed:
        accelerator.print(f"Resuming after step {training.progress.step} of epoch {training.progress.epoch + 1}.")
    elif args.resume:
        accelerator.print(f"{args.output} holds no checkpoint to resume from: starting from the beginning.")
    return training


def train_and_keep(
    args: argparse.Namespace,
    accelerator: Accelerator,
    training: Training,
    loss_function: Callable,
    measure: Callable,
    merit: Callable,
    describe: Callable,
    processor: BaseImageProcessor,
    draw_figures: Callable[[Path], None],
    card: Callable[[dict], Card],
    *,
    draw_all: bool = False,
) -> dict:
    """Train to the end. Save the best model in `--output` and the last in its folder `last`.

    Args:
        loss_function, measure, merit, describe: as in [`Training.run`].
        processor: the image processor that is saved with the model.
        draw_figures: called by the main process with a folder, to save figures about the latest measures.
        card: given the measures, the content of the model card.
        draw_all: draw after each epoch, not only after an epoch with the best model so far.

    Returns:
        The results.
    """
    measured = False

    def tracked_measure(model: torch.nn.Module) -> dict:
        nonlocal measured
        measured = True
        return measure(model)

    def write(folder: Path, results: dict) -> None:
        model, weights = training.weights()
        if not accelerator.is_main_process:
            return
        adapted = model if isinstance(model, peft.PeftModel) else None
        if adapted:
            model, weights = copy.deepcopy(adapted).merge_and_unload(), None

        def add(folder: Path) -> None:
            draw_curves(folder / "curves.png", results["history"])
            draw_figures(folder)
            entry = results["history"][-1]
            write_card(folder, card(entry), args, training.checkpoints.settings, entry)
            if adapted:
                adapted.save_pretrained(folder / "adapter")

        save_model(folder, model, processor, results, weights, add)

    def save(results: dict, better: bool) -> None:
        if better:
            write(args.output, results)
        elif accelerator.is_main_process:
            if draw_all:
                draw_figures(args.output)
            write_results(args.output, results)
        training.report_new_unreadable()

    training.run(loss_function, tracked_measure, merit, describe, save)
    results = json.loads((args.output / "results.json").read_text())
    if not measured:  # all epochs were finished before this process started, and the figures need the measures
        measure(training.trained)
    write(args.output / "last", results)
    if accelerator.is_main_process:
        shutil.copy(args.output / "last" / "curves.png", args.output)
    training.checkpoints.remove()
    accelerator.wait_for_everyone()
    return results


def upload(args: argparse.Namespace, accelerator: Accelerator) -> None:
    repository = args.push_to_hub
    if not repository or not accelerator.is_main_process:
        return
    try:
        HfApi().upload_folder(repo_id=repository, folder_path=args.output, ignore_patterns=["last/*", "logs/*"])
    except Exception as error:
        raise Problem(
            f"Cannot upload {args.output}, which is complete: {first_line(error)}. To try again, run "
            f"hf upload {repository} {args.output}"
        ) from error
    accelerator.print(f"Uploaded {args.output} to the Hub as {repository}.")
