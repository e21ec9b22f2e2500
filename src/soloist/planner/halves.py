"""Which steps go through the layers as two halves, one of which computes while the other one's tokens travel.

All ranks of a stage have to agree on that. So it is a matter of numbers that they agree on anyway: the most tokens of
any attention group in the step, and whether anybody has several tokens of a sequence in it.
"""

from __future__ import annotations

from typing import Self

import msgspec

from soloist.errors import ConfigurationError
from soloist.specs.model import Spec

FEWEST = 2  # tokens that make two halves
EVEN = 64  # tokens from which halves are cut where tensors' addresses are even


class Halves(Spec, frozen=True):
    """Tokens of a step and attention group from which it goes as two halves, by kind of step; None: never."""

    prefill: int | None = None
    decode: int | None = None  # no sequence of any group has more than one token

    @classmethod
    def parse(cls, text: str) -> Self:
        """`off`, `on`, or numbers like `prefill=4096,decode=512`, either of them left out where it is never.

        Raises ConfigurationError for anything else.
        """
        if text in ("off", "on"):
            return cls(FEWEST, FEWEST) if text == "on" else cls()
        found: dict[str, int] = {}
        for part in text.split(","):
            key, _, number = part.partition("=")
            if key not in cls.__struct_fields__ or key in found or not number.isdecimal() or int(number) < FEWEST:
                remedy = f"must be off, on, or tokens like prefill=4096,decode=512, at least {FEWEST}"
                raise ConfigurationError.of("overlap", text, remedy)
            found[key] = int(number)
        return cls(**found)

    def __str__(self) -> str:
        """What `parse` reads."""
        if (self.prefill, self.decode) == (FEWEST, FEWEST):
            return "on"
        given = {key: getattr(self, key) for key in self.__struct_fields__}
        return ",".join(f"{key}={number}" for key, number in given.items() if number is not None) or "off"

    def __bool__(self) -> bool:
        """Whether there are such steps."""
        return self.prefill is not None or self.decode is not None

    def at_least(self, tokens: int) -> Self:
        """Without steps of fewer tokens."""
        given = {key: getattr(self, key) for key in self.__struct_fields__}
        raised = {key: max(tokens, number) for key, number in given.items() if number is not None}
        return msgspec.structs.replace(self, **raised)

    def takes(self, tokens: int, decodes: bool) -> bool:
        """Whether a step goes as two halves; `tokens` of the group that has most."""
        least = self.decode if decodes else self.prefill
        return least is not None and tokens >= least

    def largest(self, tokens: int, sequences: int) -> int:
        """The most tokens of a group that go through the layers at once, in steps of up to `tokens` tokens or
        `sequences` sequences."""
        return max(_largest(tokens, self.prefill), _largest(min(tokens, sequences), self.decode))


def _largest(tokens: int, least: int | None) -> int:
    if least is None or tokens < least:
        return tokens
    return max(first_half(tokens), least - 1)


def first_half(tokens: int) -> int:
    """How many of a step's tokens go first.

    It never falls as `tokens` grows: the half of the rank that has most of them is the largest.
    """
    half = -(-tokens // 2)
    return half if tokens < EVEN else -(-half // 8) * 8
