"""A plan file as the engine takes it: what it sets, and for whom it is refused."""

from __future__ import annotations

import msgspec
import pytest

from soloist.engine.options import EngineOptions
from soloist.engine.planned import check_planned, count_gpus, planned_options
from soloist.errors import ConfigurationError
from soloist.planner.calibration import Calibration
from soloist.planner.halves import Halves
from soloist.planner.kernels import Kernels
from soloist.planner.layer import Deployment
from soloist.planner.plan import Plan, plan_of
from soloist.planner.precision import Precision
from soloist.planner.runtime import Runtime
from soloist.planner.score import Options, Scorer
from soloist.specs.cluster import cluster
from soloist.specs.layout import Layout
from soloist.specs.presets import preset
from soloist.specs.workload import Load


def plan(model="ref-16l", layout="ep2", batch=10.5, load="prompt=100,output=55,prefix=0.5,ttft=2s") -> Plan:
    machine, wanted = cluster("h100-ib"), Load.parse(load)
    calibration = Calibration.published()
    scorer = Scorer(Kernels(machine, calibration), Runtime.named("soloist", calibration), wanted)
    spec = preset(model)
    deployment = Deployment(model=spec, layout=Layout.parse(layout), precision=Precision.of(spec))
    return plan_of(scorer.score(deployment, Options(chunk_tokens=4096), batch), machine, wanted, "published")


def test_sizes_are_those_planned():
    options = EngineOptions.of(planned_options(plan()))
    assert (options.max_sequences, options.max_batch_tokens, options.gpus_per_node) == (11, 4096, 8)
    assert options.kv_tokens == 11 * 192  # 155 tokens in whole blocks of a GPU's cache
    assert options.micro_batches == 0  # as many as there are stages
    assert options.network_link == "50000,4"


def test_steps_are_captured_as_planned():
    made = plan()
    assert planned_options(made)["mixed_graphs"] == "auto"
    captured = msgspec.structs.replace(made.options, mixed_graphs="256,4096")
    options = EngineOptions.of(planned_options(msgspec.structs.replace(made, options=captured)))
    assert options.on("cuda").mixed_buckets() == (256, 4096)


def test_halves_overlap_where_planned():
    made = plan()
    assert planned_options(made)["overlap"] == "off"
    halved = msgspec.structs.replace(made, halves=Halves(prefill=2048))
    assert EngineOptions.of(planned_options(halved)).overlap == "prefill=2048"
    assert planned_options(msgspec.structs.replace(halved, system="vllm"))["overlap"] == "off"


def test_a_plan_is_for_one_model():
    check_planned(plan(), msgspec.structs.replace(preset("ref-16l"), name="other", eos_ids=(7,)), "cpu")
    other = msgspec.structs.replace(
        preset("ref-16l"), router=msgspec.structs.replace(preset("ref-16l").router, top_k=1)
    )
    with pytest.raises(
        ConfigurationError, match=r"plan.model.router.top_k = \d+: ref-16l has 1: the plan is of another"
    ):
        check_planned(plan(), other, "cpu")


def test_a_plan_needs_its_gpus_unless_a_launcher_or_the_cpu_takes_their_place():
    made = plan(layout="ep64")
    with pytest.raises(ConfigurationError, match=r"plan.layout = 'ep64': the plan is for 64 GPUs, this host has"):
        check_planned(made, made.model, "auto", {})
    check_planned(made, made.model, "cpu", {})
    check_planned(made, made.model, "auto", {"RANK": "0", "WORLD_SIZE": "64", "LOCAL_RANK": "0"})


def test_hidden_gpus_do_not_count():
    assert count_gpus({"CUDA_VISIBLE_DEVICES": ""}) == 0


def test_a_precision_that_the_engine_does_not_have():
    with pytest.raises(ConfigurationError, match="plan.precision.experts = 'fp8'"):
        planned_options(msgspec.structs.replace(plan(), precision=Precision.named("fp8")))
