"""Times Focal, Swin, FocalNet and the authors' code on this machine: speed, peak memory, and time per operation.

Models. All models of a row have random weights and share the images and the dtype. All are built for images of 224
pixels, like the published models, whatever the size of the images in the row. Only the authors' code is built for the
size in the row, because it runs at no other. Each peer uses sdpa or eager attention, whichever is faster here
uncompiled. Focal uses its default attention or, on a GPU with Triton installed, attn_implementation="triton". The peer
"sdpa" is Focal with PyTorch's attention. The peer "frozen" is Focal after focal_hf.freeze, in rows of inference. The
peer "swin-as-focal" is the Swin of the row, with the same weights, converted by convert_swin_to_focal.py: this package
computes it.

Time. Each row runs in its own process. After a warm-up the models take turns, one step each, until the time of the row
(--seconds) is over and each model has made three steps. The output has the median and the quartiles. A step of
inference is a forward pass. A step of training is a forward and a backward pass, without an optimizer.

Peak memory is the maximum during one step, minus the memory of the loaded model and the images. Training includes the
gradients. On a GPU it is torch.cuda.max_memory_allocated minus the memory that was allocated before. On a CPU each
model and row is measured in its own process: the largest resident set until the end of the first step, minus the
largest resident set before it. Before that, a copy of the model does a step at 224 pixels, so that threads and buffers
that PyTorch creates once do not count; with --compile, the model itself does this step. On systems without /proc, the
largest resident set cannot be reset. The result is then the increase during the step, which is too small if loading
needed more memory than the model.
"""

import argparse
import contextlib
import csv
import gc
import importlib.util
import json
import math
import multiprocessing
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import types
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from transformers import (
    FocalNetBackbone,
    FocalNetConfig,
    FocalNetForImageClassification,
    SwinBackbone,
    SwinConfig,
    SwinForImageClassification,
)
from transformers.utils import is_triton_available

from focal_hf import FocalBackbone, FocalConfig, FocalForImageClassification, freeze
from focal_hf.modeling_focal import FocalDropPath

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "convert"))

from swin import focal_from_swin

EXAMPLES = """\
examples:
  the first table of benchmarks/README.md, for this machine:
    python benchmarks/throughput.py

  one row of this table, with the time per operation:
    python benchmarks/throughput.py --sizes 224 --batch-size 8 --profile

  time and memory at several image sizes, for both attention types and Swin:
    python benchmarks/throughput.py --growth --peer swin

  two rows with torch.compile, which first compiles for some minutes:
    python benchmarks/throughput.py --models tiny base --batch-size 8 --compile

  backbones on detection images of 800 x 1333 pixels:
    python benchmarks/throughput.py --backbone --sizes 800 --task inference training --peer swin

  the default table, compared with the authors' code only:
    git clone https://github.com/microsoft/Focal-Transformer
    python benchmarks/throughput.py --original Focal-Transformer --peer
"""

OURS, SDPA, FROZEN, ORIGINAL, CONVERTED = "focal_hf", "sdpa", "frozen", "original", "swin-as-focal"
OUR_CODE = (OURS, SDPA, FROZEN)  # the same Focal, run in different ways
PEERS = {
    "swin": (SwinConfig, SwinForImageClassification, SwinBackbone),
    "focalnet": (FocalNetConfig, FocalNetForImageClassification, FocalNetBackbone),
}
LABELS = {OURS: "Focal", SDPA: "sdpa Focal", "swin": "Swin", "focalnet": "FocalNet", ORIGINAL: "original Focal"}
LABELS |= {FROZEN: "frozen Focal", CONVERTED: "converted Swin"}
MODEL_SIZES = {  # the published sizes, the same for all models compared here
    "tiny": {"embed_dim": 96, "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24)},
    "small": {"embed_dim": 96, "depths": (2, 2, 18, 2), "num_heads": (3, 6, 12, 24)},
    "base": {"embed_dim": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32)},
}
SOURCES = {"focal": "classification/focal_transformer.py", "topk": "classification/focal_transformer_v2.py"}

