"""The safetensors files of a folder, as one table of tensors."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from soloist.errors import CheckpointError
from soloist.models.reading import FileReader
from soloist.specs.hf import read_json
from soloist.specs.parameters import Shape

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F8_E4M3": torch.float8_e4m3fn,
    "U8": torch.uint8,
}
Part = int | slice


class Entry(NamedTuple):
    """One tensor of one file."""

    path: Path
    shape: Shape
    dtype: str  # in safetensors' spelling
    offset: int  # of its first byte in the file

    @property
    def bytes(self) -> int:
        """Size in the file."""
        return torch.Size(self.shape).numel() * DTYPES[self.dtype].itemsize


class Shards:
    """All tensors of a folder. Headers are read at once, data when asked for; `bytes_read` counts the data.

    `read` may be called from several threads.
    """

    def __init__(self, folder: Path, progress: Callable[[int], None] | None = None, pinned: bool = False) -> None:
        """`pinned`: what is read goes on to a GPU."""
        self.folder, self.bytes_read, self._progress = folder, 0, progress
        self._reader, self._lock = FileReader(pinned), threading.Lock()
        self.tensors: dict[str, Entry] = {}
        self._files: dict[Path, Any] = {}
        listed = _listed(folder)
        for path in [folder / SINGLE] if listed is None else sorted({folder / name for name in listed.values()}):
            self._open(path)
        if listed is not None:
            self._compare(listed)

    def read(self, name: str, *parts: Part) -> Tensor:
        """A rectangle of a tensor in its own dtype, valid until this thread reads again: copy it to keep it."""
        entry = self.tensors[name]
        *outer, last = parts
        if (run := _run(entry.shape, parts)) is not None:
            tensor = self._read_run(entry, run)
        elif (
            isinstance(last, slice)
            and (run := _run(entry.shape, tuple(outer))) is not None
            and _is_worth(last, entry.shape[len(outer)])
        ):
            whole = self._read_run(entry, run)  # columns: whole rows are read faster than pieces of them
            kept = [part for part in outer if isinstance(part, slice)]
            tensor = whole[(*(slice(None) for _ in kept), last)].contiguous()
        else:
            tensor = self._files[entry.path].get_slice(name)[parts]
        with self._lock:
            self.bytes_read += tensor.nbytes
            if self._progress is not None:
                self._progress(tensor.nbytes)
        return tensor

    def _read_run(self, entry: Entry, run: tuple[int, Shape]) -> Tensor:
        first, shape = run
        dtype = DTYPES[entry.dtype]
        size = torch.Size(shape).numel() * dtype.itemsize
        return self._reader.read(entry.path, entry.offset + first * dtype.itemsize, size).view(dtype).view(shape)

    def _open(self, path: Path) -> None:
        if not path.is_file():
            raise CheckpointError(f"{path}: is missing; download the checkpoint again")
        try:
            file = self._files[path] = safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: {_expected_size(path)} ({error}); download it again") from None
        starts = _starts(path)
        for name in file.keys():  # noqa: SIM118  # not a dict
            if name in self.tensors:
                raise CheckpointError(f"{name}: is in two files, {self.tensors[name].path} and {path}")
            view = file.get_slice(name)
            self.tensors[name] = Entry(path, tuple(view.get_shape()), view.get_dtype(), starts[name])

    def _compare(self, listed: dict[str, str]) -> None:
        index = self.folder / INDEX
        for name, file in listed.items():
            if name not in self.tensors or self.tensors[name].path.name != file:
                raise CheckpointError(f"{index}: {name} is not in {file}; download the checkpoint again")
        for name in self.tensors.keys() - listed.keys():
            raise CheckpointError(f"{index}: does not list {name}, which is in {self.tensors[name].path.name}")


def _starts(path: Path) -> dict[str, int]:
    """Where each tensor begins in a file that safetensors could open."""
    with path.open("rb") as file:
        header = int.from_bytes(file.read(8), "little")
        tensors: dict[str, Any] = json.loads(file.read(header))
    return {name: 8 + header + item["data_offsets"][0] for name, item in tensors.items() if name != "__metadata__"}


def _run(shape: Shape, parts: tuple[Part, ...]) -> tuple[int, Shape] | None:
    """First element and shape of a rectangle whose elements are neighbours in the file; None for any other."""
    first, found = 0, []
    whole = [slice(0, size) for size in shape[len(parts) :]]
    for axis, part in enumerate([*parts, *whole]):
        inner = torch.Size(shape[axis + 1 :]).numel()
        start, stop, step = (part, part + 1, 1) if isinstance(part, int) else part.indices(shape[axis])
        if step != 1 or (stop - start < shape[axis] and any(size != 1 for size in found)):
            return None
        first += start * inner
        if not isinstance(part, int):
            found.append(max(0, stop - start))
    return first, tuple(found)


def _is_worth(columns: slice, width: int) -> bool:
    """So many of all columns are wanted that reading the others along costs less than leaving them out."""
    start, stop, _ = columns.indices(width)
    return 8 * (stop - start) >= width


def _listed(folder: Path) -> dict[str, str] | None:
    """Tensor names and their files according to the index; None for a checkpoint of one file."""
    if (folder / SINGLE).exists():
        return None
    if not (folder / INDEX).exists():
        raise CheckpointError(f"{folder}: holds neither {SINGLE} nor {INDEX}; weights must be in safetensors format")
    listed = read_json(folder / INDEX).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise CheckpointError(f"{folder / INDEX}: expected an object weight_map, found {listed!r}")
    for name, file in listed.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise CheckpointError(f"{folder / INDEX}: expected a file name for {name}, found {file!r}")
    return listed


def _expected_size(path: Path) -> str:
    """What is wrong with the size of a file that cannot be opened, as far as its header tells."""
    found = path.stat().st_size
    with path.open("rb") as file:
        header = int.from_bytes(file.read(8), "little")
        try:
            tensors: dict[str, Any] = json.loads(file.read(min(header, found)))
            ends = [item["data_offsets"][1] for name, item in tensors.items() if name != "__metadata__"]
        except (ValueError, TypeError, AttributeError, KeyError, IndexError):
            return f"is truncated or not a safetensors file, found {found} bytes"
    return f"expected {8 + header + max(ends, default=0)} bytes, found {found}"
