"""Reads checkpoints of PyTorch and Paddle. Runs no code in them, and needs no more memory than the size of the file."""

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

from messages import ConversionError, short_repr
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
_MAX_DIMENSIONS = 8


class _StoredTensor(NamedTuple):
    """A tensor in a file. Its size is known before its values are read."""

    numel: int
    itemsize: int
    read: Callable[[], torch.Tensor]


def read_checkpoint(path: Path) -> dict[str, torch.Tensor]:
    """Reads the state dict from a `.pth` or `.pdparams` file.

    The state dict is the whole content of the file, or its entry "model" or "state_dict". A tensor is read only if all
    its values are in the file.

    Raises:
        ConversionError: if the file does not exist, is not a checkpoint, is damaged, or would run code.
    """
    if path.is_dir() or (path.is_file() and _is_safetensors(path)):
        raise ConversionError(
            f"--checkpoint {path} is not a checkpoint of the original. Give a .pth or .pdparams file. To convert a "
            "model of transformers to the original's format, use convert_hf_to_focal.py."
        )
    if not path.is_file():
        raise ConversionError(f"--checkpoint {path} does not exist, or is not a file. Give a .pth or .pdparams file.")
    with path.open("rb") as file:
        try:
            return _read_state_dict(path, file)
        except ConversionError:
            raise
        except RefusedName as refused:
            raise ConversionError(
                f"{path} imports {refused}, which a checkpoint does not need and which could run any code. Nothing in "
                "the file was run. Do not trust this file."
            ) from None
        except Exception as error:  # a damaged file raises exceptions of almost any type
            kind = "Paddle" if path.suffix == ".pdparams" else "PyTorch"
            raise ConversionError(
                f"{path} is not a {kind} checkpoint, or is damaged or incomplete ({type(error).__name__}: {error}). "
                "Download or copy the file again."
            ) from None


def _is_safetensors(path: Path) -> bool:
    with path.open("rb") as file:
        header_length, first_character = int.from_bytes(file.read(8), "little"), file.read(1)
    return first_character == b"{" and header_length < path.stat().st_size


