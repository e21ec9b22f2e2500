"""The hierarchical dispatcher against the definition, bit for bit, over every pair of transports."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from soloist.dispatch.base import SlotChoice, Topology
from soloist.dispatch.hierarchical import HierarchicalDispatcher, Rails
from soloist.dispatch.ragged import RaggedDispatcher
from soloist.transport.base import Transport
from soloist.transport.local import LocalGroup, LocalTransport
from tests.dispatch.cases import Case, Outcome, cases, check, run_case, typical
from tests.ranks import RankPool, run_threads


def dispatcher_of(transport: Transport, case: Case, chunks: int = 1) -> HierarchicalDispatcher:
    """Rail and node as parts of one world."""
    rails = Rails(case.topology, transport.rank)
    rail = transport.subgroup(rails.rail)
    alone = len(rails.node) == 1
    node = LocalTransport(LocalGroup([transport.rank]), 0) if alone else transport.subgroup(rails.node)
    return HierarchicalDispatcher(rail, node, rails, len(case.slots[transport.rank]), chunks=chunks)


def run_rank(transport: Transport, case: Case, chunks: int = 1) -> Outcome:
    return run_case(dispatcher_of(transport, case, chunks), case, transport.rank)


@settings(max_examples=80, deadline=None)
@given(cases(), st.sampled_from([1, 1, 2, 3]))
def test_random_exchanges_follow_the_definition(case: Case, chunks: int) -> None:
    check(run_threads(case.groups, run_rank, case, chunks), case)


@pytest.mark.parametrize("chunks", [1, 4])
@pytest.mark.parametrize(("nodes", "each"), [(2, 2), (2, 8), (4, 4)])
def test_equal_to_flat_on_processes(ranks: RankPool, nodes: int, each: int, chunks: int) -> None:
    """bf16 payload; both follow the definition, so they are equal to each other."""
    node_of_group = tuple(group // each for group in range(nodes * each))
    case = typical(nodes * each, torch.bfloat16, node_of_group=node_of_group, top_k=6)
    check(ranks.run(case.groups, "shared_memory", run_rank, case, chunks, deadline_s=60.0), case)


@pytest.mark.parametrize("topology", [(0, 0, 0, 1), (0, 1, 1, 1), (0, 0, 0, 0), (3, 3, 5, 7)])
def test_nodes_of_unequal_occupancy(topology: tuple[int, ...]) -> None:
    case = typical(4, torch.bfloat16, node_of_group=topology, tokens=(9, 0, 4, 11))
    check(run_threads(4, run_rank, case, 2), case)


def test_rails_of_uneven_nodes_meet_everybody() -> None:
    """Each group sends to one gateway in every node, itself at home, and gateways are on its rail."""
    topology = Topology((0,) * 5 + (1,) * 2 + (2,) * 3)
    for group in range(10):
        rails = Rails(topology, group)
        assert len(rails.gateways) == 3
        assert [topology.node_of_group[g] for g in rails.gateways] == [0, 1, 2]
        assert group in rails.gateways
        assert set(rails.gateways) <= set(rails.rail)
        assert all(Rails(topology, other).rail == rails.rail for other in rails.rail)


def counted(transport: Transport, case: Case) -> tuple[int, int, int]:
    """Rows that crossed, rows that the definition lets cross, rows that would cross in a flat exchange."""
    group, node_of_group = transport.rank, torch.tensor(case.node_of_group)
    dispatcher = dispatcher_of(transport, case)
    x_TD, choice = case.inputs(group)
    dispatcher.dispatch(x_TD, choice)
    row_bytes = 16 * -(-(case.d_model * case.dtype.itemsize + 8 * case.top_k) // 16)
    elsewhere = [set(row) - {group} for row in choice.group_TK.tolist()]
    foreign = [{g for g in row if node_of_group[g] != node_of_group[group]} for row in elsewhere]
    wanted = sum(len({case.node_of_group[g] for g in row}) for row in foreign)
    return sum(dispatcher.rail.traffic.bytes_to) // row_bytes, wanted, sum(map(len, foreign))


def test_a_token_crosses_once_to_each_node() -> None:
    case = typical(8, node_of_group=(0,) * 4 + (1,) * 4, tokens=(10,) * 8)
    for crossed, wanted, flat in run_threads(8, counted, case):
        assert crossed == wanted < flat


@pytest.mark.multigpu
@pytest.mark.parametrize("chunks", [1, 3])
def test_two_gpus_posing_as_two_nodes(ranks: RankPool, chunks: int) -> None:
    """The rail is NCCL: equal to the definition, and as many bytes as rows that have to cross."""
    case = typical(2, torch.bfloat16, node_of_group=(0, 1), tokens=(700, 300), d_model=256, top_k=3)
    found = ranks.run(2, "nccl", on_gpu, case, chunks)
    check([outcome for outcome, _, _ in found], case)
    assert [crossed for _, crossed, _ in found] == [wanted for _, _, wanted in found]


def on_gpu(transport: Transport, case: Case, chunks: int) -> tuple[Outcome, int, int]:
    """What a rank saw, the bytes that it sent over its rail, and those of the rows that had to cross."""
    group, other = transport.rank, 1 - transport.rank
    dispatcher = dispatcher_of(transport, case, chunks)
    x_TD, choice = case.inputs(group)
    on_device = SlotChoice(*(t.to(transport.device) for t in vars(choice).values()))
    batch = dispatcher.dispatch(x_TD.to(transport.device), on_device, "layer 0")
    answers = case.answers(group, len(batch.rows_RD)).to(transport.device)
    out_TD = dispatcher.combine(answers, batch, "layer 0")
    outcome = Outcome(
        *(t.cpu() for t in (batch.rows_RD, batch.row_X, batch.weight_X, batch.offsets_S, out_TD))
    )  # fmt: skip
    there = int((choice.group_TK == other).any(1).sum())
    back = int((case.inputs(other)[1].group_TK == group).any(1).sum())
    row_bytes = 2 * case.d_model
    return outcome, sum(dispatcher.rail.traffic.bytes_to), there * (row_bytes + 8 * case.top_k + 8) + back * row_bytes


def test_ranks_of_a_group_share_its_experts() -> None:
    """tp = 2: each of a group's ranks brings tokens of its own; the rows are gathered, the partial sums scattered."""
    run_threads(8, both_forms)


