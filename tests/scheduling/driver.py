"""A scheduler that is driven step by step, checked as it goes, and compared with what each request would get alone."""

from __future__ import annotations

from soloist.scheduling.request import Output, Sampled, SamplingParams, StepBatch
from soloist.scheduling.scheduler import Scheduler, SchedulerConfig
from tests.scheduling.fake_executor import EOS, FakeExecutor, alone, digest

GREEDY = SamplingParams(temperature=0, ignore_eos=True, max_tokens=8)


class Driver:
    """A scheduler with a fake executor. Batches are executed when scheduled or when answered, as `eager` says."""

    def __init__(self, config: SchedulerConfig, eager: bool = True) -> None:
        self.config, self.eager = config, eager
        self.scheduler = Scheduler(config, eos_ids=(EOS,))
        self.executor = FakeExecutor(config.blocks, config.block_size)
        self.flying: list[tuple[StepBatch, list[Sampled] | None]] = []
        self.outputs: dict[int, list[Output]] = {}
        self.finished: list[int] = []
        self.steps = 0

    def schedule(self) -> StepBatch:
        batch = self.scheduler.schedule()
        self.steps += 1
        assert batch.step == self.steps
        self._check(batch)
        if batch.chunks:
            self.flying.append((batch, self.executor.run(batch) if self.eager else None))
        return batch

    def _check(self, batch: StepBatch) -> None:
        assert batch.tokens <= self.config.max_batch_tokens
        assert len(batch.chunks) <= self.config.max_sequences
        assert all(chunk.tokens for chunk in batch.chunks)
        under_way = [c.sequence for b, _ in self.flying for c in b.chunks] + [c.sequence for c in batch.chunks]
        assert max(map(under_way.count, under_way), default=0) <= 1 + self.config.ahead
        assert len(self.flying) + bool(batch.chunks) <= self.config.places

    def answer(self, index: int = 0) -> list[Output]:
        batch, sampled = self.flying.pop(index)
        outputs = self.scheduler.update(batch, self.executor.run(batch) if sampled is None else sampled)
        for output in outputs:
            self.outputs.setdefault(output.sequence, []).append(output)
        self.finished += [output.sequence for output in outputs if output.finish_reason]
        return outputs

    def step(self) -> StepBatch:
        batch = self.schedule()
        if batch.chunks:
            self.answer()
        return batch

    def run(self) -> None:
        """To the end, keeping as many batches in flight as may be."""
        while self.scheduler.has_work:
            assert self.steps < 20_000, "no progress"
            while self.scheduler.can_schedule:
                self.schedule()
            assert self.flying, "work, but nothing to do"
            self.answer()

    def tokens(self, sequence: int) -> list[int]:
        return [token for output in self.outputs.get(sequence, []) for token in output.tokens]

    def assert_as_alone(self, sequence: int, prompt: list[int], params: SamplingParams) -> None:
        tokens, reason = alone(prompt, params, self.config.max_positions)
        assert self.tokens(sequence) == tokens
        assert [o.finish_reason for o in self.outputs[sequence]] == [None] * (len(tokens) - 1) + [reason]
        scored = [t for o in self.outputs[sequence] for t in o.prompt_logprobs]
        asked = range(1, len(prompt)) if params.prompt_logprobs is not None else ()
        assert [(t.token, t.logprob) for t in scored] == [(prompt[p], -float(digest(prompt[:p]))) for p in asked]

    def assert_empty(self) -> None:
        stats = self.scheduler.stats
        assert (stats.waiting, stats.running, stats.in_flight, stats.blocks_used) == (0, 0, 0, 0)
        assert not self.scheduler.has_work
        assert not self.scheduler.can_schedule


def config(**changes: int | bool) -> SchedulerConfig:
    return SchedulerConfig(**{"blocks": 32, "block_size": 4, "max_positions": 64, **changes})
