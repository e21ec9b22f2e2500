from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from soloist.engine.options import EngineOptions
from soloist.planner.calibration import Calibration
from soloist.planner.kernels import OWN_LIBRARY, Kernels, Parts
from soloist.planner.layer import Batch, Deployment, expert_load, moe_parts
from soloist.planner.memory import REPLICATED, REPLICATED_NVLINK
from soloist.planner.precision import Precision
from soloist.planner.refit import load_calibration
from soloist.planner.runtime import SYSTEM, Runtime
from soloist.planner.step import Overlap, StepModel
from soloist.specs.cluster import cluster
from soloist.specs.layout import Layout
from soloist.specs.presets import preset

PUBLISHED = Calibration.published()
KERNELS = Kernels(cluster("dgx-h100"), PUBLISHED)
RUNTIME = Runtime.named("soloist", PUBLISHED)


def deployment(layout: str, model: str = "qwen3-30b-a3b", precision: str = "bf16") -> Deployment:
    return Deployment(model=preset(model), layout=Layout.parse(layout), precision=Precision.named(precision))


def step(layout: str, overlap: Overlap = "auto", model: str = "qwen3-30b-a3b") -> StepModel:
    return StepModel(deployment(layout, model), KERNELS, RUNTIME, overlap)


@given(st.sampled_from(["ep16", "tp8", "tp8pp2", "attn8ep8", "attn2ep8tp2", "pp2ep8"]), st.integers(1, 512))
@settings(max_examples=30, deadline=None)
def test_more_work_never_takes_less_time(layout: str, sequences: int) -> None:
    model = step(layout)
    one = model.decode(sequences, 1000).seconds.value
    assert one <= model.decode(2 * sequences, 1000).seconds.value
    assert one <= model.decode(sequences, 4000).seconds.value
    assert model.prefill(16 * sequences, 500).seconds.value <= model.prefill(32 * sequences, 500).seconds.value


@pytest.mark.parametrize("layout", ["ep16", "tp8pp2", "attn8ep8", "attn4ep8tp2"])
def test_parts_add_up(layout: str) -> None:
    for cost in (step(layout).decode(64, 2000), step(layout).prefill(4096, 1000)):
        assert sum(part.value for part in cost.parts.values()) == pytest.approx(cost.seconds.value)
        assert cost.parts[cost.bottleneck].value == max(part.value for part in cost.parts.values())


def test_overlap_is_taken_where_it_pays() -> None:
    for sequences in (4, 512):
        off, on, auto = (step("ep64", o).decode(sequences, 1000).seconds.value for o in ("off", "on", "auto"))
        assert auto == pytest.approx(min(off, on))
    assert step("ep64").decode(512, 1000).is_overlapped
    assert not step("ep64").decode(4, 1000).is_overlapped


def test_a_pipeline_of_one_sequence_takes_its_stages_in_turn() -> None:
    alone, piped = step("tp2").decode(1, 1000).seconds.value, step("tp2pp2").decode(1, 1000).seconds.value
    assert piped == pytest.approx(alone, rel=0.15)


def test_pipeline_bubbles_shrink_with_chunks() -> None:
    model = step("tp2pp4")
    assert (
        model.prefill(4096, 500, micro_batches=2).seconds.value
        > model.prefill(4096, 500, micro_batches=16).seconds.value
    )


def test_a_group_that_shares_all_tokens_may_replicate_instead_of_dispatching() -> None:
    parts = moe_parts(deployment("attn8ep8"), Batch("decode", 8, 500), KERNELS, RUNTIME, None)
    assert "expert exchange" in parts
    assert "dispatch" not in parts
    spread = moe_parts(deployment("ep16"), Batch("decode", 8, 500), KERNELS, RUNTIME, None)
    assert {"dispatch", "combine"} <= spread.keys()


def test_replicas_share_an_expert_s_tokens() -> None:
    once, twice = (
        expert_load(msgspec.structs.replace(deployment("ep8"), slots=slots), Batch("decode", 1, 1))
        for slots in (16, 32)
    )
    assert once.pairs == twice.pairs
    assert twice.active <= 2 * once.active


def test_traces_take_the_place_of_even_routing() -> None:
    even = deployment("ep32", "deepseek-v3")
    near = msgspec.structs.replace(even, node_copies=1.2, rank_copies=3.0)
    times = [StepModel(d, KERNELS, RUNTIME).prefill(8192, 500).seconds.value for d in (even, near)]
    assert times[1] < times[0]


def test_unknown_systems_have_what_all_have_in_common_but_no_pipeline_losses() -> None:
    unknown, vllm = Runtime.named("unheard-of", PUBLISHED), Runtime.named("vllm", PUBLISHED)
    assert unknown["pipeline"] == SYSTEM["pipeline"].guess > vllm["pipeline"]
    assert set(Runtime.assumed("x").constants) == set(SYSTEM)


def test_an_exchange_that_was_never_measured_is_a_bound() -> None:
    ragged = msgspec.structs.replace(deployment("ep16"), mode="ragged")
    parts = moe_parts(ragged, Batch("decode", 64, 500), KERNELS, RUNTIME, None)
    assert parts["dispatch"].origin == "bound"


# -- our own engine inside a node --------------------------------------------------------------------------------------
@pytest.mark.parametrize("sums", [False, True])
@pytest.mark.parametrize(("ranks", "per_node"), [(2, 8), (8, 8), (16, 8), (3, 8)])
def test_the_engine_replicates_as_many_tokens(sums: bool, ranks: int, per_node: int) -> None:
    filled = EngineOptions(nvlink_sums=sums, gpus_per_node=per_node).on("cuda", attention_ranks=ranks)
    known = Kernels(msgspec.structs.replace(cluster("dgx-h100"), gpus_per_node=per_node), PUBLISHED, nvlink_sums=sums)
    assert filled.replicate_below == known.replicates_below(ranks)
    assert filled.replicate_below == (REPLICATED_NVLINK if sums and per_node % ranks == 0 else REPLICATED)


def test_few_tokens_are_summed_and_many_are_exchanged_in_a_group_of_own_ranks() -> None:
    used = load_calibration("2xh100")
    runtime = Runtime.named("soloist", used)

    def parts(sequences: int, sums: bool) -> Parts:
        own = Kernels(cluster("2xh100"), used, OWN_LIBRARY, nvlink_sums=sums)
        return moe_parts(deployment("tp2"), Batch("decode", sequences, 200), own, runtime, None)

    few, many = parts(32, sums=False), parts(256, sums=False)
    assert "expert exchange" in few
    assert "expert exchange" not in many
    assert few["dispatch"].value < many["dispatch"].value
    assert "expert exchange" in parts(256, sums=True)
    assert parts(32, sums=True)["expert exchange"].value < few["expert exchange"].value
