"""What became of every request, and what every step did."""

from __future__ import annotations

from array import array
from typing import NamedTuple

import numpy as np

from soloist.simulator.arrivals import Arrivals
from soloist.simulator.replica import Launched


class Ledger:
    """Times of each request on the virtual clock, in seconds; NaN: not yet."""

    def __init__(self, requests: Arrivals) -> None:
        count = len(requests)
        self.requests = requests
        self.arrival_s = np.full(count, np.nan)
        self.first_s = np.full(count, np.nan)  # when the first token came
        self.finish_s = np.full(count, np.nan)  # when the last token came
        self.done = np.zeros(count, np.int64)  # tokens that it had when it was submitted last
        self.submissions = np.zeros(count, np.int64)
        self.refused: dict[int, str] = {}  # requests that no group could ever run, and why

    @property
    def finished(self) -> np.ndarray:
        """Which requests have got all their tokens, bool."""
        return ~np.isnan(self.finish_s)

    @property
    def ttft_s(self) -> np.ndarray:
        """From arrival to the first token, or the end of a prompt that asks for none, of the finished requests."""
        return (self.first_s - self.arrival_s)[self.finished]

    @property
    def tpot_s(self) -> np.ndarray:
        """Mean time between output tokens after the first, of finished requests with more than one."""
        several = self.finished & (self.requests.outputs > 1)
        return ((self.finish_s - self.first_s)[several]) / (self.requests.outputs[several] - 1)

    @property
    def latency_s(self) -> np.ndarray:
        """From arrival to the last token, of the finished requests."""
        return (self.finish_s - self.arrival_s)[self.finished]


class StepRow(NamedTuple):
    """One step of one replica. Times in seconds."""

    replica: float
    start_s: float
    end_s: float
    stage_s: float  # that it keeps each stage
    links_s: float  # of which rows travel
    decodes: float  # tokens
    prefills: float  # tokens
    peak: float  # tokens of the group with the most
    context: float
    running: float
    waiting: float
    imbalance: float


class StepLog:
    """Every step of every replica, as rows of numbers."""

    def __init__(self) -> None:
        self._values = array("d")

    def __len__(self) -> int:
        return len(self._values) // len(StepRow._fields)

    def add(self, replica: int, step: Launched) -> None:
        work = step.work
        self._values.extend(
            StepRow(
                replica, step.start_s, step.end_s, step.time.stage_s, step.time.links_s, work.decodes.sum(),
                work.prefills.sum(), work.tokens.max(), step.context, step.running, step.waiting, work.imbalance,
            )
        )  # fmt: skip

    @property
    def rows(self) -> np.ndarray:
        """`[steps, len(StepRow._fields)]`, float64."""
        return np.array(self._values).reshape(-1, len(StepRow._fields))

    def __getitem__(self, name: str) -> np.ndarray:
        """One column."""
        return self.rows[:, StepRow._fields.index(name)]
