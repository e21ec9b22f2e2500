"""Where the tokens of a step go, and what that makes of its graphs and of the host's part."""

from __future__ import annotations

import pytest

from soloist.planner.halves import Halves
from soloist.planner.host import launches
from soloist.planner.kernels import OWN_LIBRARY, Kernels
from soloist.planner.layer import Deployment
from soloist.planner.precision import Precision
from soloist.planner.refit import load_calibration
from soloist.planner.runtime import Runtime
from soloist.planner.score import Options, Scorer
from soloist.planner.ways import way
from soloist.specs.cluster import cluster
from soloist.specs.layout import Layout
from soloist.specs.presets import preset
from soloist.specs.workload import Load


@pytest.mark.parametrize(
    ("text", "replicated", "sharded"),
    [
        ("ep1", "stays", "stays"), ("ep8", "inside", "inside"), ("tp8", "stays", "inside"), ("ep9", "across", "across"),
        ("attn8ep8", "stays", "inside"), ("attn4ep8", "inside", "inside"), ("attn8ep16", "across", "across"),
        ("dp8ep2", "inside", "inside"), ("dp2ep6", "across", "across"), ("pp4ep4", "inside", "inside"),
    ],
)  # fmt: skip
def test_ways_by_layout(text: str, replicated: str, sharded: str) -> None:
    layout = Layout.parse(text)
    assert (way(layout, 8, replicated=True), way(layout, 8)) == (replicated, sharded)


def test_replicas_send_even_replicated_tokens() -> None:
    layout = Layout.parse("attn8ep8")
    assert way(layout, 8, replicated=True, repeats=True) == "inside"


def scored(layout: str, batch: float = 16):
    used, spec = load_calibration("2xh200"), preset("qwen3-30b-a3b")
    deployment = Deployment(model=spec, layout=Layout.parse(layout), precision=Precision.of(spec))
    kernels = Kernels(cluster("hgx-h200"), used, OWN_LIBRARY)
    scorer = Scorer(kernels, Runtime.named("soloist", used), Load(prompt=2000))
    return scorer, scorer.score(deployment, Options(overlap="off"), batch)


def test_steps_across_nodes_are_in_no_graph() -> None:
    """The host starts their kernels, of prefill and of decode, and those of the exchange take it longer."""
    inside, one = scored("ep8")
    across, other = scored("ep16")
    assert inside.step_model(one.deployment, Options()).mixed_graphs
    assert not across.step_model(other.deployment, Options()).mixed_graphs
    assert not {"host"} & (one.decode.parts.keys() | one.prefill.parts.keys())
    model, layers = other.deployment.model, other.deployment.model.layers
    started = layers * launches(model, other.deployment.layout, crosses=True) * 100e-6
    assert other.decode.seconds.value > started
    assert other.decode.parts["host"].value > 0.9 * started
    assert other.prefill.seconds.value > started
    assert launches(model, other.deployment.layout, crosses=True) > launches(model, other.deployment.layout)


def test_activations_of_graphs_are_counted_where_there_are_graphs() -> None:
    (_, inside), (_, across) = scored("dp2ep8"), scored("ep16")
    assert inside.memory["activations"] > across.memory["activations"]


def test_memory_counts_halves_of_decode_alone() -> None:
    """A slow exchange of which decode hides all and prefill nothing: two whole windows, and room for less."""
    used, spec = load_calibration("2xh200"), preset("ref-16l")
    own, deployment = Runtime.named("soloist", used), Deployment(
        model=spec, layout=Layout.parse("ep8"), precision=Precision.of(spec)
    )  # fmt: skip
    slow = {"waiting": 20.0, "overlap_decode": 0.95, "overlap_prefill": 0.0}
    runtime = Runtime(name=own.name, constants=own.constants | slow)
    scorer = Scorer(Kernels(cluster("hgx-h200"), used, OWN_LIBRARY), runtime, Load(prompt=200))
    auto, off = Options(), Options(overlap="off")
    halved, whole = (scorer.score(deployment, options, 1024) for options in (auto, off))
    halves = scorer.halves(halved)
    assert halves == Halves(None, halves.decode)
    assert halves.decode
    assert halved.memory["exchange buffers"] == 2 * whole.memory["exchange buffers"]
    few = scorer.score(deployment, auto, halves.decode // 2)
    assert few.memory["exchange buffers"] == whole.memory["exchange buffers"], "no step of so few is halved"
    window, each = whole.memory["exchange buffers"], whole.memory["KV cache"] / 1024
    fewer = scorer.most_sequences(deployment, off) - scorer.most_sequences(deployment, auto)
    assert fewer == pytest.approx(window / each, rel=0.02)


def test_what_a_group_s_ranks_all_have_is_not_halved() -> None:
    """As in the engine: few tokens of attention groups of several ranks go whole."""
    used, spec = load_calibration("2xh200"), preset("qwen3-30b-a3b")
    deployment = Deployment(model=spec, layout=Layout.parse("attn2ep8"), precision=Precision.of(spec))
    scorer = Scorer(Kernels(cluster("hgx-h200"), used, OWN_LIBRARY), Runtime.named("soloist", used), Load(prompt=2000))
    found = scorer.halves(scorer.score(deployment, Options(overlap="on"), 1024))
    assert found == Halves(512, 512)
