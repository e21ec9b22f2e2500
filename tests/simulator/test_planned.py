"""Mixed steps cost what the planner says where all groups do the same, and sensible things in between."""

from __future__ import annotations

import numpy as np
import pytest

from soloist.planner.calibration import Calibration
from soloist.planner.kernels import Kernels
from soloist.planner.layer import Deployment
from soloist.planner.precision import Precision
from soloist.planner.runtime import Runtime
from soloist.planner.step import StepModel
from soloist.simulator.cost import StepWork
from soloist.simulator.planned import PlannedCost
from soloist.specs.cluster import cluster
from soloist.specs.layout import Layout
from soloist.specs.presets import preset

GROUPS = 32


def planned(layout: str = "ep32") -> PlannedCost:
    deployment = Deployment(
        model=preset("qwen3-30b-a3b"), layout=Layout.parse(layout), precision=Precision.named("bf16")
    )
    return PlannedCost(StepModel(deployment, Kernels(cluster("hgx-h100"), Calibration.published()), runtime()))


def runtime() -> Runtime:
    return Runtime.assumed("test")


def work(
    decodes: int = 0, prefills: int = 0, busy: int = GROUPS, imbalance: float = 1.0, alive: int = GROUPS
) -> StepWork:
    """The first `busy` groups decode sequences of 512 tokens and prefill a prompt from its start."""
    some = np.arange(GROUPS) < busy
    seen = prefills * (prefills + 1) // 2
    columns = (decodes * some, 512 * decodes * some, prefills * some, seen * some)
    return StepWork(*(column.astype(np.int64) for column in columns), alive=alive, imbalance=imbalance)


@pytest.mark.parametrize("layout", ["ep32", "pp2ep32"])
def test_equal_groups_cost_what_the_planner_says(layout: str) -> None:
    cost = planned(layout)
    stages = cost.model.deployment.layout.pp
    for step, ask in (
        (work(decodes=16), cost.model.decode(16, 512, micro_batches=1)),
        (work(prefills=1024), cost.model.prefill(1024, 512.5, micro_batches=1)),
    ):
        time = cost.step(step)
        assert stages * time.stage_s + time.once_s == pytest.approx(ask.seconds.value, rel=0.02)
        assert sum(time.parts.values()) == pytest.approx(time.stage_s + time.once_s)
    assert 0 < cost.band < 1
    assert sum(cost.origins.values()) == pytest.approx(1)


def test_everybody_waits_for_one_prefill_but_its_experts_are_shared() -> None:
    cost = planned()
    decode, one, all_ = (cost.step(step) for step in (work(16), work(0, 1024, busy=1), work(0, 1024)))
    assert decode.stage_s < one.stage_s < all_.stage_s
    assert one.parts["attention"] == all_.parts["attention"]
    assert one.parts["experts"] < 0.5 * all_.parts["experts"]


def test_more_of_anything_costs_more() -> None:
    cost = planned()
    base = cost.step(work(64)).stage_s
    assert cost.step(work(128)).stage_s > base
    assert cost.step(work(64, imbalance=4.0)).stage_s > base
    assert cost.step(work(64, 512)).stage_s > base
    assert cost.step(work(64, alive=GROUPS // 2)).stage_s >= base


def test_answers_are_kept() -> None:
    cost = planned()
    times = {cost.step(work(1000 + extra)).stage_s for extra in range(5)}
    assert len(times) == 1, "steps within the grid's 2 % are one"
