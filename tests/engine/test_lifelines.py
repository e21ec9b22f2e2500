"""Rank 0 hears at once of a process that ends without a word, and of nobody else."""

from __future__ import annotations

import queue
import socket
from collections.abc import Iterator

import pytest
from torch.distributed import HashStore

from soloist.engine.lifelines import LOST, NAME, Lifeline, Lifelines
from soloist.engine.meeting import Meeting, Place
from soloist.errors import ClusterError

RANKS = 4
WAIT_S = 200.0
Losses = queue.Queue[tuple[int, str]]


@pytest.fixture
def meetings() -> list[Meeting]:
    store = HashStore()
    return [Meeting(Place(rank, RANKS, rank, RANKS), store) for rank in range(RANKS)]


@pytest.fixture
def losses(meetings) -> Iterator[Losses]:
    heard: Losses = queue.Queue()
    lifelines = Lifelines(meetings[0], lambda rank, how: heard.put((rank, how)))
    yield heard
    lifelines.close()


def break_line(meeting: Meeting) -> None:
    """As the kernel does when a process is killed."""
    Lifeline(meeting)._line.close()


def test_a_rank_that_ends_without_a_word_is_lost(meetings, losses):
    others = [Lifeline(meetings[1]), Lifeline(meetings[3])]
    break_line(meetings[2])
    assert losses.get(timeout=WAIT_S) == (2, LOST)
    for line in others:
        line.close()
    break_line(meetings[2])  # who took leave before that was heard before it
    assert losses.get(timeout=WAIT_S) == (2, LOST)
    assert losses.empty()


@pytest.mark.parametrize("words", [b"", b"GET / HTTP/1.1\r\n\r\n", b"0\n", b"4\n", b"-1\n", b"2", b"1\n" * 1000])
def test_strangers_are_not_missed(meetings, losses, words):
    host, port = meetings[0].find(NAME).split(":")
    with socket.create_connection((host, int(port))) as stranger:
        stranger.sendall(words)
    break_line(meetings[1])
    assert losses.get(timeout=WAIT_S) == (1, LOST)
    assert losses.empty()


def test_nobody_is_missed_after_the_end(meetings):
    heard: Losses = queue.Queue()
    lifelines = Lifelines(meetings[0], lambda rank, how: heard.put((rank, how)))
    line, broken = Lifeline(meetings[1]), Lifeline(meetings[2])
    lifelines.close()
    lifelines.close()
    broken._line.close()
    lifelines._thread.join(WAIT_S)
    line.close()  # as good as it can
    assert not lifelines._thread.is_alive()
    assert heard.empty()


def test_rank_0_cannot_be_reached(meetings):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    meetings[0].announce(NAME, f"127.0.0.1:{port}")
    with pytest.raises(ClusterError, match=f"rank 1: cannot reach rank 0 at 127.0.0.1:{port}"):
        Lifeline(meetings[1])
