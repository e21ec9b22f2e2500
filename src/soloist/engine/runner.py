"""What one rank does in a step: its layers of the decoder on its attention group's tokens.

Shape legend: C tokens whose logits are wanted, V vocabulary, t tokens that this rank holds, D model width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import msgspec
import numpy as np
import torch
from torch import Tensor

from soloist.engine.answers import Answer, StepAnswer
from soloist.engine.dispatchers import Dispatchers
from soloist.engine.feedback import Feedback
from soloist.engine.graphs import Shape, StaticStep, StaticSteps, widths
from soloist.engine.history import History
from soloist.engine.host_copy import HostCopy
from soloist.engine.kv_cache import allocate, blocks_that_fit
from soloist.engine.memory import device_bytes, held, settle
from soloist.engine.options import EngineOptions
from soloist.engine.rehearsal import rehearsals
from soloist.engine.replica_loads import ReplicaLoads
from soloist.engine.sampler import Drawn, ScoredPrompt, draw, score_prompt, takes_plain_choice
from soloist.engine.world import World
from soloist.frontend.wire import Figures
from soloist.kernels.compile_ahead import compile_ahead
from soloist.kernels.paged_attention_triton import TritonPagedAttention
from soloist.models.decoder import Decoder
from soloist.models.layers import TokenSplit
from soloist.models.rope import Rope
from soloist.models.step import StepInput, to_device
from soloist.models.weights import WeightSource
from soloist.moe.fp8_experts import load_experts
from soloist.moe.layer import MoELayer
from soloist.moe.recorder import RoutingRecorder
from soloist.moe.router import Router, SlotTable
from soloist.moe.stats import LoadStats
from soloist.placement.placement import Placement
from soloist.placement.replicas import Closeness
from soloist.planner.memory import MemoryLoad, activation_bytes
from soloist.planner.precision import Precision
from soloist.planner.weights import expert_slots
from soloist.scheduling.request import StepBatch
from soloist.specs.layout import Layout, share
from soloist.specs.model import ModelSpec
from soloist.timing import Stopwatch

KEPT_BYTES = 2e9  # of the largest step's activations, for it to have a graph: they stay with it


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
        options = options.on(source.device.type, layout.pp, layout.attention_ranks)
        self.spec, self.placement, self.world, self.options = spec, placement, world, options
        self.device, self.dtype = source.device, source.dtype
        self.watch, self.recorder = Stopwatch(self.device, options.measure), self._recorder(layout)
        every = options.replicas_every if placement.has_replicas else 0
        self.stats = LoadStats(spec.experts, options.count_experts or every > 0, self.recorder)
        self.steps = 0
        self.rope = Rope(spec.rope, self.device)
        moe = dict(self._moe_layers(layout, placement, source))
        self.loads = ReplicaLoads(moe, world, self.stats, every)
        self.decoder = Decoder(spec, world.seat, source, world.attention, moe, self.rope, self.watch)
        self.heads = [block.heads for block in self.decoder.blocks]
        self.weight_bytes = sum(self.decoder.weight_parts().values())
        self.kv_blocks = blocks_that_fit(spec, self.heads, options, self.device, self.dtype.itemsize)

    def _moe_layers(self, layout: Layout, placement: Placement, source: WeightSource) -> Iterator[tuple[int, MoELayer]]:
        """The experts of this stage's MoE layers, in the slots that the placement gives this rank's group."""
        seat, spec = self.world.seat, self.spec
        stage = layout.stage_layers(seat.stage, spec.layers)
        slots_of = {
            layer: placement.slots[index][seat.group] for index, layer in enumerate(spec.moe_layers) if layer in stage
        }
        slots = [len(expert_ids) for expert_ids in slots_of.values()]
        self.dispatchers = Dispatchers(spec, placement, slots, self.world, self.options, self.dtype, self.device)
        nodes, closeness = self.world.topology.node_of_group, Closeness.parse(self.options.replicas)
        for layer, expert_ids in slots_of.items():
            keep = self.options.keep_fp8 and self.device.type == "cuda"
            experts = load_experts(spec, source, layer, expert_ids, seat.tp_index, layout.tp, keep)
            sharded, replicated = self.dispatchers.of(len(expert_ids))
            yield (
                layer,
                MoELayer(
                    router=Router.load(spec, source, layer),
                    table=SlotTable(placement, spec.moe_layers.index(layer), seat.group, self.device, nodes, closeness),
                    dispatcher=sharded,
                    replicated=replicated,
                    own=self.dispatchers.own,
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

    @torch.inference_mode()
    def allocate(self, blocks: int) -> None:
        """Make the KV cache, after the ranks of a sequence have agreed on the number of blocks; capture the graphs.

        One block more than agreed takes what padding leaves. Called by all ranks of a stage together.
        """
        options = self.options
        self.kv_blocks = blocks
        self.caches = allocate(self.spec, self.heads, blocks + 1, options.block_size, self.device, self.dtype)
        self.rope.prepare(options.longest(self.spec), self.dtype)
        self.settled = settle(self.device)
        self.feedback = Feedback(options.micro_batches + 1, options.max_sequences, self.device)
        is_enabled, self.watch.enabled = self.watch.enabled, False  # events in a graph cannot be read
        is_gpu = self.device.type == "cuda"
        buckets, mixed = (
            [rows for rows in found if not is_gpu or self._captures(rows)]
            for found in (options.graph_buckets(is_gpu), self._mixed_buckets(is_gpu))
        )
        held, most = widths(options.longest(self.spec), options.block_size), options.max_sequences
        shape = max([*buckets, *(min(most, tokens) for tokens in mixed)], default=0), self.spec.vocab
        is_last = self.world.seat.is_last_stage
        self.history = History(blocks + 1, options.block_size, self.device) if is_last else None
        self.logits_BV = torch.empty(shape, dtype=self.dtype, device=self.device) if is_last else None
        self.static = StaticSteps(buckets, mixed, held, most, self._static_step, self.device)
        if is_gpu and options.rehearse and not self.recorder:
            self.rehearse()
        self.static.capture()
        self.watch.enabled = is_enabled

    @torch.inference_mode()
    def rehearse(self) -> None:
        """Run steps of all sizes through a layer of each kind (engine/rehearsal.py). Nothing of them is counted.

        Where no step asks the host for what a kernel wrote, they are gone through without their kernels first.
        """
        blocks, caches, kept = self.decoder.blocks, self.caches, self._kinds().values()
        asks_nothing = self._captures(1) and self._captures(self.options.max_batch_tokens)
        self.decoder.blocks, self.caches = [blocks[index] for index in kept], [caches[index] for index in kept]
        if asks_nothing:
            with compile_ahead(torch.get_num_threads()):
                self._rehearse()
        self._rehearse()
        self.decoder.blocks, self.caches = blocks, caches
        self.world.check()
        self.stats.forget()
        self.world.take_traffic()

    def _rehearse(self) -> None:
        options = self.options
        longest, sequences = options.longest(self.spec), options.max_sequences
        for batch in rehearsals(options.max_batch_tokens, longest, sequences, self.kv_blocks, options.block_size):
            sources, places = self.feedback.sources(batch), self.feedback.begin(batch)
            out = self._forward(batch, sources, places, None)
            if self.world.seat.is_last_stage:
                self._answer(batch, out, places)
        for step in self.static.steps:
            step.compute()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _kinds(self) -> dict[object, int]:
        """The first layer of each kind, counted from this stage's first; the same on all ranks of the stage."""
        spec, found = self.spec, dict[object, int]()
        for index, layer in enumerate(self.decoder.layers):
            is_moe = layer in spec.moe_layers
            slots = self.placement.slots[spec.moe_layers.index(layer)] if is_moe else ()
            found.setdefault((spec.window(layer), is_moe, tuple(map(len, slots))), index)
        return found

    def _mixed_buckets(self, is_gpu: bool) -> tuple[int, ...]:
        """Tokens of mixed steps; where it is left to us also of the largest, unless its activations are."""
        options, spec, layout = self.options, self.spec, self.world.seat.layout
        found, most = options.mixed_buckets(is_gpu), options.max_batch_tokens
        if options.mixed_graphs != "auto" or not found or most in found:
            return found
        load = MemoryLoad(sequences=1, longest=1, step_tokens=most, graph_rows=1)
        experts = Precision.of(spec, keep_fp8=options.keep_fp8).experts_on(spec, layout.tp)
        held = activation_bytes(spec, layout, load, "pushed", expert_slots(spec, layout, 0), experts)
        return (*found, most) if held < KEPT_BYTES else found

    def _captures(self, rows: int) -> bool:
        """No part of a step of so many rows asks the host for anything: attention, experts, exchange. Equal on all
        ranks."""
        blocks = self.decoder.blocks
        attention = all(isinstance(block.attention.attend, TritonPagedAttention) for block in blocks)
        experts = all(block.moe.experts.capturable for block in blocks if block.moe)
        return attention and experts and self.dispatchers.captures(rows < self.options.replicate_below)

    def _static_step(self, rows: int, sequences: int, width: int) -> StaticStep:
        seat, replicated = self.world.seat, rows < self.options.replicate_below
        shape = Shape(width, self.options.block_size, self.kv_blocks, self.device, self.dtype)
        x_tD = None
        if not seat.is_first_stage:
            split = TokenSplit(self.world.attention, rows, replicated, self.watch, rows)
            tokens = split.tokens_here(seat.attention_index)
            x_tD = torch.zeros(tokens, self.spec.d_model, dtype=self.dtype, device=self.device)
        logits_BV = None if self.logits_BV is None else self.logits_BV[:sequences]
        return StaticStep(rows, sequences, shape, replicated, self.rope, self.feedback, self._stage, x_tD, logits_BV)

    @torch.inference_mode()
    def run(self, batch: StepBatch) -> Answer | None:
        """One step. What was chosen on the sampler's rank, None on the others.

        On a GPU it is only started. In a pipeline it takes over from the previous stage and passes on to the next one.
        """
        self.steps += 1
        self.loads.next_step()
        sources, places = self.feedback.sources(batch), self.feedback.begin(batch)
        static = self.static.of(batch)
        out = self._forward(batch, sources, places, static)
        if not self.world.seat.is_last_stage:
            return None
        with self.watch("sampling"):
            return self._answer(batch, out, places) if static is None else self._static_answer(batch, static, places)

    @torch.inference_mode()
    def logits(self, batch: StepBatch) -> Tensor | None:
        """logits_CV (fp32) of the rows that the batch asks for; None before the last stage."""
        sources, places = self.feedback.sources(batch), self.feedback.begin(batch)
        static = self.static.of(batch)
        out = self._forward(batch, sources, places, static)
        if not self.world.seat.is_last_stage:
            return None
        wanted = [row for row, chunk in enumerate(batch.chunks) if chunk.samples or chunk.scores_prompt]
        return (out if static is None else out[wanted]).float()

    # -- a step -----------------------------------------------------------------------------------------------------
    def _forward(self, batch: StepBatch, sources: np.ndarray, places: np.ndarray, static: StaticStep | None) -> Tensor:
        """What this stage makes of a batch: logits on the last one."""
        if static is not None:
            static.fill(batch, sources, places)
            return self._pass(static.x_tD, lambda _: self._replay(static), f"step {batch.step}")
        batch = msgspec.structs.replace(batch, peak=self.static.bucket(batch) or max(batch.peak, batch.tokens))
        replicated = batch.peak < self.options.replicate_below
        step = StepInput.of(batch, self.options.block_size, self.rope, replicated, self.device, self.dtype)
        step = replace(step, ids_T=self.feedback.fill(step.ids_T, batch, sources))
        split = self.decoder.split(step)
        if self.recorder:
            self.recorder.begin(batch, self._dispatched(split))
        x_tD = None
        if not self.world.seat.is_first_stage:
            shape = (split.tokens_here(self.world.seat.attention_index), self.spec.d_model)
            x_tD = torch.empty(shape, dtype=self.dtype, device=self.device)
        return self._pass(x_tD, lambda x_tD: self._stage(step, x_tD), step.name)

    def _pass(self, x_tD: Tensor | None, compute: Callable[[Tensor | None], Tensor], name: str) -> Tensor:
        """Take over from the stage before into `x_tD`, compute, hand on to the next one."""
        stage, pipeline = self.world.seat.stage, self.world.pipeline
        if x_tD is not None:
            with self.watch("waiting"):
                x_tD.copy_(pipeline.recv(x_tD.shape, self.dtype, stage - 1, f"{name}, from stage {stage - 1}"))
        out = compute(x_tD)
        if not self.world.seat.is_last_stage:
            pipeline.send(out, stage + 1, f"{name}, to stage {stage + 1}")
        return out

    def _stage(self, step: StepInput, x_tD: Tensor | None, logits_CV: Tensor | None = None) -> Tensor:
        """The layers of this stage: from ids or `x_tD` to logits (in `logits_CV`, if given), or to what the next stage
        takes."""
        split = self.decoder.split(step)
        x_tD = self.decoder.forward(self.decoder.embed(step, split) if x_tD is None else x_tD, step, split, self.caches)
        if self.history is None:
            return x_tD
        self.history.write(step.cache_slots_T, step.ids_T)
        with self.watch("logits"):
            return self.decoder.logits(x_tD, step, split, logits_CV)

    def _replay(self, static: StaticStep) -> Tensor:
        with self.watch("graph"):
            static.replay()
        return static.out

    @torch.inference_mode()
    def figures(self) -> Figures:
        """What this rank did since the last call."""
        bytes_to, waited_for_s = self.world.take_traffic()
        seconds, steps, self.steps = self.watch.take(), self.steps, 0
        kv_bytes = sum(cache.nbytes for cache in self.caches)
        routing = self.recorder.take() if self.recorder else b""
        loads = self.stats.take()
        return Figures(
            self.world.seat.rank, seconds, waited_for_s, bytes_to, self.weight_bytes, kv_bytes, steps, routing,
            chosen={layer: load.tokens_E.tolist() for layer, load in loads.items()},
            rows={layer: load.rows for layer, load in loads.items()},
            exchange=self.dispatchers.crossings.explain(),
            memory=held(self.decoder, self.caches, self.dispatchers, self.settled),
            device_bytes=device_bytes(self.device),
        )  # fmt: skip

    def _dispatched(self, split: TokenSplit) -> tuple[int, int] | None:
        """The tokens of a step that this rank sends to experts; None where another rank of its TP group counts them."""
        seat = self.world.seat
        if not split.replicated:
            return share(split.tokens, split.size, seat.attention_index)
        if seat.tp_index:
            return None
        return share(split.tokens, split.size // seat.layout.tp, seat.attention_index // seat.layout.tp)

    # -- the choice of tokens ---------------------------------------------------------------------------------------
    def _answer(self, batch: StepBatch, logits_CV: Tensor, places: np.ndarray) -> Answer | None:
        """Logits rows stand in the order of the chunks: all of a chunk that scores its prompt, else its last."""
        lengths = [len(c.tokens) if c.scores_prompt else int(c.samples) for c in batch.chunks]
        ends, sampling = np.cumsum(lengths), [row for row, c in enumerate(batch.chunks) if c.samples]
        (rows_C,) = to_device([ends[sampling] - 1 if sampling else np.zeros(0)], self.device)
        drawn = draw(logits_CV[rows_C.long()].float(), [batch.chunks[row] for row in sampling], self.history)
        self.feedback.store(drawn.token_C, places[sampling])
        scored = {
            chunk.sequence: score_prompt(logits_CV[end - length : end].float(), chunk)
            for chunk, end, length in zip(batch.chunks, ends.tolist(), lengths, strict=True)
            if chunk.scores_prompt
        }
        return self._given(batch, [drawn], scored)

    def _static_answer(self, batch: StepBatch, static: StaticStep, places: np.ndarray) -> Answer | None:
        """The graph has chosen for every row; those with filters, penalties or log probabilities choose again."""
        chunks = batch.chunks
        special = [row for row, c in enumerate(chunks) if c.samples and c.params and not takes_plain_choice(c)]
        drawn = [Drawn(static.chosen[0], chunks, (), HostCopy([*static.chosen[:, : len(chunks)]]))]
        if special:
            (rows_C,) = to_device([np.array(special)], self.device)
            rows_C = rows_C.long()
            drawn.append(draw(static.out[rows_C].float(), [chunks[row] for row in special], self.history))
            self.feedback.store(drawn[1].token_C, places[special])
        scored = {
            chunk.sequence: score_prompt(static.out[row : row + 1].float(), chunk)
            for row, chunk in enumerate(chunks)
            if chunk.scores_prompt
        }
        return self._given(batch, drawn, scored)

    def _given(self, batch: StepBatch, drawn: list[Drawn], scored: dict[int, ScoredPrompt]) -> Answer | None:
        """To the leader; the other ranks of the attention group have chosen the same and keep it on their devices."""
        if self.world.seat.attention_index:
            return None
        return StepAnswer(batch.chunks, drawn, scored, self.world.check, self.options.deadline_s)
