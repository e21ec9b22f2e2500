"""The script for a whole host: what it composes, that it goes on and keeps its limits, and what it prints."""

from __future__ import annotations

import json
import time

import pytest
from rich.console import Console
from typer.main import get_command

from soloist.bench.node import Node, Part, gathered, predictions, run
from soloist.bench.node_report import exchange_table, layout_table, ratios
from soloist.cli import app


@pytest.mark.parametrize(
    ("gpus", "layouts"),
    [
        (8, ["ep8", "tp8", "tp4pp2", "ep4tp2"]),
        (4, ["ep4", "tp4", "tp2pp2", "ep2tp2"]),
        (2, ["ep2", "tp2", "pp2"]),
        (1, ["ep1"]),
    ],
)
def test_the_layouts_of_a_host(gpus, layouts, tmp_path):
    node = Node(gpus, tmp_path)
    assert [str(layout) for layout in node.layouts] == layouts
    assert len({part.slug for part in node.parts()}) == len(node.parts())
    foreseen = predictions(gpus)
    assert len(foreseen) == 5 * len(layouts)
    assert all(record["predicted_s"] > 0 for record in foreseen)


def test_every_command_of_ours_can_be_parsed(tmp_path):
    for part in Node(8, tmp_path).parts():
        if part.command[0] == "soloist" and part.name != "calibration":
            _, *words = part.command
            context, command = None, get_command(app)
            while words and hasattr(command, "commands"):
                context = command.make_context("soloist", words[:0], parent=context, resilient_parsing=True)
                command, words = command.commands[words[0]], words[1:]
            command.make_context(part.name, list(words), parent=context)


def test_it_goes_on_after_a_failure_and_keeps_its_limits(tmp_path):
    parts = [
        Part("good", ("json.tool", "--help"), 0, 200),
        Part("bad", ("json.tool", "/no/file"), 0, 200),
        Part("slow", ("http.server", "0", "--bind", "127.0.0.1"), 0, 1.0),
        Part("late", ("json.tool", "--help"), 10_000, 10_000),
    ]
    begin = time.monotonic()
    fates = run(Node(2, tmp_path), parts, 1000.0, Console(quiet=True))
    assert time.monotonic() - begin < 300
    assert fates["good"].startswith("done")
    assert "exit code" in fates["bad"]
    assert "limit of 1 s" in fates["slow"]
    assert fates["late"] == "left out: no time"
    assert (tmp_path / "bad.log").read_bytes()


def test_tables_say_bar_prediction_and_ratio(tmp_path):
    node = Node(8, tmp_path)
    point = {"what": "dispatch", "variant": "push", "shape": {"T": 4096}, "seconds": 5e-4, "ceiling_s": 4e-4}
    point |= {"bound_by": "156.0 MB at 390 GB/s"}
    (tmp_path / "exchange-prefill.jsonl").write_text(json.dumps(point) + "\n")
    for layout, rate in (("ep8", 300.0), ("tp8", 100.0)):
        record = {"what": "prefill", "layout": layout, "shape": "64x9999", "seconds": 2.0, "ceiling_s": 1.0}
        (tmp_path / f"{layout}.jsonl").write_text(json.dumps(record | {"tokens_per_s": rate}) + "\n")
    records = gathered(node)
    console = Console(record=True, width=160)
    console.print(exchange_table(records), layout_table(records, predictions(8)))
    text = console.export_text()
    assert "300 GB/s: met" in text  # 312
    assert f"{predictions(8)[0]['predicted_s'] * 1e3:,.2f}" in text
    assert list(ratios(records, "ep8")) == ["prefill 64x9999: ep8 gives 3.00 x tp8"]
