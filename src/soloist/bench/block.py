"""Decoder blocks in decode, captured as the engine captures them: where the microseconds of a layer go.

    python -m soloist.bench.block --model qwen3-30b-a3b --layout tp2 --sequences 1

Shape legend: T tokens of an attention group, D model width, S slots.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Annotated

import torch
import torch.distributed as dist
import typer
from torch import Tensor
from torch.distributed import PrefixStore
from torch.profiler import ProfilerActivity, profile

from soloist.bench.report import Ceilings, Point, commit, print_table
from soloist.dispatch.ragged import RaggedDispatcher
from soloist.engine.meeting import Meeting, Place
from soloist.engine.options import EngineOptions
from soloist.engine.rank import nvlink, symmetric_group
from soloist.engine.runner import Runner
from soloist.engine.world import World
from soloist.models.random_weights import RandomWeights
from soloist.models.step import StepInput
from soloist.placement.placement import Placement
from soloist.probes.gpus import Bench, captured, in_ranks
from soloist.scheduling.request import Chunk, StepBatch
from soloist.specs.layout import Layout
from soloist.specs.model import ModelSpec
from soloist.specs.presets import preset
from soloist.transport.connect import connect, local_world

CONTEXT = 192  # tokens of each sequence, the step's included
REPLAYS = 20  # while the profiler looks


def world_of(bench: Bench, layout: Layout, deadline_s: float = 20.0) -> World:
    """This rank's transports in a layout of all GPUs; a layout of one GPU runs on each of them by itself."""
    if layout.size == 1:
        return World.build(local_world(1)[0], layout, 1)
    store = PrefixStore(f"block {layout}", dist.distributed_c10d._get_default_store())
    meeting = Meeting(Place(bench.rank, bench.size, bench.rank, bench.size), store)
    root = connect("nccl", bench.rank, bench.size, store, bench.device, deadline_s)

    def windows(ranks):
        return symmetric_group(meeting, bench.device, ranks)

    return World.build(root, layout, bench.size, control=root, windows=windows if nvlink(meeting) else None)


