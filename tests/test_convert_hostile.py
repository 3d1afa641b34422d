"""convert/: hostile files end in one short message, with bounds on time and memory."""

import codecs
import io
import os
import pickle
import re
import resource
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import messages
from checkpoint_files import read_checkpoint
from focal_hf import FocalConfig, FocalForImageClassification
from messages import ConversionError, printable_line
from model_card import swin_model_card
from original import config_from_settings, from_original
from settings_files import read_settings


def assert_short_message(error: ConversionError) -> None:
    line = printable_line(str(error))
    assert line.isprintable()
    assert len(line) < messages.MAX_MESSAGE_LENGTH + 10


@pytest.fixture
def bounded_memory() -> Iterator[None]:
    """Limits the memory of the process to 256 MiB more than it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**28, hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


# --- Messages ---------------------------------------------------------------------------------------------------------


def test_messages_are_short_and_printable(capsys):
    assert printable_line("plain  text,\nin café") == "plain text, in café"
    assert printable_line("\x1b]0;title\x07 \x9b2J \u202e \udcff") == r"\x1b]0;title\x07 \x9b2J \u202e \udcff"
    assert len(printable_line("x" * 10**7)) < messages.MAX_MESSAGE_LENGTH + 10
    messages.print_progress("Ignored: \x1b[2J")
    assert capsys.readouterr().out == "Ignored: \\x1b[2J\n"


# --- Settings ---------------------------------------------------------------------------------------------------------

NESTED_ALIASES = "a: &a0 [x, x]\n" + "".join(f"b{i}: &a{i + 1} [*a{i}, *a{i}]\n" for i in range(60)) + "MODEL: *a60\n"
NESTED_MERGES = "a: &a0 {x: 1}\n" + "".join(f"b{i}: &a{i + 1} {{<<: [*a{i}, *a{i}]}}\n" for i in range(60))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (NESTED_ALIASES, r"uses the alias \*a0\. Write the value"),
        (NESTED_MERGES, r"uses the alias \*a0\. Write the value"),
        ("MODEL: {NUM_CLASSES: 2021-99-99}", "cannot be read as YAML: month must be"),
        ("MODEL: !!timestamp soon", "cannot be read as YAML"),
        ("MODEL: !!python/object/apply:os.system [true]", "cannot be read as YAML: could not determine a constructor"),
        ("MODEL: !!int soon", "cannot be read as YAML: invalid literal"),
        ("MODEL: " + "9" * 5000, "cannot be read as YAML: Exceeds the limit"),
        # Python 3.14 has words of its own for such a number.
        ("0x" + "f" * 5000, "it holds (an integer of thousands of digits|<int instance with roughly 6021 digits)"),
        ("MODEL: " + "[" * 5000, "cannot be read as YAML: maximum recursion"),
        ("x" * 200_000, "has 200,000 bytes; a settings file may have at most 100,000"),
        ("[" + "x, " * 30_000 + "]", r"it holds \['x', 'x', .*\.\.\.\]"),
        ("MODEL: \x1b[2J", "special characters are not allowed"),
        ("BASE: [/dev/zero]", "names /dev/zero under BASE, but that file does not exist"),
        ("BASE: [pipe]", "pipe under BASE, but that file does not exist"),
        ('BASE: "a\\0b"', r"names 'a\\x00b' under BASE, which is no file: "),
        ("BASE: loop", "loop'? under BASE"),  # Python 3.13 does not resolve such a link
    ],
    ids=lambda text: text[:30],
)
def test_hostile_settings_are_refused(tmp_path, text, message):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "settings.yaml").write_text(text)
    with pytest.raises(ConversionError, match=message) as caught:
        read_settings(str(tmp_path / "settings.yaml"))
    assert_short_message(caught.value)


def write_base_chain(folder: Path, length: int, names: int) -> str:
    """Writes files of which each names the next one under BASE, `names` times. Returns the first."""
    for number in range(length):
        (folder / f"{number}.yaml").write_text(f"BASE: [{', '.join([f'{number + 1}.yaml'] * names)}]")
    (folder / f"{length}.yaml").write_text("MODEL: {NAME: last}")
    return str(folder / "0.yaml")


def test_long_chain_of_base_files_is_refused(tmp_path):
    with pytest.raises(ConversionError, match=re.escape("form a chain of more than 20 files")):
        read_settings(write_base_chain(tmp_path, 1500, names=1))


def test_shared_base_files_are_read_once(tmp_path):
    assert read_settings(write_base_chain(tmp_path, 19, names=9)) == {"MODEL": {"NAME": "last"}}  # 9**19 ways


@pytest.mark.parametrize(
    "settings",
    [
        {"DATA": {"IMG_SIZE": 20_000}},
        {"DATA": {"IMG_SIZE": [1, 10**9]}},
        {"DATA": {"IMG_SIZE": 9_000}},
        {"MODEL": {"NUM_CLASSES": 10**9}},
        {"MODEL": {"DROP_PATH_RATE": float("nan")}},
        {"MODEL": {"FOCAL": {"DEPTHS": [10**9, 1]}}},
        {"MODEL": {"FOCAL": {"DEPTHS": [1000, 1]}}},
        {"MODEL": {"FOCAL": {"DEPTHS": [1] * 10_000}}},
        {"MODEL": {"FOCAL": {"EMBED_DIM": 20_000}}},
        {"MODEL": {"FOCAL": {"MLP_RATIO": 1e30}}},
        {"MODEL": {"FOCAL": {"FOCAL_LEVELS": [10**9] * 4}}},
        {"DATA": {"IMG_SIZE": 2048}, "MODEL": {"FOCAL": {"WINDOW_SIZE": 512}}},
        {"MODEL": {"FOCAL": {"FOCAL_WINDOWS": [9_999] * 4, "FOCAL_LEVELS": [2] * 4, "FOCAL_POOL": "fc"}}},
        {"DATA": {"IMG_SIZE": 1792}, "MODEL": {"TYPE": "focalv2", "FOCAL": {"FOCAL_TOPK": 9_999}}},
    ],
    ids=str,
)
def test_settings_beyond_bounds_are_refused(settings):
    with pytest.raises(ConversionError, match=r"at most|from 0 to") as caught:
        config_from_settings(settings)
    assert_short_message(caught.value)


def test_huge_model_is_compared_on_the_meta_device():
    """A model of 10**14 parameters."""
    focal = {"EMBED_DIM": 8000, "DEPTHS": [50] * 4, "NUM_HEADS": [1] * 4, "MLP_RATIO": 1000}
    config = config_from_settings({"MODEL": {"FOCAL": focal, "NUM_CLASSES": 100_000}})
    with pytest.raises(ConversionError, match=r"lacks head\.bias"):
        from_original({"patch_embed.proj.weight": torch.zeros(1)}, config)


# --- Model cards ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "metadata",
    [
        NESTED_ALIASES.replace("MODEL", "license"),
        NESTED_MERGES,
        "license: mit\n" + "[" * 5000,
        "license: 2021-99-99",
        "license: {a: b}\ndatasets: [1]",
        "- license",
    ],
    ids=lambda text: text[:20],
)
def test_invalid_metadata_of_a_card_is_dropped(bounded_memory, metadata):
    source = {"source": "me/swin", "revision": None}
    card = f"---\n{metadata}\n---\n\n# A Swin\n"
    written = swin_model_card("focal", FocalForImageClassification, FocalConfig(), source, card, None)
    assert (written.data.license, written.data.datasets) == (None, None)
    assert "states no licence" in written.text
    assert written.text.endswith("## The card of the Swin\n\n# A Swin\n")


# --- Checkpoints ------------------------------------------------------------------------------------------------------


class Storage:
    """A storage, written to a pickle with any key and length."""

    def __init__(self, key: str, length: int, kind: type = torch.FloatStorage):
        self.id = ("storage", kind, key, "cpu", length)


class PickledTensor:
    """A tensor, written to a pickle with any offset, shape and strides."""

    def __init__(self, values: Storage | None, *described):
        self.arguments = (values, *described, False, {})

    def __reduce__(self):
        return torch._utils._rebuild_tensor_v2, self.arguments


class PickledCall:
    """An object that a pickle makes by a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def pickle_bytes(value, legacy: bool = False) -> bytes:
    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            return (*value.id, *([None] if legacy else [])) if isinstance(value, Storage) else None

    buffer = io.BytesIO()
    Pickler(buffer, protocol=2).dump(value)
    return buffer.getvalue()


