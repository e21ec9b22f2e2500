"""What dashboard and `soloist top` show, as one JSON object."""

from __future__ import annotations

import heapq
import time
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec
import numpy as np

from soloist.server.alerts import Thresholds, alerts
from soloist.server.desk import Desk
from soloist.server.metrics import Tally
from soloist.server.watch import Watch, max_over_mean

RATE_S = 5.0  # over which rates are taken
MOST_LINKS = 64  # ranks up to which every pair is told
LONGEST_WAITS = 10


class Details:
    """Rates are taken between looks, so that nothing is counted for nobody."""

    def __init__(self, desk: Desk, tally: Tally, watch: Watch, thresholds: Thresholds = Thresholds()) -> None:  # noqa: B008
        self.desk, self.tally, self.watch, self.thresholds = desk, tally, watch, thresholds
        self._seen: deque[tuple[float, int, int]] = deque([(time.monotonic(), 0, 0)])

    def page(self, rank: int | None = None) -> bytes:
        """rank: one whose dealings with every other are told, however many ranks there are."""
        return msgspec.json.encode(self.record() if rank is None else self.record() | {"pairs": self._pairs(rank)})

    def record(self) -> dict[str, Any]:
        """What the page shows, in JSON's types."""
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
        return found | {"alerts": list(alerts(found, served.slo, self.thresholds))}

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


def _named(by_rank: Mapping[int, float]) -> dict[str, float]:
    return {str(rank): value for rank, value in by_rank.items()}


def _quantiles(values_s: Iterable[float]) -> dict[str, float | None]:
    values = list(values_s)
    return {f"p{percent}": float(np.percentile(values, percent)) if values else None for percent in (50, 90, 99)}
