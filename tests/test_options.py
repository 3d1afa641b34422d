"""The command lines of examples/: what their help says, and values that no option takes."""

import argparse
import importlib
import re
import sys

import pytest

from common.options import LONGEST_SIDE
from common.pictures import MOST_PIXELS

SCRIPTS = {
    "evaluate": ["--model", "m", "--data", "d"],
    "extract_features": ["--model", "m", "--data", "d", "--output", "o"],
    "finetune": ["--model", "m", "--data", "d", "--output", "o"],
    "finetune_detection": ["--model", "m", "--data", "d", "--output", "o"],
    "finetune_segmentation": ["--model", "m", "--data", "d", "--output", "o"],
    "make_scenes": ["folder"],
    "pretrain_mim": ["--model", "m", "--data", "d", "--output", "o"],
    "visualize_attention": ["picture.png", "--model", "m"],
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_states_the_defaults(script, monkeypatch):
    parsers = []
    parse = argparse.ArgumentParser.parse_args
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", lambda parser: parsers.append(parser) or parse(parser))
    monkeypatch.setattr(sys, "argv", [script, *SCRIPTS[script]])
    args = importlib.import_module(script).parse_arguments()
    for action in parsers[0]._actions:
        stated = re.search(r"default: ([\w./-]+)\)?$", action.help)
        value = getattr(args, action.dest, None)
        if stated and isinstance(value, int | float | str) and not isinstance(value, bool):
            assert type(value)(stated[1]) == value, action.dest


@pytest.mark.parametrize(
    ("script", "options", "message"),
    [
        ("finetune", ("--seed", "4294967296"), "--seed: 4294967296 is not from 0 to 4294967295"),
        ("make_scenes", ("--seed", "-1"), "--seed: -1 is not from 0 to 4294967295"),
        ("finetune", ("--erasing", "1.5"), "--erasing: 1.5 is not from 0 to 1"),
        ("finetune", ("--erasing", "nan"), "--erasing: nan is not from 0 to 1"),
        ("evaluate", ("--image-size", "99999"), f"--image-size: 99999 is not from 1 to {LONGEST_SIDE}"),
        ("finetune_segmentation", ("--image-size", "0"), f"--image-size: 0 is not from 1 to {LONGEST_SIDE}"),
        ("evaluate", ("--batch-size", "0"), "--batch-size: 0 is not above zero"),
        ("pretrain_mim", ("--mask-ratio", "0"), "--mask-ratio: 0 is not above 0 and at most 1"),
    ],
)
def test_values_outside_their_limits_are_one_line(script, options, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [script, *SCRIPTS[script], *options])
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(script).parse_arguments()
    assert stop.value.code == 2
    assert capsys.readouterr().err.endswith(f"error: argument {message}\n")


def test_an_input_may_be_as_large_as_a_picture():
    assert LONGEST_SIDE**2 == MOST_PIXELS
