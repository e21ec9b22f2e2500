"""Virtual time: what happens next, and when."""

from __future__ import annotations

import heapq
from collections.abc import Callable

Event = Callable[[], None]


class Clock:
    """Events in order of time; those of one moment by rank, then in the order in which they were set."""

    def __init__(self) -> None:
        self.now = 0.0
        self._events: list[tuple[float, int, int, Event]] = []
        self._count = 0

    def at(self, time_s: float, event: Event, rank: int = 0) -> None:
        """Let `event` happen at `time_s`, at once if that is past."""
        self._count += 1
        heapq.heappush(self._events, (max(time_s, self.now), rank, self._count, event))

    def run(self) -> None:
        """Until nothing more is to happen."""
        while self._events:
            self.now, _, _, event = heapq.heappop(self._events)
            event()
