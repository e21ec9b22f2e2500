from __future__ import annotations

import re
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from soloist.errors import CapacityError, ConfigurationError
from soloist.placement.trace import RoutingTrace, Sample, TraceModel
from soloist.planner.calibration import Calibration
from soloist.planner.commands import run_plan
from soloist.planner.explain import headline, one_expert_per_gpu, ties, why
from soloist.planner.kernels import Kernels
from soloist.planner.layer import Deployment
from soloist.planner.plan import Plan, placement_of, plan_of
from soloist.planner.precision import Precision
from soloist.planner.runtime import Runtime
from soloist.planner.score import USABLE, Options, Scorer
from soloist.planner.search import Found, front, is_single, layouts, search
from soloist.specs.cluster import cluster
from soloist.specs.layout import Layout
from soloist.specs.presets import preset
from soloist.specs.workload import Load


def find(model: str, gpus: int, load: str, precision: str = "fp8", name: str = "dgx-h100") -> Found:
    spec, wanted, used = cluster(name), Load.parse(load), Calibration.published()
    scorer = Scorer(Kernels(spec, used), Runtime.named("soloist", used), wanted)
    return search(preset(model), spec, gpus, wanted, scorer, Precision.named(precision))


@pytest.fixture(scope="module")
def found() -> Found:
    return find("deepseek-v3", 64, "prompt=1000,output=500,skew=0.8,tpot=60ms")


@given(st.integers(1, 96))
@settings(max_examples=20, deadline=None)
def test_every_layout_fills_the_gpus_and_none_comes_twice(gpus: int) -> None:
    every = [str(layout) for layout in layouts(gpus)]
    assert len(set(every)) == len(every)
    assert all(Layout.parse(text).size == gpus for text in every)
    assert str(Layout(ep=gpus)) in every


def test_every_layout_is_scored_or_rejected_with_a_reason(found: Found) -> None:
    scored = {str(s.deployment.layout) for s in found.scores}
    rejected = {r.layout.split(" x ")[0] for r in found.rejections}
    assert scored | rejected == {str(layout) for layout in layouts(64)}
    assert all(r.reason and "\n" not in r.reason for r in found.rejections)


def test_what_is_offered_fits_and_keeps_the_slo(found: Found) -> None:
    for score in found.scores:
        assert sum(score.memory.values()) <= USABLE * 80e9
        assert score.tpot.value <= 0.060


def test_front_holds_what_no_other_beats(found: Found) -> None:
    assert front(found.front) == found.front
    for score in found.scores:
        assert any(f.tpot.value <= score.tpot.value and f.rate_per_gpu >= score.rate_per_gpu for f in found.front)
    assert found.best.rate_per_gpu == max(s.rate_per_gpu for s in found.scores)


def test_replicas_are_tried_where_routing_is_skewed(found: Found) -> None:
    assert any(s.deployment.slots for s in found.scores)
    even = find("qwen3-30b-a3b", 8, "prompt=500,output=500,sequences=256", "bf16")
    assert not any(s.deployment.slots for s in even.scores)


def test_explanations_name_the_parts(found: Found) -> None:
    other = found.scores[-1]
    assert "GPU time of a token" in why(found.best, other)
    assert "ep >= 256" in one_expert_per_gpu(found.best, None)


def test_layouts_that_predictions_do_not_tell_apart_are_named() -> None:
    best, load = find("ref-16l", 8, "sequences=8", "bf16").best, Load.parse("prompt=100,output=100")
    near, far = (best._replace(output_rate=best.output_rate.times(share)) for share in (0.97, 0.8))
    assert ties([best, far], load) == ties([best], load) == []
    (line,) = ties([best, near, far], load)
    assert line.startswith(f"A tie: {best.deployment.layout} (-3.0%) within")
    (line,) = ties([best, *[near] * 6], load)
    assert "and 2 more within" in line
    served = Load.parse("prompt=100,output=100,rate=1")  # the least latency wins
    assert "(+0.0%)" in ties([best, far], served)[0]


def test_one_expert_per_gpu_is_compared() -> None:
    result = find("ref-16l", 16, "prompt=2000,output=500,sequences=128", "bf16")
    assert result.single is not None
    assert is_single(result.single.deployment)
    assert "One expert per GPU" in one_expert_per_gpu(result.best, result.single)


def test_a_rate_is_served_with_the_least_latency() -> None:
    result = find("qwen3-30b-a3b", 8, "prompt=500,output=100,rate=20", "bf16")
    assert all(s.output_rate.value >= 2000 for s in result.scores)
    assert result.best.tpot.value == min(s.tpot.value for s in result.scores)


def test_what_fits_nowhere_says_why() -> None:
    with pytest.raises(CapacityError, match="fits nowhere.*experts"):
        find("deepseek-v3", 4, "prompt=1000,output=1000", "bf16")
    with pytest.raises(CapacityError, match="TPOT"):
        find("qwen3-30b-a3b", 1, "prompt=1000,output=1000,tpot=0.1ms", "bf16")


