"""Large reads of files, several at a time: a disk that is asked for one thing at a time is mostly idle."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from soloist.errors import CheckpointError

THREADS = 8  # requests under way at once
BLOCK = 8 << 20  # bytes of a request


class FileReader:
    """Bytes of files as tensors. May be called from several threads.

    Where the bytes go on to a GPU they are read into page-locked memory, which each thread has one piece of: a result
    is then valid until the same thread reads again.
    """

    def __init__(self, pinned: bool = False) -> None:
        self._pinned = pinned
        self._files: dict[Path, int] = {}
        self._lock = threading.Lock()
        self._own = threading.local()
        self._pool = ThreadPoolExecutor(THREADS, "read")

    def read(self, path: Path, offset: int, size: int) -> Tensor:
        """uint8 [size]. Raises CheckpointError where the file ends before."""
        memory = self._memory(size)
        view, file = memory.numpy().data, self._file(path)
        starts = range(0, size, BLOCK)
        blocks = [(view[start : start + BLOCK], offset + start) for start in starts]
        run: Callable = map if len(blocks) == 1 else self._pool.map
        if not all(run(lambda block: _fill(file, *block), blocks)):
            raise CheckpointError(f"{path}: ends before byte {offset + size}; download it again")
        return memory

    def _memory(self, size: int) -> Tensor:
        if not self._pinned:
            return torch.empty(size, dtype=torch.uint8)
        memory = getattr(self._own, "memory", None)
        if memory is None or len(memory) < size:
            memory = self._own.memory = torch.empty(max(size, BLOCK), dtype=torch.uint8, pin_memory=True)
        return memory[:size]

    def _file(self, path: Path) -> int:
        with self._lock:
            if path not in self._files:
                self._files[path] = os.open(path, os.O_RDONLY)
            return self._files[path]

    def __del__(self) -> None:
        for file in self._files.values():
            os.close(file)


def _fill(file: int, memory: memoryview, offset: int) -> bool:
    """Whether all of it could be read."""
    done = 0
    while done < len(memory) and (got := os.preadv(file, [memory[done:]], offset + done)):
        done += got
    return done == len(memory)
