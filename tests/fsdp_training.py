"""Trains under FSDP2 and stops in the middle, in processes that test_distributed.py starts: FOLDER ATTENTION_TYPE."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import FSDPModule, fully_shard

from common.checkpoints import collect_tensors, restore_tensors, unshare_memory
from focal_hf import FocalForImageClassification
from small_models import tiny

STEPS = 4


def batch(step):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(4, 3, 36, 40, generator=generator), torch.arange(4)


def build(attention_type):
    torch.manual_seed(0)
    config = tiny(attention_type, drop_path_rate=0.0, use_absolute_embeddings=True, use_shift=True)
    return FocalForImageClassification(config).train()


def optimizer_of(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def sharded(attention_type):
    """The model, in the blocks that it declares, and its optimizer."""
    model = build(attention_type)
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    blocks = [module for module in model.modules() if type(module).__name__ in model._no_split_modules]
    for module in [*blocks, model]:
        fully_shard(module, mesh=mesh)
    assert sum(isinstance(module, FSDPModule) for module in model.modules()) == len(blocks) + 1 > 3
    assert all(type(parameter.data).__name__ == "DTensor" for parameter in model.parameters())
    return model, optimizer_of(model)


def train(model, optimizer, steps):
    rank, processes = dist.get_rank(), dist.get_world_size()
    for step in steps:
        images, labels = batch(step)
        mine = slice(rank * len(labels) // processes, (rank + 1) * len(labels) // processes)
        loss = model(images[mine], labels=labels[mine]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        dist.all_reduce(loss.detach_())
        if rank == 0:
            print(step, loss.item() / processes, flush=True)


def main(folder: Path, attention_type: str) -> None:
    dist.init_process_group("gloo")
    model, optimizer = sharded(attention_type)
    half = STEPS // 2
    train(model, optimizer, range(half))
    of_model, of_optimizer = get_state_dict(model, optimizer)
    checkpoint.save({"model": of_model, "optimizer": of_optimizer}, checkpoint_id=folder / "checkpoint")

    ours = collect_tensors(model, optimizer)
    if dist.get_rank() == 0:
        save_file(unshare_memory(ours), folder / "ours.safetensors")
    dist.barrier()

    model, optimizer = sharded(attention_type)
    of_model, of_optimizer = get_state_dict(model, optimizer)
    checkpoint.load({"model": of_model, "optimizer": of_optimizer}, checkpoint_id=folder / "checkpoint")
    set_state_dict(model, optimizer, model_state_dict=of_model, optim_state_dict=of_optimizer)
    resumed = sharded(attention_type)
    restore_tensors(load_file(folder / "ours.safetensors"), *resumed)  # as examples/ do it
    restored = collect_tensors(*resumed)
    assert all(value.equal(restored[name]) for name, value in collect_tensors(model, optimizer).items())
    assert restored.keys() == ours.keys()
    train(model, optimizer, range(half, STEPS))
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if dist.get_rank() == 0:
        model.save_pretrained(folder / "model", state_dict=whole)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
