"""Metrics and details: what they count, that they stay few, and that a terminal shows them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families
from typer.testing import CliRunner

from soloist.cli import app
from soloist.frontend.frontend import RankReport
from soloist.frontend.wire import Figures
from soloist.scheduling.scheduler import SchedulerStats
from soloist.server.desk import Desk
from soloist.server.details import Details
from soloist.server.metrics import Histogram, Metrics, Tally
from soloist.server.served import Served
from soloist.server.watch import Watch, Window, max_over_mean
from soloist.specs.layout import Layout
from tests.server.live import http, live

DOCS = Path(__file__).parents[2] / "docs"
SUFFIX = {"counter": "_total", "histogram": "_bucket"}
STATS = SchedulerStats(1, 2, 0, 30, 40, 5, 6, 8)


class Front:
    """A front end whose ranks have told something."""

    def __init__(self, layout: str) -> None:
        self.layout, self.failure, self.deadline_s = Layout.parse(layout), None, 1.0
        self.ranks = {rank: RankReport(stats=STATS) for rank in range(self.layout.size)}


def samples(page: bytes) -> dict[tuple, float]:
    families = text_string_to_metric_families(page.decode())
    return {(s.name, *s.labels.values()): s.value for family in families for s in family.samples}


def deployment(layout: str, layers: int, experts: int, per_node: int = 8) -> tuple[Metrics, Details, Watch]:
    front = Front(layout)
    watch, tally = Watch(front, per_node), Tally()
    desk = Desk(Served("x", front), 10, 10.0)
    size = front.layout.size
    watch._take(Window(2.0, {
        rank: Figures(
            rank, {"exchange": 0.2, "experts": 1.8}, {(rank - 1) % size: 0.1}, {(rank + 1) % size: 10}, 100, 50, 3,
            chosen={layer: [1] * experts for layer in range(3, layers)}, rows=dict.fromkeys(range(3, layers), rank),
        )
        for rank in range(size)
    }))  # fmt: skip
    return Metrics(desk, tally, watch), Details(desk, tally, watch), watch


def test_the_number_of_series_is_bounded():
    metrics, _, _ = deployment("ep128", 61, 256)
    assert len(samples(metrics.page())) == 1459


def test_grafana_dashboard_and_docs_have_every_metric_and_no_other():
    metrics, _, _ = deployment("ep4", 5, 8)
    families = list(text_string_to_metric_families(metrics.page().decode()))
    panels = json.loads((DOCS / "grafana.json").read_text())["panels"]
    asked = " ".join(target["expr"] for panel in panels for target in panel["targets"])
    names = set(re.findall(r"[a-z]+(?:_[a-z]+)+", asked)) - {"histogram_quantile"}
    wanted = {f"{family.name}{SUFFIX.get(family.type, '')}" for family in families}
    assert wanted == names
    documented = (DOCS / "serving.md").read_text()
    assert all(f"`{name.removesuffix('_bucket')}`" in documented for name in wanted)
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels]
    assert len(set(places)) == len(places)


def test_ranks_and_layers():
    metrics, details, watch = deployment("ep4", 5, 8, per_node=2)
    found = samples(metrics.page())
    assert found["exchange_bytes_total", "inside"] == found["exchange_bytes_total", "across"] == 20
    assert found["rank_rows_total", "3"] == 6
    assert found["expert_load_max_over_mean", "3"] == 1.0
    assert found["rank_load_max_over_mean", "4"] == pytest.approx(3 / 1.5)
    assert found["preemptions_total",] == 4 * 5
    record = details.record()
    assert record["experts"]["3"] == [4] * 8
    assert record["ranks"][1]["bytes_to"] == {"2": 10}
    assert record["ranks"][1]["waited_for_s"] == {"0": 0.1}
    assert record["ranks"][1]["kept_waiting_s"] == found["rank_kept_waiting_seconds_total", "1"] == 0.1
    assert record["longest_waits"][0]["seconds"] == 0.1
    assert {alert["what"] for alert in record["alerts"]} == {
        "exchange's share of the ranks' time", "spread of the ranks' load",
    }  # fmt: skip
    pairs = json.loads(details.page(rank=1))["pairs"]
    assert pairs["bytes_from"] == {"0": 10}
    assert pairs["waited_for_it_s"] == {"2": 0.1}
    watch._take(Window(2.0, {0: Figures(0, {}, {}, {}, 0, 0, 0)}))  # nothing was done
    assert details.record()["experts"] == record["experts"]


def test_max_over_mean():
    assert max_over_mean(np.array([0, 0])) == max_over_mean(np.array([])) == 1.0
    assert max_over_mean(np.array([1, 3])) == 1.5


def test_histograms_cumulate():
    histogram = Histogram((1, 2))
    for value in (0.5, 1, 1.5, 9):
        histogram.observe(value)
    (*buckets, count, total) = [sample.value for sample in histogram.family("x", "").samples]
    assert buckets == [2, 3, 4]
    assert (count, total) == (4, 12)


def test_a_request_is_counted_once(fake):
    with live(fake.served) as server:
        body = {"model": "fake", "prompt": [1, 2, 3], "max_tokens": 5, "n": 2}
        assert http.post(f"{server.url}/v1/completions", json=body).status_code == 200
        found = samples(http.get(f"{server.url}/metrics").content)
        details = http.get(f"{server.url}/details").json()
        assert http.get(f"{server.url}/details?rank=2").json()["error"]["param"] == "rank"
        assert "pairs" in http.get(f"{server.url}/details?rank=1").json()
    assert found["generation_tokens_total",] == 10
    assert found["prompt_tokens_total",] == 6
    assert found["time_to_first_token_seconds_count",] == 2
    assert found["inter_token_latency_seconds_count",] == 8
    assert found["sequences_ended_total", "length"] == 2
    assert found["requests_accepted_total",] == found["requests_ended_total", "complete"] == 1
    assert details["tokens"]["generated"] == 10
    assert details["tpot_s"]["p50"] > 0


def test_what_the_model_did(server):
    body = {"model": "novels", "prompt": "It was a", "max_tokens": 5}
    assert http.post(f"{server.url}/v1/completions", json=body).status_code == 200
    server.wait(lambda: http.get(f"{server.url}/details").json()["ranks"])
    record = http.get(f"{server.url}/details").json()
    layers = record["experts"]
    assert layers
    assert {sum(tokens) for tokens in layers.values()} != {0}
    assert all(rank["weight_bytes"] > 0 for rank in record["ranks"])
    assert "<html" in http.get(f"{server.url}/dashboard").text
    assert http.get(f"{server.url}/").headers["location"] == "dashboard"


def test_the_terminal_shows_what_the_dashboard_shows(server):
    body = {"model": "novels", "prompt": "The old", "max_tokens": 5}
    assert http.post(f"{server.url}/v1/completions", json=body).status_code == 200
    server.wait(lambda: http.get(f"{server.url}/details").json()["ranks"])  # they are asked every two seconds
    shown = CliRunner().invoke(app, ["top", server.url, "--once"]).stdout
    assert "novels on ep2" in shown
    assert "max/mean" in shown
    assert "longest waits: rank" in shown
    assert len(shown.splitlines()) > 8


def test_the_terminal_says_where_there_is_no_server():
    wrong = CliRunner().invoke(app, ["top", "http://127.0.0.1:1", "--once"])
    assert wrong.exit_code == 1
    assert "is a server running there" in wrong.stderr
