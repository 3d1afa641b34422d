"""Reads checkpoints without running anything that is in them; writes so that nothing half-written looks whole."""

import os
import pickle
import re
import secrets
import shutil
import signal
import sys
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from messages import ConversionError, printable

# --- Reading ----------------------------------------------------------------------------------------------------------


def read_checkpoint(path: Path) -> dict[str, torch.Tensor]:
    """The state dict of a `.pth`, the original's in any of its three layouts or a dense model's, or of a `.pdparams`.

    Raises:
        ConversionError: where there is no such file, it is no checkpoint, is damaged, or would run code.
    """
    if path.is_dir() or (path.is_file() and _is_safetensors(path)):
        raise ConversionError(
            f"--checkpoint {path} is not a file of the original. Give the .pth or .pdparams itself; for a model that "
            "is in transformers' format already, convert_hf_to_focal.py goes the other way."
        )
    if not path.is_file():
        raise ConversionError(f"--checkpoint {path}: there is no such file.")

    content = _read_paddle(path) if path.suffix == ".pdparams" else _read_torch(path)
    for key in ("model", "state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    where = "alone or under 'model' or 'state_dict'"
    if not isinstance(content, Mapping) or not content:
        raise ConversionError(f"{path} holds {_described(content)}; expected a state dict, {where}.")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise ConversionError(
                f"{path} holds {_described(value)} under {name!r}; expected a state dict, {where}, and nothing but "
                "tensors in it."
            )
        if value.layout is not torch.strided or value.device.type != "cpu":
            raise ConversionError(
                f"{path} holds a tensor of layout {value.layout} on device {value.device} under {name!r}; expected a "
                "dense one with its values."
            )
    if any(name.startswith(("focal.", "backbone.focal.")) for name in content):
        raise ConversionError(
            f"{path} has the tensor names of focal_hf, so it is converted already; convert_hf_to_focal.py goes the "
            "other way."
        )
    return {name: value.detach() for name, value in content.items()}


def _is_safetensors(path: Path) -> bool:
    with path.open("rb") as file:
        length, brace = int.from_bytes(file.read(8), "little"), file.read(1)
    return brace == b"{" and length < path.stat().st_size


class _Unread:
    """Stands in for what is saved beside the weights and not needed; does nothing, whatever it is given."""

    def __init__(self, *_):
        pass

    def __setstate__(self, _):
        pass


# In a checkpoint saved during training. The original's settings are a yacs node, in whose place a dict does; mmengine's
# log is of buffers that name their own methods, and scores are NumPy's numbers.
_BESIDE_WEIGHTS = [(OrderedDict, "yacs.config.CfgNode")] + [
    (_Unread, name)
    for name in (
        "mmengine.logging.history_buffer.HistoryBuffer",
        "builtins.getattr",
        "numpy.ndarray",
        "numpy.dtype",
        "numpy.core.multiarray._reconstruct",  # before NumPy 2
        "numpy._core.multiarray._reconstruct",
        "numpy.core.multiarray.scalar",
        "numpy._core.multiarray.scalar",
    )
]


def _read_torch(path: Path):
    safe = torch.serialization.safe_globals(_BESIDE_WEIGHTS)
    with path.open("rb") as file, safe, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged file raises almost anything
            if refused := re.search(r"GLOBAL (\S+)", str(error)):
                raise _refusal(path, refused[1]) from None
            raise _damage(path, str(error).rpartition("WeightsUnpickler error:")[2], error) from None


class _PaddleUnpickler(pickle.Unpickler):
    """Reads arrays of numbers and the builtin types that pickle spells without a name, and refuses all else.

    Not even NumPy's own functions are called: its arrays and dtypes trust the state they are given.
    """

    def __init__(self, path: Path, file):
        super().__init__(file)
        self.path = path

    def find_class(self, module: str, name: str):
        if (module, name) not in _STAND_INS:
            raise _refusal(self.path, f"{module}.{name}")
        return _STAND_INS[module, name]


class _Dtype:
    """Stands in for `numpy.dtype`, as far as it is a number's."""

    def __init__(self, code: str, *_):
        if not re.fullmatch(r"[fiu][1248]|b1", code):
            raise ValueError(f"an array of {code!r} where numbers were expected")
        self.code, self.order = code, "="

    def __setstate__(self, state: tuple):
        self.order = state[1]

    def to_numpy(self) -> np.dtype:
        return np.dtype(self.order + self.code)


class _Array:
    """Stands in for `numpy.ndarray`."""

    tensor = None

    def __setstate__(self, state: tuple):
        _, shape, dtype, by_columns, data = state
        array = np.frombuffer(data, dtype.to_numpy()).reshape(shape, order="F" if by_columns else "C")
        self.tensor = torch.from_numpy(array.astype(array.dtype.newbyteorder("="), order="C"))


def _encode(text: str, encoding: str) -> bytes:
    """How pickle's protocol 2 writes bytes."""
    if encoding != "latin1":
        raise ValueError(f"bytes encoded as {encoding!r}")
    return text.encode("latin1")


_STAND_INS = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("numpy.core.multiarray", "_reconstruct"): lambda *_: _Array(),  # before NumPy 2
    ("numpy._core.multiarray", "_reconstruct"): lambda *_: _Array(),
    ("_codecs", "encode"): _encode,
}


