"""Ranks notice each other's end while nothing is under way."""

from __future__ import annotations

import threading
import time
from datetime import timedelta

from torch.distributed import PrefixStore, TCPStore

from soloist.engine.pulse import Pulse

DEADLINE_S = 2.0


def store() -> PrefixStore:
    return PrefixStore("0", TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=60), wait_for_workers=False))


def pulses(shared: PrefixStore, ranks: list[int], size: int) -> tuple[list[Pulse], dict[int, tuple[int, str]]]:
    """And what each of them heard of a loss."""
    heard: dict[int, tuple[int, str]] = {}

    def ear(own: int):
        return lambda rank, reason: heard.__setitem__(own, (rank, reason))

    return [Pulse(shared, rank, size, DEADLINE_S, ear(rank)) for rank in ranks], heard


def wait_until(done, seconds: float = 100.0) -> None:
    end = time.monotonic() + seconds
    while not done() and time.monotonic() < end:
        time.sleep(0.02)


def test_nobody_is_missed_who_lives_or_ends_in_order():
    shared = store()
    found, heard = pulses(shared, [0, 1, 2], 3)
    time.sleep(DEADLINE_S / 2)
    found[1].close()
    time.sleep(2 * DEADLINE_S)
    assert heard == {}
    found[2].close()
    start = time.monotonic()
    found[0].close(patience_s=100)
    assert time.monotonic() - start < 50


def test_all_hear_who_is_lost():
    shared = store()
    start = time.monotonic()
    found, heard = pulses(shared, [0, 2], 3)
    wait_until(lambda: len(heard) == 2)
    assert heard == dict.fromkeys((0, 2), (1, f"has not been heard of for {DEADLINE_S:g} s"))
    assert DEADLINE_S < time.monotonic() - start < 50
    for pulse in found:
        pulse.close()


def test_when_the_store_falls_silent_its_rank_is_named():
    end = threading.Event()

    class Silent:
        """As a connection to a host that has vanished: what is asked is never answered."""

        def clone(self):
            return self

        def add(self, key: str, amount: int) -> None:
            end.wait()
            raise RuntimeError

    _, heard = pulses(Silent(), [1], 2)  # type: ignore[arg-type]
    wait_until(lambda: heard)
    end.set()
    assert heard == {1: (0, f"its store has not answered for {DEADLINE_S:g} s")}


def test_a_loss_that_many_notice_at_once_is_told_once(monkeypatch):
    heard: list[int] = []
    pulse = Pulse(store(), 0, 1, 100.0, lambda rank, reason: heard.append(rank))
    is_set = pulse._stop.is_set

    def and_others_come() -> bool:
        found = is_set()
        time.sleep(0.05)
        return found

    monkeypatch.setattr(pulse._stop, "is_set", and_others_come)
    threads = [threading.Thread(target=pulse._lose, args=(rank, "is lost")) for rank in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    pulse.close()
    assert len(heard) == 1
