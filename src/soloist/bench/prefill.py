"""Steps of prompts without graphs, as the engine runs them: what the host takes, what the GPU takes, kernel by kernel.

    python -m soloist.bench.prefill --model qwen3-30b-a3b --layout tp2 --layout ep2

Shape legend: T tokens of an attention group.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Annotated

import torch
import torch.distributed as dist
import typer
from torch.profiler import ProfilerActivity, profile

from soloist.bench.block import short_name, world_of
from soloist.engine.options import EngineOptions
from soloist.engine.runner import Runner
from soloist.models.random_weights import RandomWeights
from soloist.placement.placement import Placement
from soloist.probes.gpus import Bench, in_ranks
from soloist.scheduling.request import Chunk, SamplingParams, StepBatch
from soloist.specs.layout import Layout
from soloist.specs.presets import preset

WARM_UP, STEPS, SEEN = 3, 8, 2  # steps before, timed in a row, and looked at by the profiler


def steps(tokens: int, prompt: int, block_size: int, vocab: int, seed: int) -> Iterator[StepBatch]:
    """Full steps of new prompts, the last of them cut short; each step writes over the blocks of the one before."""
    params, generator = SamplingParams(max_tokens=1, temperature=0.0), torch.Generator().manual_seed(seed)
    pieces = [min(prompt, tokens - at) for at in range(0, tokens, prompt)]
    each = -(-prompt // block_size)
    for number in range(WARM_UP + STEPS + SEEN):
        ids = torch.randint(0, vocab, (tokens,), generator=generator).split(pieces)
        blocks = [tuple(range(row * each, (row + 1) * each)) for row in range(len(pieces))]
        chunks = (
            Chunk(number * len(pieces) + row, tuple(piece.tolist()), 0, blocks[row], True, params)
            for row, piece in enumerate(ids)
        )
        yield StepBatch(number, tuple(chunks), tokens)


def measure(bench: Bench, model: str, layers: int, layout: Layout, tokens: int, prompt: int) -> Iterator[str]:
    """Lines of the first rank."""
    spec, size = preset(f"{model}@{layers}"), 64
    held = -(-tokens // prompt) * -(-prompt // size)
    options = EngineOptions(
        max_batch_tokens=tokens, max_positions=max(prompt, size), kv_tokens=held * size, cuda_graphs="off",
        block_size=size, prefix_caching=False,
    )  # fmt: skip
    source = RandomWeights(spec, 5, torch.bfloat16, bench.device)
    runner = Runner(spec, layout, Placement.linear(spec, layout.ep), world_of(bench, layout, True), source, options)
    runner.allocate(held)
    batches = steps(tokens, prompt, size, spec.vocab, runner.world.seat.attention_group)
    for _ in range(WARM_UP):
        runner.run(next(batches))
        torch.cuda.synchronize()
    ready = [next(batches) for _ in range(STEPS)]
    dist.barrier()
    host_s, whole_s = _timed(lambda: [runner.run(batch) for batch in ready])
    whole, host = (1e6 * seconds / STEPS / layers for seconds in (whole_s, host_s))
    yield f"--- {model} {layout}, steps of {tokens} tokens: {whole:.0f} µs a layer, of the host {host:.0f}"
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for batch in batches:
            runner.run(batch)
        torch.cuda.synchronize()
    runner.world.check()
    found = [event for event in seen.key_averages() if event.self_device_time_total > 0]
    for event in sorted(found, key=lambda event: -event.self_device_time_total):
        number, each = event.count / SEEN / layers, event.self_device_time_total / event.count
        yield f"    {number:5.1f} x {each:7.1f} = {number * each:7.1f} µs  {short_name(event.key)}"


def _timed(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds until the host has given everything to the GPU, and until that is done."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    given = time.perf_counter()
    torch.cuda.synchronize()
    return given - start, time.perf_counter() - start


def main(
    model: Annotated[str, typer.Option(help="a preset")] = "qwen3-30b-a3b",
    layout: Annotated[list[str], typer.Option(help="of all GPUs, or of one")] = ["tp2", "ep2"],  # noqa: B006
    layers: Annotated[int, typer.Option(help="of the model that are run")] = 8,
    tokens: Annotated[int, typer.Option(help="of a step and attention group")] = 8192,
    prompt: Annotated[int, typer.Option(help="tokens of a prompt")] = 2000,
) -> None:
    """Time full steps of prompts, and list their kernels; those that wait for a peer count their waiting."""
    if "RANK" not in os.environ:
        raise typer.Exit(in_ranks("soloist.bench.prefill", sys.argv[1:], least=1))
    bench = Bench.join()
    for text in layout:
        for line in measure(bench, model, layers, Layout.parse(text), tokens, prompt):
            if bench.rank == 0:
                print(line, flush=True)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    typer.run(main)
