"""What one rank does in a step: its layers of the decoder on its attention group's tokens.

Shape legend: C tokens whose logits are wanted, V vocabulary, t tokens that this rank holds, D model width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import msgspec
import numpy as np
import torch
from torch import Tensor

from soloist.engine.answers import Answer
from soloist.engine.buckets import Buckets
from soloist.engine.choice import Choice
from soloist.engine.dispatchers import Dispatchers
from soloist.engine.feedback import Feedback
from soloist.engine.graphs import Shape, StaticStep, StaticSteps, widths
from soloist.engine.history import History
from soloist.engine.kv_cache import allocate, blocks_that_fit
from soloist.engine.memory import device_bytes, held, release, settle
from soloist.engine.moe_layers import moe_layers, moe_layers_of, slots_of
from soloist.engine.options import EngineOptions
from soloist.engine.rehearsal import kinds, rehearsals
from soloist.engine.replica_loads import ReplicaLoads
from soloist.engine.world import World
from soloist.frontend.wire import Figures
from soloist.kernels.compile_ahead import compile_ahead
from soloist.models.decoder import Decoder
from soloist.models.layers import TokenSplit
from soloist.models.rope import Rope
from soloist.models.step import StepInput
from soloist.models.weights import WeightSource
from soloist.moe.recorder import RoutingRecorder
from soloist.moe.stats import LoadStats
from soloist.placement.placement import Placement
from soloist.planner.halves import first_half
from soloist.scheduling.request import StepBatch
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
        options = options.on(source.device.type, layout.pp, layout.attention_ranks)
        self.spec, self.placement, self.world, self.options = spec, placement, world, options
        self.device, self.dtype = source.device, source.dtype
        self.watch, self.recorder = Stopwatch(self.device, options.measure), self._recorder()
        every = options.replicas_every if placement.has_replicas else 0
        self.stats = LoadStats(spec.experts, options.count_experts or every > 0, self.recorder)
        self.steps, self.halves = 0, options.halves(layout)
        self.rope = Rope(spec.rope, self.device)
        slots = [len(expert_ids) for expert_ids in slots_of(spec, placement, world.seat).values()]
        self.dispatchers = Dispatchers(spec, placement, slots, world, options, self.dtype, self.device)
        moe = dict(moe_layers(spec, placement, world, source, options, self.dispatchers, self.stats, self.watch))
        self.loads = ReplicaLoads(moe, world, self.stats, every)
        self.decoder = Decoder(spec, world.seat, source, world.attention, moe, self.rope, self.watch)
        self.heads = [block.heads for block in self.decoder.blocks]
        self.weight_bytes = sum(self.decoder.weight_parts().values())
        self.kv_blocks = blocks_that_fit(spec, self.heads, options, self.device, self.dtype.itemsize)

    def _recorder(self) -> RoutingRecorder | None:
        if self.options.record is None:
            return None
        spec, seat = self.spec, self.world.seat
        layers = moe_layers_of(spec, seat)
        return RoutingRecorder(self.options.record, seat.rank, layers, spec.experts, spec.router.top_k)

    # -- before the first request -----------------------------------------------------------------------------------
    @torch.inference_mode()
    def allocate(self, blocks: int) -> None:
        """Make the KV cache, after the ranks of a sequence have agreed on the number of blocks; capture the graphs.

        One block more than agreed takes what padding leaves. Called by all ranks, each when it has read its weights:
        some take minutes longer than others. So all wait for the last one on the host before anything waits in a
        kernel, which is bounded as in service.
        """
        options = self.options
        self.kv_blocks = blocks
        self.caches = allocate(self.spec, self.heads, blocks + 1, options.block_size, self.device, self.dtype)
        self.rope.prepare(options.longest(self.spec), self.dtype)
        self.settled = settle(self.device)
        self.feedback = Feedback(options.micro_batches + 1, options.max_sequences, self.device)
        self.choice = self._choice(blocks + 1) if self.world.seat.is_last_stage else None
        is_enabled, self.watch.enabled = self.watch.enabled, False  # events in a graph cannot be read
        is_gpu = self.device.type == "cuda"
        self.buckets = Buckets(self.spec, self.world.seat.layout, options, self.decoder, self.dispatchers, is_gpu)
        self.static = self._static_steps(self.buckets.decodes, self.buckets.mixed)
        rehearses = is_gpu and options.rehearse and not self.recorder
        self.world.await_everybody("loaded")
        if is_gpu and (rehearses or self.static.steps):
            self.compile(rehearses)
        self.world.await_everybody("compiled")
        if rehearses:
            self.rehearse()
        self.static.capture()
        release(self.device)
        self.watch.enabled = is_enabled

    def _choice(self, blocks: int) -> Choice:
        options, world = self.options, self.world
        history = History(blocks, options.block_size, self.device)
        is_heard = world.seat.attention_index == 0
        return Choice(self.feedback, history, self.device, is_heard, world.check, options.deadline_s)

    def _static_steps(self, buckets: Sequence[int], mixed: Sequence[int]) -> StaticSteps:
        """Of decoding, by sequences, and of the other steps, by tokens. On the last stage they share their logits."""
        options, most = self.options, self.options.max_sequences
        shape = max([*buckets, *(min(most, tokens) for tokens in mixed)], default=0), self.spec.vocab
        self.logits_BV = torch.empty(shape, dtype=self.dtype, device=self.device) if self.choice else None
        held = widths(options.longest(self.spec), options.block_size)
        return StaticSteps(buckets, mixed, held, most, self.static_step, self.device)

    def static_step(self, rows: int, sequences: int, width: int) -> StaticStep:
        """A step of `rows` tokens of up to `sequences` sequences, each of up to `width` KV blocks."""
        form = self._form(rows, decodes=rows == sequences)
        shape = Shape(width, self.options.block_size, self.kv_blocks, self.device, self.dtype)
        x_tD = None if self.world.seat.is_first_stage else self._taken_over(rows, *form).zero_()
        logits_BV = None if self.logits_BV is None else self.logits_BV[:sequences]
        return StaticStep(rows, sequences, shape, *form, self.rope, self.feedback, self._stage, x_tD, logits_BV)

    def _form(self, tokens: int, decodes: bool) -> tuple[bool, bool]:
        """Whether an attention group replicates the tokens of a step, and whether it goes as two halves; `tokens` of
        the group that has most."""
        return tokens < self.options.replicate_below, self.halves.takes(tokens, decodes)

    def _taken_over(self, tokens: int, replicated: bool, halved: bool) -> Tensor:
        """Room for what this rank holds of a step's tokens: of their first half, then of the second."""
        cut = first_half(tokens) if halved else tokens
        splits = [TokenSplit(self.world.attention, part, replicated, self.watch, part) for part in (cut, tokens - cut)]
        rows = sum(split.tokens_here(self.world.seat.attention_index) for split in splits)
        return torch.empty(rows, self.spec.d_model, dtype=self.dtype, device=self.device)

    @torch.inference_mode()
    def compile(self, steps: bool) -> None:
        """The kernels of all graphs' steps, and with `steps` those of `rehearse`, side by side.

        Only where nothing but kernels reads what kernels wrote, neither the host nor the index of another operation.
        """
        asks_nothing = self.buckets.captures(1) and self.buckets.captures(self.options.max_batch_tokens)
        if (asks_nothing or not steps) and not self.options.exchange_captured:
            with self._layer_of_each_kind(), compile_ahead(torch.get_num_threads()):
                self._rehearse(steps)

    @torch.inference_mode()
    def rehearse(self) -> None:
        """Run all graphs' steps, and steps of all sizes (engine/rehearsal.py). Called by all ranks together."""
        with self._layer_of_each_kind():
            self._rehearse(steps=True)
        self.world.check()

    @contextmanager
    def _layer_of_each_kind(self) -> Iterator[None]:
        """Steps go through no other layers meanwhile, and nothing of them is counted."""
        blocks, caches = self.decoder.blocks, self.caches
        kept = kinds(self.spec, self.placement, self.decoder.layers)
        self.decoder.blocks, self.caches = [blocks[index] for index in kept], [caches[index] for index in kept]
        try:
            yield
        finally:
            self.decoder.blocks, self.caches = blocks, caches
            self.stats.forget()
            self.world.take_traffic()

    def _rehearse(self, steps: bool) -> None:
        options = self.options
        longest, sequences = options.longest(self.spec), options.max_sequences
        sizes = rehearsals(options.max_batch_tokens, longest, sequences, self.kv_blocks, options.block_size)
        for batch in sizes if steps else ():
            sources, places = self.feedback.sources(batch), self.feedback.begin(batch)
            out = self._forward(batch, sources, places, None)
            if self.choice:
                self.choice.of_logits(batch, out, places)
        for step in self.static.steps:
            step.compute()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    # -- a step -----------------------------------------------------------------------------------------------------
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
        if self.choice is None:
            return None
        with self.watch("sampling"):
            if static is None:
                return self.choice.of_logits(batch, out, places)
            return self.choice.of_graph(batch, static, places)

    @torch.inference_mode()
    def logits(self, batch: StepBatch) -> Tensor | None:
        """logits_CV (fp32) of the rows that the batch asks for; None before the last stage."""
        sources, places = self.feedback.sources(batch), self.feedback.begin(batch)
        static = self.static.of(batch)
        out = self._forward(batch, sources, places, static)
        if self.choice is None:
            return None
        wanted = [row for row, chunk in enumerate(batch.chunks) if chunk.samples or chunk.scores_prompt]
        return (out if static is None else out[wanted]).float()

    def _forward(self, batch: StepBatch, sources: np.ndarray, places: np.ndarray, static: StaticStep | None) -> Tensor:
        """What this stage makes of a batch: logits on the last one."""
        if static is not None:
            static.fill(batch, sources, places)
            return self._pass(static.x_tD, lambda _: self._replay(static), f"step {batch.step}")
        batch = msgspec.structs.replace(batch, peak=self.static.bucket(batch) or max(batch.peak, batch.tokens))
        form = self._form(batch.peak, batch.decodes)
        step = StepInput.of(batch, self.options.block_size, self.rope, self.device, self.dtype, *form)
        step = replace(step, ids_T=self.feedback.fill(step.ids_T, batch, sources))
        if self.recorder:
            self.recorder.begin(batch, self._dispatched(self.decoder.micro_batches(step)[0].split))
        x_tD = None if self.world.seat.is_first_stage else self._taken_over(step.tokens, *form)
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
        decoder, batches = self.decoder, self.decoder.micro_batches(step)
        if x_tD is None:
            xs_tD = [decoder.embed(batch) for batch in batches]
        else:
            rows = [batch.split.tokens_here(self.world.seat.attention_index) for batch in batches]
            xs_tD = [*x_tD.split(rows)]
        xs_tD = decoder.forward(xs_tD, batches, self.caches)
        if self.choice is None:
            return xs_tD[0] if len(xs_tD) == 1 else torch.cat(xs_tD)
        self.choice.history.write(step.cache_slots_T, step.ids_T)
        with self.watch("logits"):
            return decoder.logits(xs_tD, step, batches, logits_CV)

    def _replay(self, static: StaticStep) -> Tensor:
        with self.watch("graph"):
            static.replay()
        return static.out

    def _dispatched(self, split: TokenSplit) -> tuple[int, int] | None:
        """The tokens of a step that this rank sends to experts; None where another rank of its TP group counts them."""
        seat = self.world.seat
        if not split.replicated:
            return share(split.tokens, split.size, seat.attention_index)
        if seat.tp_index:
            return None
        return share(split.tokens, split.size // seat.layout.tp, seat.attention_index // seat.layout.tp)

    # -- afterwards ------------------------------------------------------------------------------------------------
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
