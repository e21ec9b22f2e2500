"""How good a partition of one layer's slots could be at best: a linear program, solved by HiGHS.

Shape legend: S slots, P parts, C classes of tokens, K choices of a token.

z[a, b] says how far two slots lie in the same part. A token with k choices of which j pairs lie together goes to at
least hull_k(j) parts, the lower convex hull over all ways to split k choices into parts that have room for them; so

    minimise Σ_c weight_c · d_c    with   d_c ≥ each line of hull_k(Σ z of the token's pairs)
    Σ_b z[a, b] ≤ room − 1 for every slot,   z[a, b] + z[b, c] − z[a, c] ≤ 1 for few slots,   0 ≤ z ≤ 1

The lighter classes of tokens are added up to one for each k, which is valid since the hull is convex; with many slots
all of them are, and only the pairs that matter get a variable: what the others could gain at the solution's prices is
taken off. Fullest part and NIC are at least the mean over the parts.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import combinations
from math import comb

import numpy as np
from scipy.optimize import linprog
from scipy.sparse import block_array, coo_array, csr_array, eye_array

from soloist.placement.swaps import Problem
from soloist.placement.trace import Array

MOST_CLASSES = 200  # that are not added up
MOST_SLOTS_WITH_TRIANGLES = 24
MOST_SLOTS = 64  # of which all pairs are variables
PRICE_STEPS = 30


def lower_bound(problem: Problem, room_P: Array) -> float:
    """No partition with at most `room_P` slots in its parts has a smaller objective; migration counts as free."""
    p = problem
    least_rows = fewest_rows(p, int(room_P.max()))
    least_load = max(p.load_S.sum() / p.parts, p.load_S.max(initial=0.0))
    return p.rows * least_rows + p.nic * least_rows / p.parts + p.load * least_load


def fewest_rows(problem: Problem, room: int) -> float:
    """Lower bound of the rows that all tokens together cause, parts having `room` slots at most."""
    slots = len(problem.load_S)
    first, second = np.triu_indices(slots, 1)
    size_c, weight_c, pairs_cZ = _classes(problem, first, second)
    ends = (np.concatenate([first, second]), np.tile(np.arange(len(first)), 2))
    degree_SZ = coo_array((np.ones(len(ends[0])), ends), (slots, len(first)))
    blocks, limits = [[degree_SZ, None]], [np.full(slots, room - 1.0)]
    for size in np.unique(size_c):
        of_size = np.flatnonzero(size_c == size)
        for slope, start in hull(int(size), room, problem.parts):
            blocks.append([slope * pairs_cZ[of_size], -eye_array(len(size_c)).tocsr()[of_size]])
            limits.append(np.full(len(of_size), -start))
    if slots <= MOST_SLOTS_WITH_TRIANGLES:
        blocks.append([_triangles(slots), None])
        limits.append(np.ones(3 * comb(slots, 3)))
    matrix = block_array(blocks).tocsc()
    cost = np.concatenate([np.zeros(len(first)), weight_c])
    used = np.ones(len(cost), dtype=bool)
    if slots > MOST_SLOTS:
        used[: len(first)] = _promising(pairs_cZ, first, second, slots, room)
    most = np.where(np.arange(len(cost)) < len(first), 1.0, np.inf)[used]
    bounds = np.stack([np.zeros(len(most)), most], axis=1)
    solved = linprog(cost[used], matrix[:, used], np.concatenate(limits), bounds=bounds, method="highs")
    assert solved.status == 0, solved.message  # z = 0 is feasible and d is bounded below
    reduced = -(matrix[:, ~used].T @ solved.ineqlin.marginals)  # cost of a variable left out, at most 1 of it
    return float(solved.fun + np.minimum(reduced, 0).sum())


def _promising(pairs_cZ: csr_array, first: Array, second: Array, slots: int, room: int) -> Array:
    """`[Z]` pairs worth nearly as much as the prices of their slots, found by bidding for room − 1 partners."""
    weight_SS = np.zeros((slots, slots))
    weight_SS[first, second] = weight_SS[second, first] = pairs_cZ.sum(axis=0)
    price_S = np.zeros(slots)
    for _ in range(PRICE_STEPS):
        next_best_S = np.partition(weight_SS - price_S, slots - room, axis=1)[:, slots - room]
        price_S = (price_S + np.maximum(next_best_S, 0)) / 2
    surplus_SS = weight_SS - price_S[:, None] - price_S[None, :]
    return (surplus_SS > -np.abs(price_S).mean() / 5)[first, second]


def _classes(problem: Problem, first: Array, second: Array) -> tuple[Array, Array, csr_array]:
    """Choices and weight of each class of tokens, and `[class, pair]` how many of its pairs are which."""
    slots, choices_CK = len(problem.load_S), problem.choices_CK
    size_C = (choices_CK < slots).sum(axis=1)
    heaviest = np.argsort(-problem.weight_C, kind="stable")[: MOST_CLASSES if slots <= MOST_SLOTS_WITH_TRIANGLES else 0]
    chosen_cS = np.zeros((len(heaviest), slots + 1))
    np.put_along_axis(chosen_cS, choices_CK[heaviest], 1.0, axis=1)
    sizes, weights = [size_C[heaviest]], [problem.weight_C[heaviest]]
    pairs = [chosen_cS[:, first] * chosen_cS[:, second]]
    rest_C = np.ones(len(size_C), dtype=bool)
    rest_C[heaviest] = False
    for size in np.unique(size_C[rest_C]):
        of_size = rest_C & (size_C == size)
        weight_c = problem.weight_C[of_size]
        sizes, weights = [*sizes, np.array([size])], [*weights, np.array([weight_c.sum()])]
        together_SS = _together(choices_CK[of_size], weight_c, slots)
        pairs.append(together_SS[first, second][None] / weight_c.sum())
    return np.concatenate(sizes), np.concatenate(weights), csr_array(np.concatenate(pairs))


def _together(choices_CK: Array, weight_C: Array, slots: int) -> Array:
    """`[S, S]` weight of the classes that chose two slots."""
    cells_CKK = choices_CK[:, :, None] * (slots + 1) + choices_CK[:, None, :]
    weights = np.repeat(weight_C, choices_CK.shape[1] ** 2)
    return np.bincount(cells_CKK.ravel(), weights, (slots + 1) ** 2).reshape(slots + 1, -1)[:-1, :-1]


@lru_cache(maxsize=256)
def hull(choices: int, room: int, parts: int) -> tuple[tuple[float, float], ...]:
    """Lines (slope, value at 0) below the least parts that hold `choices` slots of which j pairs lie together."""
    least: dict[int, int] = {}
    for split in _splits(choices, min(room, choices), parts):
        pairs = sum(size * (size - 1) // 2 for size in split)
        least[pairs] = min(least.get(pairs, choices), len(split))
    points = sorted(least.items())
    lines = [((d2 - d1) / (j2 - j1), d1 - j1 * (d2 - d1) / (j2 - j1)) for (j1, d1), (j2, d2) in combinations(points, 2)]
    below = [
        (slope, start) for slope, start in lines if slope <= 0 and all(start + slope * j <= d + 1e-9 for j, d in points)
    ]
    return tuple(sorted({(0.0, float(min(least.values()))), *below}))


def _splits(total: int, largest: int, parts: int) -> Iterator[tuple[int, ...]]:
    """Ways to write `total` as a sum of at most `parts` numbers up to `largest`, in falling order."""
    if total == 0:
        yield ()
    elif parts:
        for size in range(min(total, largest), 0, -1):
            for rest in _splits(total - size, size, parts - 1):
                yield (size, *rest)


def _triangles(slots: int) -> csr_array:
    """`[triple, pair]` rows of z[a, b] + z[b, c] − z[a, c] ≤ 1 in its three forms."""
    number_SS = np.zeros((slots, slots), np.int64)
    first, second = np.triu_indices(slots, 1)
    number_SS[first, second] = np.arange(len(first))
    triples = np.array(list(combinations(range(slots), 3)), np.int64).reshape(-1, 3)
    sides = np.stack([number_SS[triples[:, i], triples[:, j]] for i, j in ((0, 1), (1, 2), (0, 2))], axis=1)
    sign_33 = 1.0 - 2.0 * np.eye(3)
    columns, values = np.repeat(sides, 3, axis=0), np.tile(sign_33, (len(sides), 1))
    where = (np.repeat(np.arange(len(columns)), 3), columns.ravel())
    return coo_array((values.ravel(), where), (len(columns), len(first))).tocsr()
