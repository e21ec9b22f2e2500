"""Every layout's groups can be built by all ranks at once, and lead to the right peers."""

from __future__ import annotations

import threading

import pytest
import torch

from soloist.engine.world import World
from soloist.specs.layout import Layout
from soloist.transport.connect import local_world


def build_all(layout: Layout, gpus_per_node: int = 8, by_node: bool = False) -> list[World]:
    roots, worlds = local_world(layout.size, deadline_s=60), {}

    def build(rank: int) -> None:
        worlds[rank] = World.build(roots[rank], layout, gpus_per_node, by_node=by_node)

    threads = [threading.Thread(target=build, args=(rank,)) for rank in range(layout.size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    return [worlds[rank] for rank in range(layout.size)]


@pytest.mark.parametrize("text", ["ep1", "ep16", "tp8pp2", "ep2tp2", "attn8ep8", "pp4ep4", "dp2pp2ep2tp2", "attn2ep4"])
def test_each_group_has_its_seats_peers(text):
    layout = Layout.parse(text)
    for rank, world in enumerate(build_all(layout)):
        seat = layout.at(rank)
        assert world.seat == seat
        assert world.experts.ranks == seat.expert_peers
        for transport, peers in (
            (world.tp, seat.tp_peers),
            (world.attention, seat.attention_peers),
            (world.pipeline, seat.pipeline_peers),
        ):
            assert (transport.ranks if transport else (rank,)) == peers
        assert (world.control is not None) == seat.is_leader
        if world.control:
            assert world.control.ranks == seat.leaders
        world.close()


def test_traffic_is_summed_over_groups_without_control():
    worlds = build_all(Layout.parse("ep2tp2"))
    row = torch.zeros(1, 8)
    for world in worlds:
        world.pipeline = None

    def talk(world: World) -> None:
        world.experts.all_to_all_rows(row.repeat(2, 1), [1, 1])
        world.tp.all_to_all_rows(row.repeat(2, 1), [1, 1])
        if world.control:
            world.control.barrier()

    threads = [threading.Thread(target=talk, args=(world,)) for world in worlds]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert worlds[0].take_traffic()[0] == {2: 32, 1: 32}
    assert worlds[0].take_traffic() == ({}, {})


def test_nodes_are_the_declared_ones():
    layout = Layout.parse("pp2ep4")
    assert [world.topology.node_of_group for world in build_all(layout, gpus_per_node=2)][::4] == [
        (0, 0, 1, 1),
        (2, 2, 3, 3),
    ]


@pytest.mark.parametrize(
    ("text", "gpus_per_node"), [("ep16", 8), ("ep16", 4), ("ep4tp2", 4), ("pp2ep4", 2), ("ep6", 4)]
)
def test_rails_join_one_place_of_every_node(text: str, gpus_per_node: int) -> None:
    for world in build_all(Layout.parse(text), gpus_per_node, by_node=True):
        rail, node, own = world.rail.ranks, world.node.ranks, world.seat.rank
        assert set(node) == {rank for rank in world.experts.ranks if rank // gpus_per_node == own // gpus_per_node}
        assert {rank // gpus_per_node for rank in rail} == {rank // gpus_per_node for rank in world.experts.ranks}
        assert {rank % world.seat.layout.tp for rank in rail} == {world.seat.tp_index}
        assert own in set(rail) & set(node)


def test_one_node_has_no_rails() -> None:
    assert all(world.rails is None for world in build_all(Layout.parse("ep4"), 8, by_node=True))


def test_groups_of_one_node_are_made_of_what_its_ranks_share() -> None:
    """tp and node lie inside a node; the rail does not."""
    layout = Layout.parse("ep4tp2")
    roots, insides = local_world(8, deadline_s=60), [local_world(4, deadline_s=60) for _ in range(2)]
    for node, members in enumerate(insides):
        for transport in members:
            transport.ranks = tuple(range(4 * node, 4 * node + 4))
            transport.group.ranks = transport.ranks
    worlds: dict[int, World] = {}

    def build(rank: int) -> None:
        inside = insides[rank // 4][rank % 4]
        worlds[rank] = World.build(roots[rank], layout, 4, inside=inside, by_node=True)

    threads = [threading.Thread(target=build, args=(rank,)) for rank in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    for rank, world in worlds.items():
        assert world.tp.ranks == world.seat.tp_peers
        assert world.node.ranks == tuple(r for r in world.seat.expert_peers if r // 4 == rank // 4)
        assert world.tp.group in insides[rank // 4][0].group._subgroups.values()
        assert world.rail.group in roots[0].group._subgroups.values()
