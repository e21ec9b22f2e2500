"""Steps before the first request: of all sizes, and without a trace."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from soloist.engine.graphs import StaticSteps
from soloist.engine.options import EngineOptions
from soloist.engine.rehearsal import rehearsals
from soloist.engine.runner import Runner
from soloist.engine.world import World
from soloist.models.random_weights import RandomWeights
from soloist.placement.placement import Placement
from soloist.scheduling.request import Chunk, StepBatch
from soloist.specs.layout import Layout
from soloist.transport.base import Transport
from tests.ranks import run_threads
from tests.specs.models import tiny_spec

OPTIONS = EngineOptions(
    device="cpu", max_batch_tokens=20, max_sequences=4, max_positions=12, block_size=4, count_experts=True,
    cuda_graphs="2", mixed_graphs="8",
)  # fmt: skip
PROMPT = tuple(range(1, 8))


def test_every_size_comes_with_short_and_with_long_contexts() -> None:
    batches = list(rehearsals(20, longest=12, max_sequences=4, block=9, block_size=4))
    assert [batch.tokens for batch in batches] == [n for n in (1, 2, 4, 8, 16, 20) for _ in "ab"]
    for batch in batches:
        assert batch.peak == batch.tokens
        assert len(batch.chunks) <= 4
        assert len(batch.chunks[0].tokens) == 1
        for chunk in batch.chunks:
            assert chunk.stop <= 12
            assert set(chunk.blocks) == {9}
            assert len(chunk.blocks) == -(-chunk.stop // 4)
    assert {max(chunk.stop for chunk in batch.chunks) for batch in batches[1::2]} == {12}


def test_a_single_sequence_bounds_the_steps() -> None:
    assert {batch.tokens for batch in rehearsals(8192, longest=100, max_sequences=1, block=0, block_size=16)} == {1}


def answer(transport: Transport, layout: Layout, rehearsed: bool | None) -> tuple[torch.Tensor | None, list[int]]:
    """Logits of a step, and how often its layers chose each expert. rehearsed: steps, or (False) graphs alone."""
    spec, source = tiny_spec(), RandomWeights(tiny_spec(), 0, torch.float32)
    world = World.build(transport, layout, gpus_per_node=8)
    runner = Runner(spec, layout, Placement.linear(spec, layout.ep), world, source, OPTIONS)
    runner.allocate(6)
    if rehearsed is not None:
        runner.compile(steps=rehearsed)
    if rehearsed:
        runner.rehearse()
    with torch.inference_mode():
        logits = runner.logits(StepBatch(1, (Chunk(0, PROMPT, 0, (0, 1), samples=True),), len(PROMPT)))
    chosen = [count for counts in runner.figures().chosen.values() for count in counts]
    world.close()
    return logits, chosen


def captured_when(transport: Transport, came: list[str]) -> list[str]:
    """What ranks had come to when this one began to capture."""
    layout, source = Layout.parse("ep2"), RandomWeights(tiny_spec(), 0, torch.float32)
    world, seen = World.build(transport, layout, gpus_per_node=8), list[str]()

    class Watched(Runner):
        def _static_steps(self, buckets: Sequence[int], mixed: Sequence[int]) -> StaticSteps:
            steps = super()._static_steps(buckets, mixed)
            steps.capture = lambda: seen.extend(came)
            return steps

    def meet(stage: str) -> None:
        came.append(stage)
        transport.barrier()

    world.await_everybody = meet
    Watched(tiny_spec(), layout, Placement.linear(tiny_spec(), 2), world, source, OPTIONS).allocate(6)
    world.close()
    return seen


def test_graphs_are_captured_when_all_have_loaded_and_compiled() -> None:
    stages = ["loaded", "loaded", "compiled", "compiled"]
    assert run_threads(2, captured_when, []) == [stages, stages]


@pytest.mark.parametrize("rehearsed", [False, True])
@pytest.mark.parametrize("text", ["ep1", "tp2", "pp2", "ep2"])
def test_what_was_rehearsed_leaves_no_trace(text: str, rehearsed: bool) -> None:
    layout = Layout.parse(text)
    plain = run_threads(layout.size, answer, layout, None)
    after = run_threads(layout.size, answer, layout, rehearsed)
    for (expected, chosen), (found, chosen_then) in zip(plain, after, strict=True):
        assert chosen == chosen_then
        assert (expected is None and found is None) or torch.equal(expected, found)
