"""Halves over the one-sided exchange, two ranks in one process: in Triton's interpreter, and on the streams of one GPU.

What pauses can take turns with other ranks as well: everybody has sent before anybody waits.

Shape legend: t tokens that a rank holds, D model width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from soloist.dispatch import one_sided
from soloist.dispatch.forms import COPY, LATENCY, PUSH, Form
from soloist.dispatch.one_sided import OneSidedDispatcher
from soloist.engine.options import EngineOptions
from soloist.engine.runner import Runner
from soloist.engine.world import World
from soloist.kernels.language import AVAILABLE, INTERPRETED
from soloist.models.checkpoint import Checkpoint
from soloist.models.step import StepInput
from soloist.moe.pauses import in_turn
from soloist.placement.placement import Placement
from soloist.scheduling.request import Chunk, StepBatch
from soloist.specs.hf import read_config
from soloist.specs.layout import Layout
from soloist.transport.connect import local_world
from soloist.transport.symmetric import Window, windows_in_process

NOVELS = Path(__file__).parents[2] / "models" / "novels-moe-11m"
SPEC, LAYOUT, BLOCK = read_config(NOVELS), Layout.parse("ep2"), 64
FORMS = [LATENCY, replace(PUSH, pieces=2), COPY]


@dataclass
class Shared:
    """Stands for an NVLink domain: windows of ranks that live in this process."""

    device: torch.device
    made: list[list[Window]] = field(default_factory=list)
    taken: list[int] = field(default_factory=lambda: [0, 0])

    def of(self, rank: int) -> Callable[[Sequence[int]], Any]:
        return lambda ranks: _Group(self, rank)

    def window(self, rank: int, size: int) -> Window:
        number, self.taken[rank] = self.taken[rank], self.taken[rank] + 1
        if number == len(self.made):
            self.made.append(windows_in_process(2, size, self.device))
        return self.made[number][rank]


@dataclass(frozen=True)
class _Group:
    shared: Shared
    rank: int

    def window(self, size: int) -> Window:
        return self.shared.window(self.rank, size)


def pair(device: torch.device, tokens: int) -> list[Runner]:
    """Two layers of the shipped model on two ranks."""
    shared, found = Shared(device), []
    options = EngineOptions(
        max_batch_tokens=tokens, max_sequences=4, block_size=BLOCK, cuda_graphs="off", mixed_graphs="off", overlap="on"
    )
    for rank, transport in enumerate(local_world(2, 20.0)):
        transport.device = device
        world = World.build(transport, LAYOUT, 2, control=transport, windows=shared.of(rank))
        source = Checkpoint(NOVELS, SPEC, torch.float32, device)
        runner = Runner(SPEC, LAYOUT, Placement.linear(SPEC, 2), world, source, options)
        runner.allocate(4 * -(-tokens // BLOCK))
        runner.decoder.blocks, runner.caches = runner.decoder.blocks[:2], runner.caches[:2]
        found.append(runner)
    return found


def batch(counts: Sequence[int], peak: int) -> StepBatch:
    """New prompts of so many tokens."""
    each = -(-peak // BLOCK)
    ids = [tuple((37 * row + 11 * i) % 4000 + 1 for i in range(count)) for row, count in enumerate(counts)]
    blocks = [tuple(range(row * each, (row + 1) * each)) for row in range(len(counts))]
    chunks = (Chunk(row, ids[row], 0, blocks[row], True) for row in range(len(counts)))
    return StepBatch(0, tuple(chunks), peak=peak)


def through(runners: Sequence[Runner], batches: Sequence[StepBatch], halved: bool) -> Callable[[], list[Tensor]]:
    """What each rank's layers make of its step; the numbers of the step are taken to the device before."""
    steps = [
        StepInput.of(step, BLOCK, runner.rope, runner.device, runner.dtype, halved=halved)
        for runner, step in zip(runners, batches, strict=True)
    ]

    def work() -> list[Tensor]:
        works, counts = [], []
        for runner, step in zip(runners, steps, strict=True):
            parts = runner.decoder.micro_batches(step)
            counts.append(len(parts))
            works += [runner.decoder.through_layers(runner.decoder.embed(part), part, runner.caches) for part in parts]
        found = iter(in_turn(works))
        return [torch.cat([next(found) for _ in range(count)]) for count in counts]

    return work


def check(runners: Sequence[Runner], found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for runner in runners:
        runner.world.check()
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-4, atol=2e-4)


@pytest.mark.skipif(not (AVAILABLE and INTERPRETED), reason="needs Triton and TRITON_INTERPRET=1")
def test_in_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two layers, so that each lane is used again."""
    monkeypatch.setattr(one_sided, "choose_form", lambda shape, sms=0: replace(LATENCY, programs=2))
    runners = pair(torch.device("cpu"), 4)
    for runner in runners:
        assert isinstance(runner.dispatchers.sharded, OneSidedDispatcher)
        assert len(runner.dispatchers.sharded.lanes) == 2
    batches = [batch([3, 1], 4), batch([], 4)]
    with torch.inference_mode():
        check(runners, through(runners, batches, halved=True)(), through(runners, batches, halved=False)())


@pytest.mark.gpu
@pytest.mark.parametrize("captured", [False, True], ids=["started", "captured"])
@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_on_one_gpu(form: Form, captured: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twenty times over, so that what a stream still reads would be written by the other."""
    monkeypatch.setattr(one_sided, "choose_form", lambda shape, sms=0: form)
    runners = pair(torch.device("cuda", 0), 1024)
    batches = [batch([700, 1, 300], 1001), batch([400], 1001)]
    with torch.inference_mode():
        expected = [part.clone() for part in through(runners, batches, halved=False)()]
        torch.cuda.synchronize()
        halves = through(runners, batches, halved=True)
        check(runners, halves(), expected)
        if captured:
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                out = halves()
        for _ in range(20):
            if captured:
                graph.replay()
            found = out if captured else halves()
            check(runners, found, expected)
