"""What one device does: arithmetic and memory. The same calls on a GPU, where they are captured, and on a CPU.

Shape legend: M rows, K input width, N output width.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from statistics import median

import torch

from soloist.probes.gpus import captured
from soloist.timing import measure

LARGE = {"cuda": 8192, "cpu": 512}  # side of the matrices that show the arithmetic rate
BUFFER = {"cuda": 1 << 30, "cpu": 1 << 25}  # bytes read, beyond the caches
COLD = 1 << 27  # bytes, twice a GPU's cache and more
PATIENCE_S = 0.1  # spent on one number
SHORT_S = 150e-6  # of what is captured several times over


def seconds(work: Callable[[], object], device: torch.device, patience_s: float = PATIENCE_S) -> float:
    """Median time of `work` on this device, without the cost of launching it where a graph can hold it."""
    run, calls = (captured(work), 1) if device.type == "cuda" else (work, 1)
    first = median(measure(run, repeats=2, warm_up=1, device=device))
    if device.type == "cuda" and first < SHORT_S:  # a replay costs some microseconds more: several in one graph
        calls = 10 if first < SHORT_S / 3 else 3
        run = captured(lambda: [work() for _ in range(calls)], warm_up=1)
    repeats = max(5, min(50, int(patience_s / max(first * calls, 1e-7))))
    return median(measure(run, repeats=repeats, warm_up=1, device=device)) / calls


def cold_copies(size: int, device: torch.device) -> int:
    """How many tensors of `size` bytes to take in turn, so that none is still in a GPU's cache when it is read."""
    return max(1, min(64, COLD // max(size, 1))) if device.type == "cuda" else 1


def matmul_seconds(m: int, n: int, k: int, dtype: torch.dtype, device: torch.device) -> float:
    """`[m, k] × [n, k]ᵀ`, as `torch.nn.functional.linear` does it. The weight is not in a cache."""
    x_MK = torch.randn(m, k, device=device).to(dtype)
    copies = cold_copies(n * k * dtype.itemsize, device)
    weights = [torch.randn(n, k, device=device).to(dtype) for _ in range(copies)]
    out_MN = torch.empty(m, n, dtype=dtype, device=device)

    def work() -> None:
        for weight_NK in weights:
            torch.mm(x_MK, weight_NK.T, out=out_MN)

    return seconds(work, device) / copies


def arithmetic_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix multiplication."""
    side = LARGE[device.type]
    return 2.0 * side**3 / matmul_seconds(side, side, side, dtype, device)


def streaming_seconds(size: int, device: torch.device) -> float:
    """An element-wise kernel over `size` bytes, as many read as written: faster than a GPU's own copies."""
    source = torch.empty(size // 4, dtype=torch.float32, device=device).normal_()
    target = torch.empty_like(source)
    return seconds(lambda: torch.mul(source, 2.0, out=target), device)


def streaming_rate(device: torch.device) -> float:
    """Bytes/s of the device's memory, read and written, far beyond its caches."""
    size = BUFFER[device.type]
    return 2.0 * size / streaming_seconds(size, device)


def memory_bytes(device: torch.device) -> int:
    """Of the device; of the whole machine for a CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
