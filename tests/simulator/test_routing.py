"""Popularity keeps its law while it drifts; balancing helps, and is paid for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from soloist.errors import ConfigurationError
from soloist.placement.balance import balance
from soloist.placement.placement import Placement
from soloist.simulator.routing import Drift, Routing

EXPERTS, GROUPS = 64, 8


def make(**drift: Any) -> Routing:
    layer = tuple(tuple(range(8 * g, 8 * g + 8)) for g in range(GROUPS))
    placement = Placement(experts=EXPERTS, slots=(layer,) * 12)
    return Routing(Drift(**drift), placement, lambda current, load_LE: balance(current, load_LE).placement, seed=3)


def test_without_skew_all_groups_are_equal() -> None:
    routing = make(skew=0.0, drift_s=1.0)
    assert routing.advance(5.0) == 0.0
    assert routing.imbalance == pytest.approx(1.0)


def test_without_drift_nothing_changes() -> None:
    routing = make(skew=1.0)
    routing.advance(0.0)
    before, imbalance = routing.popularity_LE, routing.imbalance
    routing.advance(100.0)
    assert np.array_equal(routing.popularity_LE, before)
    assert routing.imbalance == imbalance > 1.2


def test_drift_forgets_who_is_popular_but_not_how_popular_they_are() -> None:
    """The correlation of z after t is exp(−t / drift_s); the sorted shares keep their distribution."""
    routing = make(skew=1.0, drift_s=10.0, layers=200)
    then = routing.popularity_LE
    routing.advance(10.0)
    now = routing.popularity_LE
    ranks = [share_LE.argsort(axis=1).argsort(axis=1).ravel() for share_LE in (then, now)]
    assert np.corrcoef(*ranks)[0, 1] == pytest.approx(np.exp(-1), abs=0.05)
    assert np.sort(now, axis=1).mean(axis=0)[-1] == pytest.approx(np.sort(then, axis=1).mean(axis=0)[-1], rel=0.1)


def test_balancing_helps_and_is_paid_for_by_what_the_busiest_group_fetches() -> None:
    left, balanced = make(skew=1.0), make(skew=1.0, rebalance_s=5.0, move_s=0.5)
    for now in range(5):
        assert balanced.advance(float(now)) == left.advance(float(now)) == 0.0
    before = balanced.placement
    stall_s = balanced.advance(5.0)
    left.advance(5.0)
    assert balanced.rebalancings == 1
    assert balanced.imbalance < 0.9 * left.imbalance
    fetched = [
        sum(len(set(new[g]) - set(old[g])) for new, old in zip(balanced.placement.slots, before.slots, strict=True))
        for g in range(GROUPS)
    ]
    assert stall_s == pytest.approx(0.5 * max(fetched) * 12 / 4)


def test_the_same_seed_gives_the_same_drift() -> None:
    one, other = make(skew=1.0, drift_s=2.0), make(skew=1.0, drift_s=2.0)
    for routing in (one, other):
        routing.advance(1.0)
    assert np.array_equal(one.popularity_LE, other.popularity_LE)


@pytest.mark.parametrize(("key", "value"), [("skew", -1), ("drift_s", 0), ("rebalance_s", float("nan")), ("layers", 0)])
def test_nonsense_is_named(key: str, value: float) -> None:
    with pytest.raises(ConfigurationError, match=f"drift.{key}"):
        Drift(**{"skew": 1.0, key: value})
