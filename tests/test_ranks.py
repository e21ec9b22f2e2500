"""The pool of ranks reports what its ranks do, and survives it."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

import pytest
import torch

from tests.ranks import RankPool, RanksFailed


@dataclass(frozen=True)
class Note:
    text: str


def greet(transport, note: Note) -> tuple[Note, int]:
    return Note(f"{note.text} from {transport.rank} of {transport.size}"), torch.get_num_threads()


def stumble(transport) -> int:
    if transport.rank == 1:
        raise ValueError("one stumbled")
    return transport.rank


def vanish(transport) -> int:
    if transport.rank == 0:
        os._exit(7)
    return transport.rank


def oversleep(transport) -> int:
    if transport.rank == 1:
        time.sleep(60)
    return transport.rank


def test_results_come_by_rank_from_single_threaded_ranks(ranks: RankPool) -> None:
    for kind in ("local", "gloo"):
        assert ranks.run(2, kind, greet, Note("hi")) == [(Note("hi from 0 of 2"), 1), (Note("hi from 1 of 2"), 1)]


@pytest.mark.parametrize("kind", ["local", "gloo"])
def test_error_of_a_rank_names_it_with_its_traceback(ranks: RankPool, kind: str) -> None:
    with pytest.raises(RanksFailed, match=r"(?s)rank 1: Traceback.*in stumble.*one stumbled") as failed:
        ranks.run(2, kind, stumble)
    assert failed.value.outcomes[0] == 0


def test_lost_ranks_are_reported_and_replaced(ranks: RankPool) -> None:
    with pytest.raises(RanksFailed, match="rank 0: the process died with exit code 7"):
        ranks.run(2, "gloo", vanish)
    with pytest.raises(RanksFailed, match="rank 1: did not return in time"):
        ranks.run(2, "gloo", oversleep, timeout_s=0.5)
    assert [note.text for note, _ in ranks.run(2, "gloo", greet, Note("back"))] == [
        "back from 0 of 2",
        "back from 1 of 2",
    ]
