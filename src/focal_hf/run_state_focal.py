"""What kind of run this is (compiled, exported, traced, transformed, inference on a CPU), and caches for it."""

import functools
import re
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, TypeVar, TypeVarTuple

import torch
from torch import nn

from .compatibility_focal import has_static_value, may_be_exporting, may_be_fake, may_be_transforming

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

# Largest size in bytes of all index tables that `cached_table` keeps together.
TABLE_CACHE_BYTES = 64 * 1024 * 1024

# Namespace of the custom operators of this copy of the code. Checkpoints may carry other copies into the same process,
# and PyTorch keeps only the last operator that is registered under a name.
OPERATOR_NAMESPACE = re.sub(r"[^0-9A-Za-z_]", "_", __name__.rpartition(".")[0])


def is_compiling() -> bool:
    """Whether `torch.compile` or `torch.export` is capturing a graph."""
    return torch.compiler.is_compiling()


def is_exporting() -> bool:
    """Whether a graph is being exported or traced, where custom operators are unavailable."""
    return may_be_exporting() or torch.jit.is_tracing()


def is_static(*sizes: int) -> bool:
    """Whether this run or compiled graph serves these sizes alone. An exported graph may serve others."""
    if is_exporting():
        return False
    return not is_compiling() or all(has_static_value(size) for size in sizes)


def has_symbols(*sizes: int) -> bool:
    """Whether some of the sizes are symbols of a graph that is exported for several sizes and cannot branch on them."""
    return is_exporting() and any(isinstance(size, torch.SymInt) for size in sizes)


def may_be_nonzero(*numbers: int) -> bool:
    """Whether a number is not zero, or may be another one when the graph that is captured now is used again.

    A compiled graph then serves images with and without padding.
    """
    return (is_compiling() and not is_exporting()) or has_symbols(*numbers) or any(numbers)


def is_transforming() -> bool:
    """Whether a transform of `torch.func` or forward-mode differentiation is active.

    Our custom operators have rules for neither. Without this check they would drop forward-mode tangents silently.
    """
    return not is_compiling() and may_be_transforming()


def is_cpu_inference(module: nn.Module, tensor: torch.Tensor) -> bool:
    """Whether `module` runs inference on a CPU, where chunks that stay in the processor's cache are faster.

    Not in exported graphs, which other processors run too. A trace must also be the same with and without gradients.
    """
    inference = not module.training and not torch.is_grad_enabled()
    return inference and tensor.device.type == "cpu" and not is_exporting()


def can_cache() -> bool:
    """Whether a tensor that is computed now can be used in a later run.

    It cannot while compiling, exporting or tracing, where the arithmetic belongs into the graph; under a fake mode or
    a transform of `torch.func`, whose tensors are invalid afterwards; and in a CUDA graph under capture, whose tensors
    are not computed yet.
    """
    if is_compiling() or torch.jit.is_tracing():
        return False
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        return False
    return not may_be_fake() and not is_transforming()


def allows_tf32() -> bool:
    """Whether torch's settings allow TF32 in matrix products of float32."""
    settings = torch.backends.cuda.matmul
    # Since torch 2.9, reading the older setting raises an error once the newer one was used.
    return settings.fp32_precision == "tf32" if hasattr(settings, "fp32_precision") else settings.allow_tf32


def _tensors(tables: Any) -> list[torch.Tensor]:
    """All tensors of a tensor, or of tuples and lists of such."""
    if isinstance(tables, torch.Tensor):
        return [tables]
    return [tensor for part in tables for tensor in _tensors(part)]


class _TableCache:
    """Least recently used cache of tables, bounded in bytes."""

    def __init__(self) -> None:
        self.entries: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()
        self.bytes = 0
        self.lock = threading.Lock()

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        with self.lock:
            if key in self.entries:
                self.entries.move_to_end(key)
                return self.entries[key][0]
        tables = make()
        leaves = _tensors(tables)
        size = sum(leaf.untyped_storage().nbytes() for leaf in leaves)
        # Loading builds models on the meta device. Tables made there hold no numbers.
        if size > TABLE_CACHE_BYTES or any(leaf.is_meta for leaf in leaves):
            return tables
        with self.lock:
            if key not in self.entries:
                self.entries[key] = tables, size
                self.bytes += size
            while self.bytes > TABLE_CACHE_BYTES:
                _, (_, freed) = self.entries.popitem(last=False)
                self.bytes -= freed
        return tables


_tables = _TableCache()


def cached_table(function: Callable[[*Ts, torch.device], T]) -> Callable[[*Ts, torch.device], T]:
    """Decorator that caches the tables that a function returns, whose last argument is their device.

    All decorated functions share one cache of at most `TABLE_CACHE_BYTES`. Tables are never inference tensors, which
    autograd could not use later.
    """

    @functools.wraps(function)
    def wrapper(*args: *tuple[*Ts, torch.device]) -> T:
        if not can_cache():
            return function(*args)
        # Each CUDA stream has tables of its own: those of another one may not be computed yet.
        device = args[-1]
        stream = torch.cuda.current_stream(device) if device.type == "cuda" else None

        def make() -> T:
            with torch.inference_mode(False), torch.no_grad():
                return function(*args)

        return _tables.get((function, args, stream), make)

    return wrapper


# The last result of each module: see `cached_by_value`. Copies and pickles of a module do not take it along.
_last_results: weakref.WeakKeyDictionary[nn.Module, tuple] = weakref.WeakKeyDictionary()


def cached_by_value(module: nn.Module, make: Callable[..., T], *tensors: torch.Tensor) -> T:
    """`make(*tensors)`; in inference on a CPU, the module's last result as long as the tensors are equal.

    The numbers are compared, because neither a tensor's version nor its address changes with every update by fused
    optimizers, `.data`, loading or swapping. The result belongs to the module and is freed with it.
    """
    if not (can_cache() and is_cpu_inference(module, tensors[0])):
        return make(*tensors)
    last = _last_results.get(module)
    if last is None or not all(map(_equal, last[0], tensors)):
        with torch.inference_mode(False), torch.no_grad():
            last = _last_results[module] = [tensor.clone() for tensor in tensors], make(*tensors)
    return last[1]


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors hold the same numbers in the same dtype on the same device."""
    return one.dtype == other.dtype and one.device == other.device and torch.equal(one, other)
