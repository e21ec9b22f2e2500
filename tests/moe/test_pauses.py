"""Work that pauses, alone and in turn."""

from __future__ import annotations

import pytest

from soloist.moe.pauses import Pausing, alone, in_turn


def work(name: str, pauses: int, done: list[str]) -> Pausing[str]:
    for step in range(pauses):
        done.append(f"{name}{step}")
        yield
    done.append(f"{name} ends")
    return name.upper()


def test_alone_it_goes_on_where_it_pauses() -> None:
    done: list[str] = []
    assert alone(work("a", 2, done)) == "A"
    assert done == ["a0", "a1", "a ends"]


def test_several_take_turns_and_who_has_ended_is_not_asked_again() -> None:
    done: list[str] = []
    assert in_turn([work("a", 2, done), work("b", 1, done), work("c", 0, done)]) == ["A", "B", "C"]
    assert done == ["a0", "b0", "c ends", "a1", "b ends", "a ends"]
    assert in_turn([]) == []


def test_an_error_ends_all() -> None:
    def broken() -> Pausing[None]:
        yield
        raise ValueError("in the second turn")

    done: list[str] = []
    with pytest.raises(ValueError, match="second turn"):
        in_turn([broken(), work("b", 3, done)])
    assert done == ["b0"]
