"""Reads checkpoints without running anything that is in them, in memory that the size of the file bounds."""

import io
import math
import os
import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch

from messages import ConversionError, shown
from pickles import Call, Name, RefusedName, read_pickle

_DTYPES = {
    "torch.DoubleStorage": torch.float64,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
}
_MOST_DIMENSIONS = 8


class _Tensor(NamedTuple):
    """A tensor that a file describes: its size is known before its values are read."""

    elements: int
    itemsize: int
    read: Callable[[], torch.Tensor]


def read_checkpoint(path: Path) -> dict[str, torch.Tensor]:
    """The state dict of a `.pth`, the original's in any of its three layouts or a dense model's, or of a `.pdparams`.

    Every byte of its tensors comes from the file.

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
    with path.open("rb") as file:
        try:
            return _read_state(path, file)
        except ConversionError:
            raise
        except RefusedName as refused:
            raise ConversionError(
                f"{path} asks for {refused} while it is read, which weights have no need of and which can run any "
                "code. It was refused, and nothing in it was run: do not trust this file."
            ) from None
        except Exception as error:  # a damaged file raises almost anything
            kind = "Paddle" if path.suffix == ".pdparams" else "PyTorch"
            raise ConversionError(
                f"{path} is not a {kind} checkpoint, or is not all there ({type(error).__name__}: {error}). Get it "
                "again."
            ) from None


def _is_safetensors(path: Path) -> bool:
    with path.open("rb") as file:
        length, brace = int.from_bytes(file.read(8), "little"), file.read(1)
    return brace == b"{" and length < path.stat().st_size


def _read_state(path: Path, file: BinaryIO) -> dict[str, torch.Tensor]:
    from_paddle = path.suffix == ".pdparams"
    if from_paddle:
        content, described = read_pickle(file)[0], _numpy_array
    else:
        content, described = _open_torch(file)
    for key in ("model", "state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    where = "alone or under 'model' or 'state_dict'"
    if not isinstance(content, Mapping) or not content:
        raise ConversionError(f"{path} holds {_kind(content)}; expected a state dict, {where}.")
    if from_paddle:
        content.pop("StructuredToParameterName@@", None)  # what Paddle calls the tensors in its own graph

    tensors = {}
    for name, value in content.items():
        try:
            tensors[name] = described(value)
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            raise ConversionError(f"{path} holds a tensor under {shown(name)} that cannot be read: {error}.") from None
        if not isinstance(name, str) or tensors[name] is None:
            raise ConversionError(
                f"{path} holds {_kind(value)} under {shown(name)}; expected a state dict, {where}, and nothing but "
                "dense tensors in it."
            )
    if any(name.startswith(("focal.", "backbone.focal.")) for name in tensors):
        raise ConversionError(
            f"{path} has the tensor names of focal_hf, so it is converted already; convert_hf_to_focal.py goes the "
            "other way."
        )
    size = os.fstat(file.fileno()).st_size
    if (total := sum(tensor.elements * tensor.itemsize for tensor in tensors.values())) > size:
        raise ConversionError(f"{path} has {size:,} bytes and describes tensors of {total:,} bytes: it is damaged.")

    state = {name: tensor.read() for name, tensor in tensors.items()}
    # Paddle keeps the matrix of a linear layer as (in, out).
    return {
        name: tensor.T.contiguous() if from_paddle and name.endswith(".weight") and tensor.ndim == 2 else tensor
        for name, tensor in state.items()
    }


def _kind(value) -> str:
    if isinstance(value, Mapping) and value:
        return "a dict with " + ", ".join(shown(key) for key in list(value)[:4])
    if isinstance(value, Call):
        return f"an object made by {value.function}"
    return f"an object of type {type(value).__name__}"


# --- PyTorch's formats ------------------------------------------------------------------------------------------------


class _Storage(NamedTuple):
    length: int  # bytes
    read: Callable[[], bytes]


def _open_torch(file: BinaryIO) -> tuple[object, Callable[[object], _Tensor | None]]:
    """What the file holds, and a function that describes a tensor in it."""
    is_zip = file.read(4) == b"PK\x03\x04"
    file.seek(0)
    content, storages = _open_zip(file) if is_zip else _open_legacy(file)
    read = {}  # storages, each of which may serve several tensors

    def values(key: str) -> bytearray:
        if key not in read:
            read[key] = bytearray(storages[key].read())
        return read[key]

    def described(value) -> _Tensor | None:
        if isinstance(value, Call) and value.function.startswith("torch._utils._rebuild_parameter"):
            value = value.arguments[0]
        if not isinstance(value, Call) or value.function != "torch._utils._rebuild_tensor_v2":
            return None
        storage, offset, shape, strides, _, _, *metadata = value.arguments
        key, dtype, length = _storage_of(storage)
        if any(metadata):
            raise ValueError(f"it is a view of {shown(metadata[0])}")
        if not len(shape) == len(strides) <= _MOST_DIMENSIONS or not _whole_numbers((offset, *shape, *strides)):
            raise ValueError(f"its shape is {shown(shape)}, its strides are {shown(strides)}")
        elements = math.prod(shape)
        last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        if key not in storages or storages[key].length != length * dtype.itemsize or (elements and last >= length):
            raise ValueError("not all its values are in the file")

        def read_tensor() -> torch.Tensor:
            if not elements:
                return torch.empty(shape, dtype=dtype)
            return torch.frombuffer(values(key), dtype=dtype).as_strided(shape, strides, offset)

        return _Tensor(elements, dtype.itemsize, read_tensor)

    return content, described


def _storage_of(persistent: Call) -> tuple[str, torch.dtype, int]:
    """Key, type and number of elements."""
    kind, storage_class, key, _, length, *view = persistent.arguments[0]
    dtype = _DTYPES.get(storage_class) if isinstance(storage_class, Name) else None
    if kind != "storage" or dtype is None or not isinstance(key, str) or not _whole_numbers((length,)) or any(view):
        raise ValueError(f"its values are {storage_class if isinstance(storage_class, Name) else 'no storage'}")
    return key, dtype, length


def _whole_numbers(numbers: tuple) -> bool:
    return all(type(number) is int and 0 <= number < 2**63 for number in numbers)


def _open_zip(file: BinaryIO) -> tuple[object, dict[str, _Storage]]:
    """A file of torch.save since PyTorch 1.6."""
    archive = zipfile.ZipFile(file)
    records = archive.infolist()
    names = {record.filename: record for record in records}
    size = os.fstat(file.fileno()).st_size
    if any(record.compress_type != zipfile.ZIP_STORED for record in records):
        raise ValueError("its records are compressed, as torch.save does not write them")
    if len(names) < len(records) or sum(record.file_size for record in records) > size:
        raise ValueError("its records overlap")
    folders = [name.removesuffix("data.pkl") for name in names if re.fullmatch(r"[^/]+/data\.pkl", name)]
    if len(folders) != 1:
        raise ValueError("a zip file that torch.save did not write")
    (folder,) = folders
    if (order := names.get(f"{folder}byteorder")) and archive.read(order) != b"little":
        raise ValueError("its numbers are big-endian")
    content, _ = read_pickle(io.BytesIO(archive.read(f"{folder}data.pkl")))

    def storage(record: zipfile.ZipInfo) -> _Storage:
        return _Storage(record.file_size, lambda: archive.read(record))

    prefix = f"{folder}data/"
    return content, {
        name.removeprefix(prefix): storage(record) for name, record in names.items() if name.startswith(prefix)
    }


def _open_legacy(file: BinaryIO) -> tuple[object, dict[str, _Storage]]:
    """A file of torch.save before PyTorch 1.6: five pickles, then the storages."""
    if read_pickle(file)[0] != 0x1950A86A20F9469CFC6C or read_pickle(file)[0] != 1001:
        raise ValueError("it does not begin as torch.save's files do")
    if not read_pickle(file)[0]["little_endian"]:
        raise ValueError("its numbers are big-endian")
    content, persistent = read_pickle(file)
    described = {key: dtype.itemsize for key, dtype, _ in map(_storage_of, persistent)}
    storages, keys = {}, read_pickle(file)[0]
    size = os.fstat(file.fileno()).st_size

    def storage(start: int, length: int) -> _Storage:
        def read() -> bytes:
            file.seek(start)
            return file.read(length)

        return _Storage(length, read)

    for key in keys:
        if not isinstance(key, str):
            raise ValueError("the key of a storage is no string")
        length = int.from_bytes(file.read(8), "little") * described[key]
        storages[key] = storage(file.tell(), length)
        if file.seek(length, os.SEEK_CUR) > size:
            raise ValueError("it is cut off")
    return content, storages


# --- Paddle's format --------------------------------------------------------------------------------------------------


def _numpy_array(value) -> _Tensor | None:
    """A NumPy array, whose numbers are in the pickle itself."""
    if not isinstance(value, Call) or not re.fullmatch(r"numpy\._?core\.multiarray\._reconstruct", value.function):
        return None
    _, shape, dtype, by_columns, data = value.state
    code = dtype.arguments[0]
    if not re.fullmatch(r"f[248]|i[1248]|u1|b1", code):
        raise ValueError(f"an array of {shown(code)} where numbers were expected")
    number = np.dtype(code).newbyteorder(dtype.state[1])
    if len(shape) > _MOST_DIMENSIONS or not _whole_numbers(shape):
        raise ValueError(f"its shape is {shown(shape)}")

    def read() -> torch.Tensor:
        array = np.frombuffer(_bytes(data), number).reshape(shape, order="F" if by_columns else "C")
        return torch.from_numpy(array.astype(number.newbyteorder("="), order="C"))

    return _Tensor(math.prod(shape), number.itemsize, read)


def _bytes(value) -> bytes:
    """Bytes, also as pickle's protocol 2 writes them."""
    if not isinstance(value, Call):
        return value
    text, encoding = value.arguments
    if value.function != "_codecs.encode" or encoding != "latin1":
        raise ValueError(f"bytes encoded as {shown(encoding)}")
    return text.encode("latin1")
