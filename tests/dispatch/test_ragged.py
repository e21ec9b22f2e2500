"""The ragged dispatcher against the definition, bit for bit, over every transport."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings

from soloist.dispatch.ragged import RaggedDispatcher
from soloist.transport.base import Transport
from tests.dispatch.cases import Case, Outcome, cases, check, run_case, typical
from tests.ranks import RankPool, run_threads


def run_rank(transport: Transport, case: Case) -> Outcome:
    dispatcher = RaggedDispatcher(transport, case.topology, len(case.slots[transport.rank]))
    return run_case(dispatcher, case, transport.rank)


@settings(max_examples=80, deadline=None)
@given(cases())
def test_random_exchanges_follow_the_definition(case: Case) -> None:
    check(run_threads(case.groups, run_rank, case), case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 4, 6])
@pytest.mark.parametrize("kind", ["local", "shared_memory", "gloo"])
def test_transports_deliver_the_same_bits(ranks: RankPool, kind: str, size: int, dtype: torch.dtype) -> None:
    case = typical(size, dtype)
    check(ranks.run(size, kind, run_rank, case), case)


@pytest.mark.parametrize("kind", ["shared_memory", "gloo"])
def test_extremes_over_processes(ranks: RankPool, kind: str) -> None:
    for changes in ({"tokens": (0, 0, 0, 0)}, {"skew": 100.0, "top_k": 1}, {"tokens": (0, 40, 0, 0), "top_k": 8}):
        case = typical(4, **changes)
        check(ranks.run(4, kind, run_rank, case), case)


def test_the_tree_of_two_nodes_differs_from_a_flat_sum() -> None:
    """The rounding at each node's end is real: in bf16 it shows, so the tests above can fail."""
    tree, flat = (
        typical(6, torch.bfloat16, tokens=(20,) * 6, node_of_group=n) for n in ((0,) * 3 + (1,) * 3, (0,) * 6)
    )
    tree_out, flat_out = (torch.cat([o.out_TD for o in run_threads(6, run_rank, case)]) for case in (tree, flat))
    assert not torch.equal(tree_out, flat_out)
    torch.testing.assert_close(tree_out, flat_out, rtol=2e-2, atol=2e-2)


def test_nothing_uninitialised_is_read() -> None:
    """With all fresh memory filled with NaN or the largest integer, results stay the same."""
    torch.use_deterministic_algorithms(True)
    try:
        case = typical(4, d_model=3, dtype=torch.bfloat16)
        check(run_threads(4, run_rank, case), case)
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_token_travels_once_to_each_group() -> None:
    """All top-4 choices in one group: one row, however many experts."""
    case = Case(4, 4, slots=((), (0, 1, 2, 3)), tokens=(5, 0), node_of_group=(0, 0))
    _, receiver = run_threads(2, run_rank, case)
    assert len(receiver.rows_RD) == 5
    assert len(receiver.row_X) == 20


def failing_rank(transport: Transport, case: Case) -> str:
    """Rank 1 never joins; the others are told who is missing, and in which layer and phase."""
    if transport.rank == 1:
        return ""
    dispatcher = RaggedDispatcher(transport, case.topology, len(case.slots[transport.rank]))
    with pytest.raises(Exception, match="rank 1.*layer 7, dispatch"):
        dispatcher.dispatch(*case.inputs(transport.rank), "layer 7")
    return "told"


def test_a_missing_rank_is_named() -> None:
    assert run_threads(2, failing_rank, typical(2), deadline_s=0.5) == ["told", ""]


def test_a_foreign_batch_is_refused() -> None:
    case = typical(1)

    def body(transport: Transport) -> None:
        dispatcher = RaggedDispatcher(transport, case.topology, len(case.slots[0]))
        batch = dispatcher.dispatch(*case.inputs(0))
        object.__setattr__(batch, "ticket", None)
        with pytest.raises(AssertionError, match="another dispatcher"):
            dispatcher.combine(batch.rows_RD, batch)

    run_threads(1, body)
