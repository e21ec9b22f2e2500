"""The whole layer over several ranks against a dense loop over experts."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from soloist.dispatch.base import SlotChoice, Topology
from soloist.dispatch.ragged import Arriving, RaggedDispatcher
from soloist.moe.experts import Experts
from soloist.moe.layer import MoELayer
from soloist.moe.pauses import alone
from soloist.moe.router import Router, SlotTable
from soloist.moe.stats import LoadStats, imbalance
from soloist.placement.placement import Placement
from soloist.specs.layout import Layout
from soloist.specs.model import ExpertSpec, RouterSpec
from soloist.timing import Stopwatch
from soloist.transport.base import Transport
from tests.moe.weights import RandomSource, dense_layer, make_spec
from tests.ranks import RankPool, run_threads

SPEC = make_spec(ExpertSpec(width=22, bias=True), RouterSpec(top_k=3), experts=7)
LAYOUTS = ("ep1", "ep2", "ep4", "tp3", "ep2tp2", "ep3tp2")


@dataclass(frozen=True)
class Seen:
    """One rank's tokens, their results and its counters."""

    x_TD: Tensor
    out_TD: Tensor
    stats: LoadStats


def make_layer(transport: Transport, layout: Layout, placement: Placement, dtype: torch.dtype) -> MoELayer:
    seat, source = layout.at(transport.rank), RandomSource(SPEC, dtype)
    held = placement.slots[0][seat.group]
    peers = transport.subgroup(seat.expert_peers)
    tp = transport.subgroup(seat.tp_peers) if layout.tp > 1 else None
    topology = Topology.of(layout.ep, layout.tp, gpus_per_node=4)
    return MoELayer(
        router=Router.load(SPEC, source, 0),
        table=SlotTable(placement, 0, seat.group),
        dispatcher=RaggedDispatcher(peers, topology, len(held), tp),
        replicated=RaggedDispatcher(peers, topology, len(held)),
        experts=Experts.load(SPEC, source, 0, held, seat.tp_index, layout.tp),
        stats=LoadStats(SPEC.experts, enabled=True),
        watch=Stopwatch(enabled=True),
    )


