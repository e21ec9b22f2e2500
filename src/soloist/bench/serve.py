"""`soloist bench serve`: requests sent to an OpenAI-compatible server when they are due, whatever it answers.

Open loop: arrivals do not wait for answers, so a server that falls behind shows it. Times of a request count from when
it was due. Goodput counts the requests that met the SLO.
"""

from __future__ import annotations

import asyncio
import json
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from rich.table import Table

from soloist.bench.serve_plot import plot_serve
from soloist.bench.sse import Client, Outcome
from soloist.errors import ConfigurationError
from soloist.planner.plots import drawn
from soloist.server.slo import Slo
from soloist.simulator.arrivals import gaps, lengths
from soloist.simulator.report import PERCENTILES, Spread
from soloist.specs.workload import Load


@dataclass(frozen=True)
class Planned:
    """One request: when it is due, counted from the first, and its body."""

    due_s: float
    body: Mapping[str, Any]


def plan_random(load: Load, requests: int, model: str, seed: int, vocab: int, prefixes: int = 1) -> list[Planned]:
    """Prompts of random token ids, lengths and gaps as the load says.

    Where `load.prefix` gives prompts a common part, each prompt has one of `prefixes` different ones.
    """
    if prefixes < 1:
        raise ConfigurationError.of("--prefixes", prefixes, "must be at least 1")
    random = np.random.default_rng(seed)
    prompts = lengths(load.prompt, load.spread, requests, random, "lognormal")
    outputs = lengths(load.output, load.spread, requests, random, "lognormal")
    shared = random.integers(1, vocab, (prefixes, int(load.prefix * prompts.max())))
    bodies = []
    for prompt, output in zip(prompts.tolist(), outputs.tolist(), strict=True):
        prefix = shared[random.integers(prefixes), : int(load.prefix * prompt)].tolist()
        ids = prefix + random.integers(1, vocab, prompt - len(prefix)).tolist()
        bodies.append(_body(model, ids, output) | {"ignore_eos": True})
    return _due(load, bodies, random)


