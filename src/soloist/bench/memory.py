"""`soloist bench memory`: what ranks hold, part by part, beside what the planner says before anything is started."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

import msgspec
from rich.table import Table

from soloist.engine.llm import LLM
from soloist.engine.options import EngineOptions
from soloist.errors import RequestError
from soloist.planner.memory import MemoryLoad, memory_parts
from soloist.planner.precision import Precision
from soloist.scheduling.request import SamplingParams
from soloist.specs.layout import Layout

STAYING = ("attention", "experts", "shared experts", "dense layers", "router", "embedding and head", "KV cache")


@dataclass(frozen=True)
class Part:
    """Bytes of one part on one rank. `held` counts tensors; "in all" on a GPU what PyTorch reserved, and windows."""

    rank: int
    name: str
    predicted: float
    held: float

    @property
    def error(self) -> float:
        """Predicted over held, minus one; 0 where there is neither."""
        return self.predicted / self.held - 1 if self.held else float(self.predicted > 0)


def check(model: str, layout: Layout, options: EngineOptions, step_tokens: int, kv_tokens: int) -> Iterator[Part]:
    """Fill the largest step and some of the KV cache, then ask every rank. Raises RequestError without an answer."""
    given = msgspec.structs.replace(options, max_batch_tokens=step_tokens, kv_tokens=kv_tokens, prefix_caching=False)
    with LLM(model, layout=layout, options=given, show_progress=False) as llm:
        prompt = min(step_tokens, kv_tokens, llm.spec.max_positions) - 8
        draw = random.Random(0)
        prompts = [
            [draw.randrange(llm.spec.vocab) for _ in range(prompt)]
            for _ in range(layout.dp * layout.attention_groups * layout.pp)
        ]
        outputs = llm.generate(prompts, SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True))
        if errors := [output.error for output in outputs if output.error]:
            raise RequestError(errors[0])
        figures, spec = llm.figures(), llm.spec
    is_gpu = any("reserved" in one.memory for one in figures.values())
    dtype = Precision.of(spec, given.dtype or (None if is_gpu else "float32"), given.keep_fp8 and is_gpu)
    filled = given.on("cuda" if is_gpu else "cpu", layout.pp, layout.attention_ranks)
    buckets = given.graph_buckets(is_gpu)
    load = MemoryLoad(
        sequences=1, longest=kv_tokens, step_tokens=step_tokens, block=filled.block_size,
        replicated=filled.replicate_below, graph_rows=max(buckets, default=1),
    )  # fmt: skip
    for rank, one in sorted(figures.items()):
        predicted = memory_parts(spec, layout.at(rank), dtype, load, "pushed")
        yield from (Part(rank, name, predicted[name], one.memory[name]) for name in STAYING)
        if is_gpu:
            moving = ("exchange buffers", "activations")
            yield from (Part(rank, name, predicted[name], one.memory[name]) for name in moving)
            whole = sum(predicted[name] for name in (*STAYING, *moving))
            yield Part(rank, "in all", whole, one.memory["reserved"] + one.memory["exchange buffers"])


def table(parts: list[Part]) -> Table:
    """MB of each rank."""
    found = Table("rank", "part", "predicted MB", "held MB", "error")
    for column in found.columns[2:]:
        column.justify = "right"
    for part in parts:
        if part.predicted or part.held:
            sizes = (f"{part.predicted / 1e6:,.2f}", f"{part.held / 1e6:,.2f}")
            found.add_row(str(part.rank), part.name, *sizes, f"{part.error:+.1%}")
    return found
