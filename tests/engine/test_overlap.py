"""Steps that go as two halves: every logit is that of whole steps, in every bit, and the halves really overlap.

Shape legend: C tokens whose logits are wanted, V vocabulary, T tokens, D model width.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from soloist.dispatch.base import Dispatcher, ExpertBatch, SlotChoice
from soloist.engine.dispatchers import Dispatchers
from soloist.engine.llm import LLM
from soloist.engine.options import EngineOptions
from soloist.engine.runner import Runner
from soloist.engine.world import World
from soloist.errors import ConfigurationError
from soloist.models.checkpoint import Checkpoint
from soloist.placement.placement import Placement
from soloist.scheduling.request import Chunk, SamplingParams, StepBatch
from soloist.specs.hf import read_config
from soloist.specs.layout import Layout
from soloist.transport.base import Transport
from tests.blas import where_measured
from tests.ranks import RankPool, run_threads

NOVELS = Path(__file__).parents[2] / "models" / "novels-moe-11m"
SPEC = read_config(NOVELS)
SIZE = 16  # of a block
# Steps: for each of three sequences the tokens that it has in them. Chunks are cut in the middle, some steps leave
# ranks without tokens, and the last ones decode.
STEPS = [(37, 5, 1), (3, 0, 0), (0, 40, 9), (1, 1, 1), (1, 0, 1), (1, 1, 1)]


def batches(own: list[int]) -> list[StepBatch]:
    """The steps of one attention group."""
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(1, SPEC.vocab, (64,), generator=generator).tolist() for _ in range(3)]
    at, found = [0, 0, 0], []
    for number, counts in enumerate(STEPS):
        chunks = tuple(
            Chunk(i, tuple(ids[i][at[i] : at[i] + counts[i]]), at[i], tuple(range(4 * i, 4 * i + 4)), True,
                  scores_prompt=True)
            for i in own if counts[i]
        )  # fmt: skip
        found.append(StepBatch(number, chunks, peak=sum(counts), decodes=max(counts) == 1))
        at = [before + count for before, count in zip(at, counts, strict=True)]
    return found


def make_runner(t: Transport, layout: Layout, options: EngineOptions) -> Runner:
    torch.set_num_threads(1)
    source = Checkpoint(NOVELS, SPEC, torch.float32, torch.device("cpu"))
    world = World.build(t, layout, options.gpus_per_node, by_node=options.exchange == "hierarchical")
    runner = Runner(SPEC, layout, Placement.linear(SPEC, layout.ep), world, source, options)
    runner.allocate(12)
    return runner


def logits(t: Transport, layout: Layout, options: EngineOptions) -> list[Tensor]:
    """logits_CV of each step on the ranks that sample."""
    runner = make_runner(t, layout, options)
    seat = runner.world.seat
    own = [i for i in range(3) if i % layout.attention_groups == seat.attention_group]
    found = [runner.logits(batch) for batch in batches(own)]
    return [part.clone() for part in found if part is not None]


def options_of(**changes: Any) -> EngineOptions:
    return EngineOptions(**{"block_size": SIZE, "replicate_below": 0, "deadline_s": 120.0} | changes)


CASES = {
    "attn2ep4": {},
    "pp2attn2ep2": {},
    "ep4, static": {"cuda_graphs": "4,8", "mixed_graphs": "8,48,64"},
    "attn2ep2, static": {"cuda_graphs": "4,8", "mixed_graphs": "8,48,64"},
    "ep4, by node": {"gpus_per_node": 2, "exchange": "hierarchical", "exchange_chunks": 2},
    "ep16": {},
}


@where_measured
@pytest.mark.parametrize("name", CASES)
def test_every_logit_is_that_of_whole_steps(name: str) -> None:
    layout, changes = Layout.parse(name.partition(",")[0]), CASES[name]
    whole, halved = (
        run_threads(layout.size, logits, layout, options_of(overlap=overlap, **changes)) for overlap in ("off", "on")
    )
    assert [len(found) for found in halved] == [len(found) for found in whole]
    assert any(found for found in whole)
    for ours, theirs in zip(halved, whole, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@where_measured
def test_over_processes(ranks: RankPool) -> None:
    layout, options = Layout.parse("ep2tp2"), options_of(overlap="on")
    found = ranks.run(4, "shared_memory", logits, layout, options)
    for ours, theirs in zip(found, run_threads(4, logits, layout, options_of()), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@where_measured
def test_no_answer_changes() -> None:
    """With prefixes from the cache, chunks of long prompts, prompt scores, and more sequences than a step takes."""
    start = "It was a dark and stormy night, and the old house upon the hill was silent. "
    prompts = [start * 2 + "She", start * 2 + "He", "The", start + "He said"]
    params = [SamplingParams(max_tokens=6, temperature=0.0, prompt_logprobs=0 if i == 3 else None) for i in range(4)]

    def answers(overlap: str) -> list[Any]:
        options = {"kv_tokens": 512, "max_batch_tokens": 24, "max_sequences": 2, "overlap": overlap}
        with LLM(NOVELS, layout="ep2", device="cpu", show_progress=False, **options) as llm:
            outputs = [*llm.generate(prompts, params), *llm.generate(prompts[0], params[0])]
        return [(output.outputs[0].tokens, output.outputs[0].text, output.prompt_logprobs) for output in outputs]

    assert answers("on") == answers("off")


# -- what is under way at once -----------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Told(Dispatcher):
    """Tells what is started and awaited."""

    inner: Dispatcher
    events: list[str]
    calls: dict[str, int] = field(default_factory=lambda: {"dispatch": 0, "combine": 0})

    def _pending(self, name: str, pending: Any) -> Waiting:
        number, self.calls[name] = self.calls[name], self.calls[name] + 1
        self.events.append(f"{name} {number} starts")
        return Waiting(pending, f"{name} {number} ends", self.events)

    def start_dispatch(self, x_TD: Tensor, choice: SlotChoice, where: str = "") -> Waiting:
        return self._pending("dispatch", self.inner.start_dispatch(x_TD, choice, where))

    def start_combine(self, y_RD: Tensor, batch: ExpertBatch, where: str = "") -> Waiting:
        return self._pending("combine", self.inner.start_combine(y_RD, batch, where))


@dataclass(frozen=True)
class Waiting:
    inner: Any
    event: str
    events: list[str]

    def wait(self) -> Any:
        self.events.append(self.event)
        return self.inner.wait()


def events(t: Transport, options: EngineOptions) -> list[str]:
    """Of the first two layers in one step of five tokens on rank 0 and none on rank 1."""
    runner, found = make_runner(t, Layout.parse("ep2"), options), list[str]()
    told = dict[int, Told]()
    for block in runner.decoder.blocks[:2]:
        block.moe.dispatcher = told.setdefault(0, Told(block.moe.dispatcher, found))
    runner.decoder.blocks, runner.caches = runner.decoder.blocks[:2], runner.caches[:2]
    chunks = (Chunk(0, (1, 2, 3, 4, 5), 0, (0,), True),) if t.rank == 0 else ()
    runner.logits(StepBatch(0, chunks, peak=5))
    return found


def test_one_half_travels_while_the_other_computes() -> None:
    """Rows of both halves are under way at once, and so are rows and results; with no tokens on a rank, too."""
    expected = [
        "dispatch 0 starts", "dispatch 1 starts",  # attention of the second half, while the first one travels
        "dispatch 0 ends", "combine 0 starts", "dispatch 1 ends", "combine 1 starts",
        "combine 0 ends", "dispatch 2 starts", "combine 1 ends", "dispatch 3 starts",  # the next layer
        "dispatch 2 ends", "combine 2 starts", "dispatch 3 ends", "combine 3 starts",
        "combine 2 ends", "combine 3 ends",
    ]  # fmt: skip
    assert run_threads(2, events, options_of(overlap="on")) == [expected] * 2
    whole = [f"{name} {i} {what}" for i in (0, 1) for name in ("dispatch", "combine") for what in ("starts", "ends")]
    assert run_threads(2, events, options_of(overlap="prefill=6")) == [whole] * 2


def fails(t: Transport, options: EngineOptions) -> str:
    """Rank 1 leaves in the middle of a step."""
    runner = make_runner(t, Layout.parse("ep2"), options)
    if t.rank == 1:
        t.close()
        return ""
    with pytest.raises(Exception, match="has closed") as error:
        runner.logits(StepBatch(0, (Chunk(0, (1, 2, 3, 4, 5), 0, (0,), True),), peak=5))
    return str(error.value)


def test_errors_name_rank_layer_and_phase() -> None:
    assert run_threads(2, fails, options_of(overlap="on"))[0] == "rank 0: rank 1: has closed (in layer 0, dispatch)"


# -- which steps, and the memory for them ------------------------------------------------------------------------------
def test_the_option() -> None:
    on = EngineOptions(overlap="on", replicate_below=64)
    assert on.halves(Layout.parse("ep4")).takes(2, decodes=True)
    assert not on.halves(Layout.parse("ep1")), "nothing travels"
    assert not EngineOptions(overlap="on", record="ids").halves(Layout.parse("ep4"))
    assert not EngineOptions().halves(Layout.parse("ep4"))
    sharing = on.halves(Layout.parse("attn2ep2"))
    assert [sharing.takes(tokens, decodes=False) for tokens in (63, 64)] == [False, True], "replicated tokens go whole"
    with pytest.raises(ConfigurationError, match="overlap = 'yes': must be off, on, or tokens like"):
        EngineOptions(overlap="yes")


def calls(t: Transport, overlap: str) -> tuple[int, int]:
    options = EngineOptions(max_batch_tokens=640, max_sequences=64, overlap=overlap).on("cpu")
    layout = Layout.parse("attn2ep4")
    world = World.build(t, layout, gpus_per_node=8)
    made = Dispatchers(SPEC, Placement.linear(SPEC, 4), [4], world, options, torch.float32, torch.device("cpu"))
    return made.tokens, made.lanes


def test_two_lanes_of_half_the_size() -> None:
    found = [run_threads(4, calls, overlap)[0] for overlap in ("off", "on", "decode=64", "prefill=500")]
    assert found == [(320, 1), (160, 2), (320, 2), (250, 2)]
