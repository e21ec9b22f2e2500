"""What the ranks have done, added up from their figures: load of experts and ranks, bytes, phases, waiting.

Nobody else may ask the ranks for figures meanwhile: they tell what they did since they were last asked.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from soloist.frontend.frontend import FrontEnd
from soloist.frontend.wire import Figures

INTERVAL_S = 2.0
STEP_S = 0.05  # between looks whether all have told


@dataclass
class RankTotals:
    """One rank, from the start."""

    steps: int = 0
    rows: int = 0  # that came for its experts
    weight_bytes: int = 0
    kv_bytes: int = 0
    seconds: Counter[str] = field(default_factory=Counter[str])  # by phase
    bytes_to: Counter[int] = field(default_factory=Counter[int])  # by destination
    waited_s: float = 0.0  # for others
    kept_waiting_s: float = 0.0  # others, all together

    def add(self, figures: Figures) -> None:
        self.steps += figures.steps
        self.waited_s += figures.waited_s
        self.rows += sum(figures.rows.values())
        self.weight_bytes, self.kv_bytes = figures.weight_bytes, figures.kv_bytes
        self.seconds.update(figures.seconds)
        self.bytes_to.update(figures.bytes_to)


@dataclass
class Window:
    """What happened between two questions."""

    seconds: float = 0.0
    figures: Mapping[int, Figures] = field(default_factory=dict)

    @property
    def chosen(self) -> dict[int, np.ndarray]:
        """By layer: tokens that chose each logical expert, of all ranks."""
        layers: dict[int, np.ndarray] = {}
        for figures in self.figures.values():
            for layer, counts in figures.chosen.items():
                layers[layer] = layers.get(layer, 0) + np.array(counts)
        return dict(sorted(layers.items()))

    @property
    def rows(self) -> dict[int, np.ndarray]:
        """By layer: rows that came to each rank of its stage."""
        layers: dict[int, list[int]] = {}
        for figures in self.figures.values():
            for layer, rows in figures.rows.items():
                layers.setdefault(layer, []).append(rows)
        return {layer: np.array(rows) for layer, rows in sorted(layers.items())}

    @property
    def kept_waiting_s(self) -> dict[int, float]:
        """By rank: seconds that others waited for it, all together."""
        total = dict.fromkeys(self.figures, 0.0)
        for rank, figures in self.figures.items():
            for peer, seconds in figures.waited_for_s.items():
                if peer != rank:
                    total[peer] = total.get(peer, 0.0) + seconds
        return total

    @property
    def phases(self) -> dict[str, float]:
        """Seconds of each phase, the mean of all ranks."""
        total: Counter[str] = Counter()
        for figures in self.figures.values():
            total.update(figures.seconds)
        return {phase: seconds / len(self.figures) for phase, seconds in total.items()}


class Watch:
    """Asks the ranks now and then, as long as they work."""

    def __init__(self, front: FrontEnd, gpus_per_node: int, interval_s: float = INTERVAL_S) -> None:
        self.front, self.gpus_per_node, self.interval_s = front, gpus_per_node, interval_s
        self.totals = {rank: RankTotals() for rank in front.ranks}
        self.chosen: dict[int, np.ndarray] = {}  # by layer, from the start
        self.window = Window()
        self._asked_s = time.monotonic()

    async def listen(self) -> None:
        """Until cancelled."""
        while True:
            await asyncio.sleep(self.interval_s)
            if self.front.failure is None:
                await self.ask()

    async def ask(self) -> None:
        """One question to all ranks. What has not come within the front end's deadline is left out."""
        begin_s, self._asked_s = self._asked_s, time.monotonic()
        self.front.ask_figures()
        reports, end = self.front.ranks.values(), self._asked_s + self.front.deadline_s
        while any(report.figures is None for report in reports) and time.monotonic() < end and not self.front.failure:
            await asyncio.sleep(STEP_S)
        told = {rank: report.figures for rank, report in self.front.ranks.items() if report.figures}
        self._take(Window(self._asked_s - begin_s, told))

    def _take(self, window: Window) -> None:
        for rank, figures in window.figures.items():
            self.totals[rank].add(figures)
        for rank, seconds in window.kept_waiting_s.items():
            self.totals[rank].kept_waiting_s += seconds
        for layer, counts in window.chosen.items():
            self.chosen[layer] = self.chosen.get(layer, 0) + counts
        if any(figures.steps for figures in window.figures.values()):
            self.window = window

    def bytes_moved(self) -> tuple[int, int]:
        """Bytes sent inside and across the declared nodes, from the start."""
        inside = across = 0
        for source, totals in self.totals.items():
            for target, sent in totals.bytes_to.items():
                same = source // self.gpus_per_node == target // self.gpus_per_node
                inside, across = (inside + sent, across) if same else (inside, across + sent)
        return inside, across


def max_over_mean(loads: np.ndarray) -> float:
    """1 is even; 1 for no load at all."""
    mean = float(np.mean(loads)) if len(loads) else 0.0
    return float(np.max(loads)) / mean if mean else 1.0
