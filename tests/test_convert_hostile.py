"""convert/: files that are made to harm end in one short line, in time and memory that the file's size bounds."""

import os
import re
from pathlib import Path

import pytest
import torch

import messages
from messages import ConversionError, printable
from original import config_from_settings, from_original
from settings_files import read_settings


def assert_one_short_line(error: ConversionError) -> None:
    line = printable(str(error))
    assert line.isprintable()
    assert len(line) < messages.LONGEST_MESSAGE + 10


# --- Messages ---------------------------------------------------------------------------------------------------------


def test_what_is_printed_is_short_and_printable():
    assert printable("plain  text,\nin café") == "plain text, in café"
    assert printable("\x1b]0;title\x07 \x9b2J \u202e \udcff") == r"\x1b]0;title\x07 \x9b2J \u202e \udcff"
    assert len(printable("x" * 10**7)) < messages.LONGEST_MESSAGE + 10


# --- Settings ---------------------------------------------------------------------------------------------------------

LAUGHS = "a: &a0 [x, x]\n" + "".join(f"b{i}: &a{i + 1} [*a{i}, *a{i}]\n" for i in range(60)) + "MODEL: *a60\n"
MERGES = "a: &a0 {x: 1}\n" + "".join(f"b{i}: &a{i + 1} {{<<: [*a{i}, *a{i}]}}\n" for i in range(60))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (LAUGHS, r"the alias \*a0; write out"),
        (MERGES, r"the alias \*a0; write out"),
        ("MODEL: {NUM_CLASSES: 2021-99-99}", "can be read: month must be"),
        ("MODEL: !!timestamp soon", "can be read"),
        ("MODEL: !!python/object/apply:os.system [true]", "can be read: could not determine a constructor"),
        ("MODEL: !!int soon", "can be read: invalid literal"),
        ("MODEL: " + "9" * 5000, "can be read: Exceeds the limit"),
        ("0x" + "f" * 5000, "it holds a number of thousands of digits"),
        ("MODEL: " + "[" * 5000, "can be read: maximum recursion"),
        ("x" * 200_000, "has 200,000 bytes; a file of settings has at most 100,000"),
        ("[" + "x, " * 30_000 + "]", r"it holds \['x', 'x', .*\.\.\.\]"),
        ("MODEL: \x1b[2J", "special characters are not allowed"),
        ("BASE: [/dev/zero]", "names /dev/zero under BASE, and there is no such file"),
        ("BASE: [pipe]", "pipe under BASE, and there is no such file"),
    ],
    ids=lambda text: text[:30],
)
def test_settings_that_would_harm(tmp_path, text, message):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "settings.yaml").write_text(text)
    with pytest.raises(ConversionError, match=message) as caught:
        read_settings(str(tmp_path / "settings.yaml"))
    assert_one_short_line(caught.value)


def write_chain(folder: Path, length: int, names: int) -> str:
    """Files that name each the next one under BASE, `names` times."""
    for number in range(length):
        (folder / f"{number}.yaml").write_text(f"BASE: [{', '.join([f'{number + 1}.yaml'] * names)}]")
    (folder / f"{length}.yaml").write_text("MODEL: {NAME: last}")
    return str(folder / "0.yaml")


def test_a_chain_of_settings(tmp_path):
    with pytest.raises(ConversionError, match=re.escape("lead through more than 20 files")):
        read_settings(write_chain(tmp_path, 1500, names=1))


def test_settings_named_by_several_files_are_read_once(tmp_path):
    assert read_settings(write_chain(tmp_path, 19, names=9)) == {"MODEL": {"NAME": "last"}}  # 9**19 ways


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
def test_settings_beyond_bounds(settings):
    with pytest.raises(ConversionError, match=r"at most|from 1 to|a number of") as caught:
        config_from_settings(settings)
    assert_one_short_line(caught.value)


def test_a_model_within_bounds_is_compared_without_its_memory():
    """A model of 10**12 parameters."""
    focal = {"EMBED_DIM": 10_000, "DEPTHS": [50] * 4, "NUM_HEADS": [1] * 4, "MLP_RATIO": 10_000}
    config = config_from_settings({"MODEL": {"FOCAL": focal, "NUM_CLASSES": 100_000}})
    with pytest.raises(ConversionError, match=r"lacks head\.bias"):
        from_original({"patch_embed.proj.weight": torch.zeros(1)}, config)
