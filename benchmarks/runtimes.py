"""Times Focal and Swin in onnxruntime and OpenVINO on this machine: speed, and peak memory.

All models have random weights and are exported by the same exporter, torch.onnx.export, for images of one size and
batches of one size. Swin uses its eager attention, because its default attention cannot be exported. Focal is frozen
(`focal_hf.freeze`), as convert/export_onnx.py does it.

Each model runs in its own process, because idle threads of a runtime slow down other models in the same process. The
models of a row take turns until the time of the row (--seconds) is over. The output has the median. Peak memory is the
largest resident set of a process that loads one graph and runs it once, minus the largest before it loads the graph.
"""

import argparse
import logging
import multiprocessing
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np
import torch
from throughput import largest_resident_set
from transformers import SwinConfig, SwinForImageClassification

from focal_hf import FocalConfig, FocalForImageClassification, freeze

TINY = {"embed_dim": 96, "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24), "num_labels": 1000}
MODELS = ("swin", "focal", "topk")
RUNTIMES = ("onnxruntime", "openvino")
TURN = 0.5  # seconds
MIN_RUNS = 9


def export(name: str, size: int, batch: int, file: Path) -> None:
    torch.manual_seed(0)
    if name == "swin":
        model = SwinForImageClassification(SwinConfig(**TINY, image_size=224)).eval()
        model.set_attn_implementation("eager")
    else:
        model = FocalForImageClassification(FocalConfig(**TINY, attention_type=name))
        model = freeze(model, (size, size))
    sample = {"pixel_values": torch.randn(batch, 3, size, size)}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(model, kwargs=sample, dynamo=True, opset_version=20, verbose=False)
    program.save(file, external_data=False)


def load(runtime: str, file: Path, threads: int) -> Callable[[np.ndarray], object]:
    """A function that runs the graph."""
    if runtime == "onnxruntime":
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        return lambda images: session.run(None, {"pixel_values": images})
    import openvino

    # Without the hint, OpenVINO computes in bfloat16 where the processor can.
    settings = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
    request = openvino.Core().compile_model(file, "CPU", settings).create_infer_request()
    return lambda images: request.infer([images])


def start(runtime: str, file: Path, threads: int, shape: tuple[int, ...]) -> None:
    """Loads a graph into this process."""
    global run, memory
    __import__(runtime)
    images = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    before = largest_resident_set()
    graph = load(runtime, file, threads)
    graph(images)
    memory = largest_resident_set() - before
    run = partial(graph, images)


def times_of_turn(step: Callable[[], object]) -> list[float]:
    """Times of runs, in seconds. The first run is not counted."""
    step()
    times: list[float] = []
    while sum(times) < TURN:
        begin = time.perf_counter()
        step()
        times.append(time.perf_counter() - begin)
    return times


def take_turn() -> list[float]:
    return times_of_turn(run)


def peak_memory() -> float:
    """In MiB."""
    return memory


def measure(runtime: str, files: dict[str, Path], shape: tuple[int, ...], seconds: float, threads: int) -> None:
    context = multiprocessing.get_context("spawn")
    with ExitStack() as stack:
        pools = {}
        for name, file in files.items():
            pool = ProcessPoolExecutor(1, context, initializer=start, initargs=(runtime, file, threads, shape))
            pools[name] = stack.enter_context(pool)
        memory = {name: pool.submit(peak_memory).result() for name, pool in pools.items()}
        times = {name: [] for name in pools}
        end = time.perf_counter() + seconds
        while time.perf_counter() < end or len(times[MODELS[0]]) < MIN_RUNS:
            for name, pool in pools.items():
                times[name] += pool.submit(take_turn).result()
    medians = {name: statistics.median(values) for name, values in times.items()}
    for name, median in medians.items():
        print(
            f"| {runtime} | {shape[2]} | {shape[0]} | {name} | {median * 1000:.1f} | {medians['swin'] / median:.2f} | "
            f"{memory[name]:.0f} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[224, 448], help="pixels per side")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--models", nargs="+", choices=MODELS[1:], default=list(MODELS[1:]), help="compared with Swin")
    parser.add_argument("--runtimes", nargs="+", choices=RUNTIMES, default=list(RUNTIMES))
    parser.add_argument("--seconds", type=float, default=60, help="time of a row")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    logging.disable(logging.WARNING)  # the exporter's, that torchvision is not installed
    print("| runtime | pixels | batch | model | ms | speed, Swin = 1 | peak memory, MiB |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for size in options.sizes:
            for batch in options.batch_sizes:
                files = {name: Path(folder, f"{name}.onnx") for name in ("swin", *options.models)}
                for name, file in files.items():
                    export(name, size, batch, file)
                for runtime in options.runtimes:
                    measure(runtime, files, (batch, 3, size, size), options.seconds, options.threads)


if __name__ == "__main__":
    main()
