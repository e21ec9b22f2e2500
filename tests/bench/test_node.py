"""The script for a whole host: what it composes, that it goes on and keeps its limits, and what it prints."""

from __future__ import annotations

import json
import os
import subprocess
import time
from functools import partial
from pathlib import Path

import pytest
from rich.console import Console
from typer.main import get_command

from soloist.bench import expected
from soloist.bench import node as script
from soloist.bench.node import Node, Part, foreseen, gathered, predictions, run
from soloist.bench.node_report import exchange_table, layout_table, misses, ratios
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
    guesses = predictions(gpus, "H200")
    assert len(guesses) == 5 * len(layouts)
    assert all(record["predicted_s"] > 0 for record in guesses)


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
    assert fates["late"] == "left out"
    assert (tmp_path / "bad.log").read_bytes()


class Interrupted(subprocess.Popen):
    """Ctrl-C comes while it is waited for."""

    waits = 0

    def wait(self, timeout=None):
        self.waits += 1
        if self.waits == 1:
            raise KeyboardInterrupt
        return super().wait(timeout)


def test_an_interruption_ends_what_runs_and_leaves_out_the_rest(tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", Interrupted)
    parts = [
        Part("slow", ("http.server", "0", "--bind", "127.0.0.1"), 0, 60),
        Part("late", ("json.tool", "--help"), 1, 60),
    ]
    fates = run(Node(2, tmp_path), parts, 60.0, Console(quiet=True))
    assert fates == {"slow": "interrupted", "late": "left out"}


def test_what_a_command_leaves_behind_is_ended(tmp_path, monkeypatch):
    """It holds a pipe as long as it lives."""
    (tmp_path / "leaves.py").write_text(
        "import subprocess, sys\nsubprocess.Popen(['sleep', '600'], pass_fds=[int(sys.argv[1])])\nsys.exit(3)\n"
    )
    ours, its = os.pipe()
    os.set_inheritable(its, True)
    monkeypatch.setattr(subprocess, "Popen", partial(subprocess.Popen, pass_fds=[its], cwd=tmp_path))
    fates = run(Node(2, tmp_path), [Part("bad", ("leaves", str(its)), 0, 60)], 60.0, Console(quiet=True))
    os.close(its)
    assert "exit code 3" in fates["bad"]
    assert os.read(ours, 1) == b""  # nobody holds the other end
    os.close(ours)


def test_commands_see_the_gpus_that_are_to_be_used(tmp_path, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert Node(2, tmp_path).environment["CUDA_VISIBLE_DEVICES"] == "0,1"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    assert Node(2, tmp_path).environment["CUDA_VISIBLE_DEVICES"] == "4,5"


def test_predictions_are_those_made_beforehand(tmp_path, monkeypatch):
    one = {"what": "TPOT", "gpus": 2, "gpu": "H100", "predicted_s": 1.0}
    (tmp_path / "known.jsonl").write_text(json.dumps(one) + "\n")
    monkeypatch.setattr(script, "PREDICTIONS", tmp_path / "known.jsonl")
    assert foreseen(2, "H100") == [one]
    assert len(foreseen(2, "H200")) == 15


@pytest.mark.parametrize("gpu", expected.MACHINES)
@pytest.mark.parametrize("gpus", script.HOSTS)
def test_hosts_that_we_may_meet_have_predictions(gpus, gpu):
    """Of all their layouts; that they are today's planner's is seen before a run, not here."""
    lines = (Path(__file__).parents[2] / script.PREDICTIONS).read_text().splitlines()
    known = [record for record in map(json.loads, lines) if (record["gpus"], record["gpu"]) == (gpus, gpu)]
    named = [
        [{key: record[key] for key in ("what", "layout", "shape")} for record in found]
        for found in (known, predictions(gpus, gpu))
    ]
    assert named[0] == named[1]


def test_tables_say_bar_prediction_and_ratio(tmp_path):
    node = Node(8, tmp_path)
    point = {"what": "dispatch", "variant": "push", "shape": {"T": 4096}, "seconds": 5e-4, "ceiling_s": 4e-4}
    point |= {"bound_by": "156.0 MB at 390 GB/s"}
    (tmp_path / "exchange-prefill.jsonl").write_text(json.dumps(point) + "\n")
    for layout, seconds in (("ep8", 2.0), ("tp8", 4.0)):
        record = {"what": "prefill", "layout": layout, "shape": "64x9999", "seconds": seconds, "ceiling_s": 1.0}
        (tmp_path / f"{layout}.jsonl").write_text(json.dumps(record | {"tokens_per_s": 640e3 / seconds}) + "\n")
    cut_off = {"what": "TPOT, one start", "layout": "ep8", "shape": "8", "times_s": [0.02, 0.03, 0.01]}
    with (tmp_path / "ep8.jsonl").open("a") as file:
        file.write(json.dumps(cut_off) + "\n")
    records, guesses = gathered(node), predictions(8, "H100")
    console = Console(record=True, width=160)
    console.print(exchange_table(records), layout_table(records, guesses))
    text = console.export_text()
    assert "300 GB/s: met" in text  # 312
    assert f"{guesses[0]['predicted_s'] * 1e3:,.2f}" in text
    assert "cut off" in text
    ours, theirs = (next(g["predicted_s"] for g in guesses if (g["layout"], g["what"]) == (layout, "prefill"))
                    for layout in ("ep8", "tp8"))  # fmt: skip
    wanted = f"prefill 64x9999: ep8 gives 2.00 x ({theirs / ours:.2f} predicted) tp8"
    assert list(ratios(records, guesses, "ep8")) == [wanted]
    (said,) = misses(records, guesses)
    assert said.startswith("3 predictions: median ")
