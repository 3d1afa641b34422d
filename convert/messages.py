"""Messages of the converters: short, on one line, and printable, whatever a file puts into them."""

import reprlib
from collections.abc import Iterator
from contextlib import contextmanager

LONGEST_MESSAGE = 2000  # characters


class ConversionError(Exception):
    """Says what was given, what was expected and what to do."""


def printable(text: str) -> str:
    """`text` on one line, without control characters, and without its middle where it is long."""
    if len(text) > LONGEST_MESSAGE:
        half = LONGEST_MESSAGE // 2
        text = f"{text[:half]} ... {text[-half:]}"
    return "".join(
        character if character.isprintable() else ascii(character)[1:-1] for character in " ".join(text.split())
    )


_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxdict, _SHORT.maxstring, _SHORT.maxother = 2, 6, 60, 60


def shown(value) -> str:
    """A value from a file as a message shows it: its repr, in about a line."""
    try:
        return _SHORT.repr(value)
    except ValueError:  # Python writes no whole number of more than 4300 digits
        return "a number of thousands of digits"


def say(text: str) -> None:
    """Progress, on stdout, at once."""
    print(printable(text), flush=True)


@contextmanager
def failing_as(what: str, advice: str = "") -> Iterator[None]:
    """For work on which a disk, a network or the Hub can fail, each library in exceptions of its own."""
    try:
        yield
    except Exception as error:
        raise ConversionError(f"{what} failed: {error} {advice}") from error