def write_zip(path: Path, state: dict | bytes, records: dict[str, bytes]) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/version", "3")
        archive.writestr("archive/data.pkl", state if isinstance(state, bytes) else pickle_bytes(state))
        for key, record in records.items():
            archive.writestr(f"archive/data/{key}", record)


def write_legacy(path: Path, state: dict | bytes, records: dict[str, bytes]) -> None:
    parts = [pickle_bytes(part) for part in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})]
    parts += [state if isinstance(state, bytes) else pickle_bytes(state, legacy=True), pickle_bytes(list(records))]
    parts += [(len(record) // 4).to_bytes(8, "little") + record for record in records.values()]
    path.write_bytes(b"".join(parts))


def assert_refused(path: Path, message: str) -> None:
    with pytest.raises(ConversionError, match=message) as caught:
        read_checkpoint(path)
    assert_short_message(caught.value)


FOUR = np.arange(4, dtype="<f4").tobytes()


@pytest.mark.parametrize("write", [write_zip, write_legacy])
def test_views_of_one_storage_are_read(tmp_path, write):
    values = Storage("0", 4)
    described = {"a": (0, (2, 1), (1, 2)), "b": (1, (2,), (2,)), "empty": (4, (0,), (1,))}
    write(tmp_path / "file.pth", {name: PickledTensor(values, *rest) for name, rest in described.items()}, {"0": FOUR})
    read = {name: tensor.tolist() for name, tensor in read_checkpoint(tmp_path / "file.pth").items()}
    assert read == {"a": [[0], [1]], "b": [1, 3], "empty": []}


@pytest.mark.parametrize("write", [write_zip, write_legacy])
@pytest.mark.parametrize(
    ("described", "records"),
    [
        ((Storage("0", 4), 0, (4,), (1,)), {}),
        ((Storage("0", 4), 4, (1,), (1,)), {"0": FOUR}),
        ((Storage("0", 4), 2**60, (1,), (1,)), {"0": FOUR}),
        ((Storage("0", 4), 0, (5,), (1,)), {"0": FOUR}),
        ((Storage("0", 4), 0, (2,), (4,)), {"0": FOUR}),
        ((Storage("0", 5), 0, (5,), (1,)), {"0": FOUR}),
        ((Storage("0", 2**40), 0, (2**40,), (1,)), {"0": FOUR}),
        ((Storage("1", 4), 0, (4,), (1,)), {"0": FOUR}),
    ],
    ids=["no values", "offset", "far offset", "shape", "strides", "length", "large length", "other key"],
)
def test_tensors_beyond_their_storage_are_refused(tmp_path, write, described, records):
    whole = {"whole": PickledTensor(Storage("0", 4), 0, (4,), (1,))} if records else {}
    write(tmp_path / "file.pth", whole | {"weight": PickledTensor(*described)}, records)
    assert_refused(tmp_path / "file.pth", "some of its values are not in the file")


@pytest.mark.parametrize(
    "described",
    [
        (Storage("0", 4), -1, (1,), (1,)),
        (Storage("0", 4), 3, (2,), (-1,)),
        (Storage("0", 4), 0, (2.0,), (1,)),
        (Storage("0", 4), 0, (1,), (1, 1)),
        (Storage("0", 4), 0, (1,) * 10**5, (1,) * 10**5),
        (Storage("0", 4), 0, "4", "1"),
        (Storage("0", 4, torch.ComplexFloatStorage), 0, (2,), (1,)),
        (Storage(0, 4), 0, (4,), (1,)),
        (None, 0, (4,), (1,)),
    ],
    ids=["offset", "strides", "float", "dimensions", "many dimensions", "text", "complex", "key", "no storage"],
)
def test_invalid_tensors_are_refused(tmp_path, described):
    write_zip(tmp_path / "file.pth", {"weight": PickledTensor(*described)}, {"0": FOUR})
    assert_refused(tmp_path / "file.pth", "holds a tensor under 'weight' that cannot be read")


@pytest.mark.parametrize("kind", ["complex", "float8", "uint16", "quantised", "nested", "sparse", "meta"])
def test_unsupported_tensors_are_refused(tmp_path, kind):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tensor = {
            "complex": lambda: torch.zeros(2, dtype=torch.complex64),
            "float8": lambda: torch.zeros(2, dtype=torch.float8_e4m3fn),
            "uint16": lambda: torch.zeros(2, dtype=torch.uint16),
            "quantised": lambda: torch.quantize_per_tensor(torch.zeros(2), 0.1, 0, torch.qint8),
            "nested": lambda: torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]),
            "sparse": lambda: torch.zeros(2, 2).to_sparse_csr(),
            "meta": lambda: torch.zeros(2, device="meta"),
        }[kind]()
        torch.save({"head.weight": tensor}, tmp_path / "file.pth")
    assert_refused(tmp_path / "file.pth", r"under 'head\.weight'")


