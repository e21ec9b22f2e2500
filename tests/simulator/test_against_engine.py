"""The simulator against the engine's leaders, written down plainly: real schedulers, asked in every step."""

from __future__ import annotations

from collections import deque

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from soloist.scheduling.config import SchedulerConfig
from soloist.scheduling.request import Sampled, SamplingParams, StepBatch
from soloist.scheduling.scheduler import Scheduler
from soloist.simulator.cost import StepWork
from soloist.simulator.simulation import Simulation
from soloist.specs.layout import Layout
from tests.simulator.cases import Linear, requests

Rows = list[tuple[float, int, int]]


def run_plainly(config: SchedulerConfig, groups: int, stages: int, rows: Rows) -> tuple[list[float], list[float]]:
    """Times of first and last tokens under the loop of `engine/leader.py`, all groups of one replica in lockstep."""
    schedulers = [Scheduler(config) for _ in range(groups)]
    left = np.zeros(groups)  # the front end's account
    coming = deque(enumerate(rows))
    flying: deque[tuple[float, list[StepBatch]]] = deque()
    free_s, now = [0.0] * stages, 0.0
    first, last = [np.nan] * len(rows), [np.nan] * len(rows)
    cost = Linear()

    def read_inbox() -> None:
        while coming and coming[0][1][0] <= now:
            sequence, (_, prompt, output) = coming.popleft()
            group = int(left.argmin())
            left[group] += prompt + output
            schedulers[group].add(sequence, [0] * prompt, SamplingParams(max_tokens=output))

    def land() -> None:
        nonlocal now
        while coming and coming[0][1][0] < flying[0][0]:  # the front end accepts while the step is under way
            now = coming[0][1][0]
            read_inbox()
        now, batches = flying.popleft()
        read_inbox()
        for group, batch in enumerate(batches):
            answers = [Sampled(chunk.sequence, 0) for chunk in batch.chunks if chunk.params]
            for output in schedulers[group].update(batch, answers) if batch.chunks else []:
                left[group] -= 1
                if np.isnan(first[output.sequence]):
                    first[output.sequence] = now
                if output.finish_reason:
                    last[output.sequence] = now
                    left[group] -= rows[output.sequence][1]

    while coming or flying or any(scheduler.has_work for scheduler in schedulers):
        read_inbox()
        batches = [scheduler.schedule() for scheduler in schedulers]
        if any(batch.chunks for batch in batches):
            time = cost.step(work_of(batches))
            at = now
            for stage in range(stages):
                at = free_s[stage] = max(at, free_s[stage]) + time.stage_s
            flying.append((at + time.once_s, batches))
            if len(flying) == config.in_flight:
                land()
        elif flying:
            land()
        else:
            now = coming[0][1][0]
    return first, last


def work_of(batches: list[StepBatch]) -> StepWork:
    short = [[c for c in batch.chunks if len(c.tokens) == 1] for batch in batches]
    long = [[c for c in batch.chunks if len(c.tokens) > 1] for batch in batches]
    seen = [sum(p + 1 for c in chunks for p in range(c.start, c.stop)) for chunks in long]
    columns = ([len(c) for c in short], [sum(x.stop for x in c) for c in short],
               [sum(len(x.tokens) for x in c) for c in long], seen)  # fmt: skip
    return StepWork(*(np.array(column) for column in columns), alive=len(batches))


@settings(max_examples=60, deadline=None)
@given(
    layout=st.sampled_from(["ep1", "ep3", "pp2ep2", "pp3", "attn2ep4"]),
    rows=st.lists(st.tuples(st.floats(0, 3), st.integers(1, 40), st.integers(1, 50)), min_size=1, max_size=20),
    blocks=st.integers(30, 80),
    max_batch_tokens=st.integers(8, 64),
)
def test_the_same_times_to_the_last_bit(layout: str, rows: Rows, blocks: int, max_batch_tokens: int) -> None:
    rows, parsed = sorted(rows), Layout.parse(layout)
    config = SchedulerConfig(
        blocks=blocks, block_size=4, max_batch_tokens=max_batch_tokens, max_sequences=6, max_positions=100,
        prefix_caching=False, in_flight=parsed.pp,
    )  # fmt: skip
    ledger = Simulation(parsed, config, Linear(), requests(*rows)).run().ledger
    first, last = run_plainly(config, parsed.attention_groups, parsed.pp, rows)
    assert ledger.first_s.tolist() == first
    assert ledger.finish_s.tolist() == last
