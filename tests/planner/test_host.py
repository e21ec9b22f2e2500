from __future__ import annotations

from itertools import pairwise

import msgspec
import pytest

from soloist.errors import ConfigurationError
from soloist.planner.calibration import Calibration, fit_machine
from soloist.planner.deployments import predict_run
from soloist.planner.domains import domains
from soloist.planner.host import KEPT_BYTES, WASTE, bucket_of, buckets_of, largest_eager, launches, sizes, slowest
from soloist.planner.kernels import OWN_LIBRARY, Kernels
from soloist.planner.layer import Deployment
from soloist.planner.memory import MemoryLoad, activation_bytes
from soloist.planner.precision import Precision
from soloist.planner.refit import load_calibration
from soloist.planner.runtime import Runtime
from soloist.planner.score import Options
from soloist.planner.step import StepCost, StepModel
from soloist.planner.tables import LaunchRow, RunRow
from soloist.specs.layout import Layout
from soloist.specs.presets import preset

OWN = load_calibration("2xh200")
RUNTIME = Runtime.named("soloist", OWN)


def prefill(
    layout: str, mixed_graphs: tuple[int, ...] = (), context: float = 1000, used: Calibration = OWN
) -> StepCost:
    spec = preset("qwen3-30b-a3b")
    assert used.machine is not None
    deployment = Deployment(model=spec, layout=Layout.parse(layout), precision=Precision.of(spec))
    kernels = Kernels(used.machine, used, OWN_LIBRARY)
    return StepModel(deployment, kernels, RUNTIME, "off", mixed_graphs).prefill(8192, context)


def test_launches_of_a_layer_as_they_were_profiled() -> None:
    qwen, deepseek = preset("qwen3-30b-a3b"), preset("deepseek-v3")
    assert [launches(qwen, Layout.parse(text)) for text in ("ep1", "pp2", "ep2", "tp2")] == [13, 13, 23, 29]
    assert launches(deepseek, Layout()) == 13 + 4 + 5


def test_the_slowest_of_more_hosts_is_slower() -> None:
    found = [slowest(ranks) for ranks in (1, 2, 8, 64)]
    assert found == sorted(found)
    assert found[0] == 1.0
    assert found[1] == pytest.approx(1 + 0.13 * 0.564, abs=0.005)  # 1 / sqrt(pi) standard deviations


def test_thin_shares_wait_for_the_host() -> None:
    """Of Qwen3's shape: 2.2 ms of kernels a layer on one GPU, about 1.6 where two share a batch."""
    assert "host" not in prefill("ep1").parts
    cost = prefill("tp2")
    assert cost.parts["host"].value > 0.3 * cost.seconds.value
    assert cost.seconds.origin == "extrapolated"
    assert cost.seconds.band > 0.15


def test_steps_in_graphs_do_not_wait() -> None:
    captured = prefill("tp2", (8192,))
    assert "host" not in captured.parts
    assert captured.seconds.value < 0.7 * prefill("tp2").seconds.value
    assert prefill("tp2", (8192,), context=4000).parts["host"].value > 0  # prompts of 8000 tokens are not captured
    row = RunRow(
        role="check", model="qwen3-30b-a3b", layout="tp2", phase="prefill", sequences=32, tokens=2000, seconds=1,
        mixed_graphs="8192",
    )  # fmt: skip
    eager = msgspec.structs.replace(row, mixed_graphs="off")
    assert predict_run(row, OWN, RUNTIME) < 0.7 * predict_run(eager, OWN, RUNTIME)


def test_a_lone_prompt_is_one_group_s_and_its_experts_all_groups() -> None:
    row = RunRow(
        role="check", model="qwen3-30b-a3b", layout="ep2", phase="prefill", sequences=1, tokens=2000, seconds=1,
        mixed_graphs="2048",
    )  # fmt: skip
    one, two = (predict_run(msgspec.structs.replace(row, sequences=sequences), OWN, RUNTIME) for sequences in (1, 2))
    assert 0.6 * two < one < 0.95 * two


