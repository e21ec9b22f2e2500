from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

from soloist.bench.compare import check_greedy, write
from soloist.bench.figures import Run, Series, Timing
from soloist.bench.table import comparison
from soloist.errors import SoloistError
from soloist.frontend.wire import Figures
from soloist.specs.layout import Layout


def figures(rank: int, **seconds: float) -> Figures:
    to_neighbour, to_other_node = (rank ^ 1, 300), ((rank + 2) % 4, 50)
    return Figures(rank, seconds, {0: 0.25}, dict([to_neighbour, to_other_node]), 1000 + rank, 64, 7)


def run(layout: str = "ep4", outputs=((5, 6, 7), (8,)), wall_s: float = 2.0, margin: float = 0.5) -> Run:
    return Run(
        layout=Layout.parse(layout),
        gpus_per_node=2,
        wall_s=wall_s,
        prompt_tokens=10,
        timings=[Timing(0.5, 1.5, 3), Timing(0.25, 0.25, 1)],
        figures=[figures(rank, exchange=0.75, experts=1.0, attention=0.2) for rank in range(4)],
        outputs=[tuple(tokens) for tokens in outputs],
        margin=margin,
    )


def test_figures_follow_from_a_run() -> None:
    one = run()
    assert one.tokens == 4
    assert one.tps == 2.0
    assert one.percentile_s("first_s", 50) == pytest.approx(0.375)
    assert one.percentile_s("tpot_s", 99) == pytest.approx(0.5)  # the single token has none
    assert one.share("exchange") == pytest.approx(0.25)  # waiting is not counted twice
    assert one.share("waiting") == pytest.approx(0.125)
    assert one.share("experts") == pytest.approx(0.5)
    assert one.bytes_per_token(across=False) == pytest.approx(4 * 300 / 14)
    assert one.bytes_per_token(across=True) == pytest.approx(4 * 50 / 14)
    assert one.weight_bytes == 1003


def test_a_record_holds_medians() -> None:
    series = Series(Layout.parse("ep4"), [run(wall_s=1.0), run(wall_s=2.0), run(wall_s=8.0)])
    record = series.record()
    assert record["wall_s"] == 2.0
    assert record["tps"] == 2.0
    assert record["tps_per_rank"] == 0.5


def test_equal_tokens_are_reported_with_their_margin() -> None:
    same = [Series(Layout.parse("ep4"), [run(margin=0.5)]), Series(Layout.parse("tp4"), [run("tp4", margin=0.01)])]
    assert "ep4, tp4" in check_greedy(same)
    assert "1.00e-02" in check_greedy(same)


def test_a_difference_names_request_token_and_layouts() -> None:
    other = Series(Layout.parse("tp4"), [run("tp4", outputs=((5, 9, 7), (8,)))])
    with pytest.raises(SoloistError, match="request 0: tp4 and ep4 differ from token 1"):
        check_greedy([Series(Layout.parse("ep4"), [run()]), other])


def test_table_lines_and_picture(tmp_path: Path) -> None:
    series = [Series(Layout.parse("ep4"), [run()]), Series(Layout.parse("tp4"), [run("tp4")])]
    lines, picture = write(series, tmp_path)
    records = [json.loads(line) for line in lines.read_text().splitlines()]
    assert [record["layout"] for record in records] == ["ep4", "tp4"]
    assert picture.read_bytes().startswith(b"\x89PNG")
    console = Console(record=True, width=100)
    console.print(comparison(series, "two layouts"))
    text = console.export_text()
    assert "tp4" in text
    assert "TPOT p99" in text
