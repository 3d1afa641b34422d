"""Times attention on a GPU: the Triton kernels, PyTorch's attention on gathered keys, and a lower bound.

A row is the attention of the blocks of one stage. Queries, keys, values and the neighbourhood are inputs; projections
and MLPs are not part of the time. "forward" runs without gradients. "backward" is a forward and a backward pass minus
"forward". "All blocks" is the sum over the stages, each multiplied by its number of blocks.

The lower bound ("floor") is the longer of two times:
- reading the inputs and writing the outputs once (queries, keys, values, output; in the backward pass also their
  gradients), at the rate at which the GPU copies a large tensor;
- the operations of the matrix products, at the rate of one large matrix product.

The time is that of the GPU alone: a CUDA graph of many calls is replayed, so inputs may be in its second-level cache.
With --eager, the calls are made from Python with a cold cache, and the time includes Python where the GPU waits for it.

The first call of each row compiles. --first-call measures it with an empty cache. --tune measures other block sizes
(LAUNCH_SIZES in triton_attention_focal.py) and prints the fastest for each stage. throughput.py times whole models;
with --peer sdpa swin, it compares them with PyTorch's attention and with Swin.
"""

import argparse
import itertools
import os
import tempfile
import time
from collections.abc import Callable

import torch
from throughput import MODEL_SIZES, Setting, device_name, log, matmul_rate

from focal_hf import FocalConfig
from focal_hf.attention_focal import choose_attention
from focal_hf.modeling_focal import FocalAttention
from focal_hf.neighborhood_focal import BiasPart, Neighborhood

EXAMPLES = """\
examples:
  the attention of four models at three image sizes:
    python benchmarks/triton_attention.py --models tiny small base tiny-topk

  whole models, in inference and in training, then compiled:
    rows="--task inference training --sizes 224 448 896 --peer sdpa swin"
    python benchmarks/throughput.py --models tiny small base $rows
    python benchmarks/throughput.py --attention topk $rows
    python benchmarks/throughput.py --models tiny small base $rows --compile
    python benchmarks/throughput.py --attention topk $rows --compile

  other block sizes for the first model:
    python benchmarks/triton_attention.py --sizes 224 --tune
"""
IMPLEMENTATIONS = ("triton", "sdpa")
# Queries per block, keys per block, side of a block of tokens, warps.
LAUNCHES_TO_TRY = list(itertools.product((32, 64), (16, 32, 64), (4, 8), (4, 8)))


def seconds_of(function: Callable[[], object], device: torch.device, eager: bool = True) -> float:
    """Median seconds of a call, after a warm-up; the top of this file says what is measured."""
    if device.type == "cuda":
        from triton.testing import do_bench, do_bench_cudagraph

        return (do_bench if eager else do_bench_cudagraph)(function, return_mode="median") / 1e3
    start = time.perf_counter()  # Triton's interpreter: one call, to test that it runs
    function()
    return time.perf_counter() - start


