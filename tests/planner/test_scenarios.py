from __future__ import annotations

import json
from pathlib import Path

import pytest

from soloist.errors import ConfigurationError
from soloist.planner import bounds
from soloist.planner.calibration import Calibration
from soloist.planner.checks import run_scenarios
from soloist.planner.claims import Finding, findings, judge
from soloist.planner.measures import MEASURES, Measure
from soloist.planner.precision import Precision
from soloist.planner.scenarios import Case, cases, load_scenarios
from soloist.planner.sweep import DEGREES, sweep
from soloist.specs.presets import preset
from soloist.specs.workload import Load


@pytest.fixture(scope="module")
def found() -> dict[tuple[str, str, str], Finding]:
    every = cases(load_scenarios(), Calibration.published())
    return {(f.scenario, f.case, f.claim): f for case in every for f in findings(case)}


@pytest.mark.parametrize(
    ("claimed", "bound", "predicted", "higher", "verdict"),
    [
        (120, 100, 80, True, "impossible"), (95, 100, 80, True, "weak"), (82, 100, 80, True, "plausible"),
        (50, 100, 80, True, "beaten"), (1, 2, 3, False, "impossible"), (2.2, 2, 3, False, "weak"),
        (3.1, 2, 3, False, "plausible"), (9, 2, 3, False, "beaten"),
    ],
)  # fmt: skip
def test_verdicts(claimed: float, bound: float, predicted: float, higher: bool, verdict: str) -> None:
    assert judge(claimed, Measure("x", bound, predicted, 0.1, "", higher, "")) == verdict


def test_every_claim_of_every_scenario_is_judged(found: dict[tuple[str, str, str], Finding]) -> None:
    scenarios = load_scenarios()
    assert len(scenarios) == 8
    assert {name for name, _, _ in found} == {scenario.name for scenario in scenarios}
    assert {key for scenario in scenarios for key in scenario.claims} <= MEASURES.keys()
    assert all(finding.reason for finding in found.values())


def test_no_prediction_is_better_than_its_bound(found: dict[tuple[str, str, str], Finding]) -> None:
    higher = {
        "TPS (prompt tokens)",
        "TPS (output tokens)",
        "sustained TFLOP/s a GPU",
        "throughput gain",
        "latency gain",
    }
    for finding in found.values():
        if finding.claim in higher:
            assert finding.predicted <= finding.bound * 1.001
        if finding.claim in ("TPOT", "token transfer", "all-reduce"):
            assert finding.predicted >= finding.bound


def test_arithmetic_of_the_bounds() -> None:
    """7.8 to 16.3 GFLOP a token at 10,000 tokens of context, as the scenarios' own notes work out."""
    low, high = (bounds.flops_per_token(preset(name), 5000) / 1e9 for name in ("ref-16l-mlp-top1", "ref-16l"))
    assert low == pytest.approx(7.8, rel=0.02)
    assert high == pytest.approx(16.3, rel=0.02)


@pytest.mark.parametrize(
    ("scenario", "case", "claim", "verdict"),
    [
        ("ep16", "ref-16l ep16", "TPOT", "impossible"),
        ("ep16", "ref-16l ep16", "TPS (output tokens)", "impossible"),
        ("ep16", "ref-16l ep16", "memory a GPU", "impossible"),
        ("baseline-tp8-pp2", "ref-16l tp8pp2", "TPS (prompt tokens)", "beaten"),
        ("ep64-disjoint-layers", "ref-4l pp4ep16", "throughput gain", "weak"),
        ("ep64-tp2", "ref-16l ep64tp2", "throughput gain", "weak"),
        ("large-ep-deepseek-shape", "ref-61l ep64", "network bandwidth a GPU", "impossible"),
    ],
)
def test_known_verdicts(
    found: dict[tuple[str, str, str], Finding], scenario: str, case: str, claim: str, verdict: str
) -> None:
    assert found[scenario, case, claim].verdict == verdict


def test_reasons_name_units_and_per_gpu_figures(found: dict[tuple[str, str, str], Finding]) -> None:
    assert "unit mistaken" in found["ep16", "ref-16l ep16", "TPOT"].reason
    assert "0.94 x per GPU" in found["ep64-disjoint-layers", "ref-4l pp4ep16", "throughput gain"].reason
    assert "0.60 x per GPU" in found["ep64-tp2", "ref-16l ep64tp2", "throughput gain"].reason


def test_kv_cache_is_in_the_memory() -> None:
    scenario = next(s for s in load_scenarios() if s.name == "ep16")
    case = Case(scenario, "ref-16l", "ep16", Calibration.published())
    assert case.score.memory["KV cache"] == pytest.approx(335.5e9 / 16, rel=0.01)  # in whole blocks


def test_sweep_to_1024() -> None:
    load = Load.parse("prompt=2000,output=500,skew=0.8")
    points = sweep(preset("ref-16l"), "h100-ib", Precision.named("bf16"), load, 32, Calibration.published())
    assert tuple(point.ep for point in points) == DEGREES
    assert all(0 <= point.network <= 1 for point in points)
    assert points[0].lost > points[-1].lost >= 0  # replicas heal imbalance
    assert points[0].imbalance > points[-1].imbalance >= 1


def test_command_prints_and_writes_one_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "scenarios.html"
    assert run_scenarios(html=path) == 0
    assert "impossible" in capsys.readouterr().out
    text = path.read_text()
    assert text.count("<svg") == 2
    assert "src=" not in text  # nothing is fetched
    assert "ep64-disjoint-layers" in text


def test_command_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_scenarios(as_json=True) == 0
    document = json.loads(capsys.readouterr().out)
    assert {"scenario", "case", "claimed", "bound", "predicted", "verdict", "reason"} <= document["findings"][0].keys()


def test_nonsense_in_a_scenario_file(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    for text, said in (
        ("scenarios: [{name: x}]", "missing required field `about`"), ("", "missing required field `scenarios`"),
        ("clusters: {}", "a list of entries with name, about"), ("scenarios: [1\n", "is not YAML: line 2: "),
        ("a\x00", "is not YAML: "),
    ):  # fmt: skip
        path.write_text(text)
        with pytest.raises(ConfigurationError, match=said) as caught:
            load_scenarios(path)
        assert "\n" not in str(caught.value)
    path.write_text(
        "scenarios: [{name: x, about: y, models: [ref-16l], cluster: h100-ib, layouts: [ep16], load: 'sequences=16', "
        "claims: {joy: 1}}]"
    )
    path.write_text(path.read_text().replace("sequences=16", "output=1"))
    with pytest.raises(ConfigurationError, match="x.load.output = 1"):
        list(cases(load_scenarios(path), Calibration.published()))
    path.write_text(path.read_text().replace("output=1", "sequences=16"))
    with pytest.raises(ConfigurationError, match="joy"):
        run_scenarios(scenarios=path)
