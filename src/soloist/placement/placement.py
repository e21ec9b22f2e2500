"""Which expert each slot of each group holds, for every MoE layer.

The only thing that router, dispatcher, checkpoint loader and balancer have to agree on. Groups are the `ep` expert
groups of a stage; a slot is named by (group, index in the group). A group may hold any number of slots, none included,
and an expert may have any number of replicas, at least one.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from soloist.errors import ConfigurationError
from soloist.specs.files import read_record, write_record
from soloist.specs.layout import Layout
from soloist.specs.model import ModelSpec, Spec

LayerSlots = tuple[tuple[int, ...], ...]  # [group][slot] -> logical expert


class Placement(Spec, frozen=True, kw_only=True):
    """`slots[layer][group][slot]` is a logical expert; `layer` counts the MoE layers."""

    experts: int
    slots: tuple[LayerSlots, ...]
    format: str = "soloist-placement/1"

    def __post_init__(self) -> None:
        if self.format != "soloist-placement/1":
            raise ConfigurationError.of("format", self.format, "this version reads soloist-placement/1")
        if not self.slots:
            raise ConfigurationError.of("slots", self.slots, "must list at least one MoE layer")
        for layer, groups in enumerate(self.slots):
            self._check_layer(layer, groups)

    def _check_layer(self, layer: int, groups: LayerSlots) -> None:
        if len(groups) != len(self.slots[0]):
            key = f"slots[{layer}]"
            raise ConfigurationError.of(
                key, f"{len(groups)} groups", f"every layer must list {len(self.slots[0])} groups"
            )
        held = {expert for group in groups for expert in group}
        if held - set(range(self.experts)):
            key, wrong = f"slots[{layer}]", sorted(held - set(range(self.experts)))
            raise ConfigurationError.of(key, wrong, f"experts lie between 0 and {self.experts - 1}")
        if len(held) < self.experts:
            key, missing = f"slots[{layer}]", sorted(set(range(self.experts)) - held)
            raise ConfigurationError.of(key, f"without experts {missing}", "every expert needs at least one slot")
        for group, members in enumerate(groups):
            if len(set(members)) < len(members):
                key = f"slots[{layer}][{group}]"
                raise ConfigurationError.of(
                    key, members, "a second replica in the same group serves nothing; remove it"
                )

    @property
    def groups(self) -> int:
        return len(self.slots[0])

    @property
    def has_replicas(self) -> bool:
        """Whether some expert lies in more than one slot."""
        return any(sum(map(len, groups)) > self.experts for groups in self.slots)

    @property
    def has_empty_groups(self) -> bool:
        """Whether some group holds no expert of some layer."""
        return not all(members for groups in self.slots for members in groups)

    @classmethod
    def linear(cls, spec: ModelSpec, groups: int) -> Placement:
        """Neighbouring experts together; with more groups than experts, replicas: group g holds expert g mod E."""
        e = spec.experts
        if groups <= e:
            layer = tuple(tuple(range(g * e // groups, (g + 1) * e // groups)) for g in range(groups))
        else:
            layer = tuple((g % e,) for g in range(groups))
        return cls(experts=e, slots=(layer,) * len(spec.moe_layers))

    @classmethod
    def round_robin(cls, spec: ModelSpec, groups: int) -> Placement:
        """Expert e on group e mod `groups`; with more groups than experts, group g holds expert g mod E."""
        e = spec.experts
        layer = tuple(tuple(range(g, e, groups)) if g < e else (g % e,) for g in range(groups))
        return cls(experts=e, slots=(layer,) * len(spec.moe_layers))

    def check(self, spec: ModelSpec, layout: Layout) -> None:
        """Raise ConfigurationError unless this placement is one for that model and layout."""
        for key, found, wanted in (
            ("placement.experts", self.experts, spec.experts),
            ("placement layers", len(self.slots), len(spec.moe_layers)),
            ("placement groups", self.groups, layout.ep),
        ):
            if found != wanted:
                raise ConfigurationError.of(key, found, f"model and layout have {wanted}; make a placement for them")

    def replicas(self, layer: int) -> list[list[tuple[int, int]]]:
        """`[expert]` → its (group, slot) pairs, in order of group."""
        found: list[list[tuple[int, int]]] = [[] for _ in range(self.experts)]
        for group, members in enumerate(self.slots[layer]):
            for slot, expert in enumerate(members):
                found[expert].append((group, slot))
        return found

    def replica_tables(self, layer: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """`group[E, M]`, `slot[E, M]`, `count[E]` (int64), M the most replicas of an expert; rows repeat cyclically."""
        replicas = self.replicas(layer)
        most = max(len(r) for r in replicas)
        table = np.array([[r[i % len(r)] for i in range(most)] for r in replicas], dtype=np.int64)
        return table[..., 0], table[..., 1], np.array([len(r) for r in replicas], dtype=np.int64)

    def save(self, path: str | Path) -> None:
        write_record(path, self)

    @classmethod
    def load(cls, path: str | Path) -> Placement:
        """Raises ConfigurationError for a file that is not a placement."""
        return read_record(path, cls, "placement")