def tokens_of(rank: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rank 1 has none."""
    generator = torch.Generator().manual_seed(rank)
    return torch.randn((5 * rank + 3) % 8, SPEC.d_model, generator=generator).to(dtype)


def run_sharded(transport: Transport, layout: Layout, placement: Placement, dtype: torch.dtype) -> Seen:
    layer = make_layer(transport, layout, placement, dtype)
    x_TD = tokens_of(transport.rank, dtype)
    out_TD = alone(layer.travel(x_TD, meanwhile=lambda: 2 * x_TD))
    assert set(layer.watch.take()) == {"router", "exchange", "experts"}
    return Seen(x_TD, out_TD, layer.stats)


def run_replicated(transport: Transport, layout: Layout, placement: Placement, dtype: torch.dtype) -> Seen:
    """All ranks of a group have the same tokens; they add up their partial results."""
    layer = make_layer(transport, layout, placement, dtype)
    seat = layout.at(transport.rank)
    x_TD = tokens_of(seat.group, dtype)
    partial_TD = alone(layer.travel(x_TD, gather_in_group=False))
    total_TD = transport.subgroup(seat.tp_peers).all_reduce(partial_TD)
    return Seen(x_TD, total_TD, layer.stats)


def dense(x_TD: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    source = RandomSource(SPEC, dtype)
    routing = Router.load(SPEC, source, 0).route(x_TD)
    return dense_layer(SPEC, source, x_TD, routing.expert_ids_TK, routing.weights_TK)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sharded_tokens(layout: str) -> None:
    chosen = Layout.parse(layout)
    args = (chosen, Placement.round_robin(SPEC, chosen.ep), torch.float32)
    for seen in run_threads(chosen.size, run_sharded, *args):
        torch.testing.assert_close(seen.out_TD.double(), dense(seen.x_TD) + 2 * seen.x_TD, rtol=1e-5, atol=1e-5)


@dataclass(frozen=True)
class Narrow(RaggedDispatcher):
    """Takes three tokens of a rank at most."""

    @property
    def limit(self) -> int:
        return 3

    def start_dispatch(self, x_TD: Tensor, choice: SlotChoice, where: str = "") -> Arriving:
        assert len(x_TD) <= 3
        return super().start_dispatch(x_TD, choice, where)


def run_in_rounds(transport: Transport, layout: Layout, placement: Placement) -> Seen:
    layer = make_layer(transport, layout, placement, torch.float32)
    narrow = replace(layer, dispatcher=Narrow(**vars(layer.dispatcher)))
    x_TD = tokens_of(transport.rank)
    return Seen(x_TD, alone(narrow.travel(x_TD, meanwhile=lambda: 2 * x_TD, most=7)), layer.stats)


def test_more_tokens_than_a_dispatcher_takes_go_in_rounds() -> None:
    """Ranks bring 3, 0, 5 and 2 tokens, and all agree on three rounds."""
    layout = Layout.parse("ep4")
    for seen in run_threads(4, run_in_rounds, layout, Placement.round_robin(SPEC, 4)):
        torch.testing.assert_close(seen.out_TD.double(), dense(seen.x_TD) + 2 * seen.x_TD, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_replicated_tokens(layout: str) -> None:
    chosen = Layout.parse(layout)
    args = (chosen, Placement.linear(SPEC, chosen.ep), torch.float32)
    for seen in run_threads(chosen.size, run_replicated, *args):
        torch.testing.assert_close(seen.out_TD.double(), dense(seen.x_TD), rtol=1e-5, atol=1e-5)


def run_own_part(transport: Transport, layout: Layout, placement: Placement) -> Seen:
    """All ranks have the same tokens; each does what its group has to do, and counts two of them."""
    layer, alone = make_layer(transport, layout, placement, torch.float32), transport.subgroup([transport.rank])
    slots = len(placement.slots[0][layout.at(transport.rank).group])
    layer = replace(layer, replicated=RaggedDispatcher(alone, Topology((0,)), slots), own=True)
    transport.traffic.reset()
    x_TD, counted = tokens_of(4), slice(transport.rank, transport.rank + 2)
    part_TD = layer.own_part(x_TD, torch.arange(len(x_TD)) != 3, counted)
    assert sum(transport.traffic.bytes_to) == 0
    return Seen(x_TD, transport.all_reduce(part_TD), layer.stats)


@pytest.mark.parametrize("layout", ["ep4", "ep2tp2"])
def test_equal_tokens_on_all_ranks_need_no_exchange(layout: str) -> None:
    chosen = Layout.parse(layout)
    for seen in run_threads(4, run_own_part, chosen, Placement.round_robin(SPEC, chosen.ep)):
        expected = dense(seen.x_TD)
        expected[3] = 0  # a row that only fills up a batch
        torch.testing.assert_close(seen.out_TD.double(), expected, rtol=1e-5, atol=1e-5)
        assert seen.stats.take()[0].tokens_E.sum() in (SPEC.router.top_k, 2 * SPEC.router.top_k)


def test_bf16_over_two_nodes() -> None:
    layout = Layout.parse("ep3tp2")
    placement = Placement.linear(SPEC, 3)
    for seen in run_threads(6, run_sharded, layout, placement, torch.bfloat16):
        expected = dense(seen.x_TD, torch.bfloat16) + 2 * seen.x_TD
        torch.testing.assert_close(seen.out_TD.double(), expected, rtol=5e-2, atol=8e-2)


@pytest.mark.parametrize("kind", ["shared_memory", "gloo"])
def test_sharded_tokens_over_processes(ranks: RankPool, kind: str) -> None:
    """The same bits as over threads."""
    layout = Layout.parse("ep2tp2")
    args = (layout, Placement.linear(SPEC, 2), torch.bfloat16)
    found, wanted = ranks.run(4, kind, run_sharded, *args), run_threads(4, run_sharded, *args)
    assert all(torch.equal(f.out_TD, w.out_TD) for f, w in zip(found, wanted, strict=True))


def test_more_groups_than_experts() -> None:
    """Nine groups of one slot: two experts have a replica, and each token finds one."""
    layout = Layout.parse("ep9")
    for seen in run_threads(9, run_sharded, layout, Placement.linear(SPEC, 9), torch.float32):
        torch.testing.assert_close(seen.out_TD.double(), dense(seen.x_TD) + 2 * seen.x_TD, rtol=1e-5, atol=1e-5)


def test_counters() -> None:
    layout = Layout.parse("ep4")
    seen = run_threads(4, run_sharded, layout, Placement.linear(SPEC, 4), torch.float32)
    loads = [s.stats.take()[0] for s in seen]
    routings = [Router.load(SPEC, RandomSource(SPEC), 0).route(s.x_TD).expert_ids_TK for s in seen]
    expected = torch.cat(routings).flatten().bincount(minlength=SPEC.experts)
    assert torch.equal(sum(load.tokens_E for load in loads), expected)
    for group, held in enumerate(Placement.linear(SPEC, 4).slots[0]):
        rows = sum(torch.isin(ids, torch.tensor(held)).any(1).sum().item() for ids in routings)
        assert loads[group].rows == rows
    assert all(load.rows == 0 and not load.tokens_E.any() for load in seen[0].stats.take().values())


def test_counters_are_off_by_default() -> None:
    stats = LoadStats(4)
    stats.record(0, None, None)
    assert stats.take() == {}


def test_imbalance() -> None:
    assert imbalance(torch.tensor([4, 0, 0, 0])) == 4.0
    assert imbalance(torch.tensor([3, 3])) == 1.0
    assert imbalance(torch.zeros(3)) == 1.0
