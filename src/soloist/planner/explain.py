"""Why a layout wins, in words: where its time goes, and what it saves against another."""

from __future__ import annotations

from soloist.planner.layer import Deployment
from soloist.planner.score import Score


def name_of(deployment: Deployment) -> str:
    """The layout, with its slots where they are more than the least."""
    return str(deployment.layout) + (f" x {deployment.slots} slots" if deployment.slots else "")


def why(best: Score, other: Score) -> str:
    """What decides between two scores: the parts of a token's time that differ most, per sequence and step."""
    ratio = best.rate_per_gpu / other.rate_per_gpu
    heads = f"{name_of(best.deployment)} gives {ratio:.2f} x the tokens per GPU of {name_of(other.deployment)}"
    gains = _differences(best, other)
    faster = ", ".join(f"{name} {_per_token(other, name):.0f} → {_per_token(best, name):.0f}" for name in gains[:3])
    return f"{heads}. GPU time of a token in µs: {faster}."


def _differences(best: Score, other: Score) -> list[str]:
    """Names of parts, the one that saves most first."""
    names = {*best.decode.parts, *other.decode.parts, PREFILL}
    return sorted(names, key=lambda name: _per_token(best, name) - _per_token(other, name))


PREFILL = "prefill of arriving prompts"


def _per_token(score: Score, name: str) -> float:
    """GPU-microseconds that one output token costs in a part."""
    if name == PREFILL:
        seconds = score.tpot.value - score.decode.seconds.value
    else:
        part = score.decode.parts.get(name)
        seconds = part.value if part else 0.0
    return 1e6 * seconds * score.gpus / score.sequences


def one_expert_per_gpu(best: Score, single: Score | None) -> str:
    """By how much one expert on each GPU is better or worse than the best."""
    if single is None:
        experts = best.deployment.model.experts
        return f"One expert per GPU does not come into question here: it needs ep >= {experts} and memory for it."
    if single is best:
        return "One expert per GPU is the best choice here."
    change = single.rate_per_gpu / best.rate_per_gpu - 1
    verdict = f"gives {abs(change):.0%} {'more' if change > 0 else 'less'} per GPU than the best"
    slower = single.tpot.value / best.tpot.value - 1
    return f"One expert per GPU ({name_of(single.deployment)}) {verdict}, its TPOT is {slower:+.0%}."


def headline(score: Score) -> str:
    """One line on a score."""
    return (
        f"{name_of(score.deployment)}: {score.output_rate.value:,.0f} output tok/s ({score.rate_per_gpu:,.0f} a GPU), "
        f"TPOT {1e3 * score.tpot.value:.1f} ms ± {score.tpot.band:.0%} ({score.tpot.origin}), "
        f"bottleneck {score.decode.bottleneck}"
    )
