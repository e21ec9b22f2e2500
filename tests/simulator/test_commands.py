"""From a model on a cluster, or a plan file, to figures, traces and pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

from soloist.errors import CapacityError, ConfigurationError
from soloist.planner.plan import plan_of
from soloist.planner.refit import load_calibration
from soloist.planner.score import Options
from soloist.simulator.commands import USUAL_RATE, drift_of, run_simulate, usual
from soloist.simulator.deployment import Setup, simulate
from soloist.simulator.perfetto import Tracer
from soloist.specs.cluster import cluster
from soloist.specs.presets import preset
from soloist.specs.workload import Load

LOAD = Load(prompt=300, output=20, rate=200, ttft_s=5, tpot_s=1)


def setup(layout: str = "ep8") -> Setup:
    return Setup.of(preset("qwen3-30b-a3b"), cluster("hgx-h100"), layout)


def test_figures_add_up() -> None:
    result, run = simulate(setup(), LOAD, requests=200)
    assert (result.finished, result.refused, result.resubmitted) == (200, 0, 0)
    assert result.output_tps == pytest.approx(200 * 20 / result.duration_s)
    assert result.output_tps_per_gpu == pytest.approx(result.output_tps / 8)
    line, width = result.timeline, run.end_s / len(result.timeline.time_s)
    assert sum(line.output_tps) * width == pytest.approx(200 * 20, rel=1e-3)
    assert sum(line.input_tps) * width == pytest.approx(200 * 300, rel=1e-3)
    assert sum(line.waiting) * width == pytest.approx(run.ledger.ttft_s.sum(), rel=1e-3)
    assert all(0 <= share <= 1 for share in (*line.computing, *line.links, *line.balance))
    assert result.ttft_s
    assert result.tpot_s
    assert result.ttft_s.p50 <= result.ttft_s.p99 <= result.ttft_s.max
    assert result.met_slo == 1.0
    assert result.band
    assert 0 < result.band < 1


def test_an_slo_that_is_missed() -> None:
    result, _ = simulate(setup(), Load(prompt=300, output=20, rate=200, tpot_s=1e-6), requests=20)
    assert result.met_slo == 0.0


def test_a_pipeline_and_replicas() -> None:
    result, run = simulate(setup("dp2pp2ep4"), LOAD, requests=60)
    assert result.finished == 60
    assert set(run.steps["replica"]) == {0, 1}


def test_a_plan_file(tmp_path: Path) -> None:
    given = setup()
    scorer = given.scorer(LOAD)
    plan_of(scorer.score(given.deployment, Options(), 8), given.cluster, LOAD, "published").save(tmp_path / "plan.json")
    assert run_simulate(tmp_path / "plan.json", load=str(LOAD), requests=50, out=tmp_path / "out.json") == 0
    out = json.loads((tmp_path / "out.json").read_bytes())
    assert (out["layout"], out["gpus"], out["finished"]) == ("ep8", 8, 50)
    assert 0 < out["tpot_s"]["p50"] < 1
    assert run_simulate(tmp_path / "plan.json", requests=50, out=tmp_path / "again.json") == 0
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "out.json").read_bytes()  # the plan's own load


def test_a_plan_made_for_another_engine_keeps_its_fixed_costs(tmp_path: Path) -> None:
    given = setup()
    score = given.scorer(LOAD).score(given.deployment, Options(), 8)
    for system in ("soloist", "vllm"):
        plan_of(score, given.cluster, LOAD, "published", system).save(tmp_path / f"{system}.json")
    own, other = (Setup.of_plan(tmp_path / f"{system}.json") for system in ("soloist", "vllm"))
    assert (own.system, other.system) == ("soloist", "vllm")
    assert simulate(own, LOAD, 20)[0].tpot_s != simulate(other, LOAD, 20)[0].tpot_s


def test_a_load_that_does_not_say_how_requests_arrive() -> None:
    assert usual(Load(prompt=300, output=20, skew=1.0)) == Load(prompt=300, output=20, skew=1.0, rate=USUAL_RATE)
    assert usual(Load(sequences=8)) == Load(sequences=8)


def test_skew_slows_down_and_balancing_helps() -> None:
    load = Load(prompt=300, output=20, rate=200, skew=1.0)
    even, _ = simulate(setup(), LOAD, requests=100)
    skewed, _ = simulate(setup(), load, requests=100)
    balanced, run = simulate(setup(), load, requests=100, drift=drift_of("rebalance=0.1,interval=0.05", 1.0))
    assert balanced.rebalancings > 0
    assert np.mean(run.steps["imbalance"]) < max(skewed.timeline.imbalance)
    assert even.tpot_s
    assert skewed.tpot_s
    assert even.duration_s < skewed.duration_s


def test_json_and_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = {name: tmp_path / name for name in ("trace.json", "picture.png", "out.json")}
    common: dict[str, Any] = {
        "model": preset("qwen3-30b-a3b"), "cluster": cluster("hgx-h100"), "layout": "pp2ep4", "load": str(LOAD),
        "requests": 30,
    }  # fmt: skip
    run_simulate(
        **common, perfetto=paths["trace.json"], picture=paths["picture.png"], out=paths["out.json"], as_json=True
    )
    assert json.loads(capsys.readouterr().out) == json.loads(paths["out.json"].read_bytes())
    assert paths["picture.png"].read_bytes().startswith(b"\x89PNG")
    events = json.loads(paths["trace.json"].read_bytes())["traceEvents"]
    rows = {event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert rows == {f"GPU {rank}" for rank in range(8)}
    run_simulate(**common)
    assert "30 of 30 requests finished" in " ".join(capsys.readouterr().out.split())


def test_slices_of_a_row_do_not_overlap_and_parts_fill_their_step() -> None:
    given = setup("pp2ep4")
    tracer = Tracer(given.deployment.layout, gpus=2, steps=50)
    simulate(given, LOAD, requests=20, observe=tracer)
    for row in {(e["pid"], e["tid"]) for e in tracer.events if e["ph"] == "X"}:
        mine = [e for e in tracer.events if e["ph"] == "X" and (e["pid"], e["tid"]) == row]
        steps = sorted((e["ts"], e["dur"]) for e in mine if e["cat"] == "step")
        assert len(steps) <= 50
        assert all(ts + dur <= after + 1e-3 for (ts, dur), (after, _) in zip(steps, steps[1:], strict=False))
        parts = sum(e["dur"] for e in mine if e["cat"] == "part")
        assert parts == pytest.approx(sum(dur for _, dur in steps))


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({}, "give a plan file"),
        ({"plan": "none.json"}, "none.json"),
        ({"layout": "ep8", "load": "rate=-1"}, "load.rate"),
        ({"layout": "ep8", "load": "prompt=5"}, "rate=… or sequences=…"),
        ({"layout": "ep8", "load": "rate=1", "requests": 0}, "requests = 0"),
        ({"layout": "ep8", "load": "rate=1", "drift": "rebalance=5"}, "state skew="),
        ({"layout": "ep8", "load": "rate=1,skew=1", "drift": "balance=5"}, "balance=5"),
        ({"layout": "ep8", "load": "rate=1,skew=1", "drift": "move=much"}, "drift.move = 'much'"),
        ({"layout": "ep8", "load": "rate=1", "lose": ["gpu=8,at=1"]}, "ranks 0 to 7"),
        ({"layout": "ep9000x"}, "layout"),
    ],
)
def test_nonsense_is_named(options: dict[str, Any], names: str) -> None:
    if "layout" in options:
        options = {"model": preset("qwen3-30b-a3b"), "cluster": cluster("hgx-h100"), **options}
    with pytest.raises(ConfigurationError, match=names):
        run_simulate(**options)


def test_a_load_of_which_nothing_can_be_served() -> None:
    with pytest.raises(CapacityError, match="none of 3 requests can be served: prompt of 1000000 tokens"):
        simulate(setup(), Load(prompt=1_000_000, output=20, rate=1), requests=3)


def test_a_model_that_does_not_fit() -> None:
    given = Setup.of(preset("deepseek-v3"), cluster("hgx-h100"), "ep2")
    with pytest.raises(CapacityError, match="layout = ep2: deepseek-v3"):
        simulate(given, LOAD, requests=5)


@pytest.mark.parametrize(("layout", "sequences"), [("tp2", 64), ("pp2tp4", 64)])
def test_a_full_deployment_serves_what_the_planner_says(layout: str, sequences: int) -> None:
    """Under a constant number of equal requests the planner's closed form and the simulation have to agree."""
    given, load = setup(layout), Load(prompt=1000, output=200, sequences=sequences)
    batch = sequences / given.deployment.layout.attention_groups
    planned = given.scorer(load).score(given.deployment, given.options, batch)
    result, _ = simulate(given, load, requests=4 * sequences)
    assert result.output_tps == pytest.approx(planned.output_rate.value, rel=0.05)
    assert result.met_slo is None