@dataclass
class BlockRun:
    """Some layers of a model in a layout, and a step of one token for each of many sequences."""

    bench: Bench
    spec: ModelSpec
    layout: Layout
    sequences: int  # of all attention groups
    options: EngineOptions

    @cached_property
    def runner(self) -> Runner:
        placement = Placement.linear(self.spec, self.layout.ep)
        source = RandomWeights(self.spec, 5, torch.bfloat16, self.bench.device)
        with torch.inference_mode(False):  # threads that load do not know of it
            return Runner(self.spec, self.layout, placement, world_of(self.bench, self.layout), source, self.options)

    @property
    def tokens(self) -> int:
        return max(1, self.sequences // self.layout.attention_groups)

    def step(self) -> StepInput:
        """Every sequence in blocks of its own; ids differ from group to group."""
        each, runner = -(-CONTEXT // self.options.block_size), self.runner
        generator = torch.Generator().manual_seed(runner.world.seat.attention_group)
        ids = torch.randint(0, self.spec.vocab, (self.tokens,), generator=generator).tolist()
        chunks = tuple(
            Chunk(i, (token,), CONTEXT - 1, tuple(range(i * each, (i + 1) * each)), samples=True)
            for i, token in enumerate(ids)
        )
        batch = StepBatch(0, chunks, self.tokens)
        replicated = self.tokens < self.options.replicate_below
        made = StepInput.of(batch, self.options.block_size, runner.rope, replicated, self.bench.device, torch.bfloat16)
        return replace(made, static=True)

    def prepare(self) -> None:
        blocks = -(-CONTEXT // self.options.block_size) * self.tokens
        self.runner.allocate(blocks)
        for cache in self.runner.caches:
            cache.keys.normal_()
            cache.values.normal_()

    def parts(self) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
        """The layers, and what stands before and behind them."""
        decoder, step, caches = self.runner.decoder, self.step(), self.runner.caches
        split = decoder.split(step)
        x_tD = decoder.embed(step, split).clone()
        return (
            lambda: decoder.forward(x_tD, step, split, caches),
            lambda: decoder.logits(decoder.embed(step, split), step, split),
        )

    def error(self) -> float:
        """Relative difference of the layers' result from that of the plain forms over NCCL."""
        layers, _ = self.parts()
        fused = layers().float()
        decoder, world = self.runner.decoder, self.runner.world
        kept = [block.moe for block in decoder.blocks]
        for block, moe in zip(decoder.blocks, kept, strict=True):
            assert moe is not None, "the presets of this benchmark have experts in their first layers"
            slots = len(moe.experts.down)
            plain = [RaggedDispatcher(world.experts, world.topology, slots, tp) for tp in (world.tp, None)]
            block.moe = replace(moe, dispatcher=plain[0], replicated=plain[1])
        decoder.fuse(False)
        want = layers().float()
        for block, moe in zip(decoder.blocks, kept, strict=True):
            block.moe = moe
        decoder.fuse(True)
        world.check()
        return float((fused - want).norm() / want.norm())

    def floor(self) -> tuple[float, str]:
        """Seconds of a layer of this rank: the bytes that it has to read. Experts as uniform routing touches them."""
        spec, block, runner = self.spec, self.runner.decoder.blocks[0], self.runner
        tensors = [v for v in vars(block.attention).values() if isinstance(v, Tensor)]
        assert block.moe is not None
        dense = sum(t.nbytes for t in tensors) + block.moe.router.weight_ED.nbytes
        experts = block.moe.experts
        choices = self.tokens * self.layout.attention_groups * spec.router.top_k
        touched = len(experts.down) * (1 - (1 - 1 / spec.experts) ** choices)
        weights = touched * (experts.gate_up[0].nbytes + experts.down[0].nbytes)
        cache = runner.caches[0].nbytes
        parts = {"attention": dense, "experts": weights, "KV": cache}
        bound = ", ".join(f"{name} {size / 1e6:.1f} MB" for name, size in parts.items())
        return sum(parts.values()) / Ceilings().memory, bound


def profiled(work: Callable[[], None], layers: int) -> list[tuple[str, float, float]]:
    """Kernels of a replay: name, how many a layer, µs of each."""
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for _ in range(REPLAYS):
            work()
        torch.cuda.synchronize()
    found = [e for e in seen.key_averages() if e.self_device_time_total > 0]
    found.sort(key=lambda e: -e.self_device_time_total)
    return [(_short(e.key), e.count / REPLAYS / layers, e.self_device_time_total / e.count) for e in found]


def _short(name: str) -> str:
    return re.sub(r"<.*|\(.*", "", name.replace("void ", "").replace("at::native::", ""))[:60] or name[:60]


def main(
    model: Annotated[list[str], typer.Option(help="presets")] = ["qwen3-30b-a3b"],  # noqa: B006
    layout: Annotated[list[str], typer.Option(help="of all GPUs, or of one")] = ["ep2", "tp2"],  # noqa: B006
    sequences: Annotated[list[int], typer.Option(help="of all attention groups together")] = [1, 32, 256],  # noqa: B006
    layers: Annotated[int, typer.Option(help="of the model that are run")] = 2,
    kernels: Annotated[bool, typer.Option(help="list the kernels")] = True,
    replicate_below: Annotated[int, typer.Option(help="tokens; see the engine's option of this name")] = 64,
) -> None:
    """Time decoder blocks on the GPUs of this host, each checked against the plain forms first."""
    if "RANK" not in os.environ:
        raise typer.Exit(in_ranks("soloist.bench.block", sys.argv[1:]))
    bench, points = Bench.join(), []
    options = EngineOptions(
        replicate_below=replicate_below, max_batch_tokens=1024, max_sequences=256, kv_tokens=1024, block_size=64
    )
    with torch.inference_mode():
        for name in model:
            for text in layout:
                run: BlockRun | None = None
                for count in sequences:
                    spec, chosen = preset(f"{name}@{layers}"), Layout.parse(text)
                    before = run
                    run = BlockRun(bench, spec, chosen, count, options)
                    if before is not None:
                        run.__dict__["runner"] = before.runner
                    points += _measured(run, name, layers, kernels)
                del run, before
                torch.cuda.empty_cache()
    if bench.rank == 0:
        print_table(points, explain=True)


def _measured(run: BlockRun, name: str, layers: int, kernels: bool) -> list[Point]:
    bench = run.bench
    run.runner  # noqa: B018  # weights first
    run.prepare()
    error = run.error()
    parts = run.parts()  # hold the tensors that the graphs read
    works = [captured(part) for part in parts]
    each, ends = bench.seconds(*works)
    run.runner.world.check()
    floor, bound = run.floor()
    machine = f"{bench.size} x {torch.cuda.get_device_name(bench.device)}"
    shape = {"sequences": run.sequences, "T": run.tokens, "error": f"{error:.4f}", "ends_us": f"{ends * 1e6:.0f}"}
    listed = profiled(works[0], layers) if kernels else []
    if bench.rank == 0:
        print(f"--- {name} {run.layout} {run.sequences} sequences: {each / layers * 1e6:.1f} µs a layer, floor "
              f"{floor * 1e6:.1f}, ends {ends * 1e6:.1f}, error {error:.4f}", flush=True)  # fmt: skip
        for kernel, number, micros in listed:
            print(f"    {number:5.1f} x {micros:7.1f} = {number * micros:7.1f} µs  {kernel}", flush=True)
    return [Point(f"{name}, a layer", str(run.layout), shape, each / layers, floor, bound, machine, commit())]


if __name__ == "__main__":
    typer.run(main)
