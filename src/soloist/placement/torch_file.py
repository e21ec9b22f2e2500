"""Reads what `torch.save` wrote, without torch: nested lists and dictionaries of numbers, texts and dense tensors.

Such a file is a zip archive of a pickle, which names its storages, and one member for each storage. Only the few names
that tensors need are resolved; a pickle that asks for anything else is refused, so reading executes nothing.
"""

from __future__ import annotations

import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np

from soloist.errors import ConfigurationError
from soloist.placement.archive import Array

DTYPES = {
    "BoolStorage": "?",
    "ByteStorage": "u1",
    "CharStorage": "i1",
    "ShortStorage": "<i2",
    "IntStorage": "<i4",
    "LongStorage": "<i8",
    "HalfStorage": "<f2",
    "FloatStorage": "<f4",
    "DoubleStorage": "<f8",
}


def read_torch_file(path: str | Path) -> Any:
    """The object in a file, tensors as arrays. Raises ConfigurationError for a file that is none or holds more."""
    try:
        with zipfile.ZipFile(path) as archive:
            (member,) = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            with archive.open(member) as file:
                return _Reader(file, archive, member.removesuffix("data.pkl")).load()
    except OSError as error:
        raise ConfigurationError.of("file", str(path), f"cannot be read: {error.strerror or error}") from error
    except Exception as error:  # a damaged pickle may raise anything
        raise ConfigurationError.of("file", str(path), f"is no file of tensors by torch.save: {error}") from error


class _Reader(pickle.Unpickler):
    def __init__(self, file: IO[bytes], archive: zipfile.ZipFile, folder: str) -> None:
        super().__init__(file)
        self._archive, self._folder = archive, folder

    def find_class(self, module: str, name: str) -> Callable[..., Any] | str:
        if module == "torch" and name in DTYPES:
            return DTYPES[name]
        known: dict[tuple[str, str], Callable[..., Any]] = {
            ("torch._utils", "_rebuild_tensor_v2"): _tensor,
            ("collections", "OrderedDict"): OrderedDict,
        }
        if (module, name) not in known:
            raise pickle.UnpicklingError(f"it holds a {module}.{name}")
        return known[module, name]

    def persistent_load(self, pid: tuple[Any, ...]) -> Array:
        _, dtype, key, _, _ = pid
        return np.frombuffer(self._archive.read(f"{self._folder}data/{key}"), dtype)


def _tensor(storage: Array, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: object) -> Array:
    """A copy of a storage's elements in the order of the tensor."""
    if not size:
        return storage[offset].copy()
    if 0 in size:
        return np.zeros(size, storage.dtype)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if offset < 0 or min(stride) < 0 or last >= len(storage):
        raise ValueError("a tensor reaches beyond its storage")
    strides = tuple(step * storage.itemsize for step in stride)
    return np.lib.stride_tricks.as_strided(storage[offset:], size, strides).copy()
