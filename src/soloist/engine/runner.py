"""What one rank does in a step: its layers of the decoder on its attention group's tokens.

Shape legend: C tokens whose logits are wanted, V vocabulary, t tokens that this rank holds, D model width.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from soloist.engine.dispatchers import Dispatchers
from soloist.engine.kv_cache import allocate, blocks_that_fit
from soloist.engine.options import EngineOptions
from soloist.engine.sampler import prompt_logprobs, sample
from soloist.engine.world import World
from soloist.frontend.wire import Figures
from soloist.models.decoder import Decoder
from soloist.models.layers import TokenSplit
from soloist.models.rope import Rope
from soloist.models.step import StepInput
from soloist.models.weights import WeightSource
from soloist.moe.experts import Experts
from soloist.moe.layer import MoELayer
from soloist.moe.recorder import RoutingRecorder
from soloist.moe.router import Router, SlotTable
from soloist.moe.stats import LoadStats
from soloist.placement.placement import Placement
from soloist.scheduling.request import Sampled, StepBatch
from soloist.specs.layout import Layout, share
from soloist.specs.model import ModelSpec
from soloist.timing import Stopwatch


class Runner:
    """Executor of one rank. All ranks of a stage call `run` for the same steps in the same order."""

    def __init__(
        self,
        spec: ModelSpec,
        layout: Layout,
        placement: Placement,
        world: World,
        source: WeightSource,
        options: EngineOptions,
    ) -> None:
        """Reads this rank's weights. Collective only in that peers must not wait longer than the start deadline."""
        placement.check(spec, layout)
        self.spec, self.world, self.options = spec, world, options
        self.device, self.dtype = source.device, source.dtype
        self.watch, self.recorder = Stopwatch(self.device, options.measure), self._recorder(layout)
        self.stats = LoadStats(spec.experts, options.count_experts, self.recorder)
        self.steps = 0
        self.rope = Rope(spec.rope, self.device)
        moe = dict(self._moe_layers(layout, placement, source))
        self.decoder = Decoder(spec, world.seat, source, world.attention, moe, self.rope, self.watch)
        self.heads = [block.heads for block in self.decoder.blocks]
        self.weight_bytes = self.decoder.weight_bytes
        self.kv_blocks = blocks_that_fit(spec, self.heads, options, self.device, self.dtype.itemsize)

    def _moe_layers(self, layout: Layout, placement: Placement, source: WeightSource) -> Iterator[tuple[int, MoELayer]]:
        """The experts of this stage's MoE layers, in the slots that the placement gives this rank's group."""
        seat, spec = self.world.seat, self.spec
        stage = layout.stage_layers(seat.stage, spec.layers)
        held_by_layer = {
            layer: placement.slots[index][seat.group] for index, layer in enumerate(spec.moe_layers) if layer in stage
        }
        slots = [len(held) for held in held_by_layer.values()]
        dispatchers = Dispatchers(spec, slots, self.world, self.options, self.dtype, self.device)
        for layer, held in held_by_layer.items():
            experts = Experts.load(spec, source, layer, held, seat.tp_index, layout.tp)
            sharded, replicated = dispatchers.of(len(held))
            yield (
                layer,
                MoELayer(
                    router=Router.load(spec, source, layer),
                    table=SlotTable(placement, spec.moe_layers.index(layer), seat.group, self.device),
                    dispatcher=sharded,
                    replicated=replicated,
                    experts=experts,
                    layer=layer,
                    stats=self.stats,
                    watch=self.watch,
                ),
            )

    def _recorder(self, layout: Layout) -> RoutingRecorder | None:
        if self.options.record is None:
            return None
        stage, spec = layout.stage_layers(self.world.seat.stage, self.spec.layers), self.spec
        layers = [layer for layer in spec.moe_layers if layer in stage]
        return RoutingRecorder(self.options.record, self.world.seat.rank, layers, spec.experts, spec.router.top_k)

    def allocate(self, blocks: int) -> None:
        """Make the KV cache, after the ranks of a sequence have agreed on the number of blocks."""
        self.kv_blocks = blocks
        self.caches = allocate(self.spec, self.heads, blocks, self.options.block_size, self.device, self.dtype)

    @torch.inference_mode()
    def run(self, batch: StepBatch) -> list[Sampled] | None:
        """One step. Returns what was sampled on the sampler's rank, None on the others.

        In a pipeline it waits for the previous stage and passes on to the next one.
        """
        logits_CV = self.logits(batch)
        self.steps += 1
        if logits_CV is None or self.world.seat.attention_index != 0:
            return None
        with self.watch("sampling"):
            return self._sample(batch, logits_CV)

    @torch.inference_mode()
    def logits(self, batch: StepBatch) -> Tensor | None:
        """logits_CV (fp32) of the rows that the batch asks for; None before the last stage."""
        seat, replicated = self.world.seat, max(batch.peak, batch.tokens) < self.options.replicate_below
        step = StepInput.of(batch, self.options.block_size, self.rope, replicated, self.device, self.dtype)
        split = self.decoder.split(step)
        if self.recorder:
            self.recorder.begin(batch, self._dispatched(split))
        x_tD = (
            self.decoder.embed(step, split)
            if seat.is_first_stage
            else self._receive(step, split.tokens_here(seat.attention_index))
        )
        x_tD = self.decoder.forward(x_tD, step, split, self.caches)
        if seat.is_last_stage:
            with self.watch("logits"):
                return self.decoder.logits(x_tD, step, split)
        self.world.pipeline.send(x_tD, seat.stage + 1, f"{step.name}, to stage {seat.stage + 1}")
        return None

    def figures(self) -> Figures:
        """What this rank did since the last call."""
        bytes_to, waited_s = self.world.take_traffic()
        seconds, steps, self.steps = self.watch.take(), self.steps, 0
        kv_bytes = sum(cache.nbytes for cache in self.caches)
        routing = self.recorder.take() if self.recorder else b""
        loads = self.stats.take()
        return Figures(
            self.world.seat.rank, seconds, waited_s, bytes_to, self.weight_bytes, kv_bytes, steps, routing,
            chosen={layer: load.tokens_E.tolist() for layer, load in loads.items()},
            rows={layer: load.rows for layer, load in loads.items()},
        )  # fmt: skip

    def _dispatched(self, split: TokenSplit) -> tuple[int, int] | None:
        """The tokens of a step that this rank sends to experts; None where another rank of its TP group counts them."""
        seat = self.world.seat
        if not split.replicated:
            return share(split.tokens, split.size, seat.attention_index)
        if seat.tp_index:
            return None
        return share(split.tokens, split.size // seat.layout.tp, seat.attention_index // seat.layout.tp)

    def _receive(self, step: StepInput, tokens: int) -> Tensor:
        stage = self.world.seat.stage - 1
        with self.watch("waiting"):
            return self.world.pipeline.recv(
                (tokens, self.spec.d_model), self.dtype, stage, f"{step.name}, from stage {stage}"
            )

    def _sample(self, batch: StepBatch, logits_CV: Tensor) -> list[Sampled]:
        """Logits rows stand in the order of the chunks: all of a chunk that scores its prompt, else its last."""
        lengths = [len(c.tokens) if c.scores_prompt else int(c.samples) for c in batch.chunks]
        parts = dict(zip((c.sequence for c in batch.chunks), logits_CV.split(lengths), strict=True))
        sampling = [c for c in batch.chunks if c.samples]
        last_CV = torch.stack([parts[c.sequence][-1] for c in sampling]) if sampling else logits_CV[:0]
        sampled = {s.sequence: s for s in sample(last_CV, sampling)}
        scored = {c.sequence: prompt_logprobs(parts[c.sequence], c) for c in batch.chunks if c.scores_prompt}
        return [
            Sampled(sequence, chosen.token, chosen.logprob, tuple(scored.get(sequence, ())), chosen.margin)
            if (chosen := sampled.get(sequence))
            else Sampled(sequence, None, None, tuple(scored[sequence]))
            for sequence in [c.sequence for c in batch.chunks if c.samples or c.scores_prompt]
        ]