def test_buckets_are_those_of_the_engine() -> None:
    of = preset("qwen3-30b-a3b"), Layout.parse("ep2")
    assert buckets_of("off", *of, 8192) == ()
    assert buckets_of("auto", *of, 8192) == sizes(*of, 8192)
    assert buckets_of("8192, 256,9000", *of, 8192) == (256, 8192)
    for text in ("many", "1", "256,,8", ""):
        with pytest.raises(ConfigurationError, match="mixed_graphs"):
            buckets_of(text, *of, 8192)
        with pytest.raises(ConfigurationError, match="mixed_graphs"):
            Options(mixed_graphs=text)
    assert bucket_of((256, 1024, 8192), 300) == 1024
    assert bucket_of((1024, 8192), 100) == 1024
    assert bucket_of((8192,), 7000) == 8192
    assert bucket_of((8192,), 5000) is None  # more than a third would be padding
    assert bucket_of((8192,), 9000) is None


@pytest.mark.parametrize(
    ("buckets", "longest", "largest"),
    [((), 100, 8192), ((64, 1024), 100, 8192), ((1024, 8192), 100, 5461), ((8192,), 100, 5461), ((8192,), 5000, 8192)],
)
def test_the_largest_step_without_a_graph(buckets: tuple[int, ...], longest: int, largest: int) -> None:
    assert largest_eager(buckets, 8192, longest) == largest
    if 0 < largest < 8192:
        assert bucket_of(buckets, largest) is None
        assert bucket_of(buckets, largest + 1)


def test_where_every_step_has_a_graph_none_is_left() -> None:
    found = sizes(preset("qwen3-30b-a3b"), Layout.parse("ep2"), 8192)
    assert largest_eager(found, 8192, 4000) == 0


def test_padding_of_a_graph_costs_projections_but_no_experts() -> None:
    deployment = Deployment(model=preset("qwen3-30b-a3b"), layout=Layout(), precision=Precision())
    model = StepModel(deployment, Kernels(OWN.machine, OWN, OWN_LIBRARY), RUNTIME, "off", (8192,))  # type: ignore[arg-type]
    part, whole = model.prefill(7000, 500).parts, model.prefill(8192, 500).parts
    assert part["projections"] == whole["projections"]
    assert part["experts"].value < 0.95 * whole["experts"].value


def test_a_measured_launch_takes_the_place_of_the_guess() -> None:
    rows = [LaunchRow(role="fit", gpu="H200", kernels=5, us=us) for us in (120.0, 124.0)]
    fitted = fit_machine("slow host", domains(OWN.machine)["host"], rows, OWN.machine)
    assert fitted.fitted["host/launch"].constants["launch_us"] == pytest.approx(122, rel=0.05)
    slow = prefill("tp2", used=fitted.over(OWN))
    assert slow.seconds.value > 1.3 * prefill("tp2").seconds.value
    assert slow.parts["host"].band < prefill("tp2").parts["host"].band


def test_sizes_left_to_the_engine() -> None:
    """All steps of thin layers; of thick ones those whose kernels the host takes longer to start."""
    thin, thick = (sizes(preset(model), Layout.parse("ep2"), 8192) for model in ("qwen3-30b-a3b", "ref-16l"))
    assert (thin[0], thin[-1], thick[-1]) == (64, 8192, 2048)
    assert all(bucket_of(thin, tokens) for tokens in (1, 700, 1100, 1500, 3000, 5400, 8192))
    assert max(above / below for below, above in pairwise(thin) if below >= 1024) <= WASTE
    assert sizes(preset("qwen3-30b-a3b"), Layout.parse("ep2"), 300) == (64, 128, 256)


def test_no_step_keeps_more_than_it_may() -> None:
    """DeepSeek-V3 on 8 GPUs: rows of all eight, each at all of its choices."""
    spec, layout = preset("deepseek-v3"), Layout.parse("ep8")
    found = sizes(spec, layout, 8192)
    assert found == (64, 128, 256, 512)
    load = MemoryLoad(sequences=1, longest=1, step_tokens=512, graph_rows=1)
    assert activation_bytes(spec, layout, load, "pushed", 32, "fp8") < KEPT_BYTES
