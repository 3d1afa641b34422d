"""Checkpoints to resume a run from. They are JSON and safetensors files, so loading them executes no code."""

import hashlib
import json
import shutil
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast_object_list
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim.swa_utils import AveragedModel

from .files import remove_folder, states_in, sync
from .options import Problem, first_line

TENSORS, VALUES, CHECKSUMS = "tensors.safetensors", "state.json", "checksums.json"


def keeps_states(accelerator: Accelerator) -> bool:
    """Whether the engine gives access to single tensors. DeepSpeed and FSDP 1 save pickles instead."""
    return accelerator.distributed_type not in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM) and (
        accelerator.distributed_type != DistributedType.FSDP or accelerator.is_fsdp2
    )


def collect_tensors(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, average: AveragedModel | None = None
) -> dict[str, torch.Tensor]:
    """All tensors that training changes, by name. All processes must call this if the model is sharded."""
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    for number, values in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{number}.{name}": value for name, value in values.items()}
    if average:
        tensors |= {f"average.{name}": value for name, value in average.state_dict().items()}
    return {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in tensors.items()}


def restore_tensors(
    tensors: dict[str, torch.Tensor],
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    average: AveragedModel | None = None,
) -> None:
    """Load the tensors that [`collect_tensors`] returned."""
    model.load_state_dict(
        {name: shard_like(tensors[f"model.{name}"], value) for name, value in model.state_dict().items()}
    )
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict] = {}
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            _, number, name = key.split(".")
            # Cloned, since tensors in a file are not aligned as tensors in memory are.
            like = value if name == "step" else shard_like(value, parameters[int(number)])
            state.setdefault(int(number), {})[name] = like.clone()
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    if average:
        average.load_state_dict({name: tensors[f"average.{name}"] for name in average.state_dict()})


def shard_like(value: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """Shard a tensor as `own` is sharded, or return it unchanged if `own` is not sharded."""
    if not isinstance(own, DTensor):
        return value
    return distribute_tensor(value.to(own.device), own.device_mesh, own.placements)


def unshare_memory(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Clone tensors that share memory, which safetensors refuses to save."""
    seen, separated = set(), {}
    for name, value in tensors.items():
        value = value.detach().cpu().contiguous()
        storage = value.untyped_storage().data_ptr()
        separated[name] = value.clone() if storage in seen else value
        seen.add(storage)
    return separated


def checksum(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def first_damaged(state: Path) -> Path | None:
    """The first file of a checkpoint that is missing or damaged."""
    sums = state / CHECKSUMS
    try:
        expected = json.loads(sums.read_bytes()) if sums.is_file() else None
    except (OSError, ValueError, RecursionError):
        expected = None
    if not isinstance(expected, dict) or expected.keys() != {TENSORS, VALUES}:
        return sums
    for name, digest in expected.items():
        try:
            if not (state / name).is_file() or checksum(state / name) != digest:
                return state / name
        except OSError:
            return state / name
    return None


class Checkpoints:
    """The latest two states of a run, in OUTPUT/checkpoints/step_N.

    `settings` determine the result of the run. A run does not resume with other settings.
    """

    def __init__(self, accelerator: Accelerator, output: Path, settings: dict):
        self.accelerator, self.output, self.folder = accelerator, output, output / "checkpoints"
        self.settings = json.loads(json.dumps(settings))
        self.latest: Path | None = None

    def save(self, step: int, tensors: dict[str, torch.Tensor], values: dict) -> None:
        """Write to a temporary folder, the checksums last, and rename it. Then remove all but the latest two states."""
        if self.accelerator.is_main_process:
            temporary, place = self.folder / "part", self.folder / f"step_{step:09}"
            try:
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir(parents=True)
                save_file(unshare_memory(tensors), temporary / TENSORS)
                (temporary / VALUES).write_text(json.dumps({"settings": self.settings} | values, indent=2) + "\n")
                sums = {name: checksum(temporary / name) for name in (TENSORS, VALUES)}
                (temporary / CHECKSUMS).write_text(json.dumps(sums, indent=2) + "\n")
                for path in (temporary / TENSORS, temporary / VALUES, temporary / CHECKSUMS, temporary):
                    sync(path)
                remove_folder(place, self.folder / "old")  # a damaged state, if any
                temporary.rename(place)
                sync(self.folder)
                for state in states_in(self.output):
                    if state not in (place, self.latest):
                        remove_folder(state, self.folder / "old")
            except Exception as error:  # safetensors has its own error for a full disk
                kept = f"{self.latest} is complete: --resume continues from it" if self.latest else "there is none yet"
                raise Problem(f"Cannot save a checkpoint in {self.folder} ({first_line(error)}); {kept}.") from error
            self.latest = place
        self.accelerator.wait_for_everyone()

    def load(self) -> tuple[dict[str, torch.Tensor], dict] | None:
        """The tensors and values of the latest undamaged state, or None if there is no state."""
        state, damaged = broadcast_object_list(
            [*self.latest_whole()] if self.accelerator.is_main_process else [None, []]
        )
        if state is None and damaged:
            raise Problem(
                f"{damaged[0]} is missing or damaged, and there is no other state to resume from: start again with "
                "--overwrite or another --output."
            )
        if state is None:
            return None
        for file in damaged:
            self.accelerator.print(f"{file} is missing or damaged: resuming from {state.name}, an earlier state.")
        try:
            values = json.loads((state / VALUES).read_bytes())
            saved = values.pop("settings")
            tensors = load_file(state / TENSORS)
        except Exception as error:
            raise self.unusable(state, error) from error
        changed = [
            f"{name} was {saved.get(name)} and is now {self.settings.get(name)}"
            for name in {**saved, **self.settings}
            if saved.get(name) != self.settings.get(name)
        ]
        if changed:
            raise Problem(
                f"{self.output} cannot be resumed with other settings: {'; '.join(changed)}. Use the earlier settings "
                "with --resume, or start again with --overwrite or another --output."
            )
        self.latest = state
        return tensors, values

    def latest_whole(self) -> tuple[Path | None, list[Path]]:
        """The latest undamaged state, and a damaged file of each later state."""
        damaged = []
        for state in states_in(self.output):
            file = first_damaged(state)
            if file is None:
                return state, damaged
            damaged.append(file)
        return None, damaged

    @staticmethod
    def unusable(state: Path, error: Exception) -> Problem:
        return Problem(
            f"Cannot resume from {state} ({first_line(error)}): start again with --overwrite or another --output."
        )

    def remove(self) -> None:
        """Remove all states atomically. A run without this folder counts as complete."""
        if self.accelerator.is_main_process:
            remove_folder(self.folder, self.output / ".part")
