"""One-sided exchange between four and eight ranks, with and without TP, against the ragged dispatcher over threads.

Shape legend: T tokens of a rank, D model width, K top-k, R rows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from soloist.dispatch.base import SlotChoice, Topology
from soloist.dispatch.forms import COPY, LATENCY, PUSH, Form
from soloist.dispatch.lane import ExchangeShape
from soloist.dispatch.ragged import RaggedDispatcher
from soloist.kernels.language import AVAILABLE, INTERPRETED
from soloist.transport.base import Transport
from tests.dispatch.in_turn import dense, poison, world
from tests.ranks import run_threads

pytestmark = pytest.mark.skipif(not (AVAILABLE and INTERPRETED), reason="needs Triton and TRITON_INTERPRET=1")

TOP_K, SLOTS, D_MODEL = 3, 2, 8


@dataclass(frozen=True)
class Call:
    """What every rank brings: tokens, and how much better liked the experts of group 0 are."""

    groups: int
    tp: int
    tokens: tuple[int, ...]
    skew: float = 0.0
    seed: int = 0

    @property
    def ranks(self) -> int:
        return self.groups * self.tp

    def inputs(self, rank: int) -> tuple[Tensor, SlotChoice]:
        generator = torch.Generator().manual_seed(100 * self.seed + rank)
        tokens = self.tokens[rank]
        x_TD = torch.randn(tokens, D_MODEL, generator=generator)
        liked_TE = torch.randn(tokens, self.groups * SLOTS, generator=generator)
        liked_TE[:, :SLOTS] += self.skew
        ids_TK = liked_TE.topk(TOP_K).indices
        group_TK, slot_TK = ids_TK // SLOTS, ids_TK % SLOTS
        if self.skew:  # and nowhere else
            slot_TK, group_TK = (ids.where(group_TK == 0, -1) for ids in (slot_TK, group_TK))
        return x_TD, SlotChoice(group_TK, slot_TK, torch.rand(tokens, TOP_K, generator=generator))


def partial(rows_RD: Tensor, rank: int) -> Tensor:
    """What a rank's share of its group's experts makes of a row."""
    return rows_RD * (0.3 * rank + 1)


def by_ragged(transport: Transport, call: Call) -> tuple[Tensor, Tensor]:
    """The rows that a rank gets, expanded, and what comes home."""
    group, member = divmod(transport.rank, call.tp)
    peers = transport.subgroup(range(member, call.ranks, call.tp))
    tp = transport.subgroup(range(group * call.tp, (group + 1) * call.tp)) if call.tp > 1 else None
    dispatcher = RaggedDispatcher(peers, Topology((0,) * call.groups), SLOTS, tp)
    batch = dispatcher.dispatch(*call.inputs(transport.rank))
    return batch.rows_RD[batch.row_X], dispatcher.combine(partial(batch.rows_RD, transport.rank), batch)


@pytest.mark.parametrize(
    ("first", "form"),
    [
        (Call(4, 1, (3, 0, 2, 1)), LATENCY),
        (Call(8, 1, (1, 0, 2, 1, 0, 2, 1, 0)), replace(PUSH, pieces=2)),
        (Call(2, 2, (3, 1, 0, 2)), COPY),
        (Call(4, 2, (1, 0, 2, 1, 0, 2, 1, 0)), LATENCY),
    ],
    ids=["ep4", "ep8", "ep2tp2", "ep4tp2"],
)
def test_what_ragged_delivers(first: Call, form: Form) -> None:
    """Two calls in the same, poisoned memory: random routing with empty ranks, then everything to group 0."""
    shape = ExchangeShape(first.ranks, first.tp, SLOTS, TOP_K, D_MODEL, max(first.tokens), torch.float32)
    dispatchers = world(shape, form)
    for call in (first, replace(first, skew=100.0, tokens=first.tokens[::-1], seed=1)):
        for dispatcher in dispatchers:
            poison(dispatcher)
        inputs = [call.inputs(rank) for rank in range(call.ranks)]
        arriving = [d.start_dispatch(*given) for d, given in zip(dispatchers, inputs, strict=True)]
        batches = [pending.wait() for pending in arriving]
        answers = [partial(batch.rows_RD, rank) for rank, batch in enumerate(batches)]
        returning = [d.start_combine(y, b) for d, y, b in zip(dispatchers, answers, batches, strict=True)]
        found = [(b.rows_RD[dense(b)[0]][dense(b)[1]], p.wait()) for b, p in zip(batches, returning, strict=True)]
        for mine, wanted in zip(found, run_threads(call.ranks, by_ragged, call), strict=True):
            for got, want in zip(mine, wanted, strict=True):
                torch.testing.assert_close(got, want, rtol=0, atol=0)
