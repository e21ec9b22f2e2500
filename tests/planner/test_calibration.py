from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from soloist.errors import ConfigurationError
from soloist.planner.calibration import Calibration, Fitted, Found, fit_machine
from soloist.planner.deployments import own_runs, predict_run
from soloist.planner.estimate import Estimate, total
from soloist.planner.exchange import ExchangeShape
from soloist.planner.fitting import Prior, centred, fit
from soloist.planner.kernels import Kernels
from soloist.planner.refit import calibrate_from, load_calibration, record
from soloist.planner.runtime import OWN, Runtime
from soloist.planner.tables import RunRow
from soloist.planner.validate import validate
from soloist.specs.cluster import cluster


def test_constants_are_recovered_and_unseen_ones_keep_their_prior() -> None:
    rows = [(x, (3.0 + 0.5 * x,)) for x in (1.0, 10.0, 100.0)]
    priors = {"floor": Prior(1, 2), "slope": Prior(1, 2), "other": Prior(7, 0.5)}
    found = fit(lambda c, x: (c["floor"] + c["slope"] * x,), rows, priors)
    assert found == pytest.approx({"floor": 3, "slope": 0.5, "other": 7}, rel=0.02)


def test_one_odd_row_does_not_decide() -> None:
    rows = [(x, (2.0 * x,)) for x in (1.0, 2.0, 4.0, 8.0)] + [(3.0, (60.0,))]
    assert fit(lambda c, x: (c["slope"] * x,), rows, {"slope": Prior(1, 2)})["slope"] == pytest.approx(2, rel=0.1)


def test_narrower_levels_start_from_wider_ones() -> None:
    assert centred({"a": Prior(1, 2, 4)}, {"a": 5}, 0.5) == {"a": Prior(4, 0.5, 4)}


def test_saved_and_loaded(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    Calibration.published().save(path)
    assert Calibration.load(path) == Calibration.published()
    path.write_text("{}")
    with pytest.raises(ConfigurationError, match="not a calibration"):
        Calibration.load(path)
    with pytest.raises(ConfigurationError, match="cannot be read"):
        Calibration.load(tmp_path / "none.json")


def test_a_machine_s_own_constants_come_first() -> None:
    own = Calibration(name="mine", fitted={"experts/gemm": Fitted(constants={"a": 1.0}, band=0.05, rows=1)})
    both = own.over(Calibration.published())
    assert both.find("experts", "gemm").constants == {"a": 1.0}
    assert both.find("attention", "decode").fitted.rows > 1


def test_the_narrowest_level_is_found_and_unknown_domains_are_named() -> None:
    found = Calibration.published().find("dispatch", "low_latency", "deepep-v1", "no such fabric")
    assert found.key == "dispatch/low_latency/deepep-v1"
    assert not found.exact
    with pytest.raises(ConfigurationError, match="nonsense"):
        Calibration.published().find("nonsense", "x")


def exchange(ranks: int, tokens: float) -> Estimate:
    shape = ExchangeShape(
        mode="low_latency", ranks=ranks, ranks_per_node=8, tokens=tokens, row_bytes=7392, top_k=8, experts=256
    )
    return Kernels(cluster("dgx-h100"), Calibration.published()).exchange(shape, "dispatch")


def test_origin_says_where_a_number_comes_from() -> None:
    assert exchange(64, 128).origin == "measured"
    assert exchange(32, 100).origin == "interpolated"
    far = exchange(1024, 128)
    assert far.origin == "extrapolated"
    assert far.band > exchange(32, 100).band


def test_what_no_point_had_is_extrapolated_as_far_as_can_be() -> None:
    """On a CPU the small kernels are measured without the columns of attention."""
    points = [{"tokens": tokens, "columns": 0.0} for tokens in (1.0, 16.0)]
    found = Found("small", Fitted(constants={}, band=0.1, rows=2, points=points, misfits=[0.1, 0.2]), exact=True)
    assert found.estimate(1.0, {"tokens": 4, "columns": 0}).origin == "interpolated"
    assert found.estimate(1.0, {"tokens": 4, "columns": 512}) == Estimate(pytest.approx(1.0), 0.6, "extrapolated")


def test_a_sum_is_as_good_as_its_worst_part_that_matters() -> None:
    solid, shaky = Estimate(10.0, 0.02, "measured"), Estimate(5.0, 0.2, "extrapolated")
    both = total([solid, shaky])
    assert (both.value, both.origin) == (15.0, "extrapolated")
    assert both.band == pytest.approx((10 * 0.02 + 5 * 0.2) / 15)
    assert total([solid, shaky.times(0.001)]).origin == "measured"
    assert total([]).value == 0


def test_own_measurements_make_a_calibration_and_are_validated(tmp_path: Path) -> None:
    shape = {"library": "nccl", "fabric": "2xH100-NVLink", "gpus": 2, "collective": "all_reduce"}
    lines = [
        {"what": "collectives", "shape": {**shape, "bytes": size}, "us": us, "machine": "here", "ceiling": 1}
        for size, us in ((2**20, 40.0), (2**26, 251.0), (2**28, 894.0))
    ]
    path = tmp_path / "own.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in [*lines, {"what": "weather"}]))
    own = calibrate_from(path, "mine")
    assert set(own.fitted) == {"collectives/nccl", "collectives/nccl/all_reduce"}
    both = own.over(Calibration.published())
    report = validate(path, both)
    assert report.mape("collectives", "fit") < 0.1
    path.write_text("not json")
    with pytest.raises(ConfigurationError, match="line 1"):
        validate(path)


def measured(path: Path, microseconds: dict[int, float]) -> Path:
    """A file of `soloist calibrate` with one matrix multiplication for each number of rows."""
    gpu = {"name": "mine", "tflops": {"bf16": 100.0}, "memory_GB": 10.0, "memory_TBps": 1.0}
    lines = [{"what": "machine", "cluster": {"name": "1xmine", "gpu": gpu, "gpus_per_node": 1}, "machine": "x"}]
    lines += [
        {"what": "matmul", "shape": {"gpu": "mine", "dtype": "bf16", "m": m, "n": 1024, "k": 1024}, "us": us}
        for m, us in microseconds.items()
    ]
    path.write_text("".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines))
    return path


