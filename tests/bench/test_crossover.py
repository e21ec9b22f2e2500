"""Which form is said to be the fastest, and where forms cross."""

from __future__ import annotations

from soloist.bench.crossover import ByForm, crossing_of_shares, crossing_of_tokens
from soloist.bench.load import Load


def found(tokens: int = 4096, top_k: int = 8, **micro: float) -> ByForm:
    return ByForm(Load(tokens, 64, top_k, 64), "latency", {name: 1e-6 * each for name, each in micro.items()})


def test_where_forms_cross() -> None:
    by_tokens = [found(128, latency=10, push=20), found(512, latency=30, push=33), found(1024, latency=60, push=50)]
    by_share = [found(top_k=1, push=10, copy=20), found(top_k=2, push=20, copy=19), found(top_k=3, push=20, copy=21)]
    assert crossing_of_tokens(by_tokens) == "the latency form is the fastest up to 512 tokens a rank"
    assert crossing_of_tokens(by_tokens[2:]) == "the latency form is the fastest nowhere from 1024 tokens a rank on"
    assert crossing_of_shares(by_share, 2) == "push is faster than copy up to 1 choices among 2 groups"


def test_what_is_said_of_a_form() -> None:
    one = found(latency=10, push=15)
    assert (one.said_of("latency"), one.said_of("push")) == ("the fastest, chosen", "1.50 x the fastest")
