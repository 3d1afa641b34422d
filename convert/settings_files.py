"""Reads the original's settings from YAML files, as yacs reads them, in memory and time that the files bound."""

import ast
import warnings
from collections.abc import Mapping
from pathlib import Path

import yaml

from messages import ConversionError, shown
from original import RELEASED

LARGEST_FILE = 100_000  # bytes; the original's have some hundreds
LONGEST_LITERAL = 1000  # characters
LONGEST_CHAIN = 20  # files, each of which names the next one under BASE


def read_settings(config: str) -> dict:
    """The original's settings from a YAML file, its `BASE` files followed, or by the name of a released model."""
    if config in RELEASED:
        return RELEASED[config]
    path = Path(config)
    if not path.is_file():
        raise ConversionError(
            f"--config {config} is neither a file nor the name of a released model. Give the YAML file that the "
            f"checkpoint was trained with, or one of: {', '.join(RELEASED)}."
        )
    return _read_yaml(path.resolve(), (), {})


class _TreeLoader(yaml.SafeLoader):
    """Refuses aliases, by which a small file can hold a value of any size."""

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            raise ConversionError(f"the alias *{self.peek_event().anchor}; write out what it stands for")
        return super().compose_node(parent, index)


def _read_yaml(path: Path, above: tuple[Path, ...], read: dict[Path, dict]) -> dict:
    """`above` are the files that lead to `path` by their BASE; `read` are the settings of files already read."""
    if path in read:
        return read[path]
    if path in above:
        raise ConversionError(f"The BASE entries of {above[0]} lead in a circle through {path}.")
    if len(above) == LONGEST_CHAIN:
        raise ConversionError(f"The BASE entries of {above[0]} lead through more than {LONGEST_CHAIN} files.")
    if not path.is_file():
        raise ConversionError(f"{above[-1]} names {path} under BASE, and there is no such file.")
    if path.stat().st_size > LARGEST_FILE:
        raise ConversionError(
            f"{path} has {path.stat().st_size:,} bytes; a file of settings has at most {LARGEST_FILE:,}."
        )
    try:
        own = yaml.load(path.read_text(), _TreeLoader) or {}
    except OSError:
        raise
    except Exception as error:  # text that is no YAML, or dates and numbers that are none, raise almost anything
        reason = str(error) or type(error).__name__
        raise ConversionError(f"{path} is not a YAML file that can be read: {reason}") from None
    if not isinstance(own, dict):
        raise ConversionError(f"{path} must hold settings such as MODEL.FOCAL.EMBED_DIM; it holds {shown(own)}.")
    settings = {}
    bases = own.pop("BASE", None) or []
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise ConversionError(f"BASE in {path} must list YAML files; it holds {shown(bases)}.")
    for base in bases:
        if base:
            settings = _merged(settings, _read_yaml((path.parent / base).resolve(), (*above, path), read))
    read[path] = _merged(settings, _decoded(own))
    return read[path]


def _decoded(value):
    """Strings in `value` as yacs reads them: those that spell a Python literal, such as (2, 2) or 1e-1, are that."""
    if isinstance(value, Mapping):
        if strange := [key for key in value if not isinstance(key, str)]:
            raise ConversionError(f"Names of settings must be words; got {shown(strange[0])}.")
        return {key: _decoded(inner) for key, inner in value.items()}
    if not isinstance(value, str) or len(value) > LONGEST_LITERAL:
        return value
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # text that resembles Python's
        try:
            return ast.literal_eval(value)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            return value


def _merged(base: Mapping, over: Mapping) -> dict:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(merged.get(key), Mapping) and isinstance(value, Mapping)
        merged[key] = _merged(merged[key], value) if both else value
    return merged