# Model, attention type, task, pixels per side, batch size on a CPU, batch size on a GPU.
DEFAULT_TABLE = (
    ("tiny", "focal", "inference", 224, 8, 64),
    ("tiny", "focal", "inference", 224, 1, 1),
    ("tiny", "focal", "inference", 448, 1, 16),
    ("tiny", "focal", "inference", 896, 1, 4),
    ("tiny", "topk", "inference", 224, 8, 64),
    ("tiny", "topk", "inference", 896, 1, 4),
    ("tiny", "focal", "training", 224, 4, 64),
    ("small", "focal", "inference", 224, 8, 64),
    ("base", "focal", "inference", 224, 8, 64),
)
GROWTH_SIZES = (224, 448, 896, 1792)
MIN_ROUNDS = 3

# An operation of the profiler belongs to the first group whose pattern matches its name.
GROUPS = {
    "attention": r"attention|softmax",
    "matrix products": r"mm\b|matmul|linear|conv",
    "copies": r"copy|clone|contiguous|cat\b|stack|index|gather|scatter|roll|pad",
    "rest": "",
}


@dataclass(frozen=True)
class Workload:
    """The configuration of a row, the same for all its models. `attention` is the attention type of Focal.

    Classifiers get square images. Backbones get images with sides in the ratio 3 : 5, like the largest images of
    detectors (800 by 1333), and return the maps of all stages.
    """

    size: str
    attention: str
    task: str
    image_size: int
    batch_size: int
    backbone: bool = False

    @property
    def sides(self) -> tuple[int, int]:
        """Height and width of an image."""
        return self.image_size, self.image_size * 5 // 3 if self.backbone else self.image_size

    @property
    def pixels(self) -> int:
        """Pixels of all images in a step."""
        return self.batch_size * self.sides[0] * self.sides[1]


@dataclass(frozen=True)
class Setting:
    """The configuration that all rows share."""

    device: str
    dtype: str
    compile: bool
    threads: int
    original: str | None


