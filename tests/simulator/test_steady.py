"""Skipping rounds leaves what taking them singly leaves."""

from __future__ import annotations

from collections import deque

from hypothesis import given, settings
from hypothesis import strategies as st

from soloist.scheduling.config import SchedulerConfig
from soloist.scheduling.request import Sampled, SamplingParams, StepBatch
from soloist.simulator.steady import TOKEN, SteadyScheduler

Lengths = list[tuple[int, int]]


class Driver:
    """One group's leader: keeps `in_flight` batches under way."""

    def __init__(self, config: SchedulerConfig, lengths: Lengths) -> None:
        self.scheduler = SteadyScheduler(config)
        self.flying: deque[StepBatch] = deque()
        self.lengths = deque(enumerate(lengths))
        self.log: list[object] = []

    def arrive(self) -> None:
        if self.lengths:
            sequence, (prompt, output) = self.lengths.popleft()
            tokens = [*range(prompt // 2), *range(1000 * sequence, 1000 * sequence + prompt - prompt // 2)]
            self.scheduler.add(sequence, tokens, SamplingParams(max_tokens=output))

    def turn(self) -> None:
        if self.flying:
            self.land()
        while len(self.flying) < self.scheduler.config.in_flight:
            batch = self.scheduler.schedule()
            if not batch.chunks:
                break
            self.flying.append(batch)

    def land(self) -> None:
        batch = self.flying.popleft()
        answers = [Sampled(chunk.sequence, TOKEN) for chunk in batch.chunks if chunk.params]
        outputs = self.scheduler.update(batch, answers)
        self.log.append([(output.sequence, output.finish_reason) for output in outputs if output.finish_reason])

    def skip(self, rotations: int) -> None:
        self.flying = deque(self.scheduler.advance(batch, rotations) for batch in self.flying)

    def view(self) -> object:
        flying = [[(c.sequence, c.start, c.tokens, len(c.blocks)) for c in batch.chunks] for batch in self.flying]
        stats = self.scheduler.stats
        return flying, stats, self.scheduler.unfinished(), [entry for entry in self.log if entry]


@settings(max_examples=100, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 30), st.integers(1, 40)), min_size=1, max_size=12),
    gaps=st.lists(st.integers(0, 12), min_size=12, max_size=12),
    blocks=st.integers(20, 60),
    in_flight=st.integers(1, 3),
    prefix_caching=st.booleans(),
    max_sequences=st.integers(1, 5),
)
def test_skipping_equals_stepping(
    lengths: Lengths, gaps: list[int], blocks: int, in_flight: int, prefix_caching: bool, max_sequences: int
) -> None:
    config = SchedulerConfig(
        blocks=blocks, block_size=4, max_batch_tokens=16, max_sequences=max_sequences, max_positions=75,
        prefix_caching=prefix_caching, in_flight=in_flight,
    )  # fmt: skip
    single, skipping = Driver(config, lengths), Driver(config, lengths)
    skipped = 0
    for gap in [*gaps[: len(lengths)], 400]:
        single.arrive()
        skipping.arrive()
        turns = 0
        while turns < gap and skipping.scheduler.has_work:
            before = [[chunk.sequence for chunk in batch.chunks] for batch in skipping.flying]
            rotations = min(skipping.scheduler.steady_rounds(), (gap - turns) // max(1, len(skipping.flying)))
            if rotations > 0:
                skipping.skip(rotations)
                for _ in range(rotations * len(skipping.flying)):
                    single.turn()
                turns += rotations * len(skipping.flying)
                skipped += rotations
                assert [[chunk.sequence for chunk in batch.chunks] for batch in skipping.flying] == before
            else:
                skipping.turn()
                single.turn()
                turns += 1
            assert skipping.view() == single.view()
    assert not single.scheduler.has_work
    assert not skipping.scheduler.has_work


def test_a_lone_sequence_is_skipped_to_its_last_token() -> None:
    config = SchedulerConfig(blocks=100, max_positions=500)
    driver = Driver(config, [(10, 100)])
    driver.arrive()
    driver.turn()
    driver.turn()
    assert driver.scheduler.steady_rounds() == 98  # one token came with the prompt, the last one ends it
    driver.skip(98)
    driver.turn()
    assert driver.log[-1] == [(0, "length")]
