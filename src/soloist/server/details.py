"""What dashboard and `soloist top` show, as one JSON object."""

from __future__ import annotations

import heapq
import math
import time
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np

from soloist.server.desk import Desk
from soloist.server.metrics import Tally
from soloist.server.watch import Watch, max_over_mean

RATE_S = 5.0  # over which rates are taken
MOST_LINKS = 64  # ranks up to which every pair is told
LONGEST_WAITS = 10


@dataclass(frozen=True)
class Thresholds:
    """What is worth an alert."""

    exchange_share: float = 0.05  # of the ranks' time
    load_spread: float = 0.05  # standard deviation of the ranks' rows over their mean
    kv_share: float = 0.95
    device_share: float = 0.98  # of a GPU's memory; the KV cache takes 90 % of what is free from the start
    idle_share: float = 0.5  # of the ranks' time, while requests wait for their first token
    refused: int = 0


class Details:
    """Rates are taken between looks, so that nothing is counted for nobody."""

    def __init__(self, desk: Desk, tally: Tally, watch: Watch, thresholds: Thresholds = Thresholds()) -> None:  # noqa: B008
        self.desk, self.tally, self.watch, self.thresholds = desk, tally, watch, thresholds
        self._seen: deque[tuple[float, int, int]] = deque([(time.monotonic(), 0, 0)])

    def page(self, rank: int | None = None) -> bytes:
        """rank: one whose dealings with every other are told, however many ranks there are."""
        return msgspec.json.encode(self.record() if rank is None else self.record() | {"pairs": self._pairs(rank)})

    def record(self) -> dict[str, Any]:
        served, window = self.desk.served, self.watch.window
        found: dict[str, Any] = {
            "time": time.time(),
            "model": served.name,
            "layout": str(served.front.layout),
            "gpus_per_node": served.gpus_per_node,
            "failure": str(served.front.failure) if served.front.failure else None,
            "draining": self.desk.draining,
            "requests": {"open": self.desk.calls, "waiting": self.desk.waiting, "refused": self.desk.refused},
            "tokens": {"generated": self.tally.generated, "prompt": self.tally.prompt_tokens} | self._rates(),
            "ttft_s": _quantiles(self.tally.recent_first_s),
            "tpot_s": _quantiles(self.tally.recent_tpot_s),
            "planned": self._planned(),
            "slo_s": {"ttft": served.slo.ttft_s or None, "tpot": served.slo.tpot_s or None},
            "leaders": self._leaders(),
            "window_s": window.seconds,
            "phases_s": window.phases,
            "experts": {str(layer): load.tolist() for layer, load in window.chosen.items()},
            "balance": {str(layer): max_over_mean(load) for layer, load in window.rows.items()},
            "ranks": self._ranks(),
            "longest_waits": self._longest_waits(),
        }
        return found | {"alerts": list(self._alerts(found))}

    def _rates(self) -> dict[str, float]:
        now = time.monotonic()
        self._seen.append((now, self.tally.generated, self.tally.prompt_tokens))
        while len(self._seen) > 2 and self._seen[1][0] < now - RATE_S:
            self._seen.popleft()
        then, generated, prompt = self._seen[0]
        seconds = max(now - then, 1e-3)
        return {
            "tps": (self.tally.generated - generated) / seconds,
            "prompt_tps": (self.tally.prompt_tokens - prompt) / seconds,
        }

    def _planned(self) -> dict[str, dict[str, Any]]:
        """What the plan, if there is one, predicted for its load: value, unit, band and where it comes from."""
        plan = self.desk.served.plan
        return {name: msgspec.structs.asdict(figure) for name, figure in plan.predicted.items()} if plan else {}

    def _leaders(self) -> list[dict[str, Any]]:
        stats = {rank: report.stats for rank, report in self.desk.front.ranks.items() if report.stats}
        return [{"rank": rank} | msgspec.structs.asdict(one) for rank, one in stats.items()]

    def _ranks(self) -> list[dict[str, Any]]:
        """What each did in the window. Bytes to and waits for every other rank only where the ranks are few."""
        few = len(self.watch.totals) <= MOST_LINKS
        kept_waiting_s = self.watch.window.kept_waiting_s
        return [
            {
                "rank": rank,
                "steps": figures.steps,
                "rows": sum(figures.rows.values()),
                "waited_s": figures.waited_s,
                "kept_waiting_s": kept_waiting_s[rank],
                "busy_s": figures.busy_s,
                "seconds": figures.seconds,
                "weight_bytes": figures.weight_bytes,
                "kv_bytes": figures.kv_bytes,
                "device_bytes": figures.device_bytes,
                "sent_bytes": sum(figures.bytes_to.values()),
                "bytes_to": _named(figures.bytes_to) if few else {},
                "waited_for_s": _named(figures.waited_for_s) if few else {},
            }
            for rank, figures in sorted(self.watch.window.figures.items())
        ]

    def _longest_waits(self) -> list[dict[str, Any]]:
        """Who waited longest for whom, in the window."""
        waits = (
            {"rank": rank, "for": peer, "seconds": seconds}
            for rank, figures in self.watch.window.figures.items()
            for peer, seconds in figures.waited_for_s.items()
            if peer != rank
        )
        return heapq.nlargest(LONGEST_WAITS, waits, key=lambda wait: wait["seconds"])

    def _pairs(self, rank: int) -> dict[str, dict[str, float]]:
        """What one rank sent to every other and waited for it, and the other way round, in the window."""
        told = self.watch.window.figures
        mine = told.get(rank)
        return {
            "bytes_to": _named(mine.bytes_to if mine else {}),
            "bytes_from": _named({peer: one.bytes_to[rank] for peer, one in told.items() if rank in one.bytes_to}),
            "waited_for_s": _named(mine.waited_for_s if mine else {}),
            "waited_for_it_s": _named(
                {r: one.waited_for_s[rank] for r, one in told.items() if rank in one.waited_for_s}
            ),
        }

    def _alerts(self, found: dict[str, Any]) -> Iterable[dict[str, Any]]:
        """Each with what was found and the threshold that it is past."""
        limits, ranks, leaders = self.thresholds, found["ranks"], found["leaders"]
        if found["failure"]:
            yield {"what": f"the engine has failed: {found['failure']}", "value": 1, "limit": 0}
        slo = self.desk.served.slo
        for what, value, limit in (
            ("TTFT p90, s", found["ttft_s"]["p90"] or 0.0, slo.ttft_s or math.inf),
            ("TPOT p90, s", found["tpot_s"]["p90"] or 0.0, slo.tpot_s or math.inf),
            ("exchange's share of the ranks' time", _share(found["phases_s"], "exchange"), limits.exchange_share),
            ("spread of the ranks' load", _spread(rank["rows"] for rank in ranks), limits.load_spread),
            ("ranks idle while requests wait", _idle(found), limits.idle_share),
            (
                "KV cache in use",
                _fullest((one["blocks_used"], one["blocks_total"]) for one in leaders),
                limits.kv_share,
            ),
            ("memory of a GPU in use", _fullest(rank["device_bytes"] for rank in ranks), limits.device_share),
            ("requests refused", found["requests"]["refused"], limits.refused),
        ):
            if value > limit:
                yield {"what": what, "value": value, "limit": limit}


def _named(by_rank: Mapping[int, float]) -> dict[str, float]:
    return {str(rank): value for rank, value in by_rank.items()}


def _quantiles(values_s: Iterable[float]) -> dict[str, float | None]:
    values = list(values_s)
    return {f"p{percent}": float(np.percentile(values, percent)) if values else None for percent in (50, 90, 99)}


def _idle(found: dict[str, Any]) -> float:
    """The share of the window that the ranks did not compute in, on average; 0 where no request waits."""
    if not (found["requests"]["waiting"] and found["phases_s"]):
        return 0.0
    return 1 - sum(rank["busy_s"] for rank in found["ranks"]) / len(found["ranks"]) / found["window_s"]


def _share(phases: dict[str, float], phase: str) -> float:
    total = sum(phases.values())
    return phases.get(phase, 0.0) / total if total else 0.0


def _spread(loads: Iterable[int]) -> float:
    values = np.array(list(loads), float)
    return float(values.std() / values.mean()) if values.sum() else 0.0


def _fullest(pairs: Iterable[tuple[int, int]]) -> float:
    """The largest share that is used, of pairs (used, in all)."""
    return max((used / total for used, total in pairs if total), default=0.0)
