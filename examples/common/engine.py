"""The training loop, on any engine of Accelerate, with checkpoints that resume a run exactly."""

import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object, set_seed
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm.auto import tqdm

from .checkpoints import Checkpoints, collect_tensors, keeps_states, restore_tensors
from .loading import Loader, TrainingBatches, seed_of
from .options import Problem, format_names

# The reason for which detection and segmentation refuse sharding.
NEEDS_WHOLE_MODEL = "this script needs the whole model in each process: use DDP"


@dataclass
class Progress:
    """The progress of a run, which is saved in its checkpoints."""

    epoch: int = 0
    step: int = 0  # in this epoch
    sums: tuple[float, float] = (0.0, 0.0)  # in this epoch: losses of images, gradient norms of steps
    history: list[dict] = field(default_factory=list)
    best: dict | None = None


def is_finite(parameter: torch.nn.Parameter) -> bool:
    """Whether all values are finite. Of a sharded parameter, only the local shard is checked."""
    values = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    return bool(values.isfinite().all())


def convert_images(model: torch.nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Convert `pixel_values` to the dtype of the weights, before a forward pass."""
    dtype = next(model.parameters()).dtype
    return args, kwargs | {"pixel_values": kwargs["pixel_values"].to(dtype)}


def refuse_sharding(accelerator: Accelerator, reason: str, model: torch.nn.Module | None = None) -> None:
    """Raise an error, with `reason`, if the engine shards models among processes, or if the model is sharded."""
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise Problem(f"{accelerator.distributed_type.value} shards the model among processes, and {reason}.")
    # Tensor parallelism, for example, is no engine: Accelerate gives DDP's name.
    if model is not None and any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        raise Problem(f"The parameters of the model are sharded among processes, and {reason}.")


class Training:
    """A training run: the model, the optimizer, the schedule, the data and the progress.

    Args:
        schedule (`Callable[[Optimizer, int], LRScheduler]`):
            Given the optimizer and the total number of steps, the learning rate schedule.
        settings (`dict`):
            The settings that determine the result, by option name.
        ema (`float`, *optional*):
            Decay of an exponential moving average of the weights. `trained` is then the averaged model.
        save_every (`int`, *optional*):
            Steps between checkpoints within an epoch. A checkpoint is always written after each epoch.
        unsharded (`str`, *optional*):
            The reason for which a model that is sharded among processes is refused.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        schedule: Callable,
        train_batches: TrainingBatches,
        loader: Loader,
        *,
        epochs: int,
        output: Path,
        settings: dict,
        clip: float,
        ema: float | None = None,
        save_every: int | None = None,
        unsharded: str | None = None,
    ):
        if ema:
            unsharded = "--ema averages whole weights: leave out one of the two"
        if unsharded:
            refuse_sharding(accelerator, unsharded)
        if accelerator.distributed_type == DistributedType.DEEPSPEED:  # DeepSpeed would ask a loader of Accelerate
            settings_of_deepspeed = accelerator.state.deepspeed_plugin.deepspeed_config
            settings_of_deepspeed["train_micro_batch_size_per_gpu"] = train_batches.batch_size
        self.accelerator, self.train_batches, self.loader = accelerator, train_batches, loader
        self.epochs, self.clip, self.save_every = epochs, clip, save_every
        self.progress, self.reported = Progress(), set()
        # Not prepared: Accelerate would step the schedule once per process in each step.
        self.scheduler = schedule(optimizer, train_batches.steps * epochs)
        self.average = ema and AveragedModel(model, accelerator.device, multi_avg_fn=get_ema_multi_avg_fn(ema))
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        if accelerator.distributed_type == DistributedType.DEEPSPEED:
            # DeepSpeed converts the weights to the precision of the run. Other engines convert in each operation.
            self.model.register_forward_pre_hook(convert_images, with_kwargs=True)
        if unsharded:
            refuse_sharding(accelerator, unsharded, self.model)
        self.checkpoints = Checkpoints(accelerator, output, settings)

    def save_state(self) -> None:
        """Save a checkpoint. All processes must call this."""
        if not keeps_states(self.accelerator):
            return
        scaler = self.accelerator.scaler
        values = {
            "progress": vars(self.progress),
            "scheduler": self.scheduler.state_dict(),
            "scaler": scaler.state_dict() if scaler else None,
        }
        step = self.progress.epoch * self.train_batches.steps + self.progress.step
        self.checkpoints.save(step, collect_tensors(self.model, self.optimizer.optimizer, self.average), values)

    def load_state(self) -> bool:
        """Load the latest checkpoint. Returns whether there is one."""
        saved = self.checkpoints.load()
        if saved is None:
            return False
        tensors, values = saved
        optimizer = self.optimizer.optimizer
        try:
            restore_tensors(tensors, self.model, optimizer, self.average)
            self.progress = Progress(**values["progress"])
            self.scheduler.load_state_dict(values["scheduler"])
            for group, rate in zip(optimizer.param_groups, self.scheduler.get_last_lr(), strict=True):
                group["lr"] = rate
            if self.accelerator.scaler:
                self.accelerator.scaler.load_state_dict(values["scaler"])
        except Exception as error:
            raise self.checkpoints.unusable(self.checkpoints.latest, error) from error
        return True

    @property
    def trained(self) -> torch.nn.Module:
        """The model to evaluate."""
        return self.average.module if self.average else self.model

    def weights(self) -> tuple[torch.nn.Module, dict]:
        """The model to save, and its weights. All processes must call this."""
        if self.average:
            return self.average.module, self.average.module.state_dict()
        return self.accelerator.unwrap_model(self.model), self.accelerator.get_state_dict(self.model)

    def run(
        self,
        loss_function: Callable[[torch.nn.Module, dict], torch.Tensor],
        evaluate: Callable[[torch.nn.Module], dict],
        merit: Callable[[dict], tuple],
        describe: Callable[[dict], str],
        save: Callable[[dict, bool], None],
    ) -> None:
        """Train to the end.

        Args:
            loss_function: given the model and a batch, the mean loss over the images.
            evaluate: given the model, the measures after an epoch.
            merit: given the measures, a sort key; the best model has the greatest key.
            describe: given the measures, a text for the progress line.
            save: called by all processes after each epoch with the results so far, and whether the model is the best.
        """
        accelerator, progress = self.accelerator, self.progress
        with tqdm(
            total=self.train_batches.steps * self.epochs,
            initial=progress.epoch * self.train_batches.steps + progress.step,
            unit="step",
            disable=not accelerator.is_main_process,
            smoothing=0.05,
        ) as bar:
            while progress.epoch < self.epochs:
                started = time.perf_counter()
                train_loss, gradient_norm = self.train_epoch(loss_function, bar)
                if not math.isfinite(train_loss):
                    raise self.diverged(f"loss became {train_loss}")
                if not all(is_finite(parameter) for parameter in self.trained.parameters()):
                    raise self.diverged("weights became infinite")
                measured = evaluate(self.trained)
                if not math.isfinite(measured.get("loss", 0)):
                    raise self.diverged(f"validation loss became {measured['loss']}")
                trained = {"epoch": progress.epoch + 1, "train_loss": train_loss, "gradient_norm": gradient_norm}
                entry = trained | measured
                progress.history.append(entry)
                better = progress.best is None or merit(entry) > merit(progress.best)
                progress.best = entry if better else progress.best
                save(
                    {"best": progress.best, "processes": accelerator.num_processes, "history": progress.history}, better
                )
                rate = self.scheduler.get_last_lr()[-1]
                numbers = {name: value for name, value in entry.items() if isinstance(value, int | float)}
                accelerator.log({"learning_rate": rate, **numbers}, step=entry["epoch"] * self.train_batches.steps)
                if accelerator.is_main_process:
                    bar.write(
                        f"epoch {entry['epoch']:3}/{self.epochs}  train loss {train_loss:.3f}  {describe(measured)}  "
                        f"{time.perf_counter() - started:.1f} s{'  saved' if better else ''}"
                    )
                progress.epoch, progress.step, progress.sums = progress.epoch + 1, 0, (0.0, 0.0)
                self.save_state()

    def diverged(self, how: str) -> Problem:
        return Problem(
            f"The {how} in epoch {self.progress.epoch + 1}: lower --learning-rate, or use another precision than fp16."
        )

    def train_epoch(self, loss_function: Callable, bar: tqdm) -> tuple[float, float]:
        """Train to the end of the epoch. Returns the mean loss and the mean gradient norm."""
        accelerator, progress, train_batches = self.accelerator, self.progress, self.train_batches
        self.model.train()
        train_batches.start(progress.epoch, progress.step)
        batches = iter(self.loader)
        loss_sum, norm_sum = torch.tensor(progress.sums, device=accelerator.device)
        for step in range(progress.step, train_batches.steps):
            # A seed for each step: all random choices depend on it, so checkpoints need no random state.
            set_seed(seed_of(train_batches.seed, "step", progress.epoch, step, accelerator.process_index))
            share, seen = train_batches.share(step), 0
            while seen < share:
                batch = next(batches)
                images = len(batch["pixel_values"])
                seen += images
                accelerator.sync_gradients = seen == share
                with contextlib.nullcontext() if seen == share else accelerator.no_sync(self.model):
                    loss = loss_function(self.model, batch) * images
                    # Accelerate divides by the number of batches in a step; batches here may have different sizes.
                    accelerator.backward(loss * (accelerator.gradient_accumulation_steps / share))
                loss_sum += loss.detach()
            norm_sum += accelerator.clip_grad_norm_(self.model.parameters(), self.clip)
            try:
                self.optimizer.step()
            except RuntimeError as error:
                if "without overflow" not in str(error):  # a number that does not fit into the dtype of a weight
                    raise
                raise self.diverged("weights became infinite") from error
            self.optimizer.zero_grad()
            if not accelerator.optimizer_step_was_skipped:  # fp16 skips steps while its loss scale is too large
                self.scheduler.step()
                if self.average:
                    self.average.update_parameters(accelerator.unwrap_model(self.model))
            bar.update()
            progress.step = step + 1
            done = progress.epoch * train_batches.steps + progress.step
            if self.save_every and done % self.save_every == 0 and progress.step < train_batches.steps:
                # The sum is local, and the checkpoint is shared by all processes.
                loss_sum.copy_(accelerator.reduce(loss_sum, "mean"))
                progress.sums = loss_sum.item(), norm_sum.item()
                self.save_state()
        return accelerator.reduce(loss_sum, "sum").item() / train_batches.images, norm_sum.item() / train_batches.steps

    def report_new_unreadable(self) -> None:
        """Print the unreadable training images of all processes that have not been printed yet."""
        new = [name for name in sorted(set(gather_object(self.loader.broken))) if name not in self.reported]
        if new:
            self.reported.update(new)
            self.accelerator.print(f"Skipped {len(new)} training images that cannot be read: {format_names(new)}")
