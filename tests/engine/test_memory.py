"""The planner's memory table against what ranks really hold: every family, several layouts."""

from __future__ import annotations

import msgspec
import pytest
import torch

from soloist.dispatch.lane import ExchangeShape, Lane, WindowPlan
from soloist.dispatch.local import LocalIndex
from soloist.engine.dispatchers import lane_bytes
from soloist.engine.options import EngineOptions
from soloist.engine.runner import Runner
from soloist.engine.world import World
from soloist.models.random_weights import RandomWeights
from soloist.placement.placement import Placement
from soloist.planner.memory import MemoryLoad, memory_parts, window_bytes
from soloist.planner.precision import Precision
from soloist.planner.weights import PARTS
from soloist.specs.hf import read_config
from soloist.specs.layout import Layout
from soloist.specs.model import ModelSpec, RouterSpec
from soloist.transport.base import Transport
from soloist.transport.symmetric import windows_in_process
from tests.models.tiny import FAMILIES, save_tiny
from tests.ranks import run_threads
from tests.specs.models import tiny_spec

LAYOUTS = ("ep1", "ep3", "tp2", "pp2", "ep2tp2", "attn3ep3", "tp4", "pp2ep2", "pp2tp2")
BLOCKS, BLOCK = 5, 8


@pytest.fixture(scope="module", params=FAMILIES)
def spec(request, tmp_path_factory) -> ModelSpec:
    folder = tmp_path_factory.mktemp(request.param)
    save_tiny(request.param, folder)
    return read_config(folder)


def held(transport: Transport, spec: ModelSpec, layout: Layout) -> dict[str, int]:
    source = RandomWeights(spec, 0, torch.float32)
    world = World.build(transport, layout, gpus_per_node=8)
    options = EngineOptions(block_size=BLOCK, device="cpu")
    runner = Runner(spec, layout, Placement.linear(spec, layout.ep), world, source, options)
    runner.allocate(BLOCKS)
    memory = runner.figures().memory
    world.close()
    return memory


@pytest.mark.parametrize("text", LAYOUTS)
def test_every_part_is_what_was_predicted(spec: ModelSpec, text: str) -> None:
    layout = Layout.parse(text)
    load = MemoryLoad(sequences=1, longest=BLOCKS * BLOCK, block=BLOCK)
    for rank, found in enumerate(run_threads(layout.size, held, spec, layout)):
        predicted = memory_parts(spec, layout.at(rank), Precision.named("fp32"), load)
        for part in (*PARTS, "KV cache"):
            assert found[part] == round(predicted[part]), f"{text}, rank {rank}: {part}"


@pytest.mark.parametrize(
    ("text", "top_k", "slots"),
    [("ep4", 2, 4), ("ep2tp2", 2, 8), ("attn2ep4", 8, 2), ("attn4ep4", 8, 2), ("tp2", 2, 8), ("ep1", 3, 4)],
)
def test_windows_of_the_one_sided_exchange(text: str, top_k: int, slots: int) -> None:
    """The prediction against lanes over memory of one process; 1 %: flags and alignment are left out."""
    layout, load = Layout.parse(text), MemoryLoad(sequences=1, longest=64, step_tokens=512)
    spec = msgspec.structs.replace(tiny_spec(), d_model=256, router=RouterSpec(top_k=top_k), experts=slots * layout.ep)
    found = 0
    few = -(-load.replicated * layout.tp // layout.attention_ranks)
    each = -(-load.step_tokens // layout.attention_ranks)
    capacities = [(layout.stage_ranks, layout.tp, each)] if layout.stage_ranks > 1 else []
    stays = layout.ep == 1 or layout.attention_groups == 1
    capacities += [(layout.ep, 1, few)] if layout.attention_ranks > 1 and not stays else []
    if stays:
        tokens = load.step_tokens if layout.ep == 1 else load.replicated
        index = LocalIndex.of(tokens, top_k, slots, torch.device("cpu"))
        found += sum(tensor.nbytes for tensor in vars(index).values())
    for ranks, tp, capacity in capacities:
        shape = ExchangeShape(ranks, tp, slots, top_k, spec.d_model, capacity, torch.float32)
        (window, *_) = windows_in_process(ranks, WindowPlan(shape).size)
        found += lane_bytes(Lane(window, shape))
    predicted = window_bytes(spec, layout, Precision.named("fp32"), load, slots)
    assert predicted == pytest.approx(found, rel=0.01)
