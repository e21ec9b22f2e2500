"""Drawn requests have the rates, lengths and patterns that their load states."""

from __future__ import annotations

import numpy as np
import pytest

from soloist.errors import ConfigurationError
from soloist.simulator.arrivals import BURSTINESS, LengthLaw, arrivals
from soloist.specs.workload import Load


@pytest.mark.parametrize(("arrival", "variation"), [("poisson", 1.0), ("uniform", 0.0), ("bursts", BURSTINESS)])
def test_gaps_have_their_mean_and_variation(arrival: str, variation: float) -> None:
    gaps = np.diff(arrivals(Load.parse(f"rate=20,arrival={arrival}"), 40_000).times_s)
    assert gaps.mean() == pytest.approx(1 / 20, rel=0.05)
    assert gaps.std() / gaps.mean() == pytest.approx(variation, rel=0.05, abs=1e-9)


@pytest.mark.parametrize("law", ["lognormal", "uniform"])
def test_lengths_have_their_mean_and_spread(law: LengthLaw) -> None:
    drawn = arrivals(Load(prompt=1000, output=200, rate=1, spread=0.4), 20_000, law=law)
    for lengths, mean in ((drawn.prompts, 1000), (drawn.outputs, 200)):
        assert lengths.mean() == pytest.approx(mean, rel=0.02)
        assert lengths.std() == pytest.approx(0.4 * mean, rel=0.05)
        assert lengths.min() >= 1


def test_without_spread_lengths_are_fixed() -> None:
    drawn = arrivals(Load(prompt=10, output=3, rate=1, prefix=0.5), 5)
    assert (drawn.prompts.tolist(), drawn.outputs.tolist(), drawn.shared.tolist()) == ([10] * 5, [3] * 5, [5] * 5)
    assert drawn.longest == 13


def test_seeds() -> None:
    one, same, other = (arrivals(Load(rate=1, spread=1), 50, seed) for seed in (1, 1, 2))
    assert np.array_equal(one.times_s, same.times_s)
    assert np.array_equal(one.prompts, same.prompts)
    assert not np.array_equal(one.times_s, other.times_s)


@pytest.mark.parametrize(
    ("load", "requests", "law", "names"),
    [
        (Load(), 5, "lognormal", "rate"),
        (Load(rate=1), 0, "lognormal", "requests = 0"),
        (Load(rate=1, spread=0.6), 5, "uniform", "spread"),
    ],
)
def test_nonsense_is_named(load: Load, requests: int, law: LengthLaw, names: str) -> None:
    with pytest.raises(ConfigurationError, match=names):
        arrivals(load, requests, law=law)
