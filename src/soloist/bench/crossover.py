"""Which form of the exchange is the fastest: by the tokens of a call, and by the share of the groups that a token
goes to. dispatch/forms.py chooses by these two, with limits that stand where the forms cross here.

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
TOP_K = (1, 2, 3, 4, 8)
LOADS = (Load(MANY, 7168, 8, 64), Load(MANY, 2048, 8, 128))


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
    for load in LOADS:
        by_tokens = [by_form(bench, replace(load, tokens=tokens), tuple(FORMS)) for tokens in TOKENS]
        by_share = [by_form(bench, replace(load, top_k=top_k), ("push", "copy")) for top_k in TOP_K]
        for found in (*by_tokens, *by_share):
            for name, seconds in found.seconds.items():
                made = point("form", name, found.load, seconds, 2 * load.d_model * load.dtype.itemsize)
                yield replace(made, bound_by=f"{made.bound_by}; {found.said_of(name)}")
        if bench.rank == 0:
            print(f"D={load.d_model}: {told(by_tokens, by_share, bench.size)}", flush=True)


def told(by_tokens: Sequence[ByForm], by_share: Sequence[ByForm], groups: int) -> str:
    """Where the forms cross, in words."""
    few = _up_to([(found.load.tokens, found.fastest == "latency") for found in by_tokens], "tokens a rank")
    some = _up_to([(found.load.top_k, found.fastest == "push") for found in by_share], f"choices among {groups} groups")
    return f"the latency form is the fastest {few}, push before copy {some}"


def _up_to(found: list[tuple[int, bool]], unit: str) -> str:
    """`found`: by rising size, whether the small form won."""
    won = [size for size, _ in takewhile(lambda each: each[1], found)]
    if not won:
        return f"nowhere from {found[0][0]} {unit} on"
    return f"up to {won[-1]} {unit}"
