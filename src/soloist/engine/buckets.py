"""Which steps of a rank have graphs: of the sizes asked for, where no part of them asks the host for anything.

Equal on all ranks, which capture and replay together.
"""

from __future__ import annotations

from dataclasses import dataclass

from soloist.engine.dispatchers import Dispatchers
from soloist.engine.options import EngineOptions
from soloist.kernels.paged_attention_triton import TritonPagedAttention
from soloist.models.decoder import Decoder
from soloist.planner.host import sizes
from soloist.specs.layout import Layout
from soloist.specs.model import ModelSpec


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
        """Tokens of other steps."""
        options = self.options
        if options.mixed_graphs != "auto" or options.record or options.cuda_graphs == "off" or not self.is_gpu:
            return self._taken(options.mixed_buckets())
        return self._taken(sizes(self.spec, self.layout, options.max_batch_tokens, options.keep_fp8))

    def _taken(self, sizes: tuple[int, ...]) -> list[int]:
        return [rows for rows in sizes if not self.is_gpu or self.captures(rows)]
