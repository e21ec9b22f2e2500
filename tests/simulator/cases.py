"""Costs and simulations that the tests share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from soloist.scheduling.config import SchedulerConfig
from soloist.simulator.arrivals import Arrivals
from soloist.simulator.cost import StepTime, StepWork
from soloist.simulator.simulation import Simulation
from soloist.specs.layout import Layout


@dataclass
class Constant:
    """Every step takes the same time."""

    seconds: float = 1.0

    def step(self, work: StepWork) -> StepTime:
        assert work.tokens.any()
        return StepTime(self.seconds, 0.0, {"experts": self.seconds})


class Linear:
    """Depends on everything that a cost may depend on, so that any difference shows in the times."""

    def step(self, work: StepWork) -> StepTime:
        attention = 1e-6 * float((work.decode_context + work.prefill_context).max())
        experts = 1e-3 * work.imbalance * int(work.tokens.sum()) / work.alive
        parts = {"attention": attention, "experts": experts, "dispatch": 0.01}
        return StepTime(sum(parts.values()), 0.002, {**parts, "step": 0.002})


def requests(*rows: tuple[float, int, int], shared: int = 0, in_flight: int = 0) -> Arrivals:
    """From (time, prompt, output)."""
    times_s, prompts, outputs = (np.array(column) for column in zip(*rows, strict=True))
    return Arrivals(times_s.astype(float), prompts, outputs, np.minimum(shared, prompts - 1), in_flight)


def simulate(layout: str, load: Arrivals, cost: Any = None, **options: Any) -> Simulation:
    """A finished run with small caches; sizes are given among the options."""
    names = set(SchedulerConfig.__struct_fields__)
    sizes: dict[str, Any] = {"blocks": 1000, "max_positions": load.longest + 1, "prefix_caching": False}
    sizes |= {key: options.pop(key) for key in list(options) if key in names}
    parsed = Layout.parse(layout)
    config = SchedulerConfig(**{"in_flight": parsed.pp, **sizes})
    return Simulation(parsed, config, cost or Linear(), load, **options).run()
