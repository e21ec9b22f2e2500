"""How loaded experts are, told to those who choose among replicas.

Shape legend: L MoE layers of the stage with replicas, E experts.

All ranks of a stage run the same steps, so that each of them knows without a word when the next count is due. Then they
add up what they have counted, and every one deals the turns of its own tokens anew (placement/replicas.py): of replicas
that are equally near, the one on the less loaded group takes more. What is older counts half as much each time.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from soloist.engine.world import World
from soloist.moe.layer import MoELayer
from soloist.moe.stats import LoadStats

FADING = 0.5  # of what was counted, when it is counted the next time


class ReplicaLoads:
    """`every`: steps between two counts; 0: never."""

    def __init__(self, layers: Mapping[int, MoELayer], world: World, stats: LoadStats, every: int) -> None:
        self.tables = {layer: moe.table for layer, moe in layers.items() if moe.table.has_choice}
        self.world, self.every, self.experts = world, every if self.tables else 0, stats.experts
        self.load_LE = np.zeros((len(self.tables), stats.experts))
        self._reader, self._steps = stats.reader(), 0

    def next_step(self) -> None:
        """Called by all ranks of a stage before each of their steps; now and then the host waits for the device."""
        if self.every and self._steps and self._steps % self.every == 0:
            self._count()
        self._steps += 1

    def _count(self) -> None:
        found, none_E = self._reader.take(), torch.zeros(self.experts, dtype=torch.int64, device=self.world.root.device)
        counted_LE = torch.stack([found[layer].tokens_E if layer in found else none_E for layer in self.tables])
        for transport in (self.world.experts, self.world.tp):  # one rank of each group, then the others of the group
            if transport is not None and transport.size > 1:
                counted_LE = transport.all_reduce(counted_LE, "loads of experts")
        self.load_LE = FADING * self.load_LE + counted_LE.cpu().numpy()
        for table, load_E in zip(self.tables.values(), self.load_LE, strict=True):
            if load_E.any():
                table.weigh(load_E)
