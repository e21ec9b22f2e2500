from __future__ import annotations

import pytest

from soloist.planner.tables import RunRow
from soloist.planner.winners import SPREAD, TIE, tied, winners


def run(layout: str, seconds: float, sequences: int = 1, mixed_graphs: str = "off") -> RunRow:
    return RunRow(
        role="check", model="ref-16l", layout=layout, phase="decode", sequences=sequences, tokens=192, seconds=seconds,
        mixed_graphs=mixed_graphs,
    )  # fmt: skip


def test_the_fastest_layout_is_compared_where_layouts_differ_by_more_than_two_starts() -> None:
    right, wrong = winners(
        [
            (run("ep2", 1.0), 1.1), (run("tp2", 1.2), 1.3), (run("pp2", 2.0), 1.9),
            (run("ep2", 1.0, 32), 1.2), (run("tp2", 1.2, 32), 1.1),
        ]
    )  # fmt: skip
    assert right.layouts == ["ep2", "tp2", "pp2"]
    assert (right.measured, right.predicted, right.verdict) == ("ep2", "ep2", "same")
    assert right.lead == pytest.approx(0.2)
    assert right.predicted_lead == pytest.approx(1.3 / 1.1 - 1)
    assert wrong.verdict == "other"


def test_a_lead_of_less_than_two_starts_has_no_winner() -> None:
    (one,) = winners([(run("ep2", 1.0), 1.1), (run("tp2", 1 + 0.9 * SPREAD), 1.0)])
    assert (one.measured, one.predicted, one.verdict) == ("ep2", "tp2", "tie")


def test_settings_that_differ_are_not_compared() -> None:
    assert not winners([(run("ep2", 1.0), 1.0), (run("tp2", 1.0, 32), 1.0), (run("tp2", 1.0, 1, "8192"), 1.0)])


def test_two_starts_of_a_layout_count_as_one() -> None:
    (one,) = winners([(run("ep2", 1.0), 1.0), (run("ep2", 1.2), 1.0), (run("tp2", 1.05), 1.2)])
    assert one.measured == "tp2"
    assert one.lead == pytest.approx(1.1 / 1.05 - 1)
    assert not winners([(run("ep2", 1.0), 1.0), (run("ep2", 1.2), 1.0)])


def test_rates_near_the_best_are_tied() -> None:
    assert tied([1.0, 1 - TIE / 2, 0.9]) == 2
    assert tied([1.0]) == 1