@pytest.mark.parametrize("output", [0, 1])
def test_a_deployment_for_prefill_alone_serves_what_the_planner_says(output: int) -> None:
    """Two prompts of 4000 tokens fill a step of each of eight groups."""
    load = Load(prompt=4000, output=output, sequences=32)
    result, _ = simulate(setup(), load, requests=320)
    planned = setup().scorer(load).score(setup().deployment, Options(), 2)
    assert result.input_tps == pytest.approx(planned.input_rate.value, rel=0.05)
    assert planned.output_rate.value == pytest.approx(output * planned.request_rate.value)
    assert result.output_tps == pytest.approx(output * result.input_tps / 4000)


def test_attention_groups_wait_for_the_one_that_prefills_as_the_planner_says() -> None:
    """Under requests that arrive independently; the number in flight by Little's law."""
    given, load = setup("ep8"), Load(prompt=1000, output=200, rate=30)
    result, _ = simulate(given, load, requests=400)
    assert result.tpot_s
    assert result.ttft_s
    batch = load.rate * (result.tpot_s.mean * (load.output - 1) + result.ttft_s.mean) / 8
    planned = given.scorer(load).score(given.deployment, given.options, batch)
    assert planned.tpot.value == pytest.approx(result.tpot_s.mean, rel=0.05)
    assert planned.tpot.value > 1.25 * planned.decode.seconds.value


