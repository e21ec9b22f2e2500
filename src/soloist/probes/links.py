"""What the links between ranks do, over any transport. All functions are called by all ranks together.

Shape legend: R rows, W elements of a row, N elements, M ranks.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from soloist.timing import measure, median_of_slowest
from soloist.transport.base import Transport

COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")
WIDTH = 64  # fp32 elements of a row that is sent about
PAIR_BYTES = 1 << 24


def slowest(transport: Transport, seconds: list[float]) -> float:
    """Median over repeats of the slowest rank; every rank gives as many."""
    mine = torch.tensor([seconds], dtype=torch.float64, device=transport.device)
    everybody = transport.all_gather_rows(mine.contiguous(), [1] * transport.size, "probe, times")
    return median_of_slowest(everybody.tolist())


def timed(transport: Transport, work: Callable[[], object], repeats: int = 10, warm_up: int = 3) -> float:
    """Seconds of a collective operation."""
    transport.barrier("probe")
    return slowest(transport, measure(work, repeats, warm_up, transport.device))


def _rows(transport: Transport, size: int) -> Tensor:
    return torch.zeros(max(1, size // (4 * WIDTH)), WIDTH, device=transport.device)


def collective(kind: str, transport: Transport, size: int) -> Callable[[], object]:
    """One of COLLECTIVES with `size` bytes in each rank's full buffer (for all-gather: of the result)."""
    part_RW = _rows(transport, size // transport.size)
    rows_RW, counts, where = part_RW.repeat(transport.size, 1), [len(part_RW)] * transport.size, f"probe, {kind}"
    return {
        "all_reduce": lambda: transport.all_reduce(rows_RW, where),
        "all_gather": lambda: transport.all_gather_rows(part_RW, counts, where),
        "reduce_scatter": lambda: transport.reduce_scatter_rows(rows_RW, counts, where),
        "all_to_all": lambda: transport.all_to_all_rows(rows_RW, counts, counts, where),
    }[kind]


def collective_seconds(transport: Transport, kind: str, size: int) -> float:
    """The median over repeats of the slowest rank."""
    return timed(transport, collective(kind, transport, size), repeats=10)


def exchange_rate(transport: Transport, size: int) -> float:
    """Bytes/s that a rank sends to others while all of them do: `size` bytes in equal parts to every rank."""
    return size * (transport.size - 1) / transport.size / collective_seconds(transport, "all_to_all", size)


def send_seconds(transport: Transport, size: int, source: int, target: int) -> float:
    """One message from a rank to another and an empty answer, so that it has arrived; the others wait."""
    x_N = torch.zeros(max(1, size // 4), device=transport.device)
    answer = torch.zeros(1, device=transport.device)

    def work() -> None:
        if transport.rank == source:
            transport.send(x_N, target, "probe, send")
            transport.recv((1,), answer.dtype, target, "probe, answer")
        elif transport.rank == target:
            transport.recv(x_N.shape, x_N.dtype, source, "probe, receive")
            transport.send(answer, source, "probe, answer")

    return timed(transport, work, repeats=5, warm_up=2)


def pair_rates(transport: Transport, size: int = PAIR_BYTES) -> list[list[float]]:
    """`[M][M]` bytes/s from row to column, one pair at a time; 0 on the diagonal."""
    ranks = range(transport.size)
    return [[size / send_seconds(transport, size, a, b) if a != b else 0.0 for b in ranks] for a in ranks]
