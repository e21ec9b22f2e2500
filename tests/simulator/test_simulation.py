"""Requests through virtual time: closed forms, conservation, and skipping that changes nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from soloist.errors import ConfigurationError
from soloist.placement.balance import balance
from soloist.placement.placement import Placement
from soloist.simulator.arrivals import Arrivals, arrivals
from soloist.simulator.losses import Loss
from soloist.simulator.report import result_of
from soloist.simulator.routing import Drift, Routing
from soloist.simulator.simulation import Simulation
from soloist.specs.workload import Load
from tests.simulator.cases import Constant, requests, simulate


def times_of(simulation: Simulation) -> tuple[np.ndarray, ...]:
    ledger = simulation.ledger
    return ledger.arrival_s, ledger.first_s, ledger.finish_s, ledger.submissions, simulation.steps.rows


def assert_same(one: Simulation, other: Simulation) -> None:
    for mine, theirs in zip(times_of(one), times_of(other), strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_one_request_by_hand() -> None:
    ledger = simulate("ep1", requests((5.0, 10, 4)), Constant(2.0)).ledger
    assert ledger.first_s.tolist() == [7.0]
    assert ledger.finish_s.tolist() == [13.0]
    assert ledger.ttft_s.tolist() == [2.0]
    assert ledger.tpot_s.tolist() == [2.0]


def test_a_request_for_no_token_ends_with_its_prompt() -> None:
    simulation = simulate("ep1", requests((0.0, 10, 0), (3.0, 10, 2)), Constant(2.0))
    assert simulation.ledger.finish_s.tolist() == [2.0, 7.0]
    result = result_of(simulation)
    assert result.finished == 2
    assert result.output_tps == pytest.approx(2 / 7)
    assert sum(result.timeline.output_tps) * 7 / len(result.timeline.time_s) == pytest.approx(2, rel=1e-3)


def test_a_request_waits_for_the_step_under_way() -> None:
    ledger = simulate("ep1", requests((0.0, 10, 3), (0.5, 10, 1)), Constant(1.0)).ledger
    assert ledger.first_s.tolist() == [1.0, 2.0]


def test_groups_of_a_replica_step_together_and_replicas_apart() -> None:
    load = requests((0.0, 10, 2), (0.5, 10, 1))
    assert simulate("ep2", load, Constant(1.0)).ledger.first_s.tolist() == [1.0, 2.0]
    assert simulate("dp2", load, Constant(1.0)).ledger.first_s.tolist() == [1.0, 1.5]


def test_the_stages_of_a_pipeline_work_at_the_same_time() -> None:
    load = requests((0.0, 10, 3), (0.0, 10, 3))
    ledger = simulate("pp2", load, Constant(1.0)).ledger
    assert ledger.first_s.tolist() == [2.0, 3.0]  # the second is in the first stage while the first is in the second
    assert ledger.finish_s.tolist() == [6.0, 7.0]


def test_waiting_time_of_a_queue_with_constant_service() -> None:
    """M/D/1: one sequence at a time, one step each.

    Every wait by Lindley's recursion, their mean by Pollaczek and Khinchine: ρ s / 2 (1 − ρ).
    """
    rho = 0.5
    load = arrivals(Load(prompt=8, output=1, rate=rho), 3000, seed=1)
    waits = simulate("ep1", load, Constant(1.0), max_sequences=1).ledger.ttft_s - 1.0
    expected = [0.0]
    for gap in np.diff(load.times_s):
        expected.append(max(0.0, expected[-1] + 1.0 - gap))
    np.testing.assert_allclose(waits, expected, atol=1e-6)
    assert waits.mean() == pytest.approx(rho / (2 * (1 - rho)), rel=0.1)


def test_closed_loop_keeps_so_many_in_flight() -> None:
    ledger = simulate("ep2", arrivals(Load(prompt=9, output=5, sequences=6), 60), Constant(1.0)).ledger
    moments = np.arange(0.5, ledger.finish_s.max() - 5)
    present = [(ledger.arrival_s <= t) & (ledger.finish_s > t) for t in moments]
    assert {int(found.sum()) for found in present} == {6}


def test_littles_law() -> None:
    """Requests present on average = arrival rate · time that each stays."""
    load = arrivals(Load(prompt=40, output=20, rate=8, spread=0.5), 400, seed=3)
    ledger = simulate("ep2", load, blocks=60, max_batch_tokens=64).ledger
    events = sorted([*((t, 1) for t in ledger.arrival_s), *((t, -1) for t in ledger.finish_s)])
    times, changes = np.array(events).T
    area = float((np.cumsum(changes)[:-1] * np.diff(times)).sum())
    assert area == pytest.approx(float(ledger.latency_s.sum()))
    assert area > 0


LAYOUTS = st.sampled_from(["ep1", "ep3", "dp2ep2", "pp2ep2", "pp3", "attn2ep4"])
ROWS = st.lists(st.tuples(st.floats(0, 3), st.integers(1, 40), st.integers(1, 60)), min_size=1, max_size=25)


@settings(max_examples=60, deadline=None)
@given(
    layout=LAYOUTS,
    rows=ROWS,
    in_flight=st.sampled_from([0, 0, 3]),
    blocks=st.integers(30, 100),
    max_batch_tokens=st.integers(8, 64),
    shared=st.sampled_from([0, 12]),
    losses=st.lists(st.builds(Loss, gpus=st.just((0,)), at_s=st.floats(0, 4), recovery_s=st.floats(0, 2)), max_size=1),
    seed=st.none() | st.integers(0, 9),
)
def test_skipping_changes_nothing_and_nothing_is_lost(
    layout: str, rows: Any, in_flight: int, seed: int | None, losses: list[Loss], shared: int, **sizes: int
) -> None:
    load = requests(*sorted(rows), shared=shared, in_flight=in_flight)
    options = {**sizes, "losses": losses, "block_size": 4, "max_sequences": 6, "prefix_caching": bool(shared)}
    runs = [simulate(layout, load, skip=skip, routing=drifting(seed), **options) for skip in (True, False)]
    assert_same(*runs)
    ledger = runs[0].ledger
    assert not ledger.refused
    assert ledger.finished.all()
    assert (ledger.arrival_s <= ledger.first_s).all()
    assert (ledger.first_s <= ledger.finish_s).all()
    if not losses:
        assert (ledger.submissions == 1).all()
        finite = np.concatenate([simulation.load.ravel() for simulation in runs])
        assert (finite == 0).all(), "the account of what is left to do is not settled"


def drifting(seed: int | None) -> Routing | None:
    if seed is None:
        return None
    drift = Drift(skew=1.0, drift_s=2.0, rebalance_s=1.0, move_s=0.001, interval_s=0.5)
    placement = Placement(experts=8, slots=(((0, 1, 2, 3), (4, 5, 6, 7)),) * 8)
    return Routing(drift, placement, lambda current, load_LE: balance(current, load_LE).placement, seed)


def test_the_same_seed_gives_the_same_run() -> None:
    load = Load(prompt=50, output=30, rate=5, spread=0.5)
    runs = [simulate("ep2", arrivals(load, 80, seed), routing=drifting(seed)) for seed in (1, 1, 2)]
    assert_same(runs[0], runs[1])
    assert not np.array_equal(runs[0].ledger.finish_s, runs[2].ledger.finish_s)


def test_requests_that_can_never_run_are_refused_and_harm_nobody() -> None:
    ledger = simulate("ep1", requests((0.0, 10, 5), (0.0, 5000, 5), (1.0, 10, 5)), blocks=10).ledger
    assert list(ledger.refused) == [1]
    assert "5000 tokens" in ledger.refused[1]
    assert ledger.finished.tolist() == [True, False, True]


def test_lost_sequences_go_on_elsewhere_with_what_they_have() -> None:
    load = requests(*[(0.0, 10, 40)] * 8)
    whole = simulate("ep4", load, Constant(1.0)).ledger
    hurt = simulate("ep4", load, Constant(1.0), losses=[Loss(gpus=(1,), at_s=20.5, recovery_s=7.0)]).ledger
    moved = hurt.submissions == 2
    assert moved.sum() == 2
    assert (hurt.done[moved] == 20).all()
    assert (hurt.first_s == whole.first_s).all(), "tokens that were given are not taken back"
    assert hurt.finish_s[~moved].tolist() == [whole.finish_s[0] + 7.5] * 6  # the wait, and the half step done again
    assert (hurt.finish_s[moved] == whole.finish_s[0] + 8.5).all(), "and their tokens are computed again in a step"


@pytest.mark.parametrize("layout", ["tp2", "attn4ep4"])
def test_a_replica_with_one_attention_group_restarts(layout: str) -> None:
    load = requests((0.0, 10, 10))
    ledger = simulate(layout, load, Constant(1.0), losses=[Loss(gpus=(1,), at_s=4.5, recovery_s=100.0)]).ledger
    assert ledger.finish_s.tolist() == [104.5 + 6.0]  # four tokens were there, the fifth comes with the prompt


def test_a_restarting_replica_gets_nothing_to_do_before_it_is_back() -> None:
    load = requests((0.0, 10, 10), (0.0, 10, 10), (5.0, 10, 2), (60.0, 10, 9), (61.0, 10, 2))
    run = simulate("dp2tp2", load, Constant(1.0), losses=[Loss(gpus=(1,), at_s=4.5, recovery_s=50.0)])
    assert run.ledger.submissions.tolist() == [2, 1, 1, 1, 1]
    assert run.ledger.finish_s.max() == 69.0
    assert (run.steps["start_s"][run.steps["replica"] == 0] > 54.5).sum() == 9, "back in service"


def test_a_loss_without_survivors_is_refused() -> None:
    losses = [Loss(gpus=(0, 1), at_s=0.5)]
    with pytest.raises(ConfigurationError, match="no attention group is left"):
        simulate("ep2", requests((0.0, 10, 10)), Constant(1.0), losses=losses)


def test_a_longer_queue_is_seen_in_the_log() -> None:
    load: Arrivals = requests(*[(0.0, 10, 5)] * 7)
    steps = simulate("ep1", load, Constant(1.0), max_sequences=2).steps
    assert steps["waiting"].max() == 5
    assert steps["running"].max() == 2
    assert steps["prefills"].sum() == 70
    assert steps["decodes"].sum() == 7 * 4