def test_128_gpus_in_two_seconds_and_1024_in_ten() -> None:
    """Of an idle core's time, doubled for one whose other thread is busy; more of a core that is slower still."""

    def seconds(work: Callable[[], object]) -> float:
        start = time.process_time()
        work()
        return time.process_time() - start

    for gpus, limit in ((128, 2.0), (1024, 10.0)):
        searching = partial(find, "deepseek-v3", gpus, "prompt=1000,output=1000,skew=0.8")
        pace = seconds(lambda: sum(i for i in range(8_000_000))) / 0.5  # such a loop takes 0.5 s of a busy core
        assert any(seconds(searching) < 2 * limit * max(1.0, pace) for _ in range(3))


def test_plan_file_round_trip(found: Found, tmp_path: Path) -> None:
    plan = plan_of(found.best, cluster("dgx-h100"), Load.parse("prompt=1000,output=500"), "published")
    plan.save(tmp_path / "plan.json")
    assert Plan.load_file(tmp_path / "plan.json") == plan
    assert plan.predicted["tpot"].origin in ("interpolated", "extrapolated")
    assert 0 < plan.predicted["tpot"].band < 1
    (tmp_path / "other.json").write_text('{"model": 3}')
    with pytest.raises(ConfigurationError, match="not a plan"):
        Plan.load_file(tmp_path / "other.json")


@pytest.mark.parametrize(("ep", "slots"), [(4, 0), (4, 5), (16, 0), (16, 2), (64, 0), (64, 1)])
def test_placements_of_plans_are_valid(ep: int, slots: int) -> None:
    model = preset("ref-16l")
    deployment = Deployment(model=model, layout=Layout(ep=ep), precision=Precision.of(model), slots=slots)
    placement = placement_of(deployment)
    placement.check(model, deployment.layout)
    assert max(len(group) for group in placement.slots[0]) == deployment.held


def test_command_prints_front_baseline_and_writes_the_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "plan.json"
    load = "prompt=2000,output=500,sequences=128"
    assert run_plan(preset("ref-16l"), "h100-ib", 16, load, baseline="tp8pp2", out=path) == 0
    text = capsys.readouterr().out
    for words in (
        "Pareto front",
        "Best:",
        "Why:",
        "One expert per GPU",
        "Against the baseline",
        "Rejected",
        "Plan written",
    ):
        assert words in text
    assert Plan.load_file(path).load.sequences == 128


def test_a_baseline_has_the_copies_of_the_recorded_routing_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, recorded = preset("qwen3-30b-a3b"), tmp_path / "routing.trace"
    shape = (len(model.moe_layers), 64, model.router.top_k)
    index_T, none_T = np.arange(64), np.zeros(64, np.int64)
    ids_LTK = np.broadcast_to(np.arange(model.router.top_k), shape)  # which lie on one node, even on one GPU
    sample = Sample(ids_LTK, none_T, index_T, none_T, none_T, index_T)
    RoutingTrace.of_sample(TraceModel.of(model), sample).save(recorded)

    def baseline(routing: Path | None) -> float:
        run_plan(model, "h100-ib", 16, "prompt=2000,sequences=4096", routing=routing, baseline="ep16")
        line = re.search(r"Baseline ep16: ([\d,]+) output tok/s", capsys.readouterr().out)
        assert line
        return float(line[1].replace(",", ""))

    assert baseline(recorded) > 1.02 * baseline(None)


def test_a_baseline_that_does_not_fill_the_gpus() -> None:
    with pytest.raises(ConfigurationError, match="baseline"):
        run_plan(preset("ref-16l"), "h100-ib", 16, "sequences=16", baseline="tp3", options=Options())


@pytest.mark.parametrize("output", [0, 1])
def test_where_nothing_is_decoded_prompts_count(output: int, tmp_path: Path) -> None:
    """A server for prefill alone: no TPOT, prompts' tokens, no more prompts at once than a step takes."""
    load = f"prompt=2000,output={output},ttft=1s"
    found = find("deepseek-v3", 32, load)
    best = found.best
    assert not best.decodes
    assert best.rate_per_gpu == max(score.input_rate.value / 32 for score in found.scores)
    assert best.request_rate.value == pytest.approx(best.input_rate.value / 2000)
    assert best.output_rate.value == pytest.approx(output * best.request_rate.value)
    assert all(score.batch * 2000 <= Options().chunk_tokens and score.ttft.value <= 1 for score in found.scores)
    assert [score.ttft.value for score in found.front] == sorted(score.ttft.value for score in found.front)
    assert len(found.front) > 1
    assert "prompt tok/s" in headline(best)
    plan_of(best, cluster("dgx-h100"), Load.parse(load), "published").save(tmp_path / "plan.json")
    assert "tpot" not in Plan.load_file(tmp_path / "plan.json").predicted


def test_prompts_alone_meet_a_rate() -> None:
    most = find("deepseek-v3", 32, "prompt=2000,output=1").best.request_rate.value
    assert find("deepseek-v3", 32, f"prompt=2000,output=1,rate={most / 2:.1f}").best.request_rate.value >= most / 2
    with pytest.raises(CapacityError, match="requests/s"):
        find("deepseek-v3", 32, f"prompt=2000,output=1,rate={2 * most:.1f}")
