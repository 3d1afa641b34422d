"""Reads the original's settings from YAML files, as yacs does, with bounds on memory and time."""

import ast
import warnings
from collections.abc import Mapping
from pathlib import Path

import yaml

from messages import ConversionError, short_repr
from original import RELEASED

MAX_FILE_SIZE = 100_000  # bytes; the original's files have some hundreds
MAX_LITERAL_LENGTH = 1000  # characters
MAX_BASE_DEPTH = 20  # files in a chain of BASE entries


def read_settings(config: str) -> dict:
    """Returns the original's settings, from a YAML file with its `BASE` files, or by the name of a released model."""
    if config in RELEASED:
        return RELEASED[config]
    path = Path(config)
    if not path.is_file():
        raise ConversionError(
            f"--config {config} is neither a file nor the name of a released model. Give the YAML file that the "
            f"checkpoint was trained with, or one of these names: {', '.join(RELEASED)}."
        )
    return _read_yaml(path.resolve(), (), {})


def parse_yaml(text: str) -> object:
    """Returns the value of a YAML text of builtin types.

    Raises:
        ConversionError: if it uses an alias.
        Exception: of almost any type, if it is not YAML. Invalid dates and numbers raise their own.
    """
    return yaml.load(text, _NoAliasLoader)


class _NoAliasLoader(yaml.SafeLoader):
    """Refuses aliases: with them, a small file can hold a value of any size."""

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            raise ConversionError(
                f"it uses the alias *{self.peek_event().anchor}. Write the value of the alias in its place."
            )
        return super().compose_node(parent, index)


def _read_yaml(path: Path, parents: tuple[Path, ...], cache: dict[Path, dict]) -> dict:
    """Reads a YAML file and its BASE files.

    `parents` is the chain of files that leads to `path` by BASE entries. `cache` holds the settings of the files that
    were read before.
    """
    if path in cache:
        return cache[path]
    if path in parents:
        raise ConversionError(f"The BASE entries of {parents[0]} form a cycle through {path}. Remove one of them.")
    if len(parents) == MAX_BASE_DEPTH:
        raise ConversionError(
            f"The BASE entries of {parents[0]} form a chain of more than {MAX_BASE_DEPTH} files. Shorten the chain."
        )
    if not path.is_file():
        raise ConversionError(f"{parents[-1]} names {path} under BASE, but that file does not exist.")
    if path.stat().st_size > MAX_FILE_SIZE:
        raise ConversionError(
            f"{path} has {path.stat().st_size:,} bytes; a settings file may have at most {MAX_FILE_SIZE:,}."
        )
    try:
        settings = parse_yaml(path.read_text()) or {}
    except OSError:
        raise
    except Exception as error:
        reason = str(error) or type(error).__name__
        raise ConversionError(f"{path} cannot be read as YAML: {reason}") from None
    if not isinstance(settings, dict):
        raise ConversionError(
            f"{path} must hold settings such as MODEL.FOCAL.EMBED_DIM; it holds {short_repr(settings)}."
        )
    base_files = settings.pop("BASE", None) or []
    base_files = [base_files] if isinstance(base_files, str) else base_files
    if not isinstance(base_files, list) or not all(isinstance(file, str) for file in base_files):
        raise ConversionError(f"BASE in {path} must list YAML files; it holds {short_repr(base_files)}.")
    base_settings = {}
    for file in base_files:
        if not file:
            continue
        try:
            base_path = (path.parent / file).resolve()
        except (ValueError, RuntimeError) as error:  # a null byte, or a loop of symbolic links
            raise ConversionError(f"{path} names {short_repr(file)} under BASE, which is no file: {error}.") from None
        base_settings = _merge(base_settings, _read_yaml(base_path, (*parents, path), cache))
    cache[path] = _merge(base_settings, _parse_literals(settings))
    return cache[path]


def _parse_literals(value):
    """Replaces strings that are Python literals, such as "(2, 2)" or "1e-1", by their values, as yacs does."""
    if isinstance(value, Mapping):
        if other_keys := [key for key in value if not isinstance(key, str)]:
            raise ConversionError(f"The names of settings must be strings; got {short_repr(other_keys[0])}.")
        return {key: _parse_literals(inner) for key, inner in value.items()}
    if not isinstance(value, str) or len(value) > MAX_LITERAL_LENGTH:
        return value
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SyntaxWarning for text that looks like Python
        try:
            return ast.literal_eval(value)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            return value


def _merge(base: Mapping, override: Mapping) -> dict:
    merged = dict(base)
    for key, value in override.items():
        both = isinstance(merged.get(key), Mapping) and isinstance(value, Mapping)
        merged[key] = _merge(merged[key], value) if both else value
    return merged