@pytest.mark.parametrize(
    ("layout", "prompt"), [("ep8", 1000), ("tp2", 1000), ("pp2tp4", 1000), ("tp2", 20000), ("pp2tp4", 20000)]
)
def test_a_lone_prompt_takes_as_long_as_the_planner_says(layout: str, prompt: int) -> None:
    """Without the decode step that a prompt comes behind; requests are so rare that nearly none meets another."""
    given, load = setup(layout), Load(prompt=prompt, output=2, rate=0.01)
    planned = given.scorer(load).score(given.deployment, given.options, 1)
    result, _ = simulate(given, load, requests=20)
    assert result.ttft_s
    assert planned.ttft.value - planned.decode.seconds.value == pytest.approx(result.ttft_s.p50, rel=0.12)


def test_prefill_in_graphs_does_not_wait_for_the_host() -> None:
    """By the calibration of a machine, which knows what launches of our own engine take."""
    given = replace(setup("ep2"), calibration=load_calibration("2xh200"))
    load, eager = Load(prompt=200, output=1, rate=0.01), Options(mixed_graphs="off")
    plain, quick = (simulate(replace(given, options=how), load, requests=5)[0] for how in (eager, Options()))
    assert plain.ttft_s
    assert quick.ttft_s
    assert quick.ttft_s.mean < 0.5 * plain.ttft_s.mean


def test_a_trace_keeps_its_times_unless_a_rate_is_stated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "azure.csv"
    path.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + "".join(f"{30 * i},100,5\n" for i in range(4)))
    common = {"model": preset("qwen3-30b-a3b"), "cluster": cluster("hgx-h100"), "layout": "ep2", "requests": 0}
    seconds = []
    for load in ("", "rate=4"):
        run_simulate(**common, load=load, trace=path, as_json=True)
        seconds.append(json.loads(capsys.readouterr().out)["duration_s"])
    assert seconds[0] == pytest.approx(90, abs=1)
    assert seconds[1] == pytest.approx(1, abs=0.5)


def test_an_option_goes_before_what_a_plan_says(capsys: pytest.CaptureFixture[str]) -> None:
    common = {"model": preset("qwen3-30b-a3b"), "cluster": cluster("hgx-h100"), "layout": "ep2", "requests": 5}
    means = []
    for graphs in ("off", "256"):
        load = "prompt=200,output=1,rate=0.01"
        run_simulate(**common, load=load, as_json=True, calibration="2xh200", mixed_graphs=graphs)
        means.append(json.loads(capsys.readouterr().out)["ttft_s"]["mean"])
    assert means[1] < means[0]
