"""Exchanges to try a dispatcher on, and what has to come of them, written as plainly as the definition allows.

Shape legend: T tokens of a rank, D model width, K top-k, E experts, R rows, X expanded rows, S slots.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from soloist.dispatch.base import Dispatcher, SlotChoice, Topology
from soloist.moe.router import Routing, SlotTable
from soloist.placement.placement import LayerSlots, Placement


@dataclass(frozen=True)
class Case:
    """One exchange between expert groups of one rank each."""

    experts: int
    top_k: int
    slots: LayerSlots  # [group][slot] -> expert
    tokens: tuple[int, ...]  # of each group
    node_of_group: tuple[int, ...]
    d_model: int = 8
    dtype: torch.dtype = torch.float32
    skew: float = 0.0  # how much more the first experts are liked
    dead: int = 0  # every so many tokens there is one that goes nowhere; 0: none
    seed: int = 0

    @property
    def groups(self) -> int:
        return len(self.slots)

    @property
    def topology(self) -> Topology:
        return Topology(self.node_of_group)

    def inputs(self, group: int) -> tuple[Tensor, SlotChoice]:
        """x_TD and the choice of a group's rank."""
        generator = torch.Generator().manual_seed(1000 * self.seed + group)
        x_TD = torch.randn(self.tokens[group], self.d_model, generator=generator).to(self.dtype)
        liked_TE = torch.randn(self.tokens[group], self.experts, generator=generator)
        liked_TE -= self.skew * torch.arange(self.experts)
        weights_TK, ids_TK = liked_TE.topk(self.top_k)
        placement = Placement(experts=self.experts, slots=(self.slots,))
        live_T = torch.arange(self.tokens[group]) % self.dead != self.dead - 1 if self.dead else None
        return x_TD, SlotTable(placement, 0, group).choose(Routing(ids_TK, weights_TK.softmax(-1)), live_T)

    def answers(self, group: int, rows: int) -> Tensor:
        """y_RD that a group is said to give, of very different sizes so that the order of sums shows."""
        generator = torch.Generator().manual_seed(77 * self.seed + group)
        y_RD = torch.randn(rows, self.d_model, generator=generator)
        return (y_RD * 10.0 ** torch.randint(-3, 4, y_RD.shape, generator=generator)).to(self.dtype)


@dataclass(frozen=True)
class Outcome:
    """What one rank saw."""

    rows_RD: Tensor
    row_X: Tensor
    weight_X: Tensor
    offsets_S: Tensor
    out_TD: Tensor


def run_case(dispatcher: Dispatcher, case: Case, group: int) -> Outcome:
    """One rank's part of the exchange, in halves."""
    x_TD, choice = case.inputs(group)
    batch = dispatcher.start_dispatch(x_TD, choice, "layer 0").wait()
    y_RD = case.answers(group, len(batch.rows_RD))
    out_TD = dispatcher.start_combine(y_RD, batch, "layer 0").wait()
    return Outcome(batch.rows_RD.clone(), batch.row_X, batch.weight_X, batch.offsets_S, out_TD)


def expected(case: Case) -> list[Outcome]:
    """What every rank must see, bit for bit."""
    inputs = [case.inputs(group) for group in range(case.groups)]
    arrived = [_arrivals(case, inputs, group) for group in range(case.groups)]
    answers = [case.answers(group, len(arrived[group])) for group in range(case.groups)]
    home = {
        (source, token, group): answers[group][row]
        for group in range(case.groups)
        for row, (source, token) in enumerate(arrived[group])
    }
    outcomes = []
    for group in range(case.groups):
        rows = [inputs[source][0][token] for source, token in arrived[group]]
        entries = _entries(case, inputs, arrived[group], group)
        ends = [sum(slot <= s for slot, _, _ in entries) for s in range(len(case.slots[group]))]
        tokens = [_token_sum(case, home, group, token) for token in range(case.tokens[group])]
        outcomes.append(
            Outcome(
                torch.stack(rows) if rows else torch.empty(0, case.d_model, dtype=case.dtype),
                torch.tensor([row for _, row, _ in entries], dtype=torch.int64),
                torch.tensor([weight for _, _, weight in entries], dtype=torch.float32),
                torch.tensor(ends, dtype=torch.int32),
                torch.stack(tokens) if tokens else torch.empty(0, case.d_model, dtype=case.dtype),
            )
        )
    return outcomes


