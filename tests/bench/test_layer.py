"""What the layer benchmark runs and counts, in Triton's interpreter: one process stands for each rank in turn."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import pytest
import torch

from soloist.bench import layer
from soloist.bench.floors import Machine
from soloist.bench.layer_parts import parts_of
from soloist.bench.layer_run import LayerRun
from soloist.bench.load import Load
from soloist.bench.report import Ceilings
from soloist.bench.shapes import Wanted
from soloist.bench.shared_experts import SharedRun
from soloist.bench.trace import Trace
from soloist.dispatch.forms import COPY, LATENCY, Form
from soloist.kernels.experts import ExpertTiles
from soloist.kernels.grouped_gemm import Tile
from soloist.kernels.language import AVAILABLE, INTERPRETED
from soloist.probes.gpus import Bench, OneGpu
from soloist.transport.base import Transport
from soloist.transport.symmetric import Watch

pytestmark = pytest.mark.skipif(not (AVAILABLE and INTERPRETED), reason="needs Triton and TRITON_INTERPRET=1")

CPU = torch.device("cpu")
LOAD = Load(tokens=4, d_model=16, top_k=2, experts=4, dtype=torch.float32, width=32)
TILE = Tile(16, 16, 16, warps=4, stages=2, programs=2)


def run_of(rank: int, load: Load, form: Form, gather: bool) -> LayerRun:
    small = replace(form, programs=3, block=16, weigh_block=16)
    return LayerRun(
        OneGpu(rank, 2, CPU, Watch(rank, (0, 1), CPU, 1.0)), load, small, 1, ExpertTiles(TILE, TILE, gather)
    )


@pytest.mark.parametrize(("form", "gather", "tp"), [(LATENCY, True, 2), (COPY, False, 1)], ids=["latency", "copy"])
def test_what_the_ranks_compute_adds_up_to_the_layer(form: Form, gather: bool, tp: int) -> None:
    runs = [run_of(rank, replace(LOAD, tp=tp), form, gather) for rank in range(2)]
    for run in runs:
        run.without_exchange()()
    shape = runs[0].shape
    own = slice(shape.order(0) * shape.capacity, shape.order(0) * shape.capacity + LOAD.tokens)
    parts = [run.dispatcher.lanes[0].y_RD(run.shape)[own] for run in runs]
    runs[0].compare(parts[0] + parts[1], runs[0].x_TD, runs[0].choice)


def test_shares_of_experts_add_up_for_tokens_that_all_ranks_have() -> None:
    runs = [run_of(rank, replace(LOAD, tp=2), LATENCY, gather=True) for rank in range(2)]
    shared = [SharedRun(run, run.tiles) for run in runs]
    runs[0].compare(shared[0].partial() + shared[1].partial(), shared[0].x_TD, shared[0].choice)


def test_a_floor_counts_the_busiest_rank() -> None:
    run = run_of(0, LOAD, LATENCY, gather=True)
    ceilings = Ceilings(flops=1e9, memory=1e30)
    rows = max(int((group == 0).sum()) + int((other == 0).sum()) for group, other in [_groups(), _groups(swapped=True)])
    seconds, bound = run.floor(ceilings)
    assert seconds == pytest.approx(rows * 6 * 16 * 32 / 1e9)
    assert bound.endswith("TFLOP")
    seconds, bound = run.floor(Ceilings(flops=1e30, memory=1e9))
    assert seconds == pytest.approx(2 * 3 * 16 * 32 * 4 / 1e9)
    assert bound.endswith("GB of weights")


def _groups(swapped: bool = False) -> list[torch.Tensor]:
    groups = [choice.group_TK for _, choice in LOAD.everybody(2, 0, CPU)]
    return [1 - group for group in groups] if swapped else groups


def test_every_part_runs_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times aside."""

    def once(bench: OneGpu, *works, **settings) -> list[float]:
        return [float(work() is None) + 1.0 for work in works]

    monkeypatch.setattr(OneGpu, "seconds", once)
    monkeypatch.setattr("soloist.bench.layer_parts.captured", lambda work: work)
    points = list(parts_of(run_of(0, LOAD, COPY, gather=False), "case", Machine("machine", Ceilings()), 0.0))
    assert [point.variant for point in points] == [
        "expand",
        "gate and up",
        "down",
        "weighted sum",
    ]
    assert all(0 < point.ceiling_s < point.seconds for point in points)


def test_every_form_is_measured_and_the_chosen_one_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times aside."""
    run = run_of(0, LOAD, LATENCY, gather=True)
    monkeypatch.setattr(layer, "LayerRun", lambda bench, load, form: replace(run, load=load, form=form))
    monkeypatch.setattr(LayerRun, "check", lambda run: None)
    monkeypatch.setattr(LayerRun, "measure", lambda run, *settings: (2e-6, 1e-6))
    machine = Machine("machine", Ceilings())
    measured = layer.Measured(cast(Bench, run.bench), 1, 0.0, Trace(None), machine, cast(Transport, None))
    points = list(measured.by_form("case", LOAD))
    assert [point.variant for point in points] == ["one-sided, latency, chosen", "one-sided, push", "one-sided, copy"]
    assert points[0].shape["exposed"] == "50.0%"


def test_forms_are_compared_by_tokens() -> None:
    loads = [(name, load.tokens) for name, load in layer._by_tokens(Wanted(), 2)]
    assert loads[:4] == [("prefill, two-expert", tokens) for tokens in layer.FORM_TOKENS]
    assert len(loads) == 3 * len(layer.FORM_TOKENS)
    asked = Wanted(model="qwen3-30b-a3b", tokens=768)
    assert [(name, load.tokens) for name, load in layer._by_tokens(asked, 2)] == [("qwen3-30b-a3b", 768)]
