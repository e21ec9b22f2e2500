"""What gloo's tags owe to each other; the rest is in test_conformance.py."""

from __future__ import annotations

import torch

from soloist.transport.gloo import TAGS, GlooTransport
from tests.ranks import RankPool


def exchanges_beside_a_message(t: GlooTransport) -> list[float]:
    """Half a billion exchanges later, when their tags begin again."""
    t._tag = TAGS - 2
    peer, found = 1 - t.rank, []
    t.send(torch.full((1,), 10.0 + t.rank), peer)
    for nth in range(4):
        rows, counts = t.all_to_all_rows(torch.full((2, 1), float(nth)), [1, 1])
        assert counts == [1, 1]
        found += rows.flatten().tolist()
    return [*found, t.recv((1,), torch.float32, peer).item()]


def test_no_exchange_takes_the_tag_of_messages(ranks: RankPool) -> None:
    expected = [float(nth) for nth in range(4) for _ in range(2)]
    assert ranks.run(2, "gloo", exchanges_beside_a_message) == [[*expected, 11.0], [*expected, 10.0]]
