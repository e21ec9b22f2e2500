"""The padded dispatcher against the definition, bit for bit: rows that came, sums, rounds, and what it refuses."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings

from soloist.dispatch.padded import PaddedDispatcher
from soloist.errors import CapacityError
from soloist.transport.base import Transport
from soloist.transport.connect import local_world
from tests.dispatch.cases import Case, Outcome, cases, check, typical
from tests.ranks import RankPool, run_threads


def run_rank(transport: Transport, case: Case, capacity: int, rounds: int) -> Outcome:
    """One rank's part; rows that did not come are left out of what is compared, and poisoned."""
    group = transport.rank
    dispatcher = PaddedDispatcher(transport, case.topology, len(case.slots[group]), capacity, rounds)
    x_TD, choice = case.inputs(group)
    batch = dispatcher.start_dispatch(x_TD, choice, "layer 0").wait()
    used = int(batch.offsets_S[-1]) if len(batch.offsets_S) else 0
    rows = batch.row_X[:used].unique()
    y_RD = torch.full_like(batch.rows_RD, float("nan"))
    y_RD[rows] = case.answers(group, len(rows))
    out_TD = dispatcher.start_combine(y_RD, batch, "layer 0").wait()
    row_X = torch.searchsorted(rows, batch.row_X[:used])
    return Outcome(batch.rows_RD[rows], row_X, batch.weight_X[:used], batch.offsets_S, out_TD)


@settings(max_examples=60, deadline=None)
@given(cases(max_groups=4))
def test_random_exchanges_follow_the_definition(case: Case) -> None:
    check(run_threads(case.groups, run_rank, case, 13, 1), case)


@pytest.mark.parametrize("capacity", [1, 3, 5])
def test_rounds_drop_nothing(capacity: int) -> None:
    """All tokens to the same expert: each of them takes the same group's rows."""
    case = typical(4, skew=100.0, top_k=1, tokens=(11, 0, 7, 2))
    check(run_threads(4, run_rank, case, capacity, -(-11 // capacity)), case)


@pytest.mark.parametrize("kind", ["local", "gloo"])
def test_transports_deliver_the_same_bits(ranks: RankPool, kind: str) -> None:
    case = typical(4, torch.bfloat16)
    check(ranks.run(4, kind, run_rank, case, 12, 1), case)


def test_what_may_not_fit_is_refused_before_anything_is_sent() -> None:
    case = replace(typical(1), tokens=(9,))
    dispatcher = PaddedDispatcher(local_world(1)[0], case.topology, len(case.slots[0]), capacity=4, rounds=2)
    with pytest.raises(CapacityError, match="9 tokens in a call, 2 rounds of 4"):
        dispatcher.dispatch(*case.inputs(0))
