"""Which steps of a rank have graphs: of the sizes asked for, where no part of them asks the host for anything.

Equal on all ranks, which capture and replay together.
"""

from __future__ import annotations

from dataclasses import dataclass

from soloist.engine.dispatchers import Dispatchers
from soloist.engine.options import EngineOptions
from soloist.kernels.paged_attention_triton import TritonPagedAttention
from soloist.models.decoder import Decoder
from soloist.planner.memory import MemoryLoad, activation_bytes
from soloist.planner.precision import Precision
from soloist.planner.weights import expert_slots
from soloist.specs.layout import Layout
from soloist.specs.model import ModelSpec

KEPT_BYTES = 2e9  # of the largest step's activations, for it to have a graph: they stay with it


@dataclass(frozen=True)
class Buckets:
    """Sizes of the graphs of one rank's stage."""

    spec: ModelSpec
    layout: Layout
    options: EngineOptions
    decoder: Decoder
    dispatchers: Dispatchers
    is_gpu: bool  # on a CPU nothing is captured, so that nothing stands against it

    def captures(self, rows: int) -> bool:
        """No part of a step of so many rows asks the host for anything: attention, experts, exchange."""
        blocks = self.decoder.blocks
        attention = all(isinstance(block.attention.attend, TritonPagedAttention) for block in blocks)
        experts = all(block.moe.experts.capturable for block in blocks if block.moe)
        return attention and experts and self.dispatchers.captures(rows < self.options.replicate_below)

    @property
    def decodes(self) -> list[int]:
        """Sequences of steps in which each has one token."""
        return self._taken(self.options.graph_buckets(self.is_gpu))

    @property
    def mixed(self) -> list[int]:
        """Tokens of other steps; where it is left to us also of the largest, unless its activations are."""
        options, spec, layout = self.options, self.spec, self.layout
        found, most = options.mixed_buckets(self.is_gpu), options.max_batch_tokens
        if options.mixed_graphs != "auto" or not found or most in found:
            return self._taken(found)
        load = MemoryLoad(sequences=1, longest=1, step_tokens=most, graph_rows=1)
        experts = Precision.of(spec, keep_fp8=options.keep_fp8).experts_on(spec, layout.tp)
        held = activation_bytes(spec, layout, load, "pushed", expert_slots(spec, layout, 0), experts)
        return self._taken((*found, most) if held < KEPT_BYTES else found)

    def _taken(self, sizes: tuple[int, ...]) -> list[int]:
        return [rows for rows in sizes if not self.is_gpu or self.captures(rows)]