def plan_file(load: Load, path: Path, requests: int, model: str, seed: int, chat: bool = False) -> list[Planned]:
    """Prompts of a ShareGPT-style file: a list of `{"conversations": [{"from", "value"}, …]}`.

    The first turn is the prompt; the answer may be as long as the second one, four characters taken for a token.
    chat: the prompt is a user's message.
    Raises ConfigurationError for a file of another form.
    """
    try:
        entries = json.loads(path.read_text())
        turns = [entry.get("conversations", entry.get("conversation")) for entry in entries]
        pairs = [(turn[0]["value"], turn[1]["value"]) for turn in turns if turn and len(turn) > 1]
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise ConfigurationError.of("--dataset", str(path), f"is no list of conversations ({error!r})") from error
    if not pairs:
        raise ConfigurationError.of("--dataset", str(path), "holds no conversation of two turns")
    random = np.random.default_rng(seed)
    chosen = random.choice(len(pairs), requests, replace=requests > len(pairs))
    bodies = [_body(model, pairs[i][0], min(load.output, max(1, len(pairs[i][1]) // 4)), chat) for i in chosen]
    return _due(load, bodies, random)


def _body(model: str, prompt: str | list[int], output: int, chat: bool = False) -> dict[str, Any]:
    asked = {"messages": [{"role": "user", "content": prompt}]} if chat else {"prompt": prompt}
    options = {"stream": True, "stream_options": {"include_usage": True}, "temperature": 0.0}
    return {"model": model, "max_tokens": output} | asked | options


def _due(load: Load, bodies: Sequence[Mapping[str, Any]], random: np.random.Generator) -> list[Planned]:
    """All at once where the load has no rate."""
    times = np.cumsum(gaps(load, len(bodies), random)) if load.rate else np.zeros(len(bodies))
    return [Planned(float(due - times[0]), body) for due, body in zip(times, bodies, strict=True)]


async def send(client: Client, planned: Sequence[Planned], path: str) -> list[Outcome]:
    """Send every request when it is due; outcomes in their order."""
    start_s = time.monotonic()

    async def one(request: Planned) -> Outcome:
        await asyncio.sleep(start_s + request.due_s - time.monotonic())
        return await client.stream(path, request.body, start_s + request.due_s)

    return await asyncio.gather(*(one(request) for request in planned))


def summarise(outcomes: Sequence[Outcome], load: Load, dataset: Path | None = None) -> dict[str, Any]:
    """One record of all outcomes. Rates count from the first due time to the last token.

    dataset: the file that prompts came from, whatever lengths the load names.
    """
    good = [outcome for outcome in outcomes if outcome.error is None and outcome.tokens]
    begin = min(outcome.due_s for outcome in outcomes)
    wall_s = max((outcome.last_s for outcome in good), default=begin) - begin
    slo = Slo.of(load)
    met = [outcome for outcome in good if slo.is_met(outcome.first_s - outcome.due_s, outcome.tpot_s or 0.0)]
    tokens = sum(outcome.tokens for outcome in good)
    tpot_s = [value for outcome in good if (value := outcome.tpot_s) is not None]
    return {
        "what": "serve",
        "load": str(load),
        "dataset": dataset.name if dataset else None,
        "slo_s": {"ttft": load.ttft_s or None, "tpot": load.tpot_s or None},
        "requests": len(outcomes),
        "answered": len(good),
        "errors": _errors(outcomes),
        "wall_s": wall_s,
        "requests_per_s": len(good) / wall_s if wall_s else 0.0,
        "tokens": tokens,
        "tps": tokens / wall_s if wall_s else 0.0,
        "goodput_per_s": len(met) / wall_s if wall_s else 0.0,
        "met_slo": len(met) / len(outcomes),
        "prefix_hit_rate": _hit_rate(good),
        "ttft_s": percentiles([outcome.first_s - outcome.due_s for outcome in good]),
        "tpot_s": percentiles(tpot_s),
        "longest_gap_s": percentiles([outcome.longest_gap_s for outcome in good]),
        "latency_s": percentiles([outcome.last_s - outcome.due_s for outcome in good]),
        "sent_late_s": percentiles([outcome.late_s for outcome in outcomes]),
        "machine": platform.node(),
    }


def _hit_rate(outcomes: Sequence[Outcome]) -> float | None:
    """Share of the prompt tokens that were found in the server's cache; None where it does not tell."""
    told = [outcome for outcome in outcomes if outcome.cached_tokens is not None]
    prompt = sum(outcome.prompt_tokens for outcome in told)
    return sum(outcome.cached_tokens or 0 for outcome in told) / prompt if prompt else None


def percentiles(values: Sequence[float]) -> dict[str, float | None]:
    """Mean, the usual percentiles, and the largest."""
    spread = Spread.of(np.array(values))
    return msgspec.structs.asdict(spread) if spread else {}


def _errors(outcomes: Sequence[Outcome]) -> dict[str, int]:
    found: dict[str, int] = {}
    for outcome in outcomes:
        if outcome.error:
            found[outcome.error] = found.get(outcome.error, 0) + 1
    return found


def table(summary: Mapping[str, Any]) -> Table:
    """The summary for people."""
    shown = Table("", "mean", *(f"p{percent}" for percent in PERCENTILES), "max", title=_title(summary))
    for column in shown.columns[1:]:
        column.justify = "right"
    for key, name in (
        ("ttft_s", "TTFT, ms"),
        ("tpot_s", "TPOT, ms"),
        ("longest_gap_s", "longest gap, ms"),
        ("latency_s", "whole request, ms"),
        ("sent_late_s", "sent late, ms"),
    ):
        shown.add_row(name, *(f"{value * 1e3:.1f}" for value in summary[key].values()))
    return shown


def _title(summary: Mapping[str, Any]) -> str:
    hits = summary["prefix_hit_rate"]
    found = "" if hits is None else f", {hits:.1%} of the prompts found in the cache"
    return (
        f"{summary['answered']} of {summary['requests']} requests answered, {summary['tps']:.1f} tokens/s, "
        f"{summary['met_slo']:.1%} within the SLO: goodput {summary['goodput_per_s']:.2f} requests/s{found}"
    )


def lines(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """One record a request."""
    begin = min(outcome.due_s for outcome in outcomes)
    return [
        {
            "due_s": outcome.due_s - begin,
            "status": outcome.status,
            "ttft_s": outcome.first_s - outcome.due_s if outcome.events else None,
            "latency_s": outcome.last_s - outcome.due_s if outcome.events else None,
            "tokens": outcome.tokens,
            "tpot_s": outcome.tpot_s,
            "error": outcome.error,
        }
        for outcome in outcomes
    ]


def write(outcomes: Sequence[Outcome], summary: Mapping[str, Any], folder: Path) -> list[Path]:
    """requests.jsonl, serve.jsonl and, with matplotlib, serve.png in a folder. Returns what was written."""
    folder.mkdir(parents=True, exist_ok=True)
    requests, summed = (folder / name for name in ("requests.jsonl", "serve.jsonl"))
    requests.write_text("".join(json.dumps(line) + "\n" for line in lines(outcomes)))
    summed.write_text(json.dumps(summary) + "\n")
    return [requests, summed, *drawn(partial(plot_serve, lines(outcomes), summary), folder / "serve.png")]