def test_points_of_one_machine_correct_the_formula_near_them(tmp_path: Path) -> None:
    """A kink that no roofline has: the prediction is right there, and elsewhere it is the formula's."""
    times = {m: 5.0 + 0.03 * m for m in (1, 4, 16, 64, 256, 1024, 4096)}
    times[64] *= 1.5
    path = measured(tmp_path / "mine.jsonl", times)
    used = load_calibration(path)
    kernels = Kernels(cluster(str(path)), used)
    at = {m: kernels.matmul(m, 1024, 1024, "bf16") for m in times}
    assert 1e6 * at[64].value == pytest.approx(times[64], rel=0.08)
    assert at[64].origin == "measured"
    assert all(1e6 * at[m].value == pytest.approx(times[m], rel=0.15) for m in (1, 16, 1024, 4096))
    assert kernels.matmul(64, 1 << 17, 1 << 17, "bf16").origin == "extrapolated"


def test_what_the_fit_found_travels_in_the_file(tmp_path: Path) -> None:
    path = measured(tmp_path / "mine.jsonl", {1: 5.0, 64: 7.0, 1024: 40.0})
    found = calibrate_from(path, "mine")
    with path.open("ab") as file:
        file.write(record(found))
    assert load_calibration(path).fitted["matmul/dense"] == found.fitted["matmul/dense"]
    assert load_calibration(path).machine == cluster(str(path))
    assert load_calibration(path).has("dispatch/low_latency")  # published, below it


def test_files_that_are_no_calibration(tmp_path: Path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    for call, message in ((load_calibration, "holds no records of"), (cluster, "no record of a machine")):
        with pytest.raises(ConfigurationError, match=message):
            call(str(empty))
    with pytest.raises(ConfigurationError, match="cannot be read"):
        load_calibration(tmp_path / "none.jsonl")
    empty.write_text('{"what":"calibration","calibration":{"name":1}}\n')
    with pytest.raises(ConfigurationError, match="is not a calibration file"):
        load_calibration(empty)


def test_runs_of_our_own_engine_are_predicted_and_tell_its_costs(tmp_path: Path) -> None:
    """A step's fixed cost that was made up is found again, and carries over to a model of another depth."""
    used = load_calibration("2xh100")
    known = Runtime(name="soloist", constants={**Runtime.assumed("soloist", OWN).constants, "step_us": 400.0})

    def run(model: str, layout: str, phase: str, sequences: int, tokens: float) -> RunRow:
        row = RunRow(
            role="fit", model=model, layout=layout, phase=phase, sequences=sequences, tokens=tokens, seconds=1.0
        )  # fmt: skip
        return msgspec.structs.replace(row, seconds=predict_run(row, used, known))

    points = [run("qwen3-30b-a3b@8", layout, "decode", n, 192) for layout in ("ep2", "tp2") for n in (1, 32, 256)]
    found = fit_machine("mine", (own_runs(used),), points, used.machine).fitted["runs/soloist"]
    assert found.constants["step_us"] == pytest.approx(400, rel=0.15)
    far = run("mixtral-8x7b", "ep2", "decode", 128, 400)
    again = predict_run(far, used, Runtime(name="soloist", constants=found.constants))
    assert again == pytest.approx(far.seconds, rel=0.05)


def test_lines_of_the_offline_benchmark_are_validated(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    line = {"what": "TPOT", "model": "ref-16l@4", "layout": "ep2", "shape": "256", "seconds": 7e-3, "bound_by": "bytes"}
    path.write_text(json.dumps(line) + "\n" + json.dumps({**line, "what": "prefill", "shape": "8x8000"}) + "\n")
    report = validate(path, load_calibration("2xh100"))
    assert [(row.table, row.role, row.metric) for row in report.rows] == [("runs", "check", "time [s]")] * 2
    skipped = validate(path)
    assert not skipped.rows
    assert "names no machine" in skipped.skipped[0]


@pytest.mark.parametrize(("name", "same_gpu"), [("hgx-h200", True), ("hgx-h20", False), ("hgx-h100", False)])
def test_an_exchange_is_measured_on_the_gpu_of_that_name_only(name: str, same_gpu: bool) -> None:
    """`H20` stands in `2xH200`, and is another GPU."""
    kernels = Kernels(cluster(name), load_calibration("2xh200"), "soloist")
    shape = ExchangeShape(
        mode="ragged", ranks=2, ranks_per_node=2, tokens=4096, row_bytes=4096, top_k=8, experts=128
    )  # fmt: skip
    assert (kernels.exchange(shape, "dispatch").origin != "extrapolated") == same_gpu
