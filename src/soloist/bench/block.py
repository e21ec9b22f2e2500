"""Decoder blocks in decode, captured as the engine captures them: where the microseconds of a layer go.

    python -m soloist.bench.block --model qwen3-30b-a3b --layout tp2 --sequences 1

The layers are first compared with their plain forms. Where rounding gave a token another expert there, its rows differ
by that expert: such tokens are counted and left out of the error.

Shape legend: T tokens of an attention group, D model width, S slots.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer
from torch import Tensor
from torch.distributed import PrefixStore
from torch.profiler import ProfilerActivity, profile

from soloist.bench.report import Ceilings, Point, commit, print_table
from soloist.dispatch.base import SlotChoice
from soloist.dispatch.ragged import RaggedDispatcher
from soloist.engine.meeting import Meeting, Place
from soloist.engine.options import EngineOptions
from soloist.engine.rank import nvlink, symmetric_group
from soloist.engine.runner import Runner
from soloist.engine.world import World
from soloist.models.random_weights import RandomWeights
from soloist.models.step import StepInput
from soloist.moe.choice import Chooser
from soloist.moe.router import Routing
from soloist.placement.placement import Placement
from soloist.probes.gpus import Bench, captured, in_ranks
from soloist.scheduling.request import Chunk, StepBatch
from soloist.specs.layout import Layout, share
from soloist.specs.model import ModelSpec
from soloist.specs.presets import preset
from soloist.transport.connect import connect, local_world

CONTEXT = 192  # tokens of each sequence, the step's included
REPLAYS = 20  # while the profiler looks


def world_of(bench: Bench, layout: Layout, nvlink_sums: bool, gpus_per_node: int = 0) -> World:
    """This rank's transports in a layout of all GPUs; a layout of one GPU runs on each of them by itself. They are one
    node unless `gpus_per_node` says otherwise."""
    if layout.size == 1:
        return World.build(local_world(1)[0], layout, 1)
    store = PrefixStore(f"block {layout}", dist.distributed_c10d._get_default_store())
    meeting = Meeting(Place(bench.rank, bench.size, bench.rank, bench.size), store)
    root = connect("nccl", bench.rank, bench.size, store, bench.device, deadline_s=20.0)

    def windows(ranks):
        return symmetric_group(meeting, bench.device, ranks)

    reach = windows if nvlink(meeting) else None
    per_node = gpus_per_node or bench.size
    return World.build(
        root, layout, per_node, control=root, windows=reach, by_node=per_node < bench.size, collectives=nvlink_sums
    )


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
            world = world_of(self.bench, self.layout, self.options.nvlink_sums)
            return Runner(self.spec, self.layout, placement, world, source, self.options)

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
        replicated = self.tokens < runner.options.replicate_below
        made = StepInput.of(batch, self.options.block_size, runner.rope, self.bench.device, torch.bfloat16, replicated)
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
        (whole,) = batches = decoder.micro_batches(step)
        x_tD = decoder.embed(whole).clone()
        return (
            lambda: decoder.forward([x_tD], batches, caches)[0],
            lambda: decoder.logits([decoder.embed(whole)], step, batches),
        )

    def error(self) -> tuple[float, float, int]:
        """Relative difference of the layers' result from that of the plain forms over NCCL, for tokens that chose the
        same experts in both; for all; and how many did not."""
        layers, _ = self.parts()
        fused, chosen = self._choices(layers)
        decoder, world = self.runner.decoder, self.runner.world
        kept = [block.moe for block in decoder.blocks]
        for block, moe in zip(decoder.blocks, kept, strict=True):
            assert moe is not None, "the presets of this benchmark have experts in their first layers"
            slots = len(moe.experts.down)
            forms = [RaggedDispatcher(world.experts, world.topology, slots, tp) for tp in (world.tp, None)]
            here = self.runner.dispatchers.here(slots)
            block.moe = replace(moe, dispatcher=forms[0], replicated=here if moe.own else forms[1])
        decoder.fuse(False)
        want, chosen_plain = self._choices(layers)
        for block, moe in zip(decoder.blocks, kept, strict=True):
            block.moe = moe
        decoder.fuse(True)
        world.check()
        same_t = torch.stack([(a == b).all(1) for a, b in zip(chosen, chosen_plain, strict=True)]).all(0)
        if len(same_t) < len(want):  # replicated tokens, of which this rank dispatches a slice
            same_t = self._of_all(same_t)
        errors = [float((fused[rows] - want[rows]).norm() / want[rows].norm()) for rows in (same_t, slice(None))]
        return errors[0], errors[1], int((~same_t).sum())

    def _choices(self, layers: Callable[[], Tensor]) -> tuple[Tensor, list[Tensor]]:
        """What the layers make of the step, in fp32; and in each of them the experts of the tokens dispatched here."""
        chosen: list[Tensor] = []

        def watched(choose: Chooser) -> Any:
            def call(x_TD: Tensor, live_T: Tensor | None = None) -> tuple[Routing, SlotChoice]:
                routing, choice = choose(x_TD, live_T)
                chosen.append(routing.expert_ids_TK.sort(1).values)
                return routing, choice

            return call

        with_experts = [block.moe for block in self.runner.decoder.blocks if block.moe]
        kept = [moe.choose for moe in with_experts]
        for moe in with_experts:
            moe.choose = watched(moe.choose)
        out = layers().float()
        for moe, choose in zip(with_experts, kept, strict=True):
            moe.choose = choose
        return out, chosen

    def _of_all(self, same_t: Tensor) -> Tensor:
        """All tokens of the attention group, from what each of its ranks knows of its slice."""
        group, seat = self.runner.world.attention, self.runner.world.seat
        assert group is not None
        slices = group.size // seat.layout.tp
        counts = [stop - start for start, stop in (share(self.tokens, slices, index) for index in range(slices))]
        each = [counts[index // seat.layout.tp] for index in range(group.size)]
        rows = group.all_gather_rows(same_t[:, None].int(), each)[:, 0]
        return torch.cat(list(rows.split(each))[:: seat.layout.tp]).bool()

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
        return sum(parts.values()) / Ceilings.of(torch.cuda.get_device_name()).memory, bound


def profiled(work: Callable[[], None], layers: int) -> list[tuple[str, float, float]]:
    """Kernels of a replay: name, how many a layer, µs of each."""
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for _ in range(REPLAYS):
            work()
        torch.cuda.synchronize()
    found = [e for e in seen.key_averages() if e.self_device_time_total > 0]
    found.sort(key=lambda e: -e.self_device_time_total)
    return [(short_name(e.key), e.count / REPLAYS / layers, e.self_device_time_total / e.count) for e in found]


def _of_ranks(bench: Bench, listed: list[tuple[str, float, float]]) -> list[tuple[str, float, list[float]]]:
    """This rank's kernels, with the µs of each on all ranks: who waits for whom shows there."""
    everybody: list[list[tuple[str, float, float]]] = [[] for _ in range(bench.size)]
    dist.all_gather_object(everybody, listed)
    micros = [{name: each for name, _, each in one} for one in everybody]
    return [(name, number, [one.get(name, 0.0) for one in micros]) for name, number, _ in listed]


