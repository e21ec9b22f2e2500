"""What an exchange over a transport costs a rank while all of them exchange: latency, and bytes/s after it."""

from __future__ import annotations

from statistics import median

import torch

from soloist.timing import measure
from soloist.transport.base import Transport

SIZES = {"cpu": 128 << 10, "cuda": 8 << 20}  # bytes that leave a rank in the larger of two exchanges
WIDTH = 1024  # bytes of a row
REPEATS, WARM_UP = 5, 2
NOISE = 0.1  # of a time, below which a difference means nothing


def measure_link(transport: Transport) -> tuple[float, float]:
    """Seconds of an exchange of one row with every member, and the rate of a larger one's remainder.

    Called by all members; the figures are this one's own. A transport of one member costs nothing.
    """
    others = transport.size - 1
    if not others:
        return 0.0, float("inf")
    more = max(2, SIZES[transport.device.type] // WIDTH // others)
    small_s, large_s = (_exchange_seconds(transport, rows) for rows in (1, more))
    return small_s, (more - 1) * others * WIDTH / max(large_s - small_s, NOISE * large_s)


def _exchange_seconds(transport: Transport, rows: int) -> float:
    counts = [rows * (peer != transport.rank) for peer in range(transport.size)]
    sent_RW = torch.zeros(sum(counts), WIDTH, dtype=torch.uint8, device=transport.device)

    def exchange() -> None:
        transport.all_to_all_rows(sent_RW, counts, counts, "measuring a link")

    return median(measure(exchange, REPEATS, WARM_UP, transport.device))