# The hash and the repr of the keys of these dicts would take 2**200 steps.
NESTED_TUPLES = b"\x80\x04})" + b"2\x86" * 200 + b"K\x01s."
NESTED_SETS = b"\x80\x04}(\x91\x94" + b"".join(b"0(h%c(h%c\x91\x91\x94" % (i, i) for i in range(200)) + b"K\x01s."


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (NESTED_TUPLES, "type int under <a key that is not a string>"),
        (NESTED_SETS, "type int under <a key that is not a string>"),
        (b"\x80\x02}Va\ncbuiltins\nbytearray\nI20000000000\n\x85Rs.", "made by builtins.bytearray under 'a'"),
        (b"\x80\x04}B\xff\xff\xff\xffa.", "is not a PyTorch checkpoint"),
        (b"\x80\x04}\x96\xff\xff\xff\xff\xff\xff\xff\x7fa.", "is not a PyTorch checkpoint"),
        (b"\x80\x02}r\xff\xff\xff\x7fX\x01\x00\x00\x00aK\x01s.", "type int under 'a'"),
        (b"\x80\x02" + b"(" * 1_100_000 + b".", "more than 1,000,000 opcodes"),
        (b"\x80\x02" + b"]" + b"]a" * 90_000 + b".", "an object of type list"),
        (b"\x80\x02}V" + b"\x1b" * 10**6 + b"\nK\x01s.", r"type int under '\\x1b"),
        (b"\x80\x02}Va\nL" + b"9" * 5000 + b"L\ns.", "is not a PyTorch checkpoint"),
        (b"\x80\x02}Va\n\x8b\x10\x27\x00\x00" + b"\x7f" * 10_000 + b"s.", "type int under 'a'"),
        (b"\x80\x02Rs(.", "is not a PyTorch checkpoint"),
        (b"\x80\x02h\x05.", "is not a PyTorch checkpoint"),
        (b"\x80\x02}\x82\x01.", "has the opcode EXT1"),
        (b"\x80\x02cos\nsystem\nVtrue\n\x85R.", r"imports os\.system"),
        (b"\x80\x04\x8c\x02os\x8c\x06system\x93.", r"imports os\.system"),
        (b"(S'true'\nios\nsystem\n.", "has the opcode INST"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_hostile_pickles_are_refused(tmp_path, bounded_memory, content, message):
    write_zip(tmp_path / "file.pth", content, {})
    assert_refused(tmp_path / "file.pth", message)
    (tmp_path / "file.pdparams").write_bytes(content)
    assert_refused(tmp_path / "file.pdparams", message.replace("PyTorch", "Paddle"))


def test_compressed_records_are_refused(tmp_path, bounded_memory):
    """The file of half a megabyte holds half a gigabyte."""
    state = {"a": PickledTensor(Storage("0", 2**27), 0, (2**27,), (1,))}
    with zipfile.ZipFile(tmp_path / "file.pth", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("archive/version", "3")
        archive.writestr("archive/data.pkl", pickle_bytes(state))
        with archive.open("archive/data/0", "w") as record:
            for _ in range(32):
                record.write(bytes(2**24))
    assert_refused(tmp_path / "file.pth", "its records are compressed")


def test_overlapping_records_are_refused(tmp_path, bounded_memory):
    names = [str(number) for number in range(400)]
    record = bytes(2**22)
    state = {name: PickledTensor(Storage(name, 2**20), 0, (2**20,), (1,)) for name in names}
    write_zip(tmp_path / "file.pth", state, {"0": record} | dict.fromkeys(names[1:], b""))
    with zipfile.ZipFile(tmp_path / "file.pth", "a") as archive:
        first = archive.getinfo("archive/data/0")
        for name in names[1:]:
            info = archive.getinfo(f"archive/data/{name}")
            info.header_offset, info.CRC = first.header_offset, first.CRC
            info.file_size = info.compress_size = first.file_size
        archive.writestr("archive/more", "")  # makes zipfile write the directory again
    assert_refused(tmp_path / "file.pth", "its records overlap")


@pytest.mark.parametrize("write", [write_zip, write_legacy])
def test_tensors_that_exceed_the_file_size_are_refused(tmp_path, bounded_memory, write):
    values = Storage("0", 2**20)
    state = {str(number): PickledTensor(values, 0, (2**20,), (1,)) for number in range(500)}
    write(tmp_path / "file.pth", state, {"0": bytes(2**22)})
    assert_refused(tmp_path / "file.pth", "describes tensors of 2,097,152,000 bytes")
    write(tmp_path / "file.pth", {"a": PickledTensor(values, 0, (2**20, 2**12), (0, 0))}, {"0": bytes(2**22)})
    assert_refused(tmp_path / "file.pth", "describes tensors of 17,179,869,184 bytes")


@pytest.mark.parametrize("protocol", [2, 4])
def test_paddle_arrays_that_exceed_the_file_size_are_refused(tmp_path, bounded_memory, protocol):
    array = np.zeros(2**20, "<f4")
    data = array.tobytes()

    class Shared:
        def __reduce__(self):
            function, arguments, _ = array.__reduce__()
            return function, arguments, (1, array.shape, array.dtype, False, data)

    (tmp_path / "file.pdparams").write_bytes(pickle.dumps({str(i): Shared() for i in range(500)}, protocol))
    assert_refused(tmp_path / "file.pdparams", "describes tensors of 2,097,152,000 bytes")


@pytest.mark.parametrize(
    ("dtype", "data", "message"),
    [
        (np.dtype("O"), b"", "an array of dtype 'O8', which is not supported"),
        (np.dtype("c8"), b"", "an array of dtype 'c8', which is not supported"),
        (np.dtype("<f4"), bytes(4), "is not a Paddle checkpoint"),
        (np.dtype("<f4"), PickledCall(codecs.encode, "x", "rot13"), "bytes are encoded in 'rot13'"),
    ],
    ids=["objects", "complex", "too few", "encoding"],
)
def test_unsupported_paddle_arrays_are_refused(tmp_path, dtype, data, message):
    class Array:
        def __reduce__(self):
            return *np.zeros(2).__reduce__()[:2], (1, (2,), dtype, False, data)

    (tmp_path / "file.pdparams").write_bytes(pickle.dumps({"weight": Array()}, protocol=4))
    assert_refused(tmp_path / "file.pdparams", message)


@pytest.mark.parametrize("name", ["pipe.pth", "pipe.pdparams", "zero.pth"])
def test_pipes_and_devices_are_refused(tmp_path, name):
    if name == "zero.pth":
        (tmp_path / name).symlink_to("/dev/zero")
    else:
        os.mkfifo(tmp_path / name)
    assert_refused(tmp_path / name, "does not exist, or is not a file")