def log(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def title(name: str, work: Workload) -> str:
    kind = " topk" if name in (*OUR_CODE, ORIGINAL) and work.attention == "topk" else ""
    return f"{LABELS[name]}-{work.size.capitalize()}{kind}{' backbone' * work.backbone}"


# --- Models -----------------------------------------------------------------------------------------------------------


class StubModule(types.ModuleType):
    """A stub for a module from which the authors' code imports names that it does not use."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


def original_class(checkout: str, attention: str) -> type[torch.nn.Module]:
    """The authors' FocalTransformer, executed from their unchanged checkout.

    It uses three names of timm and none of torchvision, which timm requires. Both are replaced by stubs.
    """
    layers = StubModule("timm.models.layers")
    layers.DropPath, layers.trunc_normal_ = FocalDropPath, torch.nn.init.trunc_normal_
    layers.to_2tuple = lambda value: value if isinstance(value, tuple) else (value, value)
    others = ("timm", "timm.models", "timm.data", "timm.data.constants", "timm.data.transforms", "torchvision")
    stubs = {name: StubModule(name) for name in others} | {layers.__name__: layers}
    installed = {name: sys.modules[name] for name in stubs if name in sys.modules}

    source = Path(checkout) / SOURCES[attention]
    module = sys.modules[source.stem] = types.ModuleType(source.stem)
    sys.modules.update(stubs)
    try:
        exec(compile(source.read_text(encoding="utf-8"), source, "exec"), vars(module))
    finally:
        for name in stubs:
            del sys.modules[name]
        sys.modules.update(installed)
    return module.FocalTransformer


def build(name: str, work: Workload, checkout: str | None) -> torch.nn.Module:
    settings = MODEL_SIZES[work.size]
    overlapping = work.attention == "topk"  # the published topk models have overlapping patches
    if name == ORIGINAL:
        if work.backbone:
            raise ValueError("the authors' code has no backbone")
        # The constructor prints to stdout, and its call of torch.meshgrid raises a warning.
        with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings(action="ignore"):
            own = {"img_size": work.image_size, "focal_levels": (2, 2, 2, 2), "focal_pool": "fc", "focal_topK": 128}
            return original_class(checkout, work.attention)(**settings, **own, use_conv_embed=overlapping)
    if name in OUR_CODE:
        classes = FocalConfig, FocalForImageClassification, FocalBackbone
        settings = settings | {"attention_type": work.attention, "use_conv_embed": overlapping}
    else:
        classes = PEERS["swin" if name == CONVERTED else name]
    if name == "focalnet":
        settings = {key: value for key, value in settings.items() if key != "num_heads"}
    config_class, classifier_class, backbone_class = classes
    if work.backbone:
        model = backbone_class(config_class(**settings, out_features=["stage1", "stage2", "stage3", "stage4"]))
    else:
        model = classifier_class(config_class(**settings, num_labels=1000))
    return focal_from_swin(model) if name == CONVERTED else model


class Contender:
    """A model, and the images and labels on which it runs."""

    def __init__(self, name: str, work: Workload, setting: Setting, attn_implementation: str | None = None):
        self.name, self.work, self.setting = name, work, setting
        torch.manual_seed(0)
        device, dtype = torch.device(setting.device), getattr(torch, setting.dtype)
        self.pixels = torch.randn(work.batch_size, 3, *work.sides).to(device, dtype)
        self.labels = torch.randint(1000, (work.batch_size,)).to(device)
        self.module = build(name, work, setting.original).to(device, dtype).train(work.task == "training")
        if name in (OURS, FROZEN) and self.pixels.is_cuda and is_triton_available():  # opt-in, so not the default
            attn_implementation = "triton"
        if attn_implementation := attn_implementation or (SDPA if name == SDPA else None):
            self.module.set_attn_implementation(attn_implementation)
        if name == FROZEN:
            self.module = freeze(self.module, work.sides)
        self.forward = torch.compile(self.module) if setting.compile else self.module

    def step(self, forward: Callable | None = None) -> float:
        """Runs one step and waits until it is finished. Returns its time in seconds."""
        forward = forward or self.forward
        start = time.perf_counter()
        if self.work.task == "training":
            self.loss(forward(self.pixels)).backward()
            self.module.zero_grad(set_to_none=True)
        else:
            with torch.inference_mode():
                forward(self.pixels)
        if self.pixels.is_cuda:
            torch.cuda.synchronize(self.pixels.device)
        return time.perf_counter() - start

    def loss(self, output: torch.Tensor | transformers.utils.ModelOutput) -> torch.Tensor:
        if self.work.backbone:
            return sum(maps.float().mean() for maps in output.feature_maps)
        logits = output if isinstance(output, torch.Tensor) else output.logits
        return torch.nn.functional.cross_entropy(logits.float(), self.labels)

    @property
    def attn_implementation(self) -> str | None:
        return None if self.name == ORIGINAL else self.module.config._attn_implementation

    def choose_attention(self) -> None:
        """Sets sdpa or eager attention, whichever has the faster second step."""
        seconds = {}
        for implementation in ("sdpa", "eager"):
            self.module.set_attn_implementation(implementation)
            seconds[implementation] = [self.step(self.module), self.step(self.module)][1]
        self.module.set_attn_implementation(min(seconds, key=seconds.get))


def ready_contender(name: str, work: Workload, setting: Setting) -> Contender:
    contender = Contender(name, work, setting)
    if name in PEERS and contender.module._supports_sdpa:
        contender.choose_attention()
    for _ in range(2):
        contender.step()
    return contender


# --- Memory -----------------------------------------------------------------------------------------------------------


def peak_memory(contender: Contender) -> float | None:
    """Peak memory of a step in MiB, as defined at the top of this file; None, with a line on stderr, on failure."""
    device = contender.setting.device
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        contender.step()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    question = [contender.name, asdict(contender.work), asdict(contender.setting), contender.attn_implementation]
    command = [sys.executable, __file__, "--peak-memory", json.dumps(question)]
    # By default glibc keeps freed memory. Steps would reuse it, and results would vary by a fifth.
    returning = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    answer = subprocess.run(command, env=returning, capture_output=True, text=True)
    if answer.returncode == 0:
        return float(answer.stdout)
    reason = answer.stderr.strip().splitlines()[-1:] or [f"its process ended with status {answer.returncode}"]
    log(f"    the peak memory of {title(contender.name, contender.work)} could not be measured: {reason[0]}")
    return None


def peak_memory_of_this_process(name: str, work: Workload, setting: Setting, attn_implementation: str | None) -> float:
    """Peak memory of a step in MiB. `peak_memory` runs this in a new process."""
    torch.set_num_threads(setting.threads)
    contender = Contender(name, work, setting, attn_implementation)
    if setting.compile:
        contender.step()  # compiling takes more memory than running
    else:
        Contender(name, replace(work, image_size=224, batch_size=1), setting, attn_implementation).step()
    gc.collect()
    with contextlib.suppress(OSError):  # Linux: sets the largest resident set back to the present one
        Path("/proc/self/clear_refs").write_text("5")
    before = largest_resident_set()
    contender.step()
    return largest_resident_set() - before


def largest_resident_set() -> float:
    """Largest resident set of this process so far, in MiB."""
    try:
        return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 2**10
    except OSError:
        import resource  # not available on Windows

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


# --- Time -------------------------------------------------------------------------------------------------------------


def time_in_turns(contenders: list[Contender], seconds: float) -> list[list[float]]:
    """Seconds of every step of each contender. They take turns, so that changes in machine load affect all of them."""
    times = [[] for _ in contenders]
    for contender in contenders:
        contender.step()  # building a model of transformers makes torch.compile compile the earlier models again
    gc.collect()
    gc.disable()
    end = time.perf_counter() + seconds
    while contenders and (len(times[0]) < MIN_ROUNDS or time.perf_counter() < end):
        for contender, own in zip(contenders, times, strict=True):
            own.append(contender.step())
    gc.enable()
    return times


def matmul_rate(setting: Setting) -> float:
    """GFLOP/s of a large matrix product on this machine: the best of ten, or of fewer if they take too long."""
    side = 2048 if setting.device == "cpu" else 8192
    matrix = torch.randn(side, side).to(setting.device, getattr(torch, setting.dtype))
    output, best, began = torch.empty_like(matrix), math.inf, time.perf_counter()
    for _ in range(11):  # the first one warms up
        start = time.perf_counter()
        # On some CPUs, one product in float16 takes half a minute.
        if start - began > 5:
            break
        torch.mm(matrix, matrix, out=output)
        if matrix.is_cuda:
            torch.cuda.synchronize(matrix.device)
        best = min(best, time.perf_counter() - start)
    return 2 * side**3 / best / 1e9


def count_gflop(contender: Contender) -> float:
    """10⁹ floating point operations of a step in matrix products, convolutions and attention."""
    # PyTorch has no formula for attention on a CPU. The formula for a GPU is the same.
    on_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    counts = {on_cpu: lambda query, key, value, *_, **__: sdpa_flop_count(query, key, value)}
    with FlopCounterMode(display=False, custom_mapping=counts) as counter, torch.inference_mode():
        contender.module(contender.pixels)
    # A backward pass has twice the products of the forward pass. PyTorch's count of backward passes is wrong for
    # FocalNet, because it ignores the groups of convolutions.
    return counter.get_total_flops() / 1e9 * (3 if contender.work.task == "training" else 1)


def time_shares(contender: Contender) -> dict[str, float]:
    """The share of each of GROUPS in the time of a step; on a GPU, in the time that its kernels take."""
    cuda = contender.setting.device != "cpu"
    activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * cuda
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(MIN_ROUNDS):
            contender.step()
    spent = dict.fromkeys(GROUPS, 0.0)
    for event in profile.key_averages():
        # GPU kernels are separate events. Their time is part of the operation that launched them.
        if event.device_type == torch.autograd.DeviceType.CPU:
            group = next(group for group, pattern in GROUPS.items() if re.search(pattern, event.key))
            spent[group] += event.self_device_time_total if cuda else event.self_cpu_time_total
    return {group: value / sum(spent.values()) for group, value in spent.items()}


def share_column(group: str) -> str:
    """The name of the group's column in results.csv."""
    return f"share_{group.replace(' ', '_')}"


def measure(names: list[str], work: Workload, setting: Setting, seconds: float, rate: float | None) -> list[dict]:
    """Measures a row. Returns a line of results.csv for each model, Focal first. With `rate`, it also profiles."""
    if setting.device == "cpu":
        torch.set_num_threads(setting.threads)
    contenders = []
    for name in names:
        try:
            contenders.append(ready_contender(name, work, setting))
        except Exception as error:  # such as too little memory or an unsupported image size: measure the other models
            reason = next(iter(str(error).splitlines()), "")
            log(f"    {title(name, work)} did not run: {type(error).__name__}: {reason}")
    lines = []
    for contender, times in zip(contenders, time_in_turns(contenders, seconds), strict=True):
        lower, median, upper = statistics.quantiles(times, n=4, method="inclusive")
        ours = lines[0]["median_ms"] if lines and lines[0]["model"] == OURS else None
        peak_mib = peak_memory(contender)
        line = {
            "device": device_name(setting.device),
            "threads": setting.threads,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "model": contender.name,
            "attn_implementation": contender.attn_implementation,
            **asdict(work),
            "dtype": setting.dtype,
            "compile": setting.compile,
            "rounds": len(times),
            "median_ms": median * 1e3,
            "lower_quartile_ms": lower * 1e3,
            "upper_quartile_ms": upper * 1e3,
            "images_per_s": work.batch_size / median,
            "peak_mib": peak_mib,
            "ratio": ours and median * 1e3 / ours,  # time of this model / time of Focal: above 1, Focal is faster
            "ns_per_pixel": median * 1e9 / work.pixels,
            "bytes_per_pixel": peak_mib and peak_mib * 2**20 / work.pixels,
        }
        if rate:
            gflop = count_gflop(contender)
            line |= {"gflop": gflop, "gflop_per_s": gflop / median, "matmul_gflop_per_s": rate}
            line |= {share_column(group): share for group, share in time_shares(contender).items()}
        lines.append(line)
        found = f"{number(median * 1e3)} ms, {number(peak_mib)} MiB, {len(times)} rounds"
        log(f"    {title(contender.name, work)}: {found}")
    return lines


def device_name(device: str) -> str:
    if device != "cpu":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError, TypeError):
        return re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[1].strip()
    return platform.processor() or platform.machine()


