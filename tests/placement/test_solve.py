from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from soloist.errors import ConfigurationError
from soloist.placement.bound import fewest_rows, hull, lower_bound
from soloist.placement.layer import LayerSearch, Target, Weights
from soloist.placement.packing import pack, water_fill
from soloist.placement.router_groups import whole_groups
from soloist.placement.solve import Solution, solve
from soloist.placement.swaps import Partition, Problem
from soloist.placement.trace import RoutingTrace
from soloist.placement.traffic import measure
from soloist.specs.layout import Layout
from tests.placement.cases import random_trace, tiny_spec

TINY = settings(max_examples=25, deadline=None)


@st.composite
def problems(draw: st.DrawFn) -> tuple[Problem, np.ndarray]:
    """A small problem and a partition of it into parts of two or three slots."""
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    slots, parts, classes = draw(st.sampled_from([6, 7, 8])), draw(st.sampled_from([2, 3])), 12
    choices_CK = np.sort([rng.permutation(slots)[:3] for _ in range(classes)], axis=1)
    choices_CK[:4, 2] = slots
    expert_S = np.sort(rng.permutation(slots) // draw(st.sampled_from([1, 2])))
    move_SP = rng.random((slots, parts)) if draw(st.booleans()) else None
    rates = draw(st.tuples(*[st.sampled_from([0.0, 0.5, 2.0])] * 3))
    problem = Problem(
        choices_CK, rng.integers(1, 5, classes).astype(float), rng.random(slots), expert_S, parts, *rates, move_SP
    )
    room_P = np.diff(np.arange(parts + 1) * slots // parts)
    return problem, rng.permutation(np.repeat(np.arange(parts), room_P))


def plain_value(problem: Problem, part_S: np.ndarray) -> float:
    """The objective, by loops."""
    slots, rows_P, load_P = len(part_S), np.zeros(problem.parts), np.zeros(problem.parts)
    for choices, weight in zip(problem.choices_CK, problem.weight_C, strict=True):
        for part in {part_S[slot] for slot in choices if slot < slots}:
            rows_P[part] += weight
    for slot, load in enumerate(problem.load_S):
        load_P[part_S[slot]] += load
    moved = 0 if problem.move_SP is None else sum(problem.move_SP[s, part_S[s]] for s in range(slots))
    return problem.rows * rows_P.sum() + problem.nic * rows_P.max() + problem.load * load_P.max() + moved


@TINY
@given(problems())
def test_every_swap_changes_the_objective_by_what_was_predicted(case: tuple[Problem, np.ndarray]) -> None:
    problem, part_S = case
    partition = Partition(problem, part_S)
    assert partition.value == pytest.approx(plain_value(problem, part_S))
    change_SS = partition.changes()
    for a, b in zip(*np.nonzero(np.isfinite(change_SS)), strict=True):
        other = part_S.copy()
        other[[a, b]] = other[[b, a]]
        assert change_SS[a, b] == pytest.approx(plain_value(problem, other) - partition.value, abs=1e-9)


@TINY
@given(problems())
def test_search_keeps_its_books(case: tuple[Problem, np.ndarray]) -> None:
    problem, part_S = case
    partition = Partition(problem, part_S)
    before = partition.value
    partition.improve()
    afresh = Partition(problem, partition.part_S[:-1])
    assert partition.value == pytest.approx(afresh.value)
    assert partition.value <= before + 1e-9
    assert np.array_equal(np.bincount(partition.part_S), np.bincount(np.append(part_S, problem.parts)))
    assert np.allclose(partition.changes(), afresh.changes(), atol=1e-9)


@TINY
@given(problems())
def test_no_partition_is_below_the_bound(case: tuple[Problem, np.ndarray]) -> None:
    problem, part_S = case
    bound = lower_bound(problem, np.bincount(part_S, minlength=problem.parts))
    best = min(plain_value(problem, np.array(p)) for p in set(permutations(part_S.tolist())))
    assert bound <= best + 1e-6


def test_bound_of_many_slots_leaves_out_pairs_soundly(monkeypatch: pytest.MonkeyPatch) -> None:
    trace = random_trace(experts=40, top_k=4, tokens=300, topics=8)
    target = Target.of(40, [0, 1, 2, 3])
    search = LayerSearch(trace, 0, target, Weights(), None)
    problem = search.problem_of(np.arange(40))
    everything = fewest_rows(problem, 10)
    monkeypatch.setattr("soloist.placement.bound.MOST_SLOTS", 8)
    some = fewest_rows(problem, 10)
    assert some <= everything + 1e-6
    assert some > 0.95 * everything


def test_hull_lies_below_every_split() -> None:
    lines = hull(5, 3, 4)
    for split in ((3, 2), (3, 1, 1), (2, 2, 1), (2, 1, 1, 1)):
        pairs = sum(n * (n - 1) // 2 for n in split)
        assert max(start + slope * pairs for slope, start in lines) <= len(split) + 1e-9


@TINY
@given(seed=st.integers(0, 10**6), slots=st.integers(6, 18), most=st.integers(3, 5))
def test_water_filling_leaves_no_expert_worth_another_replica(seed: int, slots: int, most: int) -> None:
    load_LE = np.random.default_rng(seed).random((2, 6)) + 0.01
    slots = min(slots, 6 * most)
    count_LE = water_fill(load_LE, slots, most)
    assert (count_LE.sum(axis=1) == slots).all()
    assert count_LE.min() >= 1
    assert count_LE.max() <= most
    for load_E, count_E in zip(load_LE, count_LE, strict=True):
        could_grow = count_E < most
        given_E = count_E > 1
        if could_grow.any() and given_E.any():
            assert (load_E / count_E)[could_grow].max() <= (load_E / (count_E - 1).clip(1))[given_E].min() + 1e-12


@TINY
@given(seed=st.integers(0, 10**6), parts=st.integers(2, 5))
def test_packing_fills_rooms_and_parts_replicas(seed: int, parts: int) -> None:
    rng = np.random.default_rng(seed)
    count_E = rng.integers(1, parts + 1, 8)
    expert_S = np.repeat(np.arange(8), count_E)
    room_P = np.full(parts, -(-len(expert_S) // parts))
    part_S = pack(rng.random(len(expert_S)), expert_S, room_P)
    assert (np.bincount(part_S, minlength=parts) <= room_P).all()
    for expert in range(8):
        assert len(set(part_S[expert_S == expert])) == count_E[expert]


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    groups=st.sampled_from([2, 4, 6]),
    nodes=st.sampled_from([1, 2]),
    slots=st.sampled_from([None, 3, 4]),
    exchange=st.sampled_from(["hierarchical", "flat"]),
    has_ids=st.booleans(),
)
@example(seed=1950, groups=6, nodes=2, slots=3, exchange="hierarchical", has_ids=True)  # slots that nobody chose
def test_solution_lies_between_bound_and_baselines(
    seed: int, groups: int, nodes: int, slots: int | None, exchange, has_ids: bool
) -> None:
    trace = random_trace(tokens=60, seed=seed, topics=2)
    trace = trace if has_ids else trace.keep(0)
    target = Target.of(6, [g * nodes // groups for g in range(groups)], slots, exchange)
    found = solve(trace, target)
    check_solution(found, target)
    assert (found.bound_L <= found.value_L + 1e-6).all()
    for _, value_L in found.baselines.values():
        assert (found.value_L <= value_L + 1e-9).all()


def check_solution(found: Solution, target: Target) -> None:
    placement = found.placement
    placement.check(tiny_spec(), Layout(ep=target.groups))  # with Placement's own checks: every expert is somewhere
    for layer in placement.slots:
        assert all(len(group) <= room for group, room in zip(layer, target.room_G, strict=True))


def test_topics_find_together() -> None:
    """Tokens choose both experts of one of four topics: two nodes of two groups, one row a token."""
    trace = random_trace(experts=8, top_k=2, tokens=200, topics=0)
    pair_LT = np.random.default_rng(1).integers(4, size=(2, 200))
    trace.sample.ids_LTK[:] = np.stack([pair_LT, pair_LT + 4], axis=2)
    trace = type(trace).of_sample(trace.model, trace.sample)
    found = solve(trace, Target.of(8, [0, 0, 1, 1]), Weights(nic=0, load=0.1))
    for layer in found.placement.slots:
        assert all(len({e % 4 for e in (*layer[n], *layer[n + 1])}) == 2 for n in (0, 2))
    source_T = np.zeros(200, dtype=int)
    assert measure(found.placement, trace, [0, 0, 1, 1], source_T).node_rows_LNN.sum() == 2 * 200


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    nodes=st.sampled_from([2, 4]),
    each=st.sampled_from([1, 2, 3]),
    spare=st.sampled_from([0, 1, 2]),
    has_ids=st.booleans(),
)
def test_router_groups_stay_whole_on_a_node(seed: int, nodes: int, each: int, spare: int, has_ids: bool) -> None:
    """16 experts in 8 router groups of which a token uses 3: it goes to 3 nodes at most, whatever was recorded."""
    trace = limited_trace(seed) if has_ids else limited_trace(seed).keep(0)
    groups = nodes * each
    slots = -(-16 // groups) + spare if spare else None
    target = Target.of(16, [g // each for g in range(groups)], slots)
    found = solve(trace, target, router_groups=8)
    whole = whole_groups(target, 16, 8)
    assert found.keeps_groups == (whole is not None)
    found.placement.check(tiny_spec(16), Layout(ep=groups))
    if whole is None:
        return
    assert (found.bound_L <= found.value_L + 1e-6).all()
    for layer in found.placement.slots:
        node_E = {expert: group // each for group, members in enumerate(layer) for expert in members}
        places = [(expert // 2, group // each) for group, members in enumerate(layer) for expert in members]
        assert len(set(places)) == 8
        assert len({node_E[2 * r] for r in range(8)}) == nodes
        assert all(len(members) <= room for members, room in zip(layer, target.room_G, strict=True))
    if has_ids and slots is None:
        traffic = measure(found.placement, trace, target.node_G.tolist())
        assert traffic.node_rows_LNN.sum() <= 3 * 2 * trace.sample.tokens
        assert (found.value_L <= found.baselines["linear"][1] + 1e-9).all()


def limited_trace(seed: int, tokens: int = 60) -> RoutingTrace:
    """Each token chooses four of the six experts of three router groups."""
    rng = np.random.default_rng(seed)
    trace = random_trace(experts=16, top_k=4, tokens=tokens, seed=seed)
    kept_LTG = np.argsort(rng.random((2, tokens, 8)) * rng.random((2, 1, 8)), axis=2)[:, :, :3]
    inside = np.argsort(rng.random((2, tokens, 6)), axis=2)[:, :, :4]
    allowed = (kept_LTG[..., None] * 2 + np.arange(2)).reshape(2, tokens, 6)
    trace.sample.ids_LTK[:] = np.take_along_axis(allowed, inside, axis=2)
    return RoutingTrace.of_sample(trace.model, trace.sample)


def test_router_groups_that_do_not_fit_are_not_kept() -> None:
    nodes = Target.of(16, [0, 1, 2])
    assert whole_groups(nodes, 16, 8) is None  # rooms of 5, 5 and 6 for groups of two
    assert whole_groups(Target.of(16, [0, 1, 2, 3]), 16, 2) is None
    assert whole_groups(Target.of(16, [0, 0]), 16, 8) is None
    assert whole_groups(Target.of(16, [0, 1, 2, 3]), 16, 8).tolist() == [2, 2, 2, 2]


def test_migration_keeps_what_is_not_worth_moving() -> None:
    trace = random_trace(experts=8, top_k=2, tokens=100, topics=4)
    target = Target.of(8, [0, 0, 1, 1])
    free = solve(trace, target, current=solve(random_trace(experts=8, tokens=100, seed=3), target).placement)
    current = free.baselines["linear"][0]
    dear = solve(trace, target, Weights(migration=1e6), current=current)
    assert dear.placement == current
    cheap = solve(trace, target, Weights(migration=1e-6), current=current)
    assert (cheap.value_L <= dear.value_L).all()
    assert cheap.placement != current


def test_impossible_slots_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="slots = 1"):
        Target.of(6, [0, 1], slots=1)
    with pytest.raises(ConfigurationError, match="slots = 7"):
        Target.of(6, [0, 1], slots=7)


def test_negative_weights_are_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"weights\.nic = -1"):
        Weights(nic=-1)
