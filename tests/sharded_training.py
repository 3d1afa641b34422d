"""Detection and segmentation with models that FSDP2 shards, in processes that test_distributed.py starts.

They train on `scenes` in the current folder. Each process prints with which line a script refuses.
"""

import sys

import torch.distributed as dist
from accelerate import Accelerator
from torch.distributed.fsdp import FSDPModule, fully_shard

import finetune_detection
import finetune_segmentation
from common.options import Problem

OPTIONS = "--data", "scenes", "--epochs", "1", "--batch-size", "2", "--workers", "0"
SCRIPTS = {
    finetune_detection: ("--config", "detector", "--image-size", "64", "--output", "detected"),
    finetune_segmentation: ("--config", "backbone", "--crop-size", "32", "--output", "segmented"),
}


class ShardingAccelerator(Accelerator):
    """Shards models on CPUs, where Accelerate itself takes DDP in place of FSDP2."""

    def prepare_model(self, model, *args, **options) -> FSDPModule:
        return fully_shard(model, mesh=dist.init_device_mesh("cpu", (self.num_processes,)))


if __name__ == "__main__":
    accelerator = ShardingAccelerator(cpu=True)
    for script, options in SCRIPTS.items():
        sys.argv = [script.__name__, *OPTIONS, *options]
        try:
            script.train(script.parse_arguments(), accelerator)
        except Problem as problem:
            print(f"refused: {problem}", flush=True)
    accelerator.end_training()
