"""The load of a deployment: how requests arrive, how long they are, what they may wait.

Compact form: comma-separated `key=value`, for instance `prompt=1000,output=200,rate=50,arrival=poisson,tpot=50ms` or
`prompt=2000,output=100,sequences=256`.
"""

from __future__ import annotations

import re
from math import isinf
from typing import Literal

import msgspec

from soloist.errors import ConfigurationError
from soloist.specs.model import Spec


class Load(Spec, frozen=True, kw_only=True):
    """Requests of `prompt` tokens in and `output` tokens out.

    Either `sequences` are in flight in the whole deployment (closed loop) or `rate` requests arrive a second (open
    loop). With neither, the planner chooses the batch that serves best. `ttft_s` and `tpot_s` are the SLO; 0: none.
    With 1 token out (which the prompt's last step gives) or none nothing is decoded, as on a server for prefill alone.
    """

    prompt: int = 1000
    output: int = 200
    sequences: int = 0
    rate: float = 0.0  # requests/s
    arrival: Literal["poisson", "uniform", "bursts"] = "poisson"
    spread: float = 0.0  # standard deviation of lengths over their mean
    skew: float = 0.0  # of the routing; exponent of planner/routing.py's power law; 0: uniform
    prefix: float = 0.0  # share of the prompt that is found in the prefix cache
    ttft_s: float = 0.0
    tpot_s: float = 0.0

    def __post_init__(self) -> None:
        for key, least in (("prompt", 1), ("output", 0), ("sequences", 0), ("rate", 0)):
            if getattr(self, key) < least:
                raise ConfigurationError.of(f"load.{key}", getattr(self, key), f"must be at least {least}")
        for key in ("spread", "skew", "ttft_s", "tpot_s"):
            if getattr(self, key) < 0:
                raise ConfigurationError.of(f"load.{key}", getattr(self, key), "must not be negative")
        if not 0 <= self.prefix < 1:
            raise ConfigurationError.of("load.prefix", self.prefix, "is a share; it must lie in [0, 1)")
        if self.sequences and self.rate:
            raise ConfigurationError.of("load.rate", self.rate, "state either rate or sequences, not both")

    @classmethod
    def parse(cls, text: str) -> Load:
        """`"prompt=1000,output=200,rate=50"`; durations `ttft` and `tpot` as `2s` or `50ms`, counts as `10k`."""
        values: dict[str, object] = {}
        for part in filter(None, text.replace(" ", "").split(",")):
            key, sign, value = part.partition("=")
            if not sign or not value:
                raise ConfigurationError.of("load", part, "write key=value pairs: prompt=1000,output=200,sequences=128")
            name = {"ttft": "ttft_s", "tpot": "tpot_s", "batch": "sequences"}.get(key, key)
            if name not in cls.__struct_fields__:
                raise ConfigurationError.of("load", key, f"unknown key; known are {', '.join(cls.__struct_fields__)}")
            values[name] = value if name == "arrival" else _number(key, value)
            if name in ("ttft_s", "tpot_s") and not values[name]:
                raise ConfigurationError.of(f"load.{key}", value, "nothing is that fast; leave it out for no limit")
        return _convert(values)

    def __str__(self) -> str:
        fields = msgspec.to_builtins(self)
        return ",".join(f"{key}={value}" for key, value in fields.items()) or "prompt=1000,output=200"

    @property
    def decodes(self) -> bool:
        """Whether there are steps between a request's first token and its last."""
        return self.output > 1

    @property
    def fresh(self) -> float:
        """Tokens of a prompt that are not found in the prefix cache."""
        return self.prompt * (1 - self.prefix)

    @property
    def context(self) -> float:
        """Mean tokens that a decoding sequence attends to."""
        return self.prompt + self.output / 2

    @property
    def longest(self) -> int:
        """Tokens of a sequence at its end."""
        return self.prompt + self.output


def _number(key: str, text: str) -> float | int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?(?:e\d+)?)(ms|s|k|K|M)?", text)
    if not match or isinf(float(match[1])):
        raise ConfigurationError.of(f"load.{key}", text, "must be a number from 0 up, perhaps with ms, s, k or M")
    value = float(match[1]) * {"ms": 1e-3, "s": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, None: 1.0}[match[2]]
    return int(value) if value.is_integer() else value


def _convert(values: dict[str, object]) -> Load:
    try:
        return msgspec.convert(values, Load)
    except msgspec.ValidationError as error:
        raise ConfigurationError(f"load: {error}") from error
