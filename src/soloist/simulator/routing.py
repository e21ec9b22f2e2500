"""Which experts are hot, how that changes, and what rebalancing does about it.

The popularity of each expert follows the planner's power law (`planner/routing.py`) at every moment. Who is popular
drifts: each expert has a normal variable z with autocorrelation exp(−t / drift_s) (an Ornstein-Uhlenbeck process), and
the law's quantile at Φ(z) is its popularity. Steps wait for the fullest expert group.

Shape legend: L layers that are simulated, E experts, G expert groups.
"""

from __future__ import annotations

from collections.abc import Callable
from math import exp, inf

import numpy as np
from scipy.special import ndtr

from soloist.errors import ConfigurationError
from soloist.placement.balance import imbalance
from soloist.placement.placement import Placement
from soloist.specs.model import Spec

TOKENS = 4096  # for which the power law is drawn; it depends on them only weakly
Balance = Callable[[Placement, np.ndarray], Placement]


class Drift(Spec, frozen=True, kw_only=True):
    """Skew of the routing and its change. Times in seconds; `inf`: never."""

    skew: float  # exponent of the power law
    drift_s: float = inf  # after which popularity is mostly forgotten
    rebalance_s: float = inf  # between rebalancings
    move_s: float = 0.0  # that everybody waits for each expert that the busiest group fetches
    interval_s: float = 1.0  # between looks at the routing
    layers: int = 4  # that stand for all layers

    def __post_init__(self) -> None:
        for key in ("skew", "move_s"):
            if not 0 <= getattr(self, key) < inf:
                raise ConfigurationError.of(f"drift.{key}", getattr(self, key), "must be a number, 0 or more")
        for key in ("drift_s", "rebalance_s", "interval_s", "layers"):
            if not getattr(self, key) > 0:
                raise ConfigurationError.of(f"drift.{key}", getattr(self, key), "must be positive")


class Routing:
    """The popularity of experts over time, and the placement that it meets.

    `balance` makes a new placement of the one there is and of observed loads (float64 [L, E]), such as
    `placement/balance.py` does in the runtime.
    """

    def __init__(self, drift: Drift, placement: Placement, balance: Balance, seed: int = 0) -> None:
        self.drift, self.balance = drift, balance
        self.interval_s = drift.interval_s
        self.imbalance, self.rebalancings = 1.0, 0
        whole, layers = placement.slots, range(drift.layers)
        self.placement = Placement(experts=placement.experts, slots=tuple(whole[i % len(whole)] for i in layers))
        self._scale = len(whole) / drift.layers
        self._random = np.random.default_rng(seed)
        self._z_LE = self._random.standard_normal((drift.layers, placement.experts))
        self._seen_LE = np.zeros_like(self._z_LE)
        self._now_s, self._balanced_s = 0.0, 0.0

    @property
    def popularity_LE(self) -> np.ndarray:
        """Share of its layer's rows that each expert gets."""
        most, power = 0.8 * TOKENS, 1.0 - self.drift.skew
        u_LE = ndtr(self._z_LE)
        drawn_LE = most**u_LE if abs(power) < 1e-6 else ((most**power - 1.0) * u_LE + 1.0) ** (1.0 / power)
        if not self.drift.skew:
            drawn_LE = np.ones_like(u_LE)
        return drawn_LE / drawn_LE.sum(axis=1, keepdims=True)

    def advance(self, now: float) -> float:
        """Move on to `now`. Returns the seconds that everybody has to wait for experts to be moved."""
        self._wander(now - self._now_s)
        self._now_s = now
        self._seen_LE += self.popularity_LE
        stall_s = 0.0
        if now - self._balanced_s >= self.drift.rebalance_s:
            stall_s = self._rebalance()
            self._balanced_s = now
        self.imbalance = imbalance(self.placement, self.popularity_LE)
        return stall_s

    def _wander(self, elapsed_s: float) -> None:
        kept = exp(-elapsed_s / self.drift.drift_s)
        noise_LE = self._random.standard_normal(self._z_LE.shape)
        self._z_LE = kept * self._z_LE + (1 - kept**2) ** 0.5 * noise_LE

    def _rebalance(self) -> float:
        """A new placement for what was seen since the last one."""
        before, self.placement = self.placement, self.balance(self.placement, self._seen_LE)
        self._seen_LE = np.zeros_like(self._z_LE)
        self.rebalancings += 1
        moved_G = np.zeros(before.groups)
        for old, new in zip(before.slots, self.placement.slots, strict=True):
            moved_G += [len(set(wanted) - set(held)) for wanted, held in zip(new, old, strict=True)]
        return float(moved_G.max()) * self._scale * self.drift.move_s
