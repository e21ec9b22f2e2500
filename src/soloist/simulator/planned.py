"""The planner's cost model as the simulator asks for it: groups of one step may differ in what they do.

The planner predicts a step in which all attention groups do the same. Of a mixed step, each part is taken from that
step of the planner's whose groups do what decides this part:

    attention                                      decodes + prefills of the group that takes longest
    projections, norms, dense and shared layers    tokens of the group with most
    dispatch, combine, gathers                     tokens of the group with most, or rows of the fullest expert group
    experts                                        rows of the fullest expert group: mean · imbalance

Tokens and contexts are rounded to a grid of 2.2 % and the planner's answers are kept, since steps resemble each other.
Where one group prefills and others do less, the planner is told: what hides the exchange is then less, too.
"""

from __future__ import annotations

from collections import defaultdict
from math import log2

import numpy as np

from soloist.planner.estimate import Estimate, Origin
from soloist.planner.layer import COMMUNICATION
from soloist.planner.step import StepModel
from soloist.simulator.cost import StepTime, StepWork

GRID = 32  # points of the grid in each doubling
EXCHANGES = (*COMMUNICATION, "pipeline hops")
ONCE = "step"  # the part that does not keep a stage busy

Phase = str
Parts = dict[str, Estimate]


class PlannedCost:
    """Implements `CostModel` by a `StepModel`. The deployment's own skew must be 0: imbalance comes with each step."""

    def __init__(self, model: StepModel) -> None:
        assert not model.deployment.skew
        self.model = model
        self.stages = model.deployment.layout.pp
        self._known: dict[tuple[Phase, float, float, float], Parts] = {}
        self._seconds: defaultdict[Origin, float] = defaultdict(float)  # predicted so far
        self._width_s = 0.0

    def step(self, work: StepWork) -> StepTime:
        """The time of a step, its slowest groups deciding."""
        parts = {name: part for name, part in self._parts(work).items() if part.value > 0}
        for part in parts.values():
            self._seconds[part.origin] += part.value
            self._width_s += part.value * part.band
        times = {name: part.value for name, part in parts.items()}
        once_s = times.get(ONCE, 0.0)
        return StepTime(sum(times.values()) - once_s, once_s, times)

    @property
    def band(self) -> float:
        """Relative half-width of all that was predicted so far."""
        return self._width_s / sum(self._seconds.values()) if self._seconds else 0.0

    @property
    def origins(self) -> dict[Origin, float]:
        """Shares of the predicted time by what carries the prediction."""
        whole = sum(self._seconds.values())
        return {origin: seconds / whole for origin, seconds in self._seconds.items()}

    def _parts(self, work: StepWork) -> Parts:
        tokens = work.tokens
        peak, mean = float(tokens.max()), float(tokens.sum()) / work.alive
        fullest = mean * work.imbalance
        context = _mean(work, int(tokens.argmax()))
        phase = "prefill" if work.prefills.any() else "decode"
        if phase == "prefill" and fullest < peak:
            parts = self._of(phase, peak, context, 1 / _rounded(peak / fullest))
        else:
            parts = self._of(phase, peak, context)
            exchange = self._of(phase, max(peak, fullest), context)
            parts = parts | {name: part for name, part in exchange.items() if name in EXCHANGES}
            if "experts" in parts:
                parts["experts"] = self._of(phase, fullest, context)["experts"]
        return parts | {"attention": self._attention(work)}

    def _attention(self, work: StepWork) -> Estimate:
        """Of the slowest group: the one with the longest contexts to read, or the one with the most to prefill."""
        candidates = {int(context.argmax()) for context in (work.decode_context, work.prefill_context) if context.any()}
        return max((self._attention_of(work, group) for group in candidates), key=lambda part: part.value)

    def _attention_of(self, work: StepWork, group: int) -> Estimate:
        """Decodes and prefills of one group, one after the other."""
        found: list[Estimate] = []
        for phase, tokens, context in (
            ("decode", work.decodes[group], work.decode_context[group]),
            ("prefill", work.prefills[group], work.prefill_context[group]),
        ):
            if tokens:
                found.append(self._of(phase, float(tokens), float(context / tokens))["attention"])
        value = sum(part.value for part in found)
        return max(found, key=lambda part: part.value)._replace(value=value)

    def _of(self, phase: Phase, tokens: float, context: float, share: float = 1.0) -> Parts:
        """The planner's parts of one stage (and `step`) when every group does the same; of prefill also when groups
        have this share of the `tokens` on average."""
        key = (phase, _rounded(max(tokens, 1.0)), _rounded(max(context, 1.0)), share)
        if key not in self._known:
            _, tokens, context, _ = key
            if phase == "decode":
                parts = self.model.decode(tokens, context, micro_batches=1).parts
            else:
                parts = self.model.prefill(tokens, context, 1, share).parts
            self._known[key] = {
                name: part if name == ONCE else part.times(1 / self.stages) for name, part in parts.items()
            }
        return self._known[key]


def _mean(work: StepWork, group: int) -> float:
    """Tokens that a token of the group attends to."""
    context = work.decode_context[group] + work.prefill_context[group]
    return float(context / max(1, work.decodes[group] + work.prefills[group]))


def _rounded(value: float) -> float:
    """To the nearest point of a geometric grid; small whole numbers stay as they are."""
    if value <= GRID and value == int(value):
        return value
    return float(2 ** (np.rint(log2(value) * GRID) / GRID))
