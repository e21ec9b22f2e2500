"""Every layout's groups can be built by all ranks at once, and lead to the right peers."""

from __future__ import annotations

import threading

import pytest
import torch

from soloist.engine.world import World
from soloist.specs.layout import Layout
from soloist.transport.connect import local_world


def build_all(layout: Layout, gpus_per_node: int = 8) -> list[World]:
    roots, worlds = local_world(layout.size, deadline_s=10), {}

    def build(rank: int) -> None:
        worlds[rank] = World.build(roots[rank], layout, gpus_per_node)

    threads = [threading.Thread(target=build, args=(rank,)) for rank in range(layout.size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
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
        thread.join(20)
    assert worlds[0].take_traffic()[0] == {2: 32, 1: 32}
    assert worlds[0].take_traffic() == ({}, 0.0)


def test_nodes_are_the_declared_ones():
    layout = Layout.parse("pp2ep4")
    assert [world.topology.node_of_group for world in build_all(layout, gpus_per_node=2)][::4] == [
        (0, 0, 1, 1),
        (2, 2, 3, 3),
    ]
