"""Which steps go as two halves, and how large what goes through the layers at once can be."""

from __future__ import annotations

import pytest

from soloist.errors import ConfigurationError
from soloist.planner.halves import Halves, first_half


@pytest.mark.parametrize("text", ["off", "on", "prefill=4096", "decode=512", "prefill=4096,decode=512"])
def test_texts_are_read_and_written(text: str) -> None:
    assert str(Halves.parse(text)) == text
    assert bool(Halves.parse(text)) == (text != "off")


@pytest.mark.parametrize("text", ["", "yes", "prefill", "prefill=1", "prefill=-4", "prefill=4,prefill=8", "tokens=9"])
def test_others_are_refused(text: str) -> None:
    with pytest.raises(ConfigurationError, match="overlap = .*: must be off, on, or tokens like"):
        Halves.parse(text)


def test_steps_are_taken_by_kind_and_size() -> None:
    found = Halves.parse("prefill=64")
    assert [found.takes(tokens, decodes=False) for tokens in (63, 64, 9999)] == [False, True, True]
    assert not found.takes(9999, decodes=True)
    both = Halves.parse("on").at_least(100)
    assert [both.takes(tokens, decodes) for tokens in (99, 100) for decodes in (False, True)] == [False] * 2 + [
        True
    ] * 2


@pytest.mark.parametrize(
    ("text", "largest"),
    [("off", 8192), ("decode=64", 8192), ("on", 4096), ("prefill=2048", 4096), ("prefill=6000", 5999)],
)
def test_the_largest_call(text: str, largest: int) -> None:
    assert Halves.parse(text).largest(8192, 256) == largest


def test_whole_decoding_steps_need_their_room() -> None:
    assert Halves.parse("prefill=2").largest(300, 256) == 256
    assert Halves.parse("prefill=2").largest(200, 256) == 200


def test_no_rank_has_a_larger_half_than_the_one_with_most_tokens() -> None:
    halves = [first_half(tokens) for tokens in range(2000)]
    assert halves == sorted(halves)
    assert all(tokens - half <= half <= tokens for tokens, half in enumerate(halves))
    assert all(half % 8 == 0 for half in halves[64:])