def _read_paddle(path: Path):
    with path.open("rb") as file:
        try:
            content = _PaddleUnpickler(path, file).load()
        except ConversionError:
            raise
        except Exception as error:  # a damaged file raises almost anything
            raise _damage(path, str(error), error) from None
    if not isinstance(content, dict):
        return content
    content.pop("StructuredToParameterName@@", None)  # what Paddle calls the tensors in its own graph
    state = {name: value.tensor if isinstance(value, _Array) else value for name, value in content.items()}
    # Paddle keeps the matrix of a linear layer as (in, out).
    return {
        name: value.T.contiguous()
        if str(name).endswith(".weight") and isinstance(value, torch.Tensor) and value.ndim == 2
        else value
        for name, value in state.items()
    }


def _refusal(path: Path, wanted: str) -> ConversionError:
    return ConversionError(
        f"{path} asks for {wanted} while it is read, which weights have no need of and which can run any code. "
        "It was refused, and nothing in it was run: do not trust this file."
    )


def _damage(path: Path, reason: str, error: Exception) -> ConversionError:
    kind = "Paddle" if path.suffix == ".pdparams" else "PyTorch"
    reason = f"{type(error).__name__}: {reason.strip()}".splitlines()[0].split(". ")[0]
    return ConversionError(f"{path} is not a {kind} checkpoint, or is not all there ({reason}). Get it again.")


def _described(value) -> str:
    if isinstance(value, Mapping) and value:
        return "a dict with " + ", ".join(repr(key) for key in list(value)[:4])
    return f"an object of type {type(value).__name__}"


# --- Writing ----------------------------------------------------------------------------------------------------------


_staged: dict[Path, Path] = {}  # what to clear when a signal ends the process: staging folder, output


@contextmanager
def staging_folder(output: Path) -> Iterator[Path]:
    """A new folder, on the file system of `output`, to build in. It is gone afterwards, however that comes about.

    Only SIGKILL leaves it, and then its name, hidden and ending in `.partial`, tells what it is.
    """
    existing = next(parent for parent in output.parents if parent.exists())
    folder = existing / f".{output.name}.{secrets.token_hex(4)}.partial"
    _staged[folder] = output
    try:
        folder.mkdir()
        yield folder
    finally:
        _clear(folder, output)
        del _staged[folder]


def _clear(folder: Path, output: Path) -> None:
    if (folder / "replaced").exists() and not output.exists():
        (folder / "replaced").rename(output)
    shutil.rmtree(folder, ignore_errors=True)


def check_output_folder(output: Path, overwrite: bool, inputs: tuple[Path, ...]) -> None:
    """Raises ConversionError unless `output` is free or, with `overwrite`, is a model's or empty, and no input's."""
    if not output.exists():
        return
    if not overwrite:
        raise ConversionError(f"--output {output} exists. Choose another folder, or add --overwrite to replace it.")
    entries = list(output.iterdir()) if output.is_dir() else None
    named = {entry.name for entry in entries or ()}
    if entries is None or (entries and ("config.json" not in named or any(entry.is_dir() for entry in entries))):
        raise ConversionError(
            f"--output {output} is not replaced, since it may hold more than a model: --overwrite is for an empty "
            "folder, or one with a config.json and no folders in it."
        )
    for path in inputs:
        if output in path.resolve().parents:
            raise ConversionError(f"--output {output} is not replaced: {path} lies in it.")


def move_into_place(built: Path, output: Path) -> None:
    """Makes the folder `built` in a staging folder `output`. What stood there goes with the staging folder.

    SIGKILL leaves the old folder, the new one, or, between two calls that take microseconds, neither, with the old one
    whole in the staging folder.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    if output.exists():
        output.rename(built.with_name("replaced"))
    built.rename(output)


# --- The command line -------------------------------------------------------------------------------------------------


def run(main: Callable[[], None]) -> None:
    """Runs a script: what the user can put right becomes one line on stderr and exit code 1."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    try:
        main()
    except (ConversionError, OSError) as error:
        sys.exit(f"error: {printable(str(error))}")


def _stop(number: int, _) -> None:
    # Not by an exception: one that comes up while Python frees an object is lost, and the process goes on.
    for folder, output in list(_staged.items()):
        _clear(folder, output)
    os._exit(128 + number)
