"""Why a layout wins, in words: where its time goes, and what it saves against another."""

from __future__ import annotations

from collections.abc import Sequence

from soloist.planner.batching import Traffic, choose, links_of
from soloist.planner.exchange import row_bytes
from soloist.planner.score import Score
from soloist.planner.winners import TIE, tied
from soloist.specs.cluster import ClusterSpec
from soloist.specs.workload import Load

MOST_TIES = 4  # that are named


def why(best: Score, other: Score) -> str:
    """What decides between two scores: the parts of a token's time that differ most, per sequence and step."""
    ratio = best.rate_per_gpu / other.rate_per_gpu
    names = [score.deployment.name for score in (best, other)]
    if names[0] == names[1]:
        names[1] += f" with overlap {'on' if other.decode.is_overlapped else 'off'}"
    heads = f"{names[0]} gives {ratio:.2f} x the tokens per GPU of {names[1]}"
    gains = _differences(best, other)
    parts = [(name, *(_micros(_per_token(score, name)) for score in (other, best))) for name in gains[:3]]
    faster = ", ".join(f"{name} {before} → {after}" for name, before, after in parts)
    return f"{heads}. GPU time of a token in µs: {faster}."


def _differences(best: Score, other: Score) -> list[str]:
    """Names of parts, the one that saves most first."""
    names = {*best.work.parts, *other.work.parts} | ({PREFILL} if best.decodes else set())
    return sorted(names, key=lambda name: _per_token(best, name) - _per_token(other, name))


def _micros(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.2g}"


PREFILL = "prefill of arriving prompts"


def _per_token(score: Score, name: str) -> float:
    """GPU-microseconds that one token costs in a part, of which the whole step takes `1 / rate_per_gpu`."""
    whole = score.tpot.value if score.decodes else score.prefill.seconds.value
    if name == PREFILL:
        seconds = score.tpot.value - score.decode.seconds.value
    else:
        part = score.work.parts.get(name)
        seconds = part.value if part else 0.0
    return 1e6 * seconds / whole / score.rate_per_gpu


def one_expert_per_gpu(best: Score, single: Score | None) -> str:
    """By how much one expert on each GPU is better or worse than the best."""
    if single is None:
        experts = best.deployment.model.experts
        return f"One expert per GPU does not come into question here: it needs ep >= {experts} and memory for it."
    if single is best:
        return "One expert per GPU is the best choice here."
    change = single.rate_per_gpu / best.rate_per_gpu - 1
    verdict = f"gives {abs(change):.0%} {'more' if change > 0 else 'less'} per GPU than the best"
    slower = single.latency.value / best.latency.value - 1
    what = "TPOT" if best.decodes else "TTFT"
    return f"One expert per GPU ({single.deployment.name}) {verdict}, its {what} is {slower:+.0%}."


def ties(scores: Sequence[Score], load: Load) -> list[str]:
    """The layouts, best first, that predictions do not tell from the best one; nothing where there is none."""
    worth = [1 / score.latency.value if load.rate else score.rate_per_gpu for score in scores]
    near = range(1, tied(worth))
    if not near:
        return []
    names = ", ".join(f"{scores[i].deployment.name} ({worth[i] / worth[0] - 1:+.1%})" for i in near[:MOST_TIES])
    more = f" and {len(near) - MOST_TIES} more" if len(near) > MOST_TIES else ""
    return [f"A tie: {names}{more} within {TIE:.0%} of the best, which predictions do not tell apart."]


def headline(score: Score) -> str:
    """One line on a score."""
    tokens, sequences, what = ("output", "sequences", "TPOT") if score.decodes else ("prompt", "prompts", "TTFT")
    latency = score.latency
    return (
        f"{score.deployment.name}: {score.rate.value:,.0f} {tokens} tok/s ({score.rate_per_gpu:,.0f} a GPU) "
        f"with {score.sequences:,.0f} {sequences}, {what} {1e3 * latency.value:.1f} ms ± {latency.band:.0%} "
        f"({latency.origin}), bottleneck {score.work.bottleneck}"
    )


def exchange_lines(score: Score, cluster: ClusterSpec) -> list[str]:
    """How the tokens of a prefill and of a decode step cross nodes: flat or by node, chunks, sizes of messages."""
    d = score.deployment
    if d.layout.ep == 1:
        return ["Exchange: none, every group holds all experts."]
    if d.layout.stages_fit(cluster.gpus_per_node):
        return ["Exchange: inside one node; nothing crosses."]
    links, size = links_of(cluster), round(row_bytes(d.model.d_model, d.precision.dispatch))
    traffic = Traffic.of(d.model, d.layout, cluster.gpus_per_node, size)
    rates = f"across nodes {links.network}, inside {links.inside}"
    lines = [f"Exchange, links of {links.source}: {rates}; a row of {size:,} bytes crosses {traffic.nodes:.2f} times."]
    for name, tokens in (("prefill", score.options.chunk_tokens), ("decode", score.batch)):
        each = max(1, round(tokens / d.layout.attention_ranks))
        lines.append(f"  {name}: {choose(each, traffic, links)}")
    return lines
