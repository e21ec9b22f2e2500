"""Where time goes: phases of a running program, and medians of repeated calls.

Nothing here waits for a GPU while the program runs: phases are marked by events and resolved when somebody asks.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from statistics import median
from typing import Any, Protocol

import torch

_NOTHING = nullcontext()
_MOST_OPEN = 4096  # spans kept before the older half is resolved


class Clock(Protocol):
    """Marks points in time and tells the seconds between two of them."""

    def mark(self) -> Any: ...

    def between(self, start: Any, stop: Any) -> float: ...


class HostClock:
    """The host's own clock."""

    def mark(self) -> float:
        return time.perf_counter()

    def between(self, start: float, stop: float) -> float:
        return stop - start


class CudaClock:
    """Events on the current stream; asking for the time between two waits for the later one."""

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, start: torch.cuda.Event, stop: torch.cuda.Event) -> float:
        stop.synchronize()
        return start.elapsed_time(stop) / 1e3


def clock_for(device: torch.device | None) -> Clock:
    return CudaClock() if device is not None and device.type == "cuda" else HostClock()


class Stopwatch:
    """Seconds spent in named phases: `with watch("experts"): …`. Nearly free while disabled.

    A phase inside another one stops the outer one meanwhile, so the phases add up to the time inside any of them.
    """

    def __init__(self, device: torch.device | None = None, enabled: bool = False) -> None:
        self.clock, self.enabled = clock_for(device), enabled
        self._running: list[str] = []
        self._last: Any = None
        self._reset()

    def _reset(self) -> None:
        self._open: list[tuple[str, Any, Any]] = []
        self._seconds: defaultdict[str, float] = defaultdict(float)

    def __call__(self, phase: str) -> AbstractContextManager[None]:
        return self._phase(phase) if self.enabled else _NOTHING

    @contextmanager
    def _phase(self, phase: str) -> Iterator[None]:
        self._mark()
        self._running.append(phase)
        try:
            yield
        finally:
            self._mark()
            self._running.pop()

    def _mark(self) -> None:
        """End the span of the innermost phase and begin the next one."""
        now = self.clock.mark()
        if self._running:
            self._open.append((self._running[-1], self._last, now))
        self._last = now
        if len(self._open) >= _MOST_OPEN:
            self._resolve(_MOST_OPEN // 2)

    def _resolve(self, spans: int) -> None:
        for phase, start, stop in self._open[:spans]:
            self._seconds[phase] += self.clock.between(start, stop)
        del self._open[:spans]

    def take(self) -> dict[str, float]:
        """Seconds of each phase since the last call. On a GPU this waits for the last phase to end."""
        self._resolve(len(self._open))
        seconds = dict(self._seconds)
        self._reset()
        return seconds


def measure(
    run: Callable[[], object], repeats: int = 20, warm_up: int = 3, device: torch.device | None = None
) -> list[float]:
    """Seconds of each of `repeats` calls, after `warm_up` calls that do not count."""
    clock = clock_for(device)
    for _ in range(warm_up):
        run()
    marks = [clock.mark()]
    for _ in range(repeats):
        run()
        marks.append(clock.mark())
    return [clock.between(start, stop) for start, stop in zip(marks[:-1], marks[1:], strict=True)]


def median_of_slowest(seconds: Sequence[Sequence[float]]) -> float:
    """From each rank's `measure`: the median over repeats of the slowest rank."""
    return median(max(repeat) for repeat in zip(*seconds, strict=True))