def copy_rate(device: torch.device) -> float:
    """Bytes per second read and written by a copy of a large tensor."""
    source = torch.empty(2**29 if device.type == "cuda" else 2**24, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / seconds_of(lambda: target.copy_(source), device)


class Call:
    """The attention of one block of a stage, with random inputs."""

    def __init__(
        self, size: str, attention_type: str, stage: int, pixels: int, batch: int, setting: Setting, eager: bool
    ):
        torch.manual_seed(0)
        self.eager = eager
        device, dtype = torch.device(setting.device), getattr(torch, setting.dtype)
        self.config = FocalConfig(**MODEL_SIZES[size], attention_type=attention_type)
        self.blocks = self.config.depths[stage]
        attention = FocalAttention(self.config, stage, self.config.block_geometry(stage, 0)).to(device, dtype)
        self.attention = attention.eval()
        window, channels = attention.window_size, self.config.embed_dim * 2**stage
        side = -(-pixels // (4 * 2**stage))
        side = -(-side // window) * window
        neighborhood = attention.neighborhood(torch.empty(batch, side, side, channels, device=device, dtype=dtype))
        parts = [BiasPart(part.source.detach().requires_grad_(), part.pattern) for part in neighborhood.parts]
        self.neighborhood = Neighborhood(neighborhood.index, parts, neighborhood.squares, neighborhood.shift_size)
        tokens = int(neighborhood.index.max()) + 1
        self.query, self.grad_output = torch.randn(2, batch, side**2, channels, device=device, dtype=dtype).unbind()
        self.key, self.value = torch.randn(2, batch, tokens, channels, device=device, dtype=dtype).unbind()
        self.inputs = [self.query, self.key, self.value]
        for tensor in self.inputs:
            tensor.requires_grad_()

    def forward(self) -> torch.Tensor:
        attention = choose_attention(self.attention, self.query, self.neighborhood)
        return attention.attend(self.attention, *self.inputs, self.neighborhood)[0]

    def seconds(self, implementation: str) -> tuple[float, float]:
        """Seconds of the forward and of the backward pass."""
        self.config._attn_implementation = implementation
        leaves = [*self.inputs, *(part.source for part in self.neighborhood.parts)]
        with torch.no_grad():
            forward = seconds_of(self.forward, self.query.device, self.eager)

        def both():
            torch.autograd.grad(self.forward(), leaves, self.grad_output)

        return forward, seconds_of(both, self.query.device, self.eager) - forward

    def floors(self, bytes_per_s: float, operations_per_s: float) -> tuple[float, float]:
        """Lower bounds in seconds for the forward and the backward pass."""
        queries, keys = (tensor.numel() * tensor.element_size() for tensor in (self.query, self.key))
        products = 2 * self.query.numel() * self.neighborhood.index.shape[-1]  # operations of one matrix product
        return (
            max((2 * queries + 2 * keys) / bytes_per_s, 2 * products / operations_per_s),
            max((4 * queries + 4 * keys) / bytes_per_s, 5 * products / operations_per_s),
        )


def first_call(call: Call) -> float:
    """Seconds of the first forward and backward pass, including compilation."""
    call.config._attn_implementation = "triton"
    start = time.perf_counter()
    torch.autograd.grad(call.forward(), call.inputs, call.grad_output)
    if call.query.is_cuda:
        torch.cuda.synchronize(call.query.device)
    return time.perf_counter() - start


def tune(call: Call) -> list[tuple[float, tuple[int, ...]]]:
    """Seconds of a forward and backward pass, and block sizes, for all block sizes that run, the fastest first."""
    from focal_hf import triton_attention_focal as kernels

    size, found = call.query.element_size(), []
    kept = dict(kernels.LAUNCH_SIZES[size])
    for numbers in LAUNCHES_TO_TRY:
        kernels.LAUNCH_SIZES[size] = {kernels.LARGEST_HEAD: kernels.LaunchSizes(*numbers)}
        try:
            found.append((sum(call.seconds("triton")), numbers))
        except Exception as error:  # such as too little shared memory or too few registers
            log(f"    {numbers}: {type(error).__name__}: {str(error).splitlines()[0]}")
    kernels.LAUNCH_SIZES[size] = kept
    return sorted(found)


def row(cells: list) -> str:
    return f"| {' | '.join(f'{cell:,.3f}' if isinstance(cell, float) else str(cell) for cell in cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    models = ["tiny", "small", "base", "tiny-topk", "small-topk", "base-topk"]
    parser.add_argument("--models", nargs="+", choices=models, default=["tiny"], help="default: tiny")
    parser.add_argument(
        "--sizes", nargs="+", type=int, default=[224, 448, 896], metavar="PIXELS", help="side of the images"
    )
    parser.add_argument("--batch-size", type=int, metavar="N", help="default: 64 for 224 pixels, or as many pixels")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--device", default="cuda", metavar="NAME", help="cuda, or cpu with TRITON_INTERPRET=1")
    parser.add_argument("--eager", action="store_true", help="time calls from Python, with its overhead")
    parser.add_argument("--first-call", action="store_true", help="also time the first call, with an empty cache")
    parser.add_argument("--tune", action="store_true", help="also time other block sizes (minutes per stage)")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error(
            "PyTorch sees no GPU. To test the script on a CPU: TRITON_INTERPRET=1 ... --device cpu --sizes 28."
        )
    if device.type == "cuda":
        torch.cuda.set_device(device)  # the timer records events on the current device
    if arguments.first_call:
        os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp()  # Triton reads it at the first launch

    setting = Setting(arguments.device, arguments.dtype, compile=False, threads=1, original=None)
    bandwidth, rate = copy_rate(device), matmul_rate(setting) * 1e9
    print(f"{device_name(arguments.device)}, {arguments.dtype}, torch {torch.__version__}: ", end="")
    print(f"{bandwidth / 1e9:,.0f} GB/s copied, {rate / 1e12:,.2f} TFLOP/s in a matrix product. Times in ms.\n")
    heads = ["model", "pixels", "batch", "stage", "pass", *IMPLEMENTATIONS, "floor", "sdpa / triton", "triton / floor"]
    print(row(heads), row(["---"] * len(heads)), sep="\n")
    for name, pixels in itertools.product(arguments.models, arguments.sizes):
        size, _, kind = name.partition("-")
        batch, totals = arguments.batch_size or max(1, 64 * 224**2 // pixels**2), {}
        for stage in range(4):
            call = Call(size, kind or "focal", stage, pixels, batch, setting, arguments.eager)
            if arguments.first_call:
                log(f"{name}, {pixels} pixels, stage {stage + 1}: first call {first_call(call):.1f} s")
            if arguments.tune:
                fastest = ", ".join(f"{numbers} {seconds * 1e3:.3f} ms" for seconds, numbers in tune(call)[:3])
                log(f"{name}, {pixels} pixels, stage {stage + 1}: fastest {fastest}")
            times = *(call.seconds(implementation) for implementation in IMPLEMENTATIONS), call.floors(bandwidth, rate)
            for number, direction in enumerate(("forward", "backward")):
                cells = [1e3 * of_passes[number] for of_passes in times]
                before = totals.get(direction, [0.0] * len(cells))
                totals[direction] = [total + call.blocks * cell for total, cell in zip(before, cells, strict=True)]
                ratios = cells[1] / cells[0], cells[0] / cells[2]
                print(row([name, pixels, batch, stage + 1, direction, *cells, *ratios]), flush=True)
        for direction, cells in totals.items():
            print(row([name, pixels, batch, "all blocks", direction, *cells, cells[1] / cells[0], cells[0] / cells[2]]))


if __name__ == "__main__":
    main()
