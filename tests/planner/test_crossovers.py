"""Crossovers that others measured: the same winner on either side and about the same size (sources beside them)."""

from __future__ import annotations

import json

import pytest

from soloist.planner.checks import run_crossovers
from soloist.planner.crossovers import CROSSINGS, POINTS, Crossing, Point, deepseek, in_waves, overlap_gain


def name(found: Point | Crossing) -> str:
    return f"{found.crossover}, {found.at if isinstance(found, Point) else 'crossing'}"


@pytest.mark.parametrize("point", [point for point in POINTS if not point.off], ids=name)
def test_ratios(point: Point) -> None:
    assert point.agrees
    assert 1 / 1.4 < point.predict() / point.measured < 1.4


@pytest.mark.parametrize("crossing", [crossing for crossing in CROSSINGS if not crossing.off], ids=name)
def test_where_they_cross(crossing: Crossing) -> None:
    assert crossing.agrees


@pytest.mark.parametrize("machine", ["hgx-h200", "hgx-h20", "mi300x"])
def test_ep_loses_to_tp_on_one_node_at_low_concurrency_and_wins_at_high(machine: str) -> None:
    few, many = (in_waves(machine, "ep8", "tp8", sequences) for sequences in (8, 1024))
    assert few < 1 < many


def test_wider_ep_wins_small_batches_and_loses_large_ones() -> None:
    """A whole decode step, without overlap, which would hide most of what the NICs take longer than NVLink."""
    load = "prompt=1000,output=1000"
    for batch, wide_wins in ((16, True), (256, False)):
        narrow, wide = (
            deepseek("dgx-h100", layout, 128 * batch, load, "off").decode.seconds.value
            for layout in ("dp8ep16", "ep128")
        )
        assert (wide < narrow) == wide_wins


def test_two_batch_overlap_loses_below_64_tokens_a_gpu() -> None:
    assert overlap_gain("decode", 32) < overlap_gain("decode", 64) < 1 < overlap_gain("decode", 128)


def test_the_command_lists_all_and_names_known_misses(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_crossovers(as_json=True) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found) == len(POINTS) + len(CROSSINGS)
    assert all(row["source"] for row in found)
    assert [row["known miss"] != "" for row in found] == [row["agrees"] == "no" for row in found]
