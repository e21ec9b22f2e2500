"""What deserves an operator's look: figures of the details that are past a threshold."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from soloist.server.slo import Slo


@dataclass(frozen=True)
class Thresholds:
    """Shares, but for `refused`."""

    exchange: float = 0.05  # of the ranks' time
    load_spread: float = 0.05  # standard deviation of the ranks' rows over their mean
    idle: float = 0.5  # of the ranks' time, while requests wait for their first token
    kv: float = 0.95  # of the fullest KV cache
    device: float = 0.98  # of a GPU's memory; the KV cache takes 90 % of what is free from the start
    refused: int = 0  # requests


def alerts(details: Mapping[str, Any], slo: Slo, limits: Thresholds) -> Iterator[dict[str, Any]]:
    """Each with what was found, the limit that it is past, and a line for people."""
    if details["failure"]:
        yield {"what": "failure", "value": 1, "limit": 0, "text": f"the engine has failed: {details['failure']}"}
    ranks, leaders = details["ranks"], details["leaders"]
    for what, value, limit, unit in (
        ("TTFT p90", details["ttft_s"]["p90"] or 0.0, slo.ttft_s or math.inf, "s"),
        ("TPOT p90", details["tpot_s"]["p90"] or 0.0, slo.tpot_s or math.inf, "s"),
        ("exchange's share of the ranks' time", _share(details["phases_s"], "exchange"), limits.exchange, "%"),
        ("spread of the ranks' load", _spread(rank["rows"] for rank in ranks), limits.load_spread, "%"),
        ("ranks idle while requests wait", _idle(details), limits.idle, "%"),
        ("KV cache in use", _fullest((one["blocks_used"], one["blocks_total"]) for one in leaders), limits.kv, "%"),
        ("memory of a GPU in use", _fullest(rank["device_bytes"] for rank in ranks), limits.device, "%"),
        ("requests refused", details["requests"]["refused"], limits.refused, ""),
    ):
        if value > limit:
            text = f"{what}: {_shown(value, unit)}, limit {_shown(limit, unit)}"
            yield {"what": what, "value": value, "limit": limit, "text": text}


def _shown(value: float, unit: str) -> str:
    return f"{100 * value:.1f} %" if unit == "%" else f"{value:.3g} {unit}".strip()


def _share(phases_s: Mapping[str, float], phase: str) -> float:
    """Of the time that is known by phase: a step in a CUDA graph is timed as a whole, in the phase "graph"."""
    total = sum(phases_s.values()) - phases_s.get("graph", 0.0)
    return phases_s.get(phase, 0.0) / total if total else 0.0


def _spread(loads: Iterable[int]) -> float:
    values = np.array(list(loads), float)
    return float(values.std() / values.mean()) if values.sum() else 0.0


def _idle(details: Mapping[str, Any]) -> float:
    """The share of the window in which the ranks did not compute, on average; 0 where no request waits."""
    if not (details["requests"]["waiting"] and details["phases_s"]):
        return 0.0
    busy_s = sum(rank["busy_s"] for rank in details["ranks"]) / len(details["ranks"])
    return 1 - busy_s / details["window_s"]


def _fullest(pairs: Iterable[tuple[int, int]]) -> float:
    """The largest share that is used, of pairs (used, in all)."""
    return max((used / total for used, total in pairs if total), default=0.0)