# --- Output -----------------------------------------------------------------------------------------------------------


def number(value: float | None) -> str:
    """The value with three significant digits, or as an integer if that has more digits."""
    if value is None:
        return "?"
    return f"{value:,.{max(0, 2 - math.floor(math.log10(abs(value)))) if value else 0}f}"


def workload_of(line: dict) -> Workload:
    return Workload(**{field: line[field] for field in Workload.__dataclass_fields__})


def markdown(lines: list[dict], columns: dict[str, Callable[[dict], str]]) -> str:
    """A Markdown table of the model, the task and the given columns, aligned for reading as plain text."""
    columns = {
        "model": lambda line: title(line["model"], workload_of(line)),
        "task": lambda line: line["task"],
        "pixels": lambda line: "x".join(map(str, dict.fromkeys(workload_of(line).sides))),
        "batch": lambda line: str(line["batch_size"]),
    } | columns
    rows = [list(columns), *([cell(line) for cell in columns.values()] for line in lines)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, ["-" * width if i < 2 else "-" * (width - 1) + ":" for i, width in enumerate(widths)])
    sides = ["<", "<"] + [">"] * (len(columns) - 2)
    return "\n".join(
        f"| {' | '.join(f'{cell:{side}{width}}' for cell, side, width in zip(row, sides, widths, strict=True))} |"
        for row in rows
    )


