"""What the engine itself takes, without a server: prefill throughput and the time of a decoding step.

    prefill   N prompts of L tokens, one new token each: N · L / seconds from the first submission to the last answer
    TPOT      N prompts with 1 + T new tokens each: the mean time between tokens while all N sequences decode

Layouts are started one after the other, forwards and backwards in turn, so that what drifts touches all alike; every
figure is the median over a layout's starts and the repeats within each. Beside it stands what the machine allows at
best: arithmetic at the rate of a large product, or every byte that has to be read once (`Ceilings`).
"""

from __future__ import annotations

import json
import random
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import msgspec
import torch

from soloist.bench.pace import steady_tpot_s, token_times
from soloist.bench.report import Ceilings, commit
from soloist.engine.llm import LLM
from soloist.engine.options import EngineOptions
from soloist.errors import ConfigurationError, RequestError
from soloist.moe.stats import imbalance
from soloist.planner.bounds import flops_per_token
from soloist.planner.precision import Precision
from soloist.planner.weights import kv_elements, rank_weights
from soloist.scheduling.request import SamplingParams
from soloist.specs.layout import Layout
from soloist.specs.model import ModelSpec

H100 = Ceilings()
FEWEST, MOST, SETTLED, SLOWER = 3, 8, 2, 1.3  # rehearsals; the last ones may take so much longer than the fastest


@dataclass(frozen=True)
class Prefill:
    """`count` prompts of `tokens` tokens."""

    count: int
    tokens: int

    @classmethod
    def parse(cls, text: str) -> Prefill:
        """`8x8000`. Raises ConfigurationError for anything else."""
        if not (found := re.fullmatch(r"(\d+)x(\d+)", text)):
            raise ConfigurationError.of("--prefill", text, "write COUNTxTOKENS, for instance 8x8000")
        return cls(*map(int, found.groups()))

    def __str__(self) -> str:
        return f"{self.count}x{self.tokens}"


@dataclass(frozen=True)
class Load:
    """What every layout is put through."""

    prefills: Sequence[Prefill]
    decodes: Sequence[int]  # sequences
    context: int = 128  # tokens of a prompt whose continuation is timed
    tokens: int = 128  # of the continuation
    repeats: int = 2  # within a start

    def options(self, given: EngineOptions, layout: Layout) -> EngineOptions:
        """With room for exactly this: the KV cache, the graphs, no prefix cache."""
        longest = max([p.tokens + 2 for p in self.prefills] + [self.context + self.tokens + 2])
        groups = layout.attention_groups * layout.dp
        rows = sorted({_share(n, groups) for n in self.decodes})
        graphs = ",".join(map(str, _rows(rows or [1], layout)))
        held = [_share(p.count, groups) * (p.tokens + 65) for p in self.prefills]
        held += [_share(n, groups) * (self.context + self.tokens + 65) for n in self.decodes]
        return msgspec.structs.replace(
            given,
            kv_tokens=given.kv_tokens or max(held),
            max_positions=longest,
            max_sequences=max([*rows, *(_share(p.count, groups) for p in self.prefills)]),
            cuda_graphs=graphs if given.cuda_graphs == "auto" else given.cuda_graphs,
            prefix_caching=False,
        )


@dataclass
class Start:
    """One start of a layout: seconds of its parts, and of everything measured (each point's repeats)."""

    layout: Layout
    start_s: float
    first_token_s: float
    points: dict[tuple[str, str], list[float]] = field(default_factory=dict)
    phases_s: dict[str, float] = field(default_factory=dict)  # of the start: when all ranks had come to each
    memory: dict[int, dict[str, int]] = field(default_factory=dict)  # bytes by part, of each rank


Told = Callable[[dict[str, Any]], None]  # of each point of each start, as soon as it is measured


def measure(
    model: str, layout: Layout, load: Load, options: EngineOptions, seed: int = 0, told: Told = lambda point: None
) -> Start:
    """Start a layout and put it through the load. Raises RequestError where a request is not answered."""
    begin = time.perf_counter()

    def tell(what: str, shape: str, times_s: Sequence[float]) -> None:
        at_s = round(time.perf_counter() - begin, 1)
        named = {"what": f"{what}, one start", "model": model, "layout": str(layout), "shape": shape}
        told({**named, "times_s": [round(each, 6) for each in times_s], "at_s": at_s})

    with LLM(model, layout=layout, options=load.options(options, layout), show_progress="lines") as llm:
        ready = time.perf_counter()
        draw = _Prompts(llm.spec.vocab, seed)
        _generate(llm, draw(1, 4), 1)
        start = Start(layout, ready - begin, time.perf_counter() - begin, phases_s=llm.start_s)
        tell("start", "first token", [start.first_token_s])
        for prefill in load.prefills:
            prompts = draw(prefill.count, prefill.tokens)
            _rehearse(llm, prompts, 1)
            times = [_generate(llm, prompts, 1) for _ in range(load.repeats)]
            start.points["prefill", str(prefill)] = times
            tell("prefill", str(prefill), times)
        for count in load.decodes:
            prompts = draw(count, load.context)
            _rehearse(llm, prompts, 4)
            times = [steady_tpot_s(token_times(llm, prompts, 1 + load.tokens)) for _ in range(load.repeats)]
            start.points["TPOT", str(count)] = times
            tell("TPOT", str(count), times)
        start.memory = {rank: figures.memory for rank, figures in llm.figures().items()}
    return start


