"""Equal splits over the rail, another dispatcher inside the node: the sums of the definition, bit for bit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from soloist.dispatch.base import Dispatcher, Topology
from soloist.dispatch.forms import COPY, LATENCY, Form
from soloist.dispatch.hierarchical import Rails
from soloist.dispatch.local import Done
from soloist.dispatch.padded import PaddedDispatcher
from soloist.dispatch.ragged import RaggedDispatcher
from soloist.dispatch.railed import RailedDispatcher, RailedExpandedDispatcher, require_equal_nodes
from soloist.errors import CapacityError, ConfigurationError
from soloist.transport.base import Transport
from soloist.transport.connect import local_world
from soloist.transport.local import LocalGroup, LocalTransport
from tests.dispatch import in_turn
from tests.dispatch.cases import Case, typical
from tests.dispatch.in_turn import shape_of
from tests.ranks import run_threads

CAPACITY = 13


def railed(t: Transport, case: Case, inner: str) -> RailedDispatcher:
    rails, slots = Rails(case.topology, t.rank), len(case.slots[t.rank])
    rail, each = t.subgroup(rails.rail), len(rails.node)
    node = t.subgroup(rails.node) if each > 1 else LocalTransport(LocalGroup([t.rank]), 0)
    flat = Topology((0,) * each)
    inside: Dispatcher = RaggedDispatcher(node, flat, slots)
    if inner == "padded":
        inside = PaddedDispatcher(node, flat, slots, CAPACITY * len(rails.nodes))
    return RailedDispatcher(rail, inside, rails, CAPACITY)


def through(dispatcher: Dispatcher, case: Case, rank: int) -> Tensor:
    """Experts that answer by row, in sizes that let the order of sums show; what did not come is poisoned."""
    batch = dispatcher.dispatch(*case.inputs(rank), "layer 0")
    y_RD = torch.full_like(batch.rows_RD, float("nan"))
    came = batch.row_X[: int(batch.offsets_S[-1]) if len(batch.offsets_S) else 0].unique()
    y_RD[came] = (batch.rows_RD[came] * 10.0 ** (5 * rank % 7 - 3) + rank).to(y_RD.dtype)
    return dispatcher.combine(y_RD, batch, "layer 0")


def differences(t: Transport, case: Case, inner: str) -> list[int]:
    flat = RaggedDispatcher(t, case.topology, len(case.slots[t.rank]))
    dispatcher, found = railed(t, case, inner), []
    for seed in range(3):
        call = replace(case, seed=seed)
        wanted = through(flat, call, t.rank)
        fitted = dispatcher if seed else dispatcher.fit(max(case.tokens))
        if seed == 0 and inner == "padded":  # whose rows have their places by capacity
            fitted = dispatcher
        found.append(int((through(fitted, call, t.rank) != wanted).sum()))
    return found


@pytest.mark.parametrize("inner", ["ragged", "padded"])
@pytest.mark.parametrize("nodes", [(0, 0, 1, 1), (0, 1, 2, 3), (0, 0, 0, 1, 1, 1), (0, 0, 1, 1, 2, 2)])
def test_sums_are_those_of_the_flat_exchange(nodes: tuple[int, ...], inner: str) -> None:
    for dead in (0, 3):
        case = typical(len(nodes), torch.bfloat16, node_of_group=nodes, dead=dead, d_model=17)
        assert run_threads(len(nodes), differences, case, inner) == [[0, 0, 0]] * len(nodes)


def shares_of_one_sided(case: Case, nodes: int, form: Form) -> list[RailedExpandedDispatcher]:
    """Ranks of this process, whose kernels run in turn in the interpreter."""
    each, found = case.groups // nodes, []
    shape = replace(shape_of(case), ranks=each, capacity=CAPACITY * nodes)
    inside = [dispatcher for _ in range(nodes) for dispatcher in in_turn.world(shape, form)]
    for t in local_world(case.groups, 20.0):
        rails = Rails(case.topology, t.rank)
        found.append(RailedExpandedDispatcher(t.subgroup(rails.rail), inside[t.rank], rails, CAPACITY))
    return found


def last_part(t: Transport, dispatchers: list[RailedExpandedDispatcher], sums: list[Tensor], case: Case) -> Tensor:
    return dispatchers[t.rank].cross_back(Done(sums[t.rank]), case.tokens[t.rank], "layer 0").wait()


@pytest.mark.parametrize("form", [LATENCY, replace(COPY, pieces=2)])
def test_one_sided_inside_the_nodes(form: Form) -> None:
    """Two nodes of two ranks; the experts take expanded rows, as the fused kernels do."""
    case = typical(4, torch.bfloat16, node_of_group=(0, 0, 1, 1), dead=3)
    dispatchers = shares_of_one_sided(case, 2, form)
    inputs = [case.inputs(rank) for rank in range(4)]
    arriving = [d.start_dispatch(*given, "layer 0") for d, given in zip(dispatchers, inputs, strict=True)]
    assert [pending.rows for pending in arriving] == [2 * 2 * CAPACITY] * 4  # all have sent inside their node
    returning = []
    for rank, (dispatcher, pending) in enumerate(zip(dispatchers, arriving, strict=True)):
        batch, x_XD = pending.wait_expanded()
        returning.append(dispatcher.inside.start_combine_expanded(x_XD * 2.0**rank, batch.ticket.inside, "layer 0"))
    found = run_threads(4, last_part, dispatchers, [pending.wait() for pending in returning], case)
    for rank, wanted in enumerate(run_threads(4, weighed, case)):
        assert torch.allclose(found[rank].float(), wanted.float(), rtol=0.02, atol=0.02)


def weighed(t: Transport, case: Case) -> Tensor:
    """The same by the flat exchange: weighted sums of rows times two to the rank."""
    flat = RaggedDispatcher(t, case.topology, len(case.slots[t.rank]))
    batch = flat.dispatch(*case.inputs(t.rank))
    y_RD = torch.zeros(batch.rows_RD.shape).index_add_(
        0, batch.row_X, batch.rows_RD[batch.row_X].float() * batch.weight_X[:, None] * 2.0**t.rank
    )
    return flat.combine(y_RD.to(case.dtype), batch)


def too_many(t: Transport) -> str:
    case = typical(2, node_of_group=(0, 1), tokens=(CAPACITY + 1, 0))
    if t.rank:
        return ""
    with pytest.raises(CapacityError, match="14 tokens in a call, buffers hold 13"):
        railed(t, case, "ragged").start_dispatch(*case.inputs(0))
    return "told"


def test_more_tokens_than_capacity_are_refused() -> None:
    assert run_threads(2, too_many)[0] == "told"


def test_nodes_that_are_not_equally_full_are_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"exchange_captured = True: nodes hold \[2, 1\] expert groups; "):
        require_equal_nodes(Rails(Topology((0, 0, 1)), 2))
