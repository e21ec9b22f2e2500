"""One replica of a deployment: attention groups that step in lockstep through the stages of a pipeline.

    turn:   land the oldest step under way → wake groups with news → schedule → launch, until all stages have work

as the leaders of the engine do. A group is *awake* while its next batch has to be asked for, and *asleep* while it is
known: it has nothing to do, or certainly repeats its batches for some rounds. Sleeping groups cost a few vector
operations for all of them together; waking one takes the rounds that it slept through at once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from soloist.scheduling.config import SchedulerConfig
from soloist.scheduling.request import Output, Sampled, SamplingParams, StepBatch
from soloist.simulator.cost import CostModel, StepTime, StepWork
from soloist.simulator.flight import Flight
from soloist.simulator.steady import TOKEN, SteadyScheduler


class Submission(NamedTuple):
    """A sequence for a group: its prompt and how many tokens it is to get."""

    sequence: int
    prompt: list[int]
    output: int


class Landed(NamedTuple):
    """A step that came back: tokens of each group (int64 [G]), and what awake groups report of their sequences."""

    tokens: np.ndarray
    outputs: list[tuple[int, Output]]  # (group, output)


class Launched(NamedTuple):
    """A step that was started. `work` is valid until the next turn."""

    start_s: float
    end_s: float
    stages_s: list[float]  # when it enters each stage
    time: StepTime
    work: StepWork
    context: int  # tokens that the decodes under way attend to: how full the KV caches are
    running: int  # sequences with blocks
    waiting: int  # sequences without


class Replica:
    """`cost` tells the time of a step. `skip` = False asks every group with work in every step; results are equal."""

    def __init__(self, sizes: SchedulerConfig, groups: int, stages: int, cost: CostModel, skip: bool = True) -> None:
        self.sizes, self.groups, self.cost, self.skip = sizes, groups, cost, skip
        self.schedulers = [SteadyScheduler(sizes) for _ in range(groups)]
        self.flying: deque[Flight] = deque()
        self.stage_free_s = [0.0] * stages
        self.resume_s = 0.0  # nothing runs before
        self.imbalance = 1.0
        self.lost: set[int] = set()
        self._awake: set[int] = set()
        self._inbox: list[tuple[int, Submission]] = []
        self._running, self._waiting = np.zeros(groups, np.int64), np.zeros(groups, np.int64)

    # -- requests ---------------------------------------------------------------------------------------------------
    def submit(self, group: int, submission: Submission) -> None:
        """Hand a sequence to a group, which sees it at its next turn. Raises RequestError where it can never be run."""
        assert group not in self.lost
        self.sizes.check_lengths(len(submission.prompt), submission.output)
        self._inbox.append((group, submission))

    # -- a turn -----------------------------------------------------------------------------------------------------
    def turn(self, now: float) -> tuple[Landed | None, list[Launched]]:
        """Land what is back, launch what can start."""
        assert now >= self.resume_s
        flight = self.flying.popleft() if self.flying and self.flying[0].end_s <= now else None
        self._read_inbox(flight)
        landed = self._land(flight) if flight else None
        launched: list[Launched] = []
        while len(self.flying) < self.sizes.in_flight:
            flight = self._schedule(flight or Flight(self.groups))
            if not flight:
                break
            launched.append(self._launch(flight, now))
            flight = None
        return landed, launched

    @property
    def next_turn_s(self) -> float | None:
        """When the oldest step under way is back, or work that waits can start; None: there is no work."""
        if self.flying:
            return self.flying[0].end_s
        return self.resume_s if self._inbox or self._awake else None

    def _read_inbox(self, landing: Flight | None) -> None:
        """Wake the groups to which something happens: an arrival, or their batch comes back for the last time."""
        for group, (sequence, prompt, output) in self._inbox:
            self._wake(group, landing)
            self.schedulers[group].add(sequence, prompt, SamplingParams(max_tokens=output))
        self._inbox.clear()
        if landing:
            for group in np.flatnonzero((landing.decodes > 0) & (landing.rounds <= 0)).tolist():
                self._wake(group, landing)

    def _wake(self, group: int, landing: Flight | None = None) -> None:
        """Let a group's scheduler catch up with what its batches have done meanwhile."""
        if group in self._awake:
            return
        self._awake.add(group)
        for flight in (landing, *self.flying):
            if flight and (batch := flight.batches.get(group)):
                rounds = flight.rounds_since(group)
                flight.batches[group] = self.schedulers[group].advance(batch, rounds)

    def _land(self, flight: Flight) -> Landed:
        """Answer the batches of awake groups, which leave the flight; those of sleeping groups go on in it."""
        tokens = flight.decodes.copy()
        outputs: list[tuple[int, Output]] = []
        for group in self._awake:
            batch = flight.batches.get(group)
            flight.clear(group)
            found = self.schedulers[group].update(batch, _answers(batch)) if batch else []
            tokens[group] = len(found)
            outputs += [(group, output) for output in found]
        flight.repeat()
        return Landed(tokens, outputs)

    def _schedule(self, flight: Flight) -> Flight:
        """Fill a flight with the next batches of awake groups; let those sleep whose future is known."""
        for group in list(self._awake):
            scheduler = self.schedulers[group]
            if scheduler.can_schedule and (batch := scheduler.schedule()).chunks:
                flight.put(group, batch)
            stats = scheduler.stats
            self._running[group], self._waiting[group] = stats.running, stats.waiting
            self._fall_asleep(group, flight)
        return flight

    def _fall_asleep(self, group: int, launching: Flight) -> None:
        scheduler = self.schedulers[group]
        if not scheduler.has_work:
            self._awake.discard(group)
        elif self.skip and (rounds := scheduler.steady_rounds()):
            self._awake.discard(group)
            for flight in (launching, *self.flying):
                flight.rounds[group] = rounds

    def _launch(self, flight: Flight, now: float) -> Launched:
        """Send a flight through the stages, each of which may still be busy with the one before."""
        work = flight.work(self.groups - len(self.lost), self.imbalance)
        time = self.cost.step(work)
        entered: list[float] = []
        at = now
        for stage, free_s in enumerate(self.stage_free_s):
            entered.append(max(at, free_s))
            at = self.stage_free_s[stage] = entered[-1] + time.stage_s
        flight.start_s, flight.end_s = now, at + time.once_s
        self.flying.append(flight)
        context = sum(int(other.decode_context.sum()) for other in self.flying)
        running, waiting = int(self._running.sum()), int(self._waiting.sum())
        return Launched(now, flight.end_s, entered, time, work, context, running, waiting)

    # -- losses -----------------------------------------------------------------------------------------------------
    def lose(self, groups: Iterable[int], now: float, recovery_s: float) -> dict[int, int]:
        """Groups are gone for good; the others do the steps under way again after `recovery_s`.

        Returns the sequences to be resubmitted, each with the number of tokens that it had got.
        """
        orphans: dict[int, int] = {}
        for group in groups:
            self._wake(group)
            orphans |= self._empty(group)
            self.lost.add(group)
        self._delay(now, recovery_s)
        return orphans

    def restart(self, now: float, recovery_s: float) -> dict[int, int]:
        """All groups start anew after `recovery_s`. Returns the sequences to be resubmitted, as `lose` does."""
        orphans: dict[int, int] = {}
        for group in range(self.groups):
            self._wake(group)
            orphans |= self._empty(group)
        self.flying.clear()
        self._delay(now, recovery_s)
        return orphans

    def pause(self, now: float, stall_s: float) -> None:
        """Every stage is busy with something else for a while, before its next step."""
        self.stage_free_s = [max(now, free_s) + stall_s for free_s in self.stage_free_s]

    def _empty(self, group: int) -> dict[int, int]:
        orphans = self.schedulers[group].unfinished()
        orphans |= {submission.sequence: 0 for target, submission in self._inbox if target == group}
        self._inbox = [entry for entry in self._inbox if entry[0] != group]
        self.schedulers[group] = SteadyScheduler(self.sizes)
        self._awake.discard(group)
        self._running[group] = self._waiting[group] = 0
        for flight in self.flying:
            flight.clear(group)
        return orphans

    def _delay(self, now: float, recovery_s: float) -> None:
        """Nothing moves until the world is whole again; what was under way begins anew."""
        self.resume_s = max(self.resume_s, now + recovery_s)
        shift = self.resume_s - self.flying[0].start_s if self.flying else 0.0
        for flight in self.flying:
            flight.start_s += shift
            flight.end_s += shift
        self.stage_free_s = [max(self.resume_s, free_s + shift) for free_s in self.stage_free_s]


def _answers(batch: StepBatch) -> list[Sampled]:
    return [Sampled(chunk.sequence, TOKEN) for chunk in batch.chunks if chunk.params]