def speed_table(lines: list[dict], per_pixel: bool) -> str:
    def quartiles(line: dict) -> str:
        return f"{number(line['lower_quartile_ms'])} to {number(line['upper_quartile_ms'])}"

    columns = {
        "ms (quartiles)": lambda line: f"{number(line['median_ms'])} ({quartiles(line)})",
        "images/s": lambda line: number(line["images_per_s"]),
        "peak MiB": lambda line: number(line["peak_mib"]),
        "time / Focal": lambda line: "" if line["model"] == OURS else number(line["ratio"]),
    }
    if per_pixel:
        columns["ns/pixel"] = lambda line: number(line["ns_per_pixel"])
        columns["bytes/pixel"] = lambda line: number(line["bytes_per_pixel"])
    return markdown(lines, columns)


def profile_table(lines: list[dict]) -> str:
    columns = {
        "GFLOP": lambda line: number(line["gflop"]),
        "GFLOP/s": lambda line: number(line["gflop_per_s"]),
        "share of matrix rate": lambda line: f"{line['gflop_per_s'] / line['matmul_gflop_per_s']:.0%}",
    }
    columns |= {group: lambda line, group=group: f"{line[share_column(group)]:.0%}" for group in GROUPS}
    return markdown(lines, columns)


@contextlib.contextmanager
def replacing(file: Path):
    """A temporary path. It replaces `file` when the block ends without an error."""
    part = file.with_name(f".{file.name}.part")
    try:
        yield part
        os.replace(part, file)
    finally:
        part.unlink(missing_ok=True)


