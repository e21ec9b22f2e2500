"""What the simulator asks of a cost model: the time of one step of one replica, for what its groups have to do."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np

LINKS = ("dispatch", "combine", "attention exchange", "expert exchange", "pipeline hops")  # parts spent on links


class StepWork(NamedTuple):
    """A step of all attention groups of a replica. Arrays are int64, one entry a group."""

    decodes: np.ndarray  # sequences that compute one token
    decode_context: np.ndarray  # tokens that these attend to, summed over the sequences
    prefills: np.ndarray  # tokens of longer chunks
    prefill_context: np.ndarray  # tokens that each of these attends to, summed over the tokens
    alive: int  # groups that have not been lost
    imbalance: float = 1.0  # rows of the fullest expert group over the mean

    @property
    def tokens(self) -> np.ndarray:
        return self.decodes + self.prefills


class StepTime(NamedTuple):
    """How long a step keeps each pipeline stage, what it takes once at its end, and both by part, in seconds.

    A step leaves the pipeline after `stages · stage_s + once_s`, unless it has to wait for the one before it.
    """

    stage_s: float
    once_s: float
    parts: dict[str, float]  # of one stage, and of what comes once; they add up to stage_s + once_s

    @property
    def links_s(self) -> float:
        """Of one stage: time in which rows travel and nothing hides it."""
        return sum(self.parts.get(name, 0.0) for name in LINKS)


class CostModel(Protocol):
    """Predicts steps of one deployment."""

    def step(self, work: StepWork) -> StepTime:
        """The time of a step in which at least one group has a token."""
        ...
