"""Messages of the converters. A message is one short, printable line, even if it quotes a hostile file."""

import reprlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

MAX_MESSAGE_LENGTH = 2000  # characters


class ConversionError(Exception):
    """An error that the user can correct. The message says what was given, what was expected and what to do."""


def printable_line(text: str) -> str:
    """Puts `text` on one line, escapes control characters, and cuts out the middle of a long text."""
    if len(text) > MAX_MESSAGE_LENGTH:
        half = MAX_MESSAGE_LENGTH // 2
        text = f"{text[:half]} ... {text[-half:]}"
    return "".join(
        character if character.isprintable() else ascii(character)[1:-1] for character in " ".join(text.split())
    )


_REPR = reprlib.Repr()
_REPR.maxlevel, _REPR.maxdict, _REPR.maxstring, _REPR.maxother = 2, 6, 60, 60


def short_repr(value) -> str:
    """Returns the repr of a value from a file, shortened to about one line."""
    try:
        return _REPR.repr(value)
    except ValueError:  # Python refuses to print an integer of more than 4300 digits
        return "an integer of thousands of digits"


def join_names(names: Sequence[str]) -> str:
    """Returns up to eight names, and the number of the others."""
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return ", ".join(names[:8]) + more


def print_progress(text: str) -> None:
    """Prints a progress message to stdout without buffering."""
    print(printable_line(text), flush=True)


@contextmanager
def wrap_errors(action: str, advice: str = "") -> Iterator[None]:
    """Turns every exception into a ConversionError that says that `action` failed.

    Use it around work on a disk, a network or the Hub, for which each library raises exceptions of its own.
    """
    try:
        yield
    except Exception as error:
        raise ConversionError(f"{action} failed: {str(error).rstrip('.')}. {advice}".rstrip()) from error
