"""The probes on a CPU: what they give is a rate or a time, positive and not absurd; over real ranks."""

from __future__ import annotations

import pytest
import torch

from soloist.probes import device, links, small
from soloist.transport.base import Transport

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _one_thread():
    """Two threads on two busy cores wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_device_rates_are_physical() -> None:
    flops, moved = device.arithmetic_rate(CPU, torch.float32), device.streaming_rate(CPU)
    assert 1e8 < flops < 1e14
    assert 1e8 < moved < 1e13
    (launch,) = small.launches(CPU, torch.float32, "cpu")
    assert 1e-8 < launch.seconds < 1


def test_twice_the_matrix_takes_longer() -> None:
    small, large = (device.matmul_seconds(side, side, side, torch.float32, CPU) for side in (64, 768))
    assert large > 2 * small


def test_small_kernels_take_longer_for_more_tokens() -> None:
    """In one of a few tries: other work may fall on either."""

    def seconds() -> dict[int, float]:
        return {record.shape["tokens"]: record.seconds for record in small.small_kernels(CPU, torch.float32, "cpu")}

    assert any(0 < found[1] < found[256] for found in (seconds() for _ in range(5)))


def probe_links(transport: Transport) -> dict[str, object]:
    size = 1 << 18
    return {
        "pairs": links.pair_rates(transport, size),
        "all": links.exchange_rate(transport, size),
        "reduce": links.collective_seconds(transport, "all_reduce", size),
        "gather": links.collective_seconds(transport, "all_gather", size),
        "scatter": links.collective_seconds(transport, "reduce_scatter", size),
    }


def test_links_agree_on_all_ranks(ranks) -> None:
    found = ranks.run(3, "shared_memory", probe_links)
    assert all(other == found[0] for other in found)
    pairs = found[0]["pairs"]
    assert all((pairs[a][b] > 0) == (a != b) for a in range(3) for b in range(3))
    assert all(found[0][name] > 0 for name in ("all", "reduce", "gather", "scatter"))