def write_csv(file: Path, lines: list[dict]) -> None:
    with replacing(file) as part, part.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, lines[0])
        writer.writeheader()
        for line in lines:
            writer.writerow({key: round(cell, 4) if isinstance(cell, float) else cell for key, cell in line.items()})


def draw(file: Path, lines: list[dict], machine: str) -> None:
    """Draws images per second against the image side: one curve per model, at the fastest batch size of each side."""
    import matplotlib

    matplotlib.use("Agg")  # draws into a file, without a display
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator, NullLocator

    curves: dict[tuple[str, str, str, str], dict[int, float]] = {}
    for line in lines:
        key = (title(line["model"], workload_of(line)), line["model"], line["size"], line["task"])
        points = curves.setdefault(key, {})
        points[line["image_size"]] = max(points.get(line["image_size"], 0), line["images_per_s"])

    figure, axes = plt.subplots(figsize=(10.5, 5.6), layout="constrained")
    colours = {OURS: "#2456c8", SDPA: "#7fa3f0", "swin": "#d1372c", "focalnet": "#2a8f5b", ORIGINAL: "#8a93a6"}
    colours |= {FROZEN: "#5b3fa8", CONVERTED: "#e79a5b"}
    for (label, model, size, task), points in sorted(curves.items(), key=lambda curve: -max(curve[1].values())):
        axes.plot(
            *zip(*sorted(points.items()), strict=True),
            label=label if task == "inference" else f"{label}, {task}",
            color=colours[model],
            alpha=0.5 if label.endswith("topk") else 1,
            marker={"tiny": "o", "small": "s", "base": "^"}[size],
            markerfacecolor="white" if task == "training" else colours[model],
            linestyle="--" if task == "training" else "-",
            linewidth=2,
        )
    sides = sorted({line["image_size"] for line in lines})
    axes.set(xscale="log", yscale="log", xlabel="shorter side of the image, pixels", ylabel="images per second")
    axes.set_xticks(sides, map(str, sides))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_locator(NullLocator())
    axes.grid(color="#e3e7ee")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(machine, size=10, color="#5b6475", loc="left")
    figure.suptitle("Throughput against resolution", size=14, weight="bold", x=0.01, ha="left")
    figure.legend(loc="outside right upper", frameon=False)
    with replacing(file) as part:
        figure.savefig(part, dpi=130, format="png")
    plt.close(figure)


# --- Command line -----------------------------------------------------------------------------------------------------


