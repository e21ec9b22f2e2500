"""What one run of the same requests through one layout showed, and the figures that follow from it."""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import mean, median

import numpy as np

from soloist.frontend.wire import Figures
from soloist.specs.layout import Layout

PHASES = ("exchange", "experts", "attention", "waiting")


@dataclass(frozen=True)
class Timing:
    """One request: seconds from its arrival to the first and to the last token, and how many tokens it got."""

    first_s: float
    last_s: float
    tokens: int

    @property
    def tpot_s(self) -> float | None:
        """Mean seconds between tokens after the first; None for a single token."""
        return (self.last_s - self.first_s) / (self.tokens - 1) if self.tokens > 1 else None


@dataclass(frozen=True)
class Run:
    """The same requests, once, through one layout."""

    layout: Layout
    gpus_per_node: int
    wall_s: float
    prompt_tokens: int
    timings: list[Timing]
    figures: list[Figures]  # one a rank
    outputs: list[tuple[int, ...]]  # the tokens of each request
    margin: float  # smallest between the two best logits, over all tokens

    @property
    def tokens(self) -> int:
        return sum(timing.tokens for timing in self.timings)

    @property
    def tps(self) -> float:
        """Output tokens a second of the whole deployment."""
        return self.tokens / self.wall_s

    def percentile_s(self, name: str, percent: float) -> float:
        """Of `first_s` (TTFT) or `tpot_s` over the requests; NaN where no request has it."""
        values = [value for timing in self.timings if (value := getattr(timing, name)) is not None]
        return float(np.percentile(values, percent)) if values else float("nan")

    def share(self, phase: str) -> float:
        """Of the ranks' time in this run, the part spent in a phase. Exchange is counted without its waiting."""
        return mean(_seconds(figures, phase) for figures in self.figures) / self.wall_s

    def bytes_per_token(self, across: bool) -> float:
        """Bytes that ranks sent inside a node, or across nodes, for each token computed (prompt and output)."""
        total = sum(
            sent
            for figures in self.figures
            for peer, sent in figures.bytes_to.items()
            if (figures.rank // self.gpus_per_node != peer // self.gpus_per_node) == across
        )
        return total / (self.prompt_tokens + self.tokens)

    @property
    def weight_bytes(self) -> int:
        """Of the rank that holds most."""
        return max(figures.weight_bytes for figures in self.figures)

    @property
    def kv_bytes(self) -> int:
        """KV cache of the rank that holds most."""
        return max(figures.kv_bytes for figures in self.figures)


def _seconds(figures: Figures, phase: str) -> float:
    if phase == "waiting":
        return figures.waited_s
    seconds = figures.seconds.get(phase, 0.0)
    return max(0.0, seconds - figures.waited_s) if phase == "exchange" else seconds


@dataclass
class Series:
    """All runs of one layout; each figure is the median over them."""

    layout: Layout
    runs: list[Run] = field(default_factory=list)

    def record(self) -> dict[str, object]:
        """One flat record: what, shape, medians. Times in seconds, memory in bytes."""
        first = self.runs[0]

        def over_runs(value) -> float:
            return median(value(run) for run in self.runs)

        return {
            "what": "compare",
            "layout": str(self.layout),
            "ranks": self.layout.size,
            "gpus_per_node": first.gpus_per_node,
            "requests": len(first.timings),
            "prompt_tokens": first.prompt_tokens,
            "output_tokens": first.tokens,
            "runs": len(self.runs),
            "wall_s": over_runs(lambda r: r.wall_s),
            "tps": over_runs(lambda r: r.tps),
            "tps_per_rank": over_runs(lambda r: r.tps) / self.layout.size,
            **{
                f"{label}_p{percent}_s": over_runs(lambda r, n=name, p=percent: r.percentile_s(n, p))
                for label, name in (("ttft", "first_s"), ("tpot", "tpot_s"))
                for percent in (50, 99)
            },
            **{f"{phase}_share": over_runs(lambda r, p=phase: r.share(p)) for phase in PHASES},
            "bytes_inside_per_token": first.bytes_per_token(across=False),
            "bytes_across_per_token": first.bytes_per_token(across=True),
            "weight_bytes_per_rank": first.weight_bytes,
            "kv_bytes_per_rank": first.kv_bytes,
            "margin": min(run.margin for run in self.runs),
        }