def compare(
    model: str,
    layouts: Sequence[Layout],
    load: Load,
    options: EngineOptions,
    runs: int,
    seed: int = 0,
    told: Told = lambda point: None,
) -> Iterator[Start]:
    """Every layout `runs` times: A B C, C B A, …"""
    for run in range(runs):
        for layout in layouts if run % 2 == 0 else reversed(layouts):
            yield measure(model, layout, load, options, seed, told)


def routing(model: str, layout: Layout, load: Load, options: EngineOptions, seed: int = 0) -> dict[str, Any]:
    """How even the routing is, from a start of its own that is not timed: counting takes time.

    Over all tokens of the prompts the largest load of a rank over the mean (mean and greatest over layers); for each
    number of sequences also one decoding step: experts of a layer that it touches (mean over layers).
    """
    counting = msgspec.structs.replace(load.options(options, layout), count_experts=True)
    found: dict[str, Any] = {"what": "routing", "model": model, "layout": str(layout)}
    with LLM(model, layout=layout, options=counting, show_progress=False) as llm:
        draw, slots = _Prompts(llm.spec.vocab, seed), llm.placement.slots
        for prefill in load.prefills:
            chosen_LE = _chosen(llm, draw(prefill.count, prefill.tokens), 1)
            found[f"rank_max_over_mean_{prefill}"] = _evenness(chosen_LE, slots, layout.ep)
        for count in load.decodes:
            prompts = draw(count, load.context)
            short_LE, long_LE = (_chosen(llm, prompts, tokens) for tokens in (1, 2))
            found[f"experts_touched_{count}"] = round(float(((long_LE - short_LE) > 0).sum(1).float().mean()), 1)
            found[f"rank_max_over_mean_{count}"] = _evenness(short_LE, slots, layout.ep)
    return found


def _chosen(llm: LLM, prompts: list[list[int]], max_tokens: int) -> torch.Tensor:
    """Choices of each expert in each MoE layer while these prompts were answered, over all ranks: int64 [L, E]."""
    llm.figures()
    _generate(llm, prompts, max_tokens)
    counts_LE = torch.zeros(len(llm.spec.moe_layers), llm.spec.experts, dtype=torch.int64)
    for figures in llm.figures().values():
        for layer, chosen in figures.chosen.items():
            counts_LE[llm.spec.moe_layers.index(layer)] += torch.tensor(chosen)
    return counts_LE


def _evenness(chosen_LE: torch.Tensor, slots: Sequence[Sequence[Sequence[int]]], groups: int) -> tuple[float, float]:
    """Load of the fullest group over the mean: mean and greatest over layers."""
    of_layers = [
        imbalance(torch.stack([chosen_E[list(placed[group])].sum() for group in range(groups)]))
        for chosen_E, placed in zip(chosen_LE, slots, strict=True)
    ]
    return round(sum(of_layers) / len(of_layers), 3), round(max(of_layers), 3)


def records(
    spec: ModelSpec, load: Load, starts: Sequence[Start], options: EngineOptions, machine: str = ""
) -> list[dict[str, Any]]:
    """One flat record for each layout and point: medians, and the ceiling beside them; with the options that
    predictions go by (planner/tables.py). `machine`: the GPU's name."""
    found: list[dict[str, Any]] = []
    ceilings, common = Ceilings.of(machine), {"commit": commit(), "machine": machine}
    common |= {"mixed_graphs": options.mixed_graphs, "nvlink_sums": options.nvlink_sums}
    for layout in dict.fromkeys(start.layout for start in starts):
        own = [start for start in starts if start.layout == layout]
        for what, shape in own[0].points:
            seconds = median(value for start in own for value in start.points[what, shape])
            ceiling = _prefill_s(spec, layout, Prefill.parse(shape), ceilings) if what == "prefill" else decode_s(
                spec, layout, int(shape), load.context + load.tokens / 2, ceilings
            )  # fmt: skip
            tokens = Prefill.parse(shape).count * Prefill.parse(shape).tokens if what == "prefill" else int(shape)
            found.append({
                "what": what, "model": spec.name, "layout": str(layout), "shape": shape, "seconds": seconds,
                "tokens_per_s": tokens / seconds, "ceiling_s": ceiling, "fraction": round(ceiling / seconds, 4),
                "bound_by": "arithmetic" if what == "prefill" else "bytes", "starts": len(own), **common,
                "context": load.context + load.tokens / 2,
            })  # fmt: skip
        held = load.options(options, layout)
        found.append({
            "what": "memory", "model": spec.name, "layout": str(layout), "bytes": own[0].memory,
            "kv_tokens": held.kv_tokens, "sequences": held.max_sequences, **common,
        })  # fmt: skip
        found.append({
            "what": "start", "model": spec.name, "layout": str(layout), "shape": "first token",
            "seconds": median(start.first_token_s for start in own),
            "ready_s": [round(start.start_s, 2) for start in own], "starts": len(own), **common,
            "phases_s": [start.phases_s for start in own],
        })  # fmt: skip
    return found


