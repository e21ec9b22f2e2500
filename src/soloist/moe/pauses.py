"""Work that pauses where it would wait for tokens that travel, so that other work of the same rank goes on meanwhile.

Such work is a generator: it yields when what it needs next has been sent for, and returns its result. By itself it runs
through; with others it takes turns, which are the same on all ranks: how often work pauses depends on nothing else than
what the ranks have agreed on.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any, TypeVar

Result = TypeVar("Result")
Pausing = Generator[None, None, Result]


def alone(work: Pausing[Result]) -> Result:
    """Its result: it goes on at once where it pauses."""
    return in_turn([work])[0]


def in_turn(works: Sequence[Pausing[Result]]) -> list[Result]:
    """The results of several works, each of which goes on to its next pause before the first one has its turn again."""
    results: list[Any] = [None] * len(works)
    running = list(enumerate(works))
    while running:
        running = [(index, work) for index, work in running if not _ends(index, work, results)]
    return results


def _ends(index: int, work: Pausing[Any], results: list[Any]) -> bool:
    """Whether it did so instead of pausing; then its result is kept."""
    try:
        next(work)
    except StopIteration as end:
        results[index] = end.value
        return True
    return False
