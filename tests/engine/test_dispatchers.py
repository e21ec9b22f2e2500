"""Which steps of a layout can be captured, with what stands for kernels and windows that a CPU does not have."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from soloist.engine.dispatchers import Dispatchers
from soloist.engine.options import EngineOptions
from soloist.engine.world import World
from soloist.placement.placement import Placement
from soloist.planner.ways import way
from soloist.specs.layout import Layout
from soloist.transport.base import Transport
from tests.ranks import run_threads
from tests.specs.models import tiny_spec


def captured(
    transport: Transport, layout: Layout, index: Any, windows: Any, gpus_per_node: int = 8
) -> tuple[bool, bool, bool]:
    """Whether replicated tokens stay on their rank, and whether replicated and sharded steps can be captured."""
    spec, world = tiny_spec(), World.build(transport, layout, gpus_per_node=gpus_per_node)
    placement, options = Placement.linear(spec, layout.ep), EngineOptions(max_batch_tokens=64)
    made = Dispatchers(spec, placement, [2], world, options.on("cpu"), torch.float32, torch.device("cpu"))
    made.index = index if layout.ep == 1 or made.own else None
    reaches = len({rank // gpus_per_node for rank in range(layout.stage_ranks)}) == 1
    made.sharded = windows if layout.stage_ranks > 1 and reaches else None
    made.replicated = windows if layout.attention_ranks > 1 and layout.ep > 1 and not made.own and reaches else None
    return made.own, made.captures(replicated=True), made.captures(replicated=False)


@pytest.mark.parametrize(
    ("text", "own", "without_windows"),
    [
        ("ep1", False, (True, True)),
        ("ep2", False, (False, False)),
        ("tp2", False, (True, False)),  # larger steps gather rows in the group, by counts
        ("attn2ep2", True, (True, False)),
        ("attn2ep4", False, (False, False)),
    ],
)
def test_steps_that_ask_the_host_are_not_captured(text: str, own: bool, without_windows: tuple[bool, bool]) -> None:
    layout, some = Layout.parse(text), object()
    assert run_threads(layout.size, captured, layout, None, None)[0] == (own, False, False)
    assert run_threads(layout.size, captured, layout, some, None)[0] == (own, *without_windows)
    assert run_threads(layout.size, captured, layout, some, some)[0] == (own, True, True)


@pytest.mark.parametrize("text", ["ep4", "tp2", "ep2tp2", "attn2ep2", "attn2ep4", "dp2ep2", "pp2ep2"])
@pytest.mark.parametrize("gpus_per_node", [1, 2, 3, 8])
def test_where_a_machine_has_all_it_takes_the_planner_knows(text: str, gpus_per_node: int) -> None:
    layout, some = Layout.parse(text), object()
    found = run_threads(layout.size, captured, layout, some, some, gpus_per_node)
    planned = [way(layout, gpus_per_node, replicated) != "across" for replicated in (True, False)]
    assert {tuple(each[1:]) for each in found} == {tuple(planned)}
