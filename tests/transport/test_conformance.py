"""Every transport does what `tests/transport/conformance.py` asks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.ranks import Failure, RankPool, RanksFailed
from tests.transport import conformance

NCCL = pytest.param("nccl", marks=pytest.mark.multigpu)
KINDS = ["local", "shared_memory", "gloo", NCCL]
PROCESSES = ["shared_memory", "gloo"]
LONG_S = 400.0  # a deadline that no test can wait for
CULPRIT = 1


def size_on(kind: str) -> int:
    return 2 if kind == "nccl" else 4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("check", conformance.CHECKS, ids=lambda check: check.__name__)
def test_agrees_with_definition(ranks: RankPool, kind: str, check) -> None:
    ranks.run(size_on(kind), kind, check)


@pytest.mark.parametrize("kind", KINDS)
def test_reduces_in_defined_order(ranks: RankPool, kind: str) -> None:
    check = conformance.reductions_within_rounding if kind == "nccl" else conformance.reductions
    ranks.run(size_on(kind), kind, check)


@pytest.mark.parametrize("kind", KINDS)
def test_world_of_one(ranks: RankPool, kind: str) -> None:
    for check in (conformance.all_rows, conformance.gathers, conformance.barriers):
        ranks.run(1, kind, check)


@st.composite
def exchanges(draw: st.DrawFn) -> tuple[list[list[int]], int, torch.dtype, bool]:
    size = draw(st.integers(1, 5))
    row = st.lists(st.integers(0, 9), min_size=size, max_size=size)
    counts_PP = draw(st.lists(row, min_size=size, max_size=size))
    return counts_PP, draw(st.integers(1, 40)), draw(st.sampled_from(conformance.DTYPES)), draw(st.booleans())


@pytest.mark.parametrize("kind", ["local", *PROCESSES])
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(exchange=exchanges())
def test_any_exchange(ranks: RankPool, kind: str, exchange) -> None:
    ranks.run(len(exchange[0]), kind, conformance.check_rows, *exchange)


def blamed(outcomes: list, where: str) -> list[tuple[int, int | None]]:
    """Who named whom; everyone but the culprit says where it happened."""
    told = [outcome for outcome in outcomes if isinstance(outcome, tuple)]
    assert all(where in text for _, _, text in told)
    return [(rank, peer) for rank, peer, _ in told]


@pytest.mark.parametrize("kind", KINDS)
def test_peer_that_stops_is_named(ranks: RankPool, kind: str) -> None:
    size = size_on(kind)
    outcomes = ranks.run(size, kind, conformance.one_stops, CULPRIT)
    assert blamed(outcomes, "layer 3, dispatch") == [(rank, CULPRIT) for rank in range(size) if rank != CULPRIT]


@pytest.mark.parametrize("kind", ["local", *PROCESSES])
def test_peer_that_never_sends_is_named(ranks: RankPool, kind: str) -> None:
    outcomes = ranks.run(2, kind, conformance.one_never_sends, CULPRIT)
    assert blamed(outcomes, "stage 1, input") == [(0, CULPRIT)]


@pytest.mark.parametrize("kind", ["local", *PROCESSES])
def test_peer_that_closes_is_named_at_once(ranks: RankPool, kind: str) -> None:
    outcomes = ranks.run(3, kind, conformance.one_closes, CULPRIT, deadline_s=LONG_S)
    assert blamed(outcomes, "layer 1, attention") == [(0, CULPRIT), (2, CULPRIT)]


@pytest.mark.parametrize("kind", PROCESSES)
def test_peer_that_dies_is_named_at_once(ranks: RankPool, kind: str) -> None:
    with pytest.raises(RanksFailed, match="exit code 3") as failed:
        ranks.run(3, kind, conformance.one_dies, CULPRIT, deadline_s=LONG_S)
    outcomes = failed.value.outcomes
    assert isinstance(outcomes[CULPRIT], Failure)
    assert blamed(outcomes, "step 7") == [(0, CULPRIT), (2, CULPRIT)]
