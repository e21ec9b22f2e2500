"""Ranks that somebody else started hear of each other while nothing is under way.

Inside a step the transports notice a lost peer. But a rank that sleeps waits for a message, and would wait for ever for
a front end whose node has vanished. So every rank counts up a number in the store now and then, from a thread that does
not depend on steps; rank 0 watches the numbers and writes down who is lost, which the others read.

Silence is counted in one's own beats: who was stopped himself, or had no core, did not hear whether others spoke.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

BEATS = 6  # within a deadline: whoever is silent for more of them is lost
GRACE_S = 2.0  # for a step under way to end with its own error, which says more
LOST = "lost rank"
LAST_BEAT_S = 5.0  # for the last word to the store
LOOK_S = 0.02  # between looks of rank 0 at who has ended


class Pulse:
    """This rank's beat, and its ear. `store` is a TCPStore, or a part of one.

    `on_loss` is called once at most, in a thread, with the lost rank and why.
    """

    def __init__(
        self, store: Any, rank: int, size: int, deadline_s: float, on_loss: Callable[[int, str], None]
    ) -> None:
        self._store = store.clone()  # a connection of its own: others may block on the first
        self._rank, self._size, self._deadline_s, self._on_loss = rank, size, deadline_s, on_loss
        self._stop, self._losing = threading.Event(), threading.Lock()
        self._unanswered = 0  # beats since the store last answered
        self._seen: dict[int, tuple[int, int]] = {}  # count, and looks since it last changed
        self._beating = threading.Thread(target=self._beat, name="pulse", daemon=True)
        self._beating.start()
        threading.Thread(target=self._watch, name="pulse watch", daemon=True).start()

    def close(self, patience_s: float = 0.0) -> None:
        """Say that this rank ends in order. Rank 0 keeps the store: it waits so long for the others to say it, too."""
        lost = self._stop.is_set()
        self._stop.set()
        self._beating.join(LAST_BEAT_S)  # a thread inside the store while the interpreter ends would abort the process
        others = [] if lost or self._rank else [_ended(rank) for rank in range(1, self._size)]
        end = time.monotonic() + patience_s
        while others and time.monotonic() < end and not all(map(self._is_set, others)):
            time.sleep(LOOK_S)

    def tell(self, rank: int, reason: str) -> None:
        """Rank 0 has found that a rank is lost, and lets all others know. The first one found counts as the cause."""
        if not self._stop.is_set():
            with suppress(RuntimeError):  # without a store the others notice by themselves
                self._store.set(LOST, f"{rank} {reason}")
            self._lose(rank, reason)

    def _beat(self) -> None:
        """Calls of the store may never return when its host has vanished, hence the second thread."""
        own = f"pulse {self._rank}"
        try:
            while not self._stop.wait(self._deadline_s / BEATS):
                self._store.add(own, 1)
                if self._rank == 0:
                    self._look()
                elif self._store.check([LOST]):
                    rank, reason = self._store.get(LOST).decode().split(" ", 1)
                    self._lose(int(rank), reason)
                self._unanswered = 0
            self._store.set(_ended(self._rank), "")
        except RuntimeError:  # the store is gone: the watcher says so when the deadline has passed
            return

    def _look(self) -> None:
        for rank in range(1, self._size):
            count = self._store.add(f"pulse {rank}", 0)
            before, silent = self._seen.get(rank, (count, 0))
            self._seen[rank] = (count, silent + 1 if count == before else 0)
            if silent >= BEATS and count == before and not self._is_set(_ended(rank)):
                reason = f"has not been heard of for {self._deadline_s:g} s"
                self.tell(rank, reason)
                return

    def _is_set(self, key: str) -> bool:
        try:
            return self._store.check([key])
        except RuntimeError:
            return False

    def _watch(self) -> None:
        while not self._stop.wait(self._deadline_s / BEATS):
            self._unanswered += 1
            if self._unanswered > BEATS:
                self._lose(0, f"its store has not answered for {self._deadline_s:g} s")

    def _lose(self, rank: int, reason: str) -> None:
        with self._losing:  # both threads, and whoever calls `tell`, may come to it together
            if self._stop.is_set():
                return
            self._stop.set()
        self._on_loss(rank, reason)


def _ended(rank: int) -> str:
    return f"ended {rank}"


def end_process(own: int) -> Callable[[int, str], None]:
    """What a rank does that only serves: its main thread may wait for a message that never comes."""

    def end(rank: int, reason: str) -> None:
        time.sleep(GRACE_S)
        print(f"rank {own}: rank {rank}: {reason}", file=sys.stderr, flush=True)
        os._exit(1)

    return end
