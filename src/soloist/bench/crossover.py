"""Which form of the exchange is the fastest: by the tokens of a call, and by the share of the groups that a token
goes to. dispatch/forms.py chooses by these two; its limits should stand where the forms cross here.

    soloist bench exchange --preset forms --explain
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile

from soloist.bench.dispatchers import one_sided
from soloist.bench.exchange_run import ExchangeRun
from soloist.bench.load import Load
from soloist.bench.report import Point
from soloist.dispatch.forms import COPY, LATENCY, PUSH, choose_form
from soloist.probes.gpus import Bench

FORMS = {form.name: form for form in (LATENCY, PUSH, COPY)}
TOKENS = (128, 256, 512, 1024, 2048)
MANY = 4096  # tokens, where the share is what counts
TOP_K = (1, 2, 3, 8)
BY_TOKENS = (Load(MANY, 7168, 8, 64), Load(MANY, 2048, 8, 128))
BY_SHARE = BY_TOKENS[0]


@dataclass(frozen=True)
class ByForm:
    """Seconds of a load from x to expanded rows and from the experts' rows to x, by the form's name."""

    load: Load
    chosen: str
    seconds: dict[str, float]

    @property
    def fastest(self) -> str:
        return min(self.seconds, key=lambda name: self.seconds[name])

    def said_of(self, name: str) -> str:
        ratio = self.seconds[name] / self.seconds[self.fastest]
        return ("the fastest" if name == self.fastest else f"{ratio:.2f} x the fastest") + (
            ", chosen" if name == self.chosen else ""
        )


def by_form(bench: Bench, load: Load, names: Sequence[str]) -> ByForm:
    """Called by every rank. Each form is checked before it is timed."""
    shape = load.shape(bench.size)
    dispatcher, seconds = one_sided(bench, shape, COPY, lanes=1), {}
    for name in names:
        run = ExchangeRun(bench, load, dispatcher.fit(load.tokens, FORMS[name]))
        run.check()
        seconds[name] = run.round_trip(calls=10 if load.tokens < MANY else 3)
    return ByForm(load, choose_form(shape).name, seconds)


def crossovers(bench: Bench, point: Callable[[str, str, Load, float, int], Point]) -> Iterator[Point]:
    """A point for each load and form; the first rank says where they cross. `point`: as of the exchange."""
    for load in BY_TOKENS:
        by_tokens = [by_form(bench, replace(load, tokens=tokens), tuple(FORMS)) for tokens in TOKENS]
        yield from _points(by_tokens, point)
        _tell(bench, f"D={load.d_model}, top-{load.top_k}: {crossing_of_tokens(by_tokens)}")
    by_share = [by_form(bench, replace(BY_SHARE, top_k=top_k), ("push", "copy")) for top_k in TOP_K]
    yield from _points(by_share, point)
    _tell(bench, f"D={BY_SHARE.d_model}, {MANY} tokens: {crossing_of_shares(by_share, bench.size)}")


def _points(found: Sequence[ByForm], point: Callable[[str, str, Load, float, int], Point]) -> Iterator[Point]:
    for each in found:
        for name, seconds in each.seconds.items():
            made = point("form", name, each.load, seconds, 2 * each.load.d_model * each.load.dtype.itemsize)
            yield replace(made, bound_by=f"{made.bound_by}; {each.said_of(name)}")


def _tell(bench: Bench, words: str) -> None:
    if bench.rank == 0:
        print(words, flush=True)


def crossing_of_tokens(found: Sequence[ByForm]) -> str:
    """In words."""
    return "the latency form is the fastest " + _up_to(
        [(each.load.tokens, each.fastest == "latency") for each in found], "tokens a rank"
    )


def crossing_of_shares(found: Sequence[ByForm], groups: int) -> str:
    """In words."""
    return "push is faster than copy " + _up_to(
        [(each.load.top_k, each.fastest == "push") for each in found], f"choices among {groups} groups"
    )


def _up_to(found: list[tuple[int, bool]], unit: str) -> str:
    """`found`: by rising size, whether the small form won."""
    won = [size for size, _ in takewhile(lambda each: each[1], found)]
    if not won:
        return f"nowhere from {found[0][0]} {unit} on"
    return f"up to {won[-1]} {unit}"