def _read_state_dict(path: Path, file: BinaryIO) -> dict[str, torch.Tensor]:
    from_paddle = path.suffix == ".pdparams"
    if from_paddle:
        content, parse_tensor = read_pickle(file)[0], _parse_numpy_array
    else:
        content, parse_tensor = _open_torch(file)
    for key in ("model", "state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    expected = "expected a state dict of dense tensors, which may be the entry 'model' or 'state_dict' of a dict"
    if not isinstance(content, Mapping) or not content:
        raise ConversionError(f"{path} holds {_describe(content)}; {expected}.")
    if from_paddle:
        content.pop("StructuredToParameterName@@", None)  # Paddle's graph names of the tensors

    tensors = {}
    for name, value in content.items():
        try:
            tensors[name] = parse_tensor(value)
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            raise ConversionError(
                f"{path} holds a tensor under {short_repr(name)} that cannot be read: {error}."
            ) from None
        if not isinstance(name, str) or tensors[name] is None:
            raise ConversionError(f"{path} holds {_describe(value)} under {short_repr(name)}; {expected}.")
    if any(name.startswith(("focal.", "backbone.focal.")) for name in tensors):
        raise ConversionError(
            f"{path} has the tensor names of focal_hf, so it is converted already. To convert it back to the "
            "original's format, use convert_hf_to_focal.py."
        )
    file_size = os.fstat(file.fileno()).st_size
    if (total := sum(tensor.numel * tensor.itemsize for tensor in tensors.values())) > file_size:
        raise ConversionError(
            f"{path} is damaged: the file has {file_size:,} bytes and describes tensors of {total:,} bytes."
        )

    state = {name: tensor.read() for name, tensor in tensors.items()}
    # Paddle stores the weight of a linear layer as (in, out).
    return {
        name: tensor.T.contiguous() if from_paddle and name.endswith(".weight") and tensor.ndim == 2 else tensor
        for name, tensor in state.items()
    }


def _describe(value) -> str:
    if isinstance(value, Mapping) and value:
        return "a dict with " + ", ".join(short_repr(key) for key in list(value)[:4])
    if isinstance(value, Call):
        return f"an object made by {value.function}"
    return f"an object of type {type(value).__name__}"


# --- PyTorch's formats ------------------------------------------------------------------------------------------------


class _Storage(NamedTuple):
    size: int  # bytes
    read: Callable[[], bytes]


def _open_torch(file: BinaryIO) -> tuple[object, Callable[[object], _StoredTensor | None]]:
    """Returns the content of the file, and a function that parses a tensor in it."""
    is_zip = file.read(4) == b"PK\x03\x04"
    file.seek(0)
    content, storages = _open_zip(file) if is_zip else _open_legacy(file)
    storage_bytes = {}  # of the storages that were read; tensors may share a storage

    def read_storage(key: str) -> bytearray:
        if key not in storage_bytes:
            storage_bytes[key] = bytearray(storages[key].read())
        return storage_bytes[key]

    def parse_tensor(value) -> _StoredTensor | None:
        if isinstance(value, Call) and value.function.startswith("torch._utils._rebuild_parameter"):
            value = value.arguments[0]
        if not isinstance(value, Call) or value.function != "torch._utils._rebuild_tensor_v2":
            return None
        storage, offset, shape, strides, _, _, *metadata = value.arguments
        key, dtype, storage_numel = _parse_storage(storage)
        if any(metadata):
            raise ValueError(f"it is a view of {short_repr(metadata[0])}")
        if not len(shape) == len(strides) <= _MAX_DIMENSIONS or not _are_sizes((offset, *shape, *strides)):
            raise ValueError(f"its shape is {short_repr(shape)} and its strides are {short_repr(strides)}")
        numel = math.prod(shape)
        last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        if (
            key not in storages
            or storages[key].size != storage_numel * dtype.itemsize
            or (numel and last >= storage_numel)
        ):
            raise ValueError("some of its values are not in the file")

        def read_tensor() -> torch.Tensor:
            if not numel:
                return torch.empty(shape, dtype=dtype)
            return torch.frombuffer(read_storage(key), dtype=dtype).as_strided(shape, strides, offset)

        return _StoredTensor(numel, dtype.itemsize, read_tensor)

    return content, parse_tensor


def _parse_storage(persistent_id: Call) -> tuple[str, torch.dtype, int]:
    """Returns the key, the dtype and the number of elements of a storage."""
    kind, storage_class, key, _, numel, *view = persistent_id.arguments[0]
    dtype = _DTYPES.get(storage_class) if isinstance(storage_class, Name) else None
    if kind != "storage" or dtype is None or not isinstance(key, str) or not _are_sizes((numel,)) or any(view):
        raise ValueError(f"its storage {short_repr(persistent_id.arguments[0])} is not supported")
    return key, dtype, numel


def _are_sizes(numbers: tuple) -> bool:
    return all(type(number) is int and 0 <= number < 2**63 for number in numbers)


def _open_zip(file: BinaryIO) -> tuple[object, dict[str, _Storage]]:
    """Opens a file in the format of torch.save since PyTorch 1.6."""
    archive = zipfile.ZipFile(file)
    records = archive.infolist()
    names = {record.filename: record for record in records}
    file_size = os.fstat(file.fileno()).st_size
    if any(record.compress_type != zipfile.ZIP_STORED for record in records):
        raise ValueError("its records are compressed, which torch.save never does")
    if len(names) < len(records) or sum(record.file_size for record in records) > file_size:
        raise ValueError("its records overlap")
    folders = [name.removesuffix("data.pkl") for name in names if re.fullmatch(r"[^/]+/data\.pkl", name)]
    if len(folders) != 1:
        raise ValueError("torch.save did not write this zip file")
    (folder,) = folders
    if (byte_order := names.get(f"{folder}byteorder")) and archive.read(byte_order) != b"little":
        raise ValueError("its numbers are big-endian")
    content, _ = read_pickle(io.BytesIO(archive.read(f"{folder}data.pkl")))

    def storage(record: zipfile.ZipInfo) -> _Storage:
        return _Storage(record.file_size, lambda: archive.read(record))

    prefix = f"{folder}data/"
    return content, {
        name.removeprefix(prefix): storage(record) for name, record in names.items() if name.startswith(prefix)
    }


def _open_legacy(file: BinaryIO) -> tuple[object, dict[str, _Storage]]:
    """Opens a file in the format of torch.save before PyTorch 1.6: five pickles, then the storages."""
    if read_pickle(file)[0] != 0x1950A86A20F9469CFC6C or read_pickle(file)[0] != 1001:
        raise ValueError("it does not begin like a file of torch.save")
    if not read_pickle(file)[0]["little_endian"]:
        raise ValueError("its numbers are big-endian")
    content, persistent_ids = read_pickle(file)
    itemsizes = {key: dtype.itemsize for key, dtype, _ in map(_parse_storage, persistent_ids)}
    storages, keys = {}, read_pickle(file)[0]
    file_size = os.fstat(file.fileno()).st_size

    def storage(start: int, size: int) -> _Storage:
        def read() -> bytes:
            file.seek(start)
            return file.read(size)

        return _Storage(size, read)

    for key in keys:
        if not isinstance(key, str):
            raise ValueError("the key of a storage is not a string")
        size = int.from_bytes(file.read(8), "little") * itemsizes[key]
        storages[key] = storage(file.tell(), size)
        if file.seek(size, os.SEEK_CUR) > file_size:
            raise ValueError("its end is missing")
    return content, storages


# --- Paddle's format --------------------------------------------------------------------------------------------------


def _parse_numpy_array(value) -> _StoredTensor | None:
    """Parses a NumPy array, whose values are in the pickle itself."""
    if not isinstance(value, Call) or not re.fullmatch(r"numpy\._?core\.multiarray\._reconstruct", value.function):
        return None
    _, shape, dtype, fortran_order, data = value.state
    code = dtype.arguments[0]
    if not re.fullmatch(r"f[248]|i[1248]|u1|b1", code):
        raise ValueError(f"it is an array of dtype {short_repr(code)}, which is not supported")
    stored_dtype = np.dtype(code).newbyteorder(dtype.state[1])
    if len(shape) > _MAX_DIMENSIONS or not _are_sizes(shape):
        raise ValueError(f"its shape is {short_repr(shape)}")

    def read() -> torch.Tensor:
        array = np.frombuffer(_array_bytes(data), stored_dtype).reshape(shape, order="F" if fortran_order else "C")
        return torch.from_numpy(array.astype(stored_dtype.newbyteorder("="), order="C"))

    return _StoredTensor(math.prod(shape), stored_dtype.itemsize, read)


def _array_bytes(value) -> bytes:
    """Returns the bytes of an array. Pickle protocol 2 writes bytes as text encoded in latin1."""
    if not isinstance(value, Call):
        return value
    text, encoding = value.arguments
    if value.function != "_codecs.encode" or encoding != "latin1":
        raise ValueError(f"bytes are encoded in {short_repr(encoding)}; expected 'latin1'")
    return text.encode("latin1")
