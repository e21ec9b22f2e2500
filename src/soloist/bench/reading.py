"""How fast a checkpoint is read, beside what the disk gives to one who reads its files from end to end."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

import torch

from soloist.models.checkpoint import Checkpoint
from soloist.specs.hf import read_config
from soloist.specs.parameters import Param, parameters

PIECE = 16 << 20  # bytes of a plain read


def measure(folder: Path, device: str, repeats: int = 3) -> dict[str, float]:
    """GB/s, medians of `repeats` turns: the files from end to end (`disk`), all weights of the model (`checkpoint`),
    and once more with the files in memory (`cached`).

    The files are dropped from the page cache before the first two, which on a file system that keeps a cache of its
    own means nothing.
    """
    files = sorted(folder.glob("*.safetensors"))
    rates: dict[str, list[float]] = {"disk": [], "checkpoint": [], "cached": []}
    for _ in range(repeats):
        _forget(files)
        rates["disk"].append(_rate(lambda: _read_plainly(files)))
        _forget(files)
        for name in ("checkpoint", "cached"):
            rates[name].append(_rate(lambda: _read_weights(folder, device)))
    return {name: median(found) for name, found in rates.items()}


def _rate(read: Callable[[], int]) -> float:
    start = time.perf_counter()
    return read() / (time.perf_counter() - start) / 1e9


def _read_plainly(files: list[Path]) -> int:
    memory, total = memoryview(bytearray(PIECE)), 0
    for path in files:
        with path.open("rb", buffering=0) as file:
            while got := file.readinto(memory):
                total += got
    return total


def _read_weights(folder: Path, device: str) -> int:
    """Every weight once, as the engine asks for them: experts by several threads, the others one by one."""
    spec = read_config(folder)
    source = Checkpoint(folder, spec, getattr(torch, spec.dtype), device)
    layers: dict[int, list[Param]] = {}
    for param, _ in parameters(spec):
        layers.setdefault(param.layer, []).append(param)
    for params in layers.values():
        with ThreadPoolExecutor(source.threads) as pool:
            for _ in pool.map(lambda param: source.read(param).numel(), params):
                pass
    return source.bytes_read


def _forget(files: list[Path]) -> None:
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
