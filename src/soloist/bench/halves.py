"""Steps of a model's layers whole and as two halves that overlap, in turn, in one start: where do halves pay?

    python -m soloist.bench.halves --model qwen3-30b-a3b --layout ep2                      # one NVLink node
    python -m soloist.bench.halves --model qwen3-30b-a3b --layout ep2 --gpus-per-node 1    # as many nodes as GPUs, NCCL
    NCCL_P2P_DISABLE=1 python -m soloist.bench.halves … --gpus-per-node 1                  # through the host's memory
    python -m soloist.bench.halves --model qwen3-30b-a3b --layout ep1      # nothing travels: what halves cost

Each step is timed as the engine runs it, its kernels started one by one, and, where its exchange allows, as a CUDA
graph. Logits of both are compared: a token that rounding gives another expert counts in full.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer
from torch import Tensor

from soloist.bench.block import world_of
from soloist.bench.report import commit
from soloist.engine.options import EngineOptions
from soloist.engine.runner import Runner
from soloist.models.random_weights import RandomWeights
from soloist.placement.placement import Placement
from soloist.planner.halves import Halves
from soloist.probes.gpus import Bench, in_ranks
from soloist.scheduling.request import Chunk, SamplingParams, StepBatch
from soloist.specs.layout import Layout
from soloist.specs.presets import preset

WARM_UP, STEPS, TURNS = 2, 4, "ABBABA"  # calls of a form before, in each turn, and the order of turns
CONTEXT, BLOCK = 192, 64  # tokens of a decoding sequence; of a KV block
FORMS = ("off", "on")  # of the engine's option `overlap`


def prefill(tokens: int, prompt: int, ids: Sequence[int]) -> StepBatch:
    """New prompts, the last of them cut short."""
    params = SamplingParams(max_tokens=1, temperature=0.0)
    pieces, each = [ids[at : min(at + prompt, tokens)] for at in range(0, tokens, prompt)], -(-prompt // BLOCK)
    chunks = (
        Chunk(row, tuple(piece), 0, tuple(range(row * each, (row + 1) * each)), True, params)
        for row, piece in enumerate(pieces)
    )
    return StepBatch(0, tuple(chunks), peak=tokens)


def decode(sequences: int, ids: Sequence[int]) -> StepBatch:
    """One token of each sequence, at the end of its context."""
    params, each = SamplingParams(max_tokens=1, temperature=0.0), -(-CONTEXT // BLOCK)
    chunks = (
        Chunk(row, (ids[row],), CONTEXT - 1, tuple(range(row * each, (row + 1) * each)), True, params)
        for row in range(sequences)
    )
    return StepBatch(0, tuple(chunks), peak=sequences, decodes=True)


@dataclass
class Rank:
    """This rank's share of the layers, with memory for halves and for whole steps."""

    bench: Bench
    runner: Runner

    def started(self, batch: StepBatch, overlap: str) -> Callable[[], Tensor]:
        """A step whose kernels the host starts one by one. Returns its logits."""

        def work() -> Tensor:
            self.runner.halves = Halves.parse(overlap)
            logits = self.runner.logits(batch)
            assert logits is not None, "this benchmark has no pipelines"
            return logits

        return work

    def captured(self, batch: StepBatch, overlap: str) -> Callable[[], Tensor]:
        """The same in a graph."""
        runner, rows = self.runner, batch.tokens if batch.decodes else len(batch.chunks)
        runner.halves = Halves.parse(overlap)
        step = runner.static_step(batch.tokens, rows, -(-runner.options.longest(runner.spec) // BLOCK))
        step.fill(batch, runner.feedback.sources(batch), runner.feedback.begin(batch))
        stream = torch.cuda.Stream(self.bench.device)
        stream.wait_stream(torch.cuda.current_stream())
        step.capture(torch.cuda.graph_pool_handle(), stream)
        torch.cuda.current_stream().wait_stream(stream)

        def work() -> Tensor:
            step.replay()
            return step.out[: len(batch.chunks)]

        return work

    def compare(self, works: Sequence[Callable[[], Tensor]]) -> tuple[list[float], float]:
        """Seconds of a step in each form, of the slowest rank; relative difference of their logits."""
        whole, halved = (work().float().clone() for work in works)
        for work in works:
            self._seconds(work, WARM_UP)
        found: dict[str, list[float]] = {"A": [], "B": []}
        for turn in TURNS:
            found[turn].append(self._seconds(works["AB".index(turn)], STEPS))
        self.runner.world.check()
        slowest = torch.tensor([median(found[turn]) for turn in "AB"], device=self.bench.device)
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        return slowest.tolist(), float((halved - whole).norm() / whole.norm())

    def _seconds(self, work: Callable[[], object], steps: int) -> float:
        dist.barrier()
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(steps):
            work()
        torch.cuda.synchronize()
        return (time.perf_counter() - start) / steps


def rank_of(
    bench: Bench, name: str, layout: Layout, gpus_per_node: int, tokens: int, prompt: int, sequences: int
) -> Rank:  # fmt: skip
    """With room for steps of up to so many tokens or sequences of an attention group."""
    spec, held = preset(name), max(-(-tokens // prompt) * -(-prompt // BLOCK), sequences * -(-CONTEXT // BLOCK))
    options = EngineOptions(
        max_batch_tokens=tokens, max_sequences=max(sequences, -(-tokens // prompt)), kv_tokens=held * BLOCK,
        max_positions=max(prompt, CONTEXT), cuda_graphs="off", block_size=BLOCK, prefix_caching=False,
        gpus_per_node=gpus_per_node, exchange="hierarchical", overlap=f"prefill={tokens + 1}",
    )  # fmt: skip
    world = world_of(bench, layout, True, gpus_per_node)
    source = RandomWeights(spec, 5, torch.bfloat16, bench.device)
    runner = Runner(spec, layout, Placement.linear(spec, layout.ep), world, source, options)
    runner.allocate(held)
    runner.logits_BV = torch.empty(options.max_sequences, spec.vocab, dtype=torch.bfloat16, device=bench.device)
    return Rank(bench, runner)


def measure(rank: Rank, batches: Sequence[StepBatch], named: dict[str, Any], layers: int) -> Iterator[dict[str, Any]]:
    """A record of each step in each way to start it."""
    for batch in batches:
        ways = {"started": rank.started}
        if rank.runner.buckets.captures(batch.tokens):
            ways["captured"] = rank.captured
        for way, make in ways.items():
            (whole_s, halves_s), error = rank.compare([make(batch, overlap) for overlap in FORMS])
            yield {
                **named, "step": f"{'decode' if batch.decodes else 'prefill'} {batch.tokens}", "way": way,
                "whole_us": round(1e6 * whole_s / layers, 1), "halves_us": round(1e6 * halves_s / layers, 1),
                "ratio": round(halves_s / whole_s, 3), "logits_differ": round(error, 5),
            }  # fmt: skip


def main(
    model: Annotated[str, typer.Option(help="a preset")] = "qwen3-30b-a3b",
    layout: Annotated[str, typer.Option(help="of all GPUs, or of one")] = "ep2",
    layers: Annotated[int, typer.Option(help="of the model that are run")] = 8,
    gpus_per_node: Annotated[int, typer.Option(help="of a declared node; 0: all GPUs are one node")] = 0,
    tokens: Annotated[list[int], typer.Option(help="of prefill steps and attention group")] = [8192, 2048],  # noqa: B006
    prompt: Annotated[int, typer.Option(help="tokens of a prompt")] = 2000,
    sequences: Annotated[list[int], typer.Option(help="of decoding steps and attention group")] = [128],  # noqa: B006
) -> None:
    """Time steps whole and as two halves; µs a layer of the slowest rank."""
    if "RANK" not in os.environ:
        raise typer.Exit(in_ranks("soloist.bench.halves", sys.argv[1:], least=1))
    bench, name, parsed = Bench.join(), f"{model}@{layers}", Layout.parse(layout)
    per_node = gpus_per_node or bench.size
    rank = rank_of(bench, name, parsed, per_node, max(tokens), prompt, max([1, *sequences]))
    generator = torch.Generator().manual_seed(rank.runner.world.seat.attention_group)
    ids = torch.randint(0, rank.runner.spec.vocab, (max(tokens),), generator=generator).tolist()
    batches = [*(prefill(size, prompt, ids) for size in tokens), *(decode(count, ids) for count in sequences)]
    machine = f"{bench.size} x {torch.cuda.get_device_name(bench.device)}"
    named = {"what": "halves", "model": name, "layout": layout, "gpus_per_node": per_node}
    with torch.inference_mode():
        for record in measure(rank, batches, named, layers):
            if bench.rank == 0:
                print(json.dumps({**record, "machine": machine, "commit": commit()}), flush=True)


if __name__ == "__main__":
    typer.run(main)