def both_forms(transport: Transport) -> None:
    tp, group = transport.rank % 2, transport.rank // 2
    case = typical(4, torch.bfloat16, seed=transport.rank % 2)
    peers = transport.subgroup(range(tp, 8, 2))
    pair = transport.subgroup([2 * group, 2 * group + 1])
    flat = RaggedDispatcher(peers, case.topology, len(case.slots[group]), pair)
    rails = Rails(case.topology, group)
    rail, node = peers.subgroup(rails.rail), peers.subgroup(rails.node)
    hierarchical = HierarchicalDispatcher(rail, node, rails, len(case.slots[group]), pair, chunks=2)
    x_TD, choice = case.inputs(group)
    outcomes = []
    for dispatcher in (flat, hierarchical):
        batch = dispatcher.dispatch(x_TD, choice)
        y_RD = replace(case, seed=5).answers(group, len(batch.rows_RD))
        outcomes.append((batch.rows_RD, batch.row_X, batch.weight_X, batch.offsets_S, dispatcher.combine(y_RD, batch)))
    assert all(torch.equal(one, other) for one, other in zip(*outcomes, strict=True))


def dead_tokens(transport: Transport) -> None:
    case = typical(4, torch.bfloat16, tokens=(6,) * 4)
    x_TD, choice = case.inputs(transport.rank)
    live_T = torch.tensor([True, False, True, True, False, True])
    group_TK, slot_TK = (t.where(live_T[:, None], -1) for t in (choice.group_TK, choice.slot_TK))
    dispatcher = dispatcher_of(transport, case, chunks=2)
    batch = dispatcher.dispatch(x_TD, SlotChoice(group_TK, slot_TK, choice.weight_TK))
    out_TD = dispatcher.combine(batch.rows_RD, batch)
    assert not out_TD[~live_T].any()
    assert out_TD[live_T].abs().sum(1).bool().all()


def test_a_token_of_group_minus_one_goes_nowhere() -> None:
    run_threads(4, dead_tokens)


def missing(transport: Transport, case: Case) -> str:
    if transport.rank == 1:
        return ""
    with pytest.raises(Exception, match=r"rank 1.*layer 7, dispatch, (across nodes|inside the node)"):
        dispatcher_of(transport, case).dispatch(*case.inputs(transport.rank), "layer 7")
    return "told"


def test_a_missing_rank_is_named_with_the_stage() -> None:
    case = typical(3, node_of_group=(0, 0, 1), tokens=(3, 3, 0))
    assert run_threads(3, missing, case, deadline_s=3.0)[0] == "told"