def _arrivals(case: Case, inputs: list[tuple[Tensor, SlotChoice]], group: int) -> list[tuple[int, int]]:
    """(source, token) of each row of a group: one for a token that chose any of its slots."""
    return [
        (source, token)
        for source in range(case.groups)
        for token in range(case.tokens[source])
        if group in inputs[source][1].group_TK[token].tolist()
    ]


def _entries(
    case: Case, inputs: list[tuple[Tensor, SlotChoice]], arrived: list[tuple[int, int]], group: int
) -> list[tuple[int, int, float]]:
    """(slot, row, weight) of each expanded row."""
    found = []
    for row, (source, token) in enumerate(arrived):
        choice = inputs[source][1]
        for k in range(case.top_k):
            if choice.group_TK[token, k] == group:
                found.append((int(choice.slot_TK[token, k]), row, float(choice.weight_TK[token, k])))
    return sorted(found, key=lambda entry: entry[:2])


def _token_sum(case: Case, home: dict[tuple[int, int, int], Tensor], source: int, token: int) -> Tensor:
    """fp32 over the groups of a node, rounded to the payload type; fp32 over the nodes, rounded to the payload type."""
    total_D = torch.zeros(case.d_model)
    for node in sorted(set(case.node_of_group)):
        partial_D = torch.zeros(case.d_model)
        for group in range(case.groups):
            if case.node_of_group[group] == node and (source, token, group) in home:
                partial_D = partial_D + home[source, token, group].float()
        total_D = total_D + partial_D.to(case.dtype).float()
    return total_D.to(case.dtype)


def check(outcomes: list[Outcome], case: Case) -> None:
    """Every rank saw exactly what the definition says."""
    for rank, (found, wanted) in enumerate(zip(outcomes, expected(case), strict=True)):
        for name in ("rows_RD", "row_X", "weight_X", "offsets_S", "out_TD"):
            f, w = getattr(found, name), getattr(wanted, name)
            assert f.dtype == w.dtype, f"rank {rank}, {name}: {f.dtype}, not {w.dtype}"
            assert torch.equal(f, w), f"rank {rank}, {name}: {f} instead of {w}"


@st.composite
def cases(draw: st.DrawFn, max_groups: int = 6) -> Case:
    """Random placements with replicas, empty groups and many slots; skews up to everything to the same experts."""
    groups = draw(st.integers(1, max_groups))
    experts = draw(st.integers(1, 9))
    holders = [draw(st.sets(st.integers(0, groups - 1), min_size=1, max_size=3)) for _ in range(experts)]
    order = draw(st.permutations(range(experts)))
    nodes = draw(st.lists(st.integers(0, 2), min_size=groups, max_size=groups))
    return Case(
        experts=experts,
        top_k=draw(st.integers(1, min(experts, 5))),
        slots=tuple(tuple(e for e in order if group in holders[e]) for group in range(groups)),
        tokens=tuple(draw(st.lists(st.sampled_from([0, 0, 1, 2, 5, 13]), min_size=groups, max_size=groups))),
        node_of_group=tuple(sorted(nodes)),
        d_model=draw(st.sampled_from([1, 3, 8, 17])),
        dtype=draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])),
        skew=draw(st.sampled_from([0.0, 0.5, 100.0])),
        dead=draw(st.sampled_from([0, 0, 1, 3])),
        seed=draw(st.integers(0, 999)),
    )


def typical(groups: int, dtype: torch.dtype = torch.float32, **changes) -> Case:
    """A case with replicas, an empty group where there are three or more, and two nodes where there are four."""
    holders = [{e % groups, (3 * e + 1) % groups} for e in range(2 * groups)]
    slots = [tuple(e for e in range(2 * groups) if g in holders[e]) for g in range(groups)]
    if groups >= 3:
        orphans = [e for e in slots[1] if holders[e] == {1}]
        slots[1], slots[0] = (), tuple(sorted({*slots[0], *orphans}))
    settings = {
        "experts": 2 * groups,
        "top_k": min(4, 2 * groups),
        "slots": tuple(slots),
        "tokens": tuple((7 * g + 3) % 12 for g in range(groups)),
        "node_of_group": tuple(int(g >= 2) for g in range(groups)),
        "dtype": dtype,
        "seed": groups,
    }
    return Case(**(settings | changes))
