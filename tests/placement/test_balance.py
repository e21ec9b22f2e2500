from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from soloist.placement.balance import balance, group_load, imbalance, place
from soloist.placement.eplb import eplb
from soloist.placement.eplb import imbalance as eplb_imbalance
from tests.placement.cases import random_placement

LOADS = st.integers(0, 10**6).map(lambda seed: np.random.default_rng(seed).lognormal(0, 1, (2, 16)))


@settings(max_examples=30, deadline=None)
@given(load_LE=LOADS, slots=st.sampled_from([2, 3, 4]), most_moves=st.sampled_from([0, 2, 5, None]))
def test_balancing_helps_within_its_budget(load_LE: np.ndarray, slots: int, most_moves: int | None) -> None:
    current = place(np.ones((2, 16)), np.full(8, slots))
    found = balance(current, load_LE, most_moves)
    assert [[len(group) for group in layer] for layer in found.placement.slots] == [
        [len(group) for group in layer] for layer in current.slots
    ]
    if most_moves is not None:
        assert found.moves <= 2 * most_moves
    if most_moves == 0:
        assert found.placement == current
    if slots == 2:  # no replicas, so only swaps, which never make it worse
        assert found.after <= found.before + 1e-9
    assert found.before == imbalance(current, load_LE)
    assert found.after == imbalance(found.placement, load_LE)


def test_even_load_moves_nothing() -> None:
    current = place(np.ones((2, 16)), np.full(8, 3))
    assert balance(current, np.ones((2, 16))).moves == 0


def test_a_hot_expert_gets_the_replicas_of_cold_ones() -> None:
    current = place(np.ones((1, 8)), np.full(4, 3))
    load_E = np.ones(8)
    load_E[7] = 20
    found = balance(current, load_E[None])
    assert len(found.placement.replicas(0)[7]) == 4
    assert found.after < found.before / 2


def test_uneven_placements_are_balanced_too() -> None:
    load_LE = np.random.default_rng(0).lognormal(0, 1, (2, 6))
    for seed in range(5):
        found = balance(random_placement(6, 4, seed), load_LE)
        assert found.after <= found.before * 1.25


def test_placing_from_nothing_is_about_as_even_as_eplb() -> None:
    load_LE = np.random.default_rng(0).lognormal(0, 1, (4, 64))
    ours = imbalance(place(load_LE, np.full(16, 5)), load_LE)
    assert ours <= 1.02 * eplb_imbalance(eplb(load_LE, 80, 1, 1, 16), load_LE, 16)


def test_group_load_shares_between_replicas() -> None:
    assert group_load(((0, 1), (1,), ()), np.array([3.0, 4.0])).tolist() == [5, 2, 0]


def test_small_loads_count() -> None:
    """Loads below one are told apart: each group gets a heavy and a light expert."""
    placement = place(np.array([[0.9, 0.8, 0.2, 0.1]]), np.array([2, 2]))
    assert sorted(placement.slots[0]) == [(0, 3), (1, 2)]
