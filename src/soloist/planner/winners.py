"""Which layout is fastest: measured against predicted, over our engine's own runs.

Two starts of one layout differ by up to SPREAD, so a measured lead below it has no winner: such comparisons are shown
as ties and count neither way. Predictions of two layouts of one machine are wrong against each other, too: within TIE
a plan does not tell them apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import median
from typing import Literal

import msgspec

from soloist.planner.tables import RunRow

SPREAD = 0.03  # two starts of decode: up to 2.7 % apart (docs/benchmarks.md, "End to end on H200")
TIE = 0.05  # of the ratios of two layouts' times, 7 in 10 were predicted within it (docs/planner.md, "Our own engine")
Verdict = Literal["same", "other", "tie"]


class Winner(msgspec.Struct, frozen=True, kw_only=True):
    """The fastest layout of a comparison, and by what share the next one takes longer."""

    at: str
    layouts: list[str]
    measured: str
    lead: float
    predicted: str
    predicted_lead: float

    @property
    def verdict(self) -> Verdict:
        """`tie` where two starts of one layout may differ as much as these layouts do."""
        if self.lead < SPREAD:
            return "tie"
        return "same" if self.measured == self.predicted else "other"


def winners(runs: Iterable[tuple[RunRow, float]]) -> list[Winner]:
    """Of all settings that more than one layout ran; `runs`: rows of one machine and their predictions (s)."""
    settings: dict[str, list[tuple[str, float, float]]] = {}
    for row, predicted in runs:
        settings.setdefault(_setting(row), []).append((row.layout, row.seconds, predicted))
    return [_winner(at, found) for at, found in settings.items() if len({layout for layout, _, _ in found}) > 1]


def tied(rates: Sequence[float]) -> int:
    """How many of these descending rates lie so near the first that predictions cannot tell them apart."""
    return sum(rate >= rates[0] / (1 + TIE) for rate in rates)


def _setting(row: RunRow) -> str:
    graphs = "" if row.mixed_graphs == "off" else f", graphs of {row.mixed_graphs}"
    sums = "" if row.nvlink_sums else ", NCCL's sums"
    return f"{row.model}{f' {row.gpu}' if row.gpu else ''} {row.phase} {row.sequences} x {row.tokens:g}{graphs}{sums}"


def _winner(at: str, found: list[tuple[str, float, float]]) -> Winner:
    names = list(dict.fromkeys(layout for layout, _, _ in found))
    times = {name: [each[1:] for each in found if each[0] == name] for name in names}
    ranked = [sorted((median(each[i] for each in times[name]), name) for name in names) for i in (0, 1)]
    (measured, lead), (predicted, predicted_lead) = ((one[0][1], one[1][0] / one[0][0] - 1) for one in ranked)
    return Winner(
        at=at, layouts=names, measured=measured, lead=lead, predicted=predicted, predicted_lead=predicted_lead
    )  # fmt: skip