def write(found: Sequence[dict[str, Any]], path: Path | None) -> None:
    """A JSON line for each record, to stdout where no file is named."""
    text = "".join(json.dumps(record) + "\n" for record in found)
    if path is None:
        print(text, end="")
        return
    with path.open("a") as file:
        file.write(text)


def gpu() -> str:
    """The name of this host's first GPU; nothing where there is none."""
    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else ""


# -- what the machine allows ------------------------------------------------------------------------------------------
def _prefill_s(spec: ModelSpec, layout: Layout, prefill: Prefill, ceilings: Ceilings) -> float:
    """All arithmetic, attention over half of the prompt on average, evenly over all GPUs."""
    flops = prefill.count * prefill.tokens * flops_per_token(spec, prefill.tokens / 2)
    return flops / layout.size / ceilings.flops


def decode_s(spec: ModelSpec, layout: Layout, sequences: int, context: float, ceilings: Ceilings = H100) -> float:
    """Bytes that a step reads at least, by the rank that reads most: its weights, of experts those that uniform
    routing touches, and the keys and values of its sequences; in a pipeline once for each micro-batch, in turn."""
    batches = min(layout.pp, sequences)
    each = -(-sequences // batches)  # of a micro-batch
    touched = spec.experts * (1 - (1 - spec.router.top_k / max(spec.experts, 1)) ** each) / layout.ep
    stage_s = []
    for stage in range(layout.pp):
        seat = layout.at(stage * layout.stage_ranks)
        weights = rank_weights(spec, seat, touched, Precision.of(spec))
        moved = sum(weights.values()) - (weights["embedding and head"] if not seat.is_last_stage else 0)
        if layout.pp == 1:
            moved -= weights["embedding and head"] / 2  # of the embedding some rows
        layers = len(layout.stage_layers(stage, spec.layers))
        kv = 2 * kv_elements(spec, layout.attention_ranks) * context * _share(each, layout.attention_groups) * layers
        stage_s.append((moved + kv) / ceilings.memory)
    return sum(stage_s) if batches == 1 else max(stage_s) * batches


# -- requests ---------------------------------------------------------------------------------------------------------
class _Prompts:
    """Random token ids; never the same prompt twice."""

    def __init__(self, vocab: int, seed: int) -> None:
        self._vocab, self._random = vocab, random.Random(seed)

    def __call__(self, count: int, tokens: int) -> list[list[int]]:
        return [[self._random.randrange(self._vocab) for _ in range(tokens)] for _ in range(count)]


def _generate(llm: LLM, prompts: list[list[int]], max_tokens: int) -> float:
    """Seconds until all of them are answered."""
    start = time.perf_counter()
    outputs = llm.generate(prompts, SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True))
    seconds = time.perf_counter() - start
    if errors := [output.error for output in outputs if output.error]:
        raise RequestError(errors[0])
    return seconds


def _rehearse(llm: LLM, prompts: list[list[int]], max_tokens: int) -> None:
    """Until kernels are compiled and communicators made: no run takes much longer than the fastest.

    How the prompts are spread over steps differs from run to run, and with it which kernels are needed.
    """
    times = [_generate(llm, prompts, max_tokens)]
    while len(times) < FEWEST or max(times[-SETTLED:]) > SLOWER * min(times):
        times.append(_generate(llm, prompts, max_tokens))
        if len(times) == MOST:
            return


def _share(count: int, groups: int) -> int:
    return -(-count // groups)


def _rows(rows: Sequence[int], layout: Layout) -> list[int]:
    """Of the graphs: in a pipeline the batches in flight share the sequences."""
    return sorted({_share(n, layout.pp) for n in rows} | set(rows))
