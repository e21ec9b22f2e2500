"""Which replica of an expert a token takes: a table that the runtime reads, and that traffic is predicted from.

Shape legend: E experts, M most replicas of an expert, T turns, G expert groups.

Each group has a table of its own. A token of group g that is the t-th of its rank's step takes entry (g + t) mod T of
its expert's row, so the choice costs one look-up, needs no communication, and can be repeated from a trace. A row deals
the turns to the replicas by how near they are, then by load: of those that come into question, each turn goes to

    the replica with the least (load of its group without this expert + turns dealt so far) / closeness

*Nearest* takes replicas of the own group where there are any, else those on the own node, else all. *Weighted* lets
farther ones have a share although there are nearer ones, so that a node whose tokens are many does not drown its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from soloist.errors import ConfigurationError
from soloist.placement.placement import Placement
from soloist.placement.trace import Array
from soloist.specs.model import Spec

TURNS = 24  # divides evenly among 2, 3, 4, 6, 8 and 12 replicas


class Closeness(Spec, frozen=True, kw_only=True):
    """What a replica is worth on the own group, on the own node, and elsewhere; 0: only if nothing is nearer."""

    group: float = 1.0
    node: float = 0.0
    elsewhere: float = 0.0

    @classmethod
    def parse(cls, text: str) -> Closeness:
        """`nearest`, or three weights: `4,2,1`. Raises ConfigurationError for anything else."""
        if text == "nearest":
            return cls()
        try:
            group, node, elsewhere = (float(part) for part in text.split(","))
        except ValueError:
            group = -1.0
        if group < 0 or min(node, elsewhere) < 0:
            raise ConfigurationError.of("replicas", text, "write nearest, or weights of group, node and others: 4,2,1")
        return cls(group=group, node=node, elsewhere=elsewhere)


NEAREST = Closeness()


def turns(
    placement: Placement,
    layer: int,
    group: int,
    node_of_group: Sequence[int] | None = None,
    load_E: Array | None = None,
    closeness: Closeness = NEAREST,
) -> tuple[Array, Array]:
    """`group[E, T]` and `slot[E, T]` (int64) for tokens of `group`; T is 1 where no expert has a second replica.

    node_of_group: by default all groups lie on one node. load_E: of each expert, in any unit; by default equal.
    """
    group_EM, slot_EM, count_E = placement.replica_tables(layer)
    if group_EM.shape[1] == 1:
        return group_EM, slot_EM
    node_G = np.zeros(placement.groups, np.int64) if node_of_group is None else np.asarray(node_of_group)
    load_E = np.ones(placement.experts) if load_E is None else np.asarray(load_E, dtype=float)
    weight_EM = _weights(group_EM, count_E, group, node_G, closeness)
    replica_ET = _deal(weight_EM, *_loads(group_EM, count_E, load_E, placement.groups))
    rows_E1 = np.arange(placement.experts)[:, None]
    return group_EM[rows_E1, replica_ET], slot_EM[rows_E1, replica_ET]


def _weights(group_EM: Array, count_E: Array, group: int, node_G: Array, closeness: Closeness) -> Array:
    """`[E, M]` closeness of each replica; where none has any, 1 for the nearest ones. 0 for repeated entries."""
    tier_EM = np.where(group_EM == group, 0, np.where(node_G[group_EM] == node_G[group], 1, 2))
    is_real_EM = np.arange(group_EM.shape[1]) < count_E[:, None]
    weight_EM = np.array([closeness.group, closeness.node, closeness.elsewhere])[tier_EM] * is_real_EM
    nearest_E1 = np.where(is_real_EM, tier_EM, 3).min(axis=1)[:, None]
    has_none_E1 = ~weight_EM.any(axis=1)[:, None]
    return np.where(has_none_E1, (tier_EM == nearest_E1) & is_real_EM, weight_EM).astype(float)


def _loads(group_EM: Array, count_E: Array, load_E: Array, groups: int) -> tuple[Array, Array]:
    """`[E, M]` load of each replica's group without that expert, replicas sharing evenly; `[E]` load of a turn."""
    share_E = load_E / count_E
    is_real_EM = np.arange(group_EM.shape[1]) < count_E[:, None]
    load_G = np.bincount(group_EM[is_real_EM], np.broadcast_to(share_E[:, None], group_EM.shape)[is_real_EM], groups)
    return load_G[group_EM] - share_E[:, None], load_E / TURNS


def _deal(weight_EM: Array, load_EM: Array, turn_E: Array) -> Array:
    """`[E, T]` the replica of each turn."""
    experts = np.arange(len(weight_EM))
    dealt_EM, replica_ET = np.zeros(weight_EM.shape), np.empty((len(weight_EM), TURNS), np.int64)
    is_open_EM = weight_EM > 0
    divisor_EM = np.where(is_open_EM, weight_EM, 1.0)
    for turn in range(TURNS):
        cost_EM = (load_EM + (dealt_EM + 1) * turn_E[:, None]) / divisor_EM
        replica_ET[:, turn] = np.where(is_open_EM, cost_EM, np.inf).argmin(axis=1)
        dealt_EM[experts, replica_ET[:, turn]] += 1
    return replica_ET
