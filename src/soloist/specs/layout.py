"""How the work is cut over the ranks: pipeline × data × expert × tensor parallelism.

A pipeline stage is `ep × tp` ranks. For the experts it is `ep` *groups* of `tp` ranks of one node: a slot belongs to a
group, and each of the group's ranks holds a share of its width. For attention the same ranks form groups of `attn_tp`
that share heads; these groups are data-parallel, each owns its sequences and their KV cache. `dp` repeats the whole.

    rank = ((dp_index · pp + stage) · ep + group) · tp + tp_index

so that a TP group, and then an attention group, is a run of neighbouring ranks. Written `ep16`, `tp8pp2`, `ep64tp2`,
`pp4ep16`, `attn8ep8`; the letters may come in any order.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from soloist.errors import ConfigurationError
from soloist.specs.model import ModelSpec, Spec


class Layout(Spec, frozen=True, kw_only=True):
    """Degrees of parallelism. `attn_tp = 0` stands for its default, `tp`."""

    pp: int = 1
    dp: int = 1
    attn_tp: int = 0
    ep: int = 1
    tp: int = 1

    def __post_init__(self) -> None:
        for key in ("pp", "dp", "ep", "tp"):
            if getattr(self, key) < 1:
                raise ConfigurationError.of(f"layout.{key}", getattr(self, key), "must be at least 1")
        if self.attn_tp < 0 or self.attention_ranks % self.tp or self.stage_ranks % self.attention_ranks:
            raise ConfigurationError.of(
                "layout.attn", self.attn_tp, f"must be a multiple of tp={self.tp} that divides ep·tp={self.stage_ranks}"
            )

    @classmethod
    def parse(cls, text: str) -> Layout:
        """`"tp8pp2"` → `Layout(tp=8, pp=2)`. Raises ConfigurationError for anything else."""
        parts = re.findall(r"(pp|dp|attn|ep|tp)(\d+)", text)
        names = [name for name, _ in parts]
        if not parts or "".join(n + d for n, d in parts) != text or len(set(names)) != len(names):
            raise ConfigurationError.of("layout", text, "write for instance ep16, tp8pp2, ep64tp2, pp4ep16 or attn8ep8")
        return cls(**{"attn_tp" if name == "attn" else name: int(degree) for name, degree in parts})

    def __str__(self) -> str:
        stages, ranks = (("pp", self.pp), ("tp", self.tp)), (("ep", self.ep), ("tp", self.tp))
        order = (*reversed(stages),) if self.ep == 1 else (stages[0], *ranks)  # tp8pp2, but pp4ep16 and ep64tp2
        attn = self.attention_ranks if self.attention_ranks != self.tp else 1
        degrees = (("dp", self.dp), ("attn", attn), *order)
        return "".join(f"{name}{degree}" for name, degree in degrees if degree > 1) or "ep1"

    @property
    def attention_ranks(self) -> int:
        """Ranks of an attention group."""
        return self.attn_tp or self.tp

    @property
    def stage_ranks(self) -> int:
        """Ranks of a pipeline stage."""
        return self.ep * self.tp

    @property
    def attention_groups(self) -> int:
        """Attention groups of a stage; each owns its own sequences."""
        return self.stage_ranks // self.attention_ranks

    @property
    def size(self) -> int:
        """Ranks in all."""
        return self.dp * self.pp * self.stage_ranks

    def stages_fit(self, gpus_per_node: int) -> bool:
        """Whether every stage lies inside one node of so many ranks."""
        return self.size <= gpus_per_node or gpus_per_node % self.stage_ranks == 0

    def check(self, spec: ModelSpec) -> None:
        """Raise ConfigurationError unless this layout can cut that model."""
        for key, degree, most, what in (
            ("pp", self.pp, spec.layers, "layers"),
            ("tp", self.tp, spec.expert.width, "elements of an expert's width"),
            ("attn", self.attention_ranks, spec.vocab, "rows of the vocabulary"),
        ):
            if degree > most:
                remedy = f"the model has only {most} {what}; use {key} <= {most}"
                raise ConfigurationError.of(f"layout.{key}", degree, remedy)

    def at(self, rank: int) -> Seat:
        """Where a rank sits."""
        assert 0 <= rank < self.size
        replica, inside = divmod(rank, self.pp * self.stage_ranks)
        stage, local = divmod(inside, self.stage_ranks)
        return Seat(self, rank, replica, stage, local)

    def stage_layers(self, stage: int, layers: int) -> range:
        """The layers of a stage: neighbouring ones, the earlier stages taking the remainder."""
        assert layers >= self.pp, "checked by `check`"
        start, stop = share(layers, self.pp, stage)
        return range(start, stop)


@dataclass(frozen=True)
class Seat:
    """One rank's place in a layout. `local` counts the ranks of its stage."""

    layout: Layout
    rank: int
    replica: int
    stage: int
    local: int

    @property
    def group(self) -> int:
        """The expert group of this rank within its stage."""
        return self.local // self.layout.tp

    @property
    def tp_index(self) -> int:
        """This rank's share of its group's experts."""
        return self.local % self.layout.tp

    @property
    def attention_group(self) -> int:
        """The attention group of this rank within its stage."""
        return self.local // self.layout.attention_ranks

    @property
    def attention_index(self) -> int:
        """This rank's share of its attention group's heads."""
        return self.local % self.layout.attention_ranks

    @property
    def is_leader(self) -> bool:
        """Leaders have their attention group's scheduler."""
        return self.stage == 0 and self.attention_index == 0

    @property
    def is_first_stage(self) -> bool:
        return self.stage == 0

    @property
    def is_last_stage(self) -> bool:
        return self.stage == self.layout.pp - 1

    @property
    def stage_start(self) -> int:
        """The lowest rank of this stage."""
        return self.rank - self.local

    @property
    def expert_peers(self) -> tuple[int, ...]:
        """Ranks that exchange tokens with this one: same stage, same `tp_index`, one of each expert group."""
        first = self.stage_start + self.tp_index
        return tuple(range(first, first + self.layout.stage_ranks, self.layout.tp))

    @property
    def tp_peers(self) -> tuple[int, ...]:
        """Ranks that hold the other shares of this group's experts, this one included."""
        first = self.rank - self.tp_index
        return tuple(range(first, first + self.layout.tp))

    @property
    def attention_peers(self) -> tuple[int, ...]:
        """Ranks that share heads with this one, this one included."""
        first = self.rank - self.attention_index
        return tuple(range(first, first + self.layout.attention_ranks))

    @property
    def pipeline_peers(self) -> tuple[int, ...]:
        """Ranks with this one's place in every stage, first stage first."""
        first = self.rank - self.stage * self.layout.stage_ranks
        return tuple(range(first, first + self.layout.pp * self.layout.stage_ranks, self.layout.stage_ranks))

    @property
    def leader(self) -> int:
        """The leader of this rank's sequences: lowest stage, lowest attention index."""
        return self.pipeline_peers[0] - self.attention_index

    @property
    def sampler(self) -> int:
        """The rank that samples for this rank's sequences: last stage, lowest attention index."""
        return self.pipeline_peers[-1] - self.attention_index

    @property
    def sequence_peers(self) -> tuple[int, ...]:
        """All ranks that work on this rank's sequences: its attention group in every stage."""
        width = range(self.layout.attention_ranks)
        return tuple(first - self.attention_index + i for first in self.pipeline_peers for i in width)

    @property
    def leaders(self) -> tuple[int, ...]:
        """The leaders that step together with this rank's: one for each attention group of its replica."""
        first = self.replica * self.layout.pp * self.layout.stage_ranks
        return tuple(range(first, first + self.layout.stage_ranks, self.layout.attention_ranks))


def share(total: int, parts: int, index: int) -> tuple[int, int]:
    """Start and stop of part `index` when `total` things are cut into `parts`; the earlier parts take the remainder."""
    each, rest = divmod(total, parts)
    start = index * each + min(index, rest)
    return start, start + each + (index < rest)
