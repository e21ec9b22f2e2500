"""Claims held against what the hardware allows and what the model predicts, with a verdict and the reason in words.

impossible  better than the physical bound, or contradicted by arithmetic
weak        not impossible, but better than the prediction and its error band, or won by more GPUs alone
plausible   within the error band of the prediction
beaten      the prediction is better than the claim, by more than its error band
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from soloist.errors import ConfigurationError
from soloist.planner.measures import MEASURES, Measure
from soloist.planner.scenarios import Case

Verdict = Literal["impossible", "weak", "plausible", "beaten"]


class Finding(NamedTuple):
    """One claim of one case. `bound` and `prediction` in the claim's unit."""

    scenario: str
    case: str
    claim: str
    claimed: float
    bound: float
    predicted: float
    band: float
    unit: str
    verdict: Verdict
    reason: str


def judge(claimed: float, measure: Measure) -> Verdict:
    """Compare a claim with bound and prediction."""
    sign = 1.0 if measure.higher else -1.0
    if sign * (claimed - measure.bound) > 0.005 * abs(measure.bound):
        return "impossible"
    worse, better = (measure.predicted * (1 - sign * measure.band), measure.predicted * (1 + sign * measure.band))
    if sign * (claimed - better) > 0:
        return "weak"
    return "beaten" if sign * (claimed - worse) < 0 else "plausible"


def findings(case: Case) -> list[Finding]:
    """All claims of a case. Raises ConfigurationError for a claim of an unknown kind."""
    found: list[Finding] = []
    for key, claimed in case.scenario.claims.items():
        if key not in MEASURES:
            raise ConfigurationError.of("claims", key, f"unknown kind; known are {', '.join(MEASURES)}")
        for measure in MEASURES[key](case):
            verdict = _overruled(case, measure) or judge(claimed, measure)
            found.append(
                Finding(case.scenario.name, _name(case), measure.claim, claimed, *measure[1:5], verdict, measure.reason)
            )
    return found


def _overruled(case: Case, measure: Measure) -> Verdict | None:
    """A gain that more GPUs alone explain is weak, whatever its size."""
    if measure.claim != "throughput gain" or case.baseline is None:
        return None
    return "weak" if case.scenario.claims["throughput_gain"] * case.baseline.gpus / case.gpus < 1 else None


def _name(case: Case) -> str:
    return f"{case.model_name} {case.layout_text}"
