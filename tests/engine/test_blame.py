"""Ranks that gave up on each other lead to the one that was lost."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
from torch.distributed import PrefixStore, TCPStore

from soloist.engine import blame
from soloist.engine.blame import cause, tell
from soloist.engine.meeting import Meeting, Place
from soloist.engine.pulse import LOST
from soloist.errors import CommunicationError


@pytest.fixture
def meeting(monkeypatch: pytest.MonkeyPatch) -> Meeting:
    monkeypatch.setattr(blame, "GRACE_S", 0.2)
    monkeypatch.setattr(blame, "STORE_S", 60.0)
    store = TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=60), wait_for_workers=False)
    return Meeting(Place(3, 8, 3, 8), PrefixStore("0", store))


def broke(rank: int, peer: int | None) -> CommunicationError:
    return CommunicationError(rank, peer, "layer 0, dispatch", "the connection broke")


def test_who_is_missed_leads_to_whom_it_missed(meeting: Meeting) -> None:
    tell(meeting, broke(0, 1))
    tell(meeting, broke(1, 2))
    assert str(cause(meeting, broke(3, 0))) == "rank 3: rank 2: rank 1 has given up on it (in layer 0, dispatch)"


def test_without_more_to_know_the_error_stays(meeting: Meeting) -> None:
    tell(meeting, broke(5, 6))
    tell(meeting, broke(6, 5))
    for error in (broke(3, 0), broke(3, 5), broke(3, None), ValueError("other")):
        assert cause(meeting, error) is error


def test_whom_the_pulse_has_lost_is_named(meeting: Meeting) -> None:
    meeting.store.set(LOST, "2 has not been heard of for 8 s")
    assert str(cause(meeting, broke(3, 0))) == "rank 3: rank 2: rank 0 has given up on it (in layer 0, dispatch)"
    error = broke(3, 2)
    assert cause(meeting, error) is error


def test_ranks_of_one_launcher_ask_nobody(tmp_path: Path) -> None:
    """Their front end hears all of them and chooses."""
    error, folder = broke(1, 0), Meeting.in_folder(tmp_path, Place(1, 2, 1, 2))
    tell(folder, error)
    assert cause(folder, error) is error