def positive(kind: type) -> Callable[[str], int | float]:
    """An argparse type for an int or a float above zero."""

    def parse(text: str) -> int | float:
        value = kind(text)
        if not (math.isfinite(value) and value > 0):
            raise argparse.ArgumentTypeError(f"{text} is not above zero")
        return value

    parse.__name__ = kind.__name__  # for argparse's message "invalid int value"
    return parse


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    group = parser.add_argument_group("rows", "All combinations. Without these options: nine rows, a few minutes.")
    group.add_argument("--models", nargs="+", choices=list(MODEL_SIZES), help="default: tiny")
    group.add_argument("--attention", nargs="+", choices=list(SOURCES), help="attention type of Focal, default: focal")
    group.add_argument("--task", nargs="+", choices=["inference", "training"], help="default: inference")
    group.add_argument("--sizes", nargs="+", type=positive(int), metavar="PIXELS", help="shorter side, default: 224")
    group.add_argument(
        "--backbone",
        action="store_true",
        help="backbones with the feature maps of all stages, on images 5/3 times as wide as high, such as 800 x 1333",
    )
    group.add_argument(
        "--batch-size",
        type=positive(int),
        metavar="N",
        help="images per step; default: 1 on a CPU; on a GPU 64 of 224 pixels, or as many pixels of another size",
    )
    sides = ", ".join(map(str, GROWTH_SIZES))
    group.add_argument("--growth", action="store_true", help=f"both attention types at {sides}; adds columns per pixel")

    group = parser.add_argument_group("other models")
    peers = {"choices": [*PEERS, CONVERTED, SDPA, FROZEN], "default": ["swin", CONVERTED, "focalnet"]}
    group.add_argument(
        "--peer",
        nargs="*",
        **peers,
        help="default: swin swin-as-focal focalnet; swin-as-focal: the same Swin, converted to Focal; sdpa: Focal with "
        "PyTorch's attention; frozen: Focal after focal_hf.freeze, in rows of inference",
    )
    group.add_argument("--original", metavar="PATH", help="checkout of microsoft/Focal-Transformer; its code is run")

    group = parser.add_argument_group("run")
    group.add_argument("--device", metavar="NAME", help="cpu, cuda or cuda:N; default: cuda if available")
    dtypes = ["float32", "bfloat16", "float16"]
    group.add_argument("--dtype", choices=dtypes, help="default: float32 on a CPU, bfloat16 on a GPU")
    group.add_argument("--compile", action="store_true", help="compile all models with torch.compile")
    group.add_argument("--threads", type=positive(int), metavar="N", help="CPU threads, default: PyTorch's choice")
    group.add_argument("--seconds", type=positive(float), default=10, metavar="S", help="time per row, default: 10")

    group = parser.add_argument_group("result")
    group.add_argument(
        "--profile",
        action="store_true",
        help="also measure the time per operation: attention (sdpa and softmax; the products of eager attention are "
        "matrix products), matrix products and convolutions, gathers and copies, the rest; and the FLOP/s, compared "
        "with one large matrix product",
    )
    group.add_argument(
        "--output",
        type=Path,
        default=Path("benchmark-results"),
        metavar="FOLDER",
        help="folder for results.csv and throughput.png, which are replaced; default: benchmark-results",
    )
    parser.add_argument("--peak-memory", help=argparse.SUPPRESS)  # for `peak_memory`, which starts this script

    arguments = parser.parse_args()
    if not arguments.peak_memory:
        check(parser, arguments)
    return arguments


