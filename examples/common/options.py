"""Command lines: kinds of values, and what only the user can put right."""

import argparse
import math
import sys
import time
from collections.abc import Callable
from typing import NoReturn


class Problem(Exception):
    """Something only the user can put right: shown as one line, without a traceback."""


def positive(kind: type, or_zero: bool = False) -> Callable[[str], int | float]:
    """An argparse type: an int or a float above zero, or zero where that has a meaning."""

    def parse(text: str) -> int | float:
        value = kind(text)
        if not (math.isfinite(value) and (value > 0 or (or_zero and value == 0))):
            raise argparse.ArgumentTypeError(f"{text} is not {'zero or ' if or_zero else ''}above zero")
        return value

    parse.__name__ = kind.__name__  # argparse puts it into "invalid int value"
    return parse


def fraction(text: str) -> float:
    """An argparse type: above 0, at most 1."""
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and at most 1")
    return value


def first_line(error: Exception) -> str:
    """An error's first line of text: what libraries write after it is advice that does not fit here."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def stop(problem: Problem, is_main_process: bool) -> NoReturn:
    """Show the problem and end this process."""
    # All processes meet the same problem and one should report it. It ends the others by failing; where it is not the
    # one in trouble, the others speak for themselves.
    if not is_main_process:
        time.sleep(5)
    print(f"error: {problem}", file=sys.stderr, flush=True)
    sys.exit(1)
