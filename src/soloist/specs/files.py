"""Files that users name. What keeps one from being read is an error that names its key and its path."""

from __future__ import annotations

from codecs import BOM_UTF16_BE, BOM_UTF16_LE
from pathlib import Path
from typing import TypeVar

import msgspec
import yaml

from soloist.errors import ConfigurationError

R = TypeVar("R", bound=msgspec.Struct)


def read_text(path: str | Path, key: str) -> str:
    """The text of a file in UTF-8, or in the UTF-16 that Windows' shell writes, which begins with its byte order.

    Raises ConfigurationError for a file that is missing or holds something else.
    """
    try:
        data = Path(path).read_bytes()
        encoding = "utf-16" if data.startswith((BOM_UTF16_LE, BOM_UTF16_BE)) else "utf-8-sig"
        return data.decode(encoding).replace("\r\n", "\n")
    except OSError as error:
        raise ConfigurationError.of(key, str(path), f"cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigurationError.of(key, str(path), f"cannot be read: it is no text in UTF-8 ({error})") from error


def read_yaml(path: str | Path, key: str) -> object:
    """What a YAML file holds, {} where that is nothing. Raises ConfigurationError in one line, as `read_text`."""
    try:
        return yaml.safe_load(read_text(path, key)) or {}
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise ConfigurationError.of(key, str(path), f"is not YAML: {line}{error.problem}") from error
    except yaml.YAMLError as error:  # characters that YAML does not know
        raise ConfigurationError.of(key, str(path), f"is not YAML: {' '.join(str(error).split())}") from error


def read_record(path: str | Path, kind: type[R], key: str) -> R:
    """A record of `kind` from a file that holds it as JSON. Raises ConfigurationError where it holds something else."""
    try:
        return msgspec.json.decode(read_text(path, key), type=kind)
    except msgspec.DecodeError as error:
        raise ConfigurationError.of(key, str(path), f"is not a {key} file: {error}") from error


def write_file(path: str | Path, content: str | bytes) -> None:
    """Write a file. Raises OSError with the file's name, also where only the writing fails, as on a full disk."""
    try:
        Path(path).write_bytes(content.encode() if isinstance(content, str) else content)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def write_record(path: str | Path, record: msgspec.Struct) -> None:
    """Write a record as indented JSON, as `read_record` reads it."""
    write_file(path, msgspec.json.format(msgspec.json.encode(record), indent=1) + b"\n")