def check(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Sets defaults that depend on the machine, and rejects arguments that would fail later."""
    arguments.device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", arguments.device):
        parser.error(f"--device {arguments.device} is not supported; use cpu, cuda or cuda:N.")
    if arguments.device != "cpu" and int(arguments.device[5:] or 0) >= (count := torch.cuda.device_count()):
        parser.error(f"--device {arguments.device}: PyTorch sees {count} CUDA devices here; use --device cpu.")
    arguments.dtype = arguments.dtype or ("float32" if arguments.device == "cpu" else "bfloat16")
    if arguments.growth and (arguments.sizes or arguments.attention):
        parser.error("--growth sets the sizes and attention types; omit --sizes and --attention.")
    if arguments.original is not None:
        arguments.original = os.path.abspath(arguments.original)
        for source in SOURCES.values():
            if not Path(arguments.original, source).is_file():
                parser.error(
                    f"--original {arguments.original} is not a checkout of microsoft/Focal-Transformer: it has no "
                    f"{source}. Clone https://github.com/microsoft/Focal-Transformer and pass that folder."
                )
    compiler = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    if arguments.compile and not shutil.which(compiler):
        parser.error(f"--compile needs a C++ compiler: {compiler} was not found; install it or set CXX to another.")
    try:
        arguments.output.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=arguments.output).close()
    except OSError as error:
        parser.error(f"--output {arguments.output} is not a writable folder: {error.strerror}.")


def list_workloads(arguments: argparse.Namespace) -> list[Workload]:
    cpu, growth = arguments.device == "cpu", arguments.growth
    chosen = (arguments.models, arguments.attention, arguments.task, arguments.sizes, arguments.batch_size, growth)
    if not any(chosen) and not arguments.backbone:
        return [Workload(*row[:4], batch_size=row[4 if cpu else 5]) for row in DEFAULT_TABLE]
    return [
        Workload(
            model,
            attention,
            task,
            size,
            arguments.batch_size or (1 if cpu else max(1, 64 * 224**2 // size**2)),
            arguments.backbone,
        )
        for model in arguments.models or ["tiny"]
        for attention in arguments.attention or (list(SOURCES) if growth else ["focal"])
        for task in arguments.task or ["inference"]
        for size in arguments.sizes or (GROWTH_SIZES if growth else [224])
    ]


def main() -> None:
    arguments = parse_arguments()
    if arguments.peak_memory:
        name, work, setting, attn_implementation = json.loads(arguments.peak_memory)
        print(peak_memory_of_this_process(name, Workload(**work), Setting(**setting), attn_implementation))
        return

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    setting = Setting(arguments.device, arguments.dtype, arguments.compile, torch.get_num_threads(), arguments.original)
    can_draw = importlib.util.find_spec("matplotlib") is not None
    if not can_draw:
        log("matplotlib is not installed: throughput.png will not be drawn. Run `pip install matplotlib`.")
    threads = f", {setting.threads} threads" if setting.device == "cpu" else ""
    machine = f"{device_name(setting.device)}{threads}; {setting.dtype}{', compiled' * setting.compile}; "
    machine += f"torch {torch.__version__}, transformers {transformers.__version__}"
    log(machine)

    names = [OURS, *dict.fromkeys(arguments.peer), *([ORIGINAL] if setting.original else [])]
    workloads = list_workloads(arguments)
    rate = matmul_rate(setting) if arguments.profile else None
    lines, missing = [], 0
    for count, work in enumerate(workloads, start=1):
        in_row = [name for name in names if name != FROZEN or work.task == "inference"]
        missing += len(in_row)
        row = f"{title(OURS, work)}, {work.task}, {work.image_size} px, batch {work.batch_size}"
        log(f"[{count}/{len(workloads)}] {row}")
        # Memory that the allocator keeps from other rows changes a model's time by up to a fifth.
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
            try:
                found = process.submit(measure, in_row, work, setting, arguments.seconds, rate).result()
                lines, missing = lines + found, missing - len(found)
            except BrokenProcessPool:
                log("    The process of this row was killed, perhaps by the system for lack of memory.")
        if lines:
            write_csv(arguments.output / "results.csv", lines)  # after every row, to lose nothing
    if lines:
        print(f"{machine}\n\n{speed_table(lines, per_pixel=arguments.growth)}")
        if rate:
            print(f"\nOne large matrix product runs at {number(rate)} GFLOP/s.\n\n{profile_table(lines)}")
        if can_draw:
            draw(arguments.output / "throughput.png", lines, machine)
        log(f"Wrote results.csv{' and throughput.png' * can_draw} in {arguments.output}.")
    if missing:
        sys.exit(f"error: {missing} of {len(lines) + missing} measurements failed; the reasons are above.")


if __name__ == "__main__":
    main()
