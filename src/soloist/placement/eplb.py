"""DeepSeek's expert-parallel load balancer, to compare with and to speak its format.

Shape legend: L layers, E experts, R replicas in all (physical experts), M most replicas of an expert.

Written from its published description: replicate the expert with the largest load per replica, again and again; pack by
falling load into the lightest pack that has room. With router groups that divide evenly over the nodes, groups are
packed to nodes first and the rest happens inside each node. It looks at neither co-activation, nor the network, nor
what it would move; with one replica a GPU its last packing does nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from soloist.errors import ConfigurationError
from soloist.placement.placement import Placement
from soloist.placement.trace import Array


@dataclass(frozen=True)
class EplbMaps:
    """`physical_LR` → logical expert; `logical_LEM` → its physical ones, −1 behind them; `count_LE` replicas."""

    physical_LR: Array
    logical_LEM: Array
    count_LE: Array

    @classmethod
    def of(cls, physical_LR: Array, experts: int) -> EplbMaps:
        """The other two maps from the first."""
        layers = len(physical_LR)
        count_LE = np.stack([np.bincount(row, minlength=experts) for row in physical_LR])
        logical_LEM = np.full((layers, experts, count_LE.max()), -1)
        for layer, row in enumerate(physical_LR):
            order = np.argsort(row, kind="stable")
            rank = np.arange(len(row)) - np.repeat(np.cumsum(count_LE[layer]) - count_LE[layer], count_LE[layer])
            logical_LEM[layer, row[order], rank] = order
        return cls(physical_LR, logical_LEM, count_LE)


def eplb(load_LE: Array, replicas: int, router_groups: int, nodes: int, gpus: int) -> EplbMaps:
    """Replicas on GPUs: GPU g has the physical experts from g · R/gpus on. Raises ConfigurationError."""
    experts = load_LE.shape[1]
    if replicas % gpus or replicas < experts or gpus % nodes or experts % router_groups:
        remedy = (
            f"must be a multiple of {gpus} GPUs on {nodes} nodes and hold {experts} experts of {router_groups} groups"
        )
        raise ConfigurationError.of("replicas", replicas, remedy)
    if router_groups % nodes:
        router_groups = nodes = 1
    physical_LR = np.stack([_layer(load_E, replicas, router_groups, nodes, gpus) for load_E in load_LE])
    return EplbMaps.of(physical_LR, experts)


def imbalance(maps: EplbMaps, load_LE: Array, gpus: int) -> float:
    """Largest load of a GPU over the mean, averaged over the layers; an expert's tokens shared by its replicas."""
    share_LE = load_LE / maps.count_LE
    load_LG = np.take_along_axis(share_LE, maps.physical_LR, axis=1).reshape(len(load_LE), gpus, -1).sum(axis=2)
    return float(np.mean(load_LG.max(axis=1) / load_LG.mean(axis=1)))


def _layer(load_E: Array, replicas: int, router_groups: int, nodes: int, gpus: int) -> Array:
    size = len(load_E) // router_groups
    node_of_group = _pack(load_E.reshape(router_groups, size).sum(axis=1), nodes)
    placed: list[Array] = []
    for node in range(nodes):
        groups = np.flatnonzero(node_of_group == node)
        expert_S = _replicate(load_E, (groups[:, None] * size + np.arange(size)).ravel(), replicas // nodes)
        count_E = np.bincount(expert_S, minlength=len(load_E))
        gpu_S = _pack(load_E[expert_S] / count_E[expert_S], gpus // nodes)
        placed += [expert_S[gpu_S == gpu] for gpu in range(gpus // nodes)]
    return np.concatenate(placed)


def _replicate(load_E: Array, experts: Array, slots: int) -> Array:
    count_E = np.zeros(len(load_E), np.int64)
    count_E[experts] = 1
    for _ in range(slots - len(experts)):
        count_E[experts[np.argmax(load_E[experts] / count_E[experts])]] += 1
    return np.repeat(np.arange(len(load_E)), count_E)


def _pack(load_S: Array, packs: int) -> Array:
    """Pack of each item, all packs of equal size."""
    size = len(load_S) // packs
    if size == 1:
        return np.arange(packs)
    pack_S, load_P, count_P = np.zeros(len(load_S), np.int64), np.zeros(packs), np.zeros(packs, np.int64)
    for item in np.argsort(-load_S, kind="stable"):
        pack_S[item] = pack = np.argmin(np.where(count_P < size, load_P, np.inf))
        load_P[pack] += load_S[item]
        count_P[pack] += 1
    return pack_S


def physical_map(placement: Placement) -> Array:
    """`[L, R]` logical expert of each slot, group by group. Raises ConfigurationError where groups are uneven."""
    sizes = {len(group) for layer in placement.slots for group in layer}
    if len(sizes) > 1:
        remedy = "this format knows only equal numbers in every group and layer; solve with --slots N"
        raise ConfigurationError.of("placement: slots of a group", sorted(sizes), remedy)
    return np.array([[expert for group in layer for expert in group] for layer in placement.slots], np.int64)
