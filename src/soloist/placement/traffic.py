"""Rows that a placement makes travel, counted exactly from recorded routing.

Shape legend: L MoE layers, E experts, T tokens, K top-k, G expert groups, N nodes, M most replicas of an expert.

A token travels once to each group that holds one of its experts (flat exchange), or once to each such node and there
on to the groups (hierarchical exchange). With replicas it depends on the token's own group which of them it takes; the
choice is the runtime's own (placement/replicas.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from soloist.errors import ConfigurationError
from soloist.placement.placement import Placement
from soloist.placement.replicas import NEAREST, Closeness, turns
from soloist.placement.trace import Array, RoutingTrace


@dataclass(frozen=True)
class Traffic:
    """Rows by source and destination, those that stay in their group or node included."""

    tokens: int
    node_of_group: Array
    group_rows_LGG: Array  # one for each token and group
    node_rows_LNN: Array  # one for each token and node
    choices_LG: Array  # token-expert pairs that the slots of a group compute

    def cross_node_rows(self, hierarchical: bool) -> int:
        """Rows of all layers, one way, that leave their node."""
        if hierarchical:
            return int(self.node_rows_LNN.sum() - np.trace(self.node_rows_LNN, axis1=1, axis2=2).sum())
        crosses_GG = self.node_of_group[:, None] != self.node_of_group[None, :]
        return int(self.group_rows_LGG[:, crosses_GG].sum())

    def per_token(self, hierarchical: bool) -> float:
        """Rows that leave their node for each token and MoE layer."""
        return self.cross_node_rows(hierarchical) / (self.tokens * len(self.group_rows_LGG))

    def fullest_nic(self, hierarchical: bool) -> float:
        """The most rows that a node receives from others over the mean, averaged over the layers."""
        rows_LNN = self.node_rows_LNN if hierarchical else self.flat_node_rows()
        received_LN = rows_LNN.sum(axis=1) - np.diagonal(rows_LNN, axis1=1, axis2=2)
        return _peak(received_LN)

    def fullest_group(self) -> float:
        """The largest number of token-expert pairs of a group over the mean, averaged over the layers."""
        return _peak(self.choices_LG)

    def flat_node_rows(self) -> Array:
        member_GN = np.eye(self.node_rows_LNN.shape[1], dtype=np.int64)[self.node_of_group]
        return member_GN.T @ self.group_rows_LGG @ member_GN


def measure(
    placement: Placement,
    trace: RoutingTrace,
    node_of_group: Sequence[int],
    source_T: Array | None = None,
    index_T: Array | None = None,
    closeness: Closeness = NEAREST,
) -> Traffic:
    """What the tokens of the trace's sample cause.

    source_T: the group that sends each token; by default sequences are dealt to the groups in turn, as the front end
    does with requests of equal length. index_T: the token's place among those its rank sends in the same step.
    closeness: how near a replica must be to be taken.
    Raises ConfigurationError where the trace has no sample or another shape than the placement.
    """
    sample, model = trace.needed_sample, trace.model
    if (len(placement.slots), placement.experts) != (model.moe_layers, model.experts):
        found = f"{len(placement.slots)} layers of {placement.experts} experts"
        raise ConfigurationError.of("placement", found, f"the trace is of {model}")
    if len(node_of_group) != placement.groups:
        raise ConfigurationError.of("nodes", f"{len(node_of_group)} groups", f"the placement has {placement.groups}")
    source_T = sample.sequence_T % placement.groups if source_T is None else source_T
    index_T = sample.index_T if index_T is None else index_T
    node_G, groups, nodes = np.asarray(node_of_group), placement.groups, max(node_of_group) + 1
    by_group, by_node, choices = [], [], []
    for layer, ids_TK in enumerate(sample.ids_LTK):
        group_TK = chosen_groups(placement, layer, ids_TK, source_T, index_T, node_of_group, closeness)
        by_group.append(rows(source_T, group_TK, groups))
        by_node.append(rows(node_G[source_T], node_G[group_TK], nodes))
        choices.append(np.bincount(group_TK.ravel(), minlength=groups))
    return Traffic(sample.tokens, node_G, np.array(by_group), np.array(by_node), np.array(choices))


def chosen_groups(
    placement: Placement,
    layer: int,
    ids_TK: Array,
    source_T: Array,
    index_T: Array,
    node_of_group: Sequence[int] | None = None,
    closeness: Closeness = NEAREST,
) -> Array:
    """`[T, K]` the group whose replica each choice of a token takes."""
    group_TK = np.empty(ids_TK.shape, np.int64)
    for source in np.unique(source_T):
        group_ET, _ = turns(placement, layer, int(source), node_of_group, closeness=closeness)
        mine_T = source_T == source
        turn_T1 = (source + index_T[mine_T])[:, None] % group_ET.shape[1]
        group_TK[mine_T] = group_ET[ids_TK[mine_T], turn_T1]
    return group_TK


def rows(source_T: Array, place_TK: Array, places: int) -> Array:
    """`[places, places]` rows from source to place: each token counts once for each different place."""
    sorted_TK = np.sort(place_TK, axis=1)
    is_new_TK = np.ones(place_TK.shape, dtype=bool)
    is_new_TK[:, 1:] = sorted_TK[:, 1:] != sorted_TK[:, :-1]
    pairs = (source_T[:, None] * places + sorted_TK)[is_new_TK]
    return np.bincount(pairs, minlength=places * places).reshape(places, places)


def _peak(load_LN: Array) -> float:
    mean_L = load_LN.mean(axis=1)
    return float(np.mean(load_LN.max(axis=1) / np.where(mean_L > 0, mean_L, 1)))
