"""The stopwatch, by a clock that the test turns."""

from __future__ import annotations

import pytest

from soloist import timing
from soloist.timing import Stopwatch, measure, median_of_slowest


class HandClock:
    """Time passes when the test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def mark(self) -> float:
        return self.now

    def between(self, start: float, stop: float) -> float:
        return stop - start


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Stopwatch:
    monkeypatch.setattr(timing, "clock_for", lambda device: HandClock())
    return Stopwatch(enabled=True)


def test_phases_add_up_and_inner_ones_stop_outer_ones(watch: Stopwatch) -> None:
    for _ in range(2):
        with watch("layer"):
            watch.clock.now += 1
            with watch("exchange"):
                watch.clock.now += 10
            watch.clock.now += 2
        watch.clock.now += 100
    assert watch.take() == {"layer": 6, "exchange": 20}
    assert watch.take() == {}


def test_a_phase_that_fails_is_closed(watch: Stopwatch) -> None:
    def broken() -> None:
        with watch("layer"):
            watch.clock.now += 1
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        broken()
    watch.clock.now += 5
    with watch("experts"):
        watch.clock.now += 2
    assert watch.take() == {"layer": 1, "experts": 2}


def test_open_spans_are_bounded(watch: Stopwatch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "_MOST_OPEN", 8)
    for _ in range(100):
        with watch("layer"):
            watch.clock.now += 1
        assert len(watch._open) < 8
    assert watch.take() == {"layer": 100}


def test_disabled_records_nothing() -> None:
    watch = Stopwatch()
    with watch("layer"):
        pass
    assert watch.take() == {}


def test_measure_leaves_the_warm_up_out() -> None:
    calls: list[int] = []
    seconds = measure(lambda: calls.append(1), repeats=5, warm_up=2)
    assert len(calls) == 7
    assert len(seconds) == 5
    assert min(seconds) >= 0


def test_median_of_slowest() -> None:
    assert median_of_slowest([[1, 5, 2], [3, 1, 4]]) == 4
