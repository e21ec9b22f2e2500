"""A rank without a model: the next token is a function of all tokens before it, read back from a paged cache."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from soloist.engine.meeting import FRONT_END, Job, Meeting, Place
from soloist.engine.options import EngineOptions
from soloist.engine.rank import run_rank
from soloist.engine.world import World
from soloist.errors import SoloistError
from soloist.frontend.frontend import FrontEnd
from soloist.frontend.requests import Request
from soloist.frontend.sockets import Hub
from soloist.frontend.wire import Figures, ToFrontEnd
from soloist.placement.placement import Placement
from soloist.scheduling.request import UNKNOWN, Sampled, SamplingParams, StepBatch, TokenLogprob
from soloist.specs.layout import Layout
from soloist.specs.model import AttentionSpec, ExpertSpec, ModelSpec, RopeSpec, RouterSpec
from soloist.transport.connect import local_world

VOCAB = 97
SPEC = ModelSpec(
    name="fake",
    family="qwen3_moe",
    layers=8,
    d_model=8,
    vocab=VOCAB,
    max_positions=256,
    attention=AttentionSpec(heads=2, kv_heads=1, head_dim=4, v_head_dim=4, scale=0.5),
    rope=RopeSpec(width=4),
    experts=16,
    router=RouterSpec(top_k=1),
    expert=ExpertSpec(width=4),
    eos_ids=(0,),
)


def next_token(tokens: Sequence[int]) -> int:
    return int(sum((i + 1) * t for i, t in enumerate(tokens)) * 31 + 7) % VOCAB


def continuation(prompt: Sequence[int], max_tokens: int, ignore_eos: bool = False) -> list[int]:
    """What a deployment of any layout must answer."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + max_tokens:
        tokens.append(next_token(tokens))
        if tokens[-1] in SPEC.eos_ids and not ignore_eos:
            break
    return tokens[len(prompt) :]


@dataclass(frozen=True)
class Here:
    """An answer that need not be waited for."""

    sampled: list[Sampled]
    is_here = True

    def wait(self) -> list[Sampled]:
        return self.sampled


class FakeExecutor:
    """Checks that all ranks of a stage take the same step, and that a step passes through the stages in order."""

    kv_blocks = 64

    def __init__(self, job: Job, world: World, device: torch.device, report: Callable[[int], None]) -> None:
        self.world, self.block_size = world, job.options.block_size
        self.last: dict[int, int] = {}  # what was chosen last for each sequence
        report(1000)

    def allocate(self, blocks: int) -> None:
        self.cache = np.full(blocks * self.block_size, -1)

    def run(self, batch: StepBatch) -> Here | None:
        form = torch.tensor([[batch.step, batch.peak + 1000 * batch.decodes]])
        for group in (self.world.experts, self.world.attention):
            if group is not None:
                assert (group.all_gather_rows(form, where=f"step {batch.step}") == form).all()
        seat, pipeline = self.world.seat, self.world.pipeline
        if pipeline and not seat.is_first_stage:
            assert (pipeline.recv((1, 2), torch.int64, seat.stage - 1, f"step {batch.step}") == form).all()
        if pipeline and not seat.is_last_stage:
            pipeline.send(form, seat.stage + 1, f"step {batch.step}")
        answers = [self.answer(chunk) for chunk in batch.chunks]
        return Here([a for a in answers if a]) if seat.sampler == seat.rank else None

    def figures(self) -> Figures:
        bytes_to, waited_for_s = self.world.take_traffic()
        return Figures(self.world.seat.rank, {}, waited_for_s, bytes_to, 1000, 0, 0)

    def answer(self, chunk) -> Sampled | None:
        rows = np.array([chunk.blocks[p // self.block_size] * self.block_size + p % self.block_size
                         for p in range(chunk.stop)])  # fmt: skip
        unknown = chunk.tokens == (UNKNOWN,)
        self.cache[rows[chunk.start :]] = self.last[chunk.sequence] if unknown else chunk.tokens
        if chunk.params is None:
            return None
        token = self.last[chunk.sequence] = next_token(self.cache[rows].tolist())
        return Sampled(chunk.sequence, token if chunk.samples else None, TokenLogprob(token, -1.0), margin=float(token))


class Slow(FakeExecutor):
    """Leaves the test time to interfere."""

    def run(self, batch: StepBatch) -> Here | None:
        time.sleep(0.05)
        return super().run(batch)


class Deployment:
    """A front end, and the ranks of a layout as threads."""

    def __init__(self, folder: Path, layout: str, make_executor=FakeExecutor, tokenizer: Path | None = None, **options):
        self.layout = Layout.parse(layout)
        options = EngineOptions(device="cpu", **{"deadline_s": 60.0, "block_size": 4, **options})
        job = Job(SPEC, self.layout, Placement.linear(SPEC, self.layout.ep), options, tokenizer=tokenizer)
        self.hub: Hub[ToFrontEnd] = Hub(f"ipc://{folder}/front", ToFrontEnd)
        self.front = FrontEnd(self.layout, VOCAB, self.hub, options.deadline_s, dict)
        self.meetings = [Meeting.in_folder(folder, Place(r, self.layout.size, r, self.layout.size))
                         for r in range(self.layout.size)]  # fmt: skip
        self.meetings[0].announce(FRONT_END, self.hub.address)
        self.roots = local_world(self.layout.size, options.deadline_s)
        self.threads = [threading.Thread(target=self.rank, args=(job, m, make_executor)) for m in self.meetings]

    def rank(self, job: Job, meeting: Meeting, make_executor) -> None:
        with suppress(SoloistError, ValueError):  # it has told the front end
            run_rank(job, meeting, make_executor, self.world)

    def world(self, job: Job, meeting: Meeting, device: torch.device) -> World:
        return World.build(self.roots[meeting.place.rank], job.layout, job.options.gpus_per_node)

    def __enter__(self) -> Deployment:
        for thread in self.threads:
            thread.start()
        try:
            self.front.wait_ready(120, lambda ranks: None)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.front.close()
        for thread in self.threads:
            thread.join(120)
        assert not any(thread.is_alive() for thread in self.threads)

    def finish(self, *requests: Request) -> None:
        while not all(request.done for request in requests):
            self.front.pump()

    def answer(self, prompt: Sequence[int], **params) -> list[int]:
        request = self.front.submit(prompt, SamplingParams(**params))
        self.finish(request)
        assert request.error is None, request.error
        return request.sequences[0].tokens
