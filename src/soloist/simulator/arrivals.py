"""Requests of a load: when they come and how long they are. The same seed gives the same requests.

Open loop: gaps between arrivals are exponential (Poisson), equal (uniform), or gamma distributed with a coefficient of
variation of `BURSTINESS` (bursts). Closed loop: no times, the next request comes when one ends.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np

from soloist.errors import ConfigurationError
from soloist.specs.workload import Load

BURSTINESS = 3.0  # standard deviation of the gaps of bursts over their mean

LengthLaw = Literal["lognormal", "uniform"]


class Arrivals(NamedTuple):
    """Requests in order of arrival. `in_flight` > 0: closed loop, `times_s` are all 0."""

    times_s: np.ndarray  # float64
    prompts: np.ndarray  # int64, tokens
    outputs: np.ndarray  # int64, tokens; 0: nothing is wanted but the prompt
    shared: np.ndarray  # int64, leading tokens of the prompt that all requests have in common
    in_flight: int = 0

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def longest(self) -> int:
        """Tokens of the longest request at its end."""
        return int((self.prompts + self.outputs).max())


def arrivals(load: Load, requests: int, seed: int = 0, law: LengthLaw = "lognormal") -> Arrivals:
    """`requests` requests of a load. Raises ConfigurationError where it states neither rate nor sequences."""
    if requests < 1:
        raise ConfigurationError.of("requests", requests, "must be at least 1")
    if not load.rate and not load.sequences:
        raise ConfigurationError.of("load.rate", load.rate, "a simulation needs rate=… or sequences=…")
    random = np.random.default_rng(seed)
    times_s = np.cumsum(gaps(load, requests, random)) if load.rate else np.zeros(requests)
    prompts = lengths(load.prompt, load.spread, requests, random, law)
    outputs = lengths(load.output, load.spread, requests, random, law)
    return Arrivals(times_s, prompts, outputs, (load.prefix * prompts).astype(np.int64), load.sequences)


def gaps(load: Load, count: int, random: np.random.Generator) -> np.ndarray:
    """`[count]` seconds from each arrival to the next, of mean 1/rate."""
    mean = 1.0 / load.rate
    if load.arrival == "uniform":
        return np.full(count, mean)
    if load.arrival == "poisson":
        return random.exponential(mean, count)
    shape = BURSTINESS**-2
    return random.gamma(shape, mean / shape, count)


def lengths(mean: int, spread: float, count: int, random: np.random.Generator, law: LengthLaw) -> np.ndarray:
    """`[count]` lengths of a mean and of a standard deviation of `spread` times the mean, at least 1 if the mean is."""
    if not spread or not mean:
        return np.full(count, mean, np.int64)
    if law == "uniform":
        half = spread * 3**0.5
        if half > 1:
            raise ConfigurationError.of("load.spread", spread, "uniform lengths reach 0 at 0.57; use lognormal ones")
        drawn = mean * random.uniform(1 - half, 1 + half, count)
    else:
        variance = np.log1p(spread**2)
        drawn = mean * random.lognormal(-variance / 2, variance**0.5, count)
    return np.maximum(1, np.rint(drawn)).astype(np.int64)