def short_name(name: str) -> str:
    return re.sub(r"<.*|\(.*", "", name.replace("void ", "").replace("at::native::", ""))[:60] or name[:60]


def main(
    model: Annotated[list[str], typer.Option(help="presets")] = ["qwen3-30b-a3b"],  # noqa: B006
    layout: Annotated[list[str], typer.Option(help="of all GPUs, or of one")] = ["ep2", "tp2"],  # noqa: B006
    sequences: Annotated[list[int], typer.Option(help="of all attention groups together")] = [1, 32, 256],  # noqa: B006
    layers: Annotated[int, typer.Option(help="of the model that are run")] = 2,
    kernels: Annotated[bool, typer.Option(help="list the kernels")] = True,
    replicate_below: Annotated[int, typer.Option(help="tokens; see the engine's option of this name")] = -1,
    nvlink_sums: Annotated[bool, typer.Option(help="see the engine's option of this name")] = True,
) -> None:
    """Time decoder blocks on the GPUs of this host, each checked against the plain forms first."""
    if "RANK" not in os.environ:
        raise typer.Exit(in_ranks("soloist.bench.block", sys.argv[1:], least=1))
    bench, points = Bench.join(), []
    options = EngineOptions(
        replicate_below=replicate_below, nvlink_sums=nvlink_sums, max_batch_tokens=1024, max_sequences=256,
        kv_tokens=1024, block_size=64, cuda_graphs="off",
    )  # fmt: skip
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
    error, whole, moved = run.error()
    parts = run.parts()  # hold the tensors that the graphs read
    works = [captured(part) for part in parts]
    each, ends = bench.seconds(*works)
    run.runner.world.check()
    floor, bound = run.floor()
    shape = {"sequences": run.sequences, "T": run.tokens, "error": f"{error:.4f}", "ends_us": f"{ends * 1e6:.0f}"}
    machine = f"{bench.size} x {torch.cuda.get_device_name(bench.device)}"
    point = Point(f"{name}, a layer", str(run.layout), shape, each / layers, floor, bound, machine, commit())
    listed = _of_ranks(bench, profiled(works[0], layers)) if kernels else []
    if bench.rank == 0:
        us, floor_us = point.seconds * 1e6, floor * 1e6
        print(f"--- {name} {run.layout} {run.sequences} sequences: {us:.1f} µs a layer, floor {floor_us:.1f}; ends "
              f"{ends * 1e6:.1f} µs", flush=True)  # fmt: skip
        print(f"    error {error:.4f}; {moved} tokens chose other experts, with them {whole:.4f}", flush=True)
        for kernel, number, (own, *others) in listed:
            beside = f"  (other ranks: {', '.join(f'{one:.1f}' for one in others)})" if others else ""
            print(f"    {number:5.1f} x {own:7.1f} = {number * own:7.1f} µs  {kernel}{beside}", flush=True)
    return [point]


if __name__ == "__main__":
    typer.run(main)
