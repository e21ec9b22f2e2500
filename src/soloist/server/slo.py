"""What clients were promised, and how many of them may wait so that the promise can be kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from soloist.errors import ConfigurationError
from soloist.specs.workload import Load

if TYPE_CHECKING:
    from soloist.planner.plan import Plan


@dataclass(frozen=True)
class Slo:
    """Limits of the time to the first token and of the mean time between tokens; 0: none."""

    ttft_s: float = 0.0
    tpot_s: float = 0.0

    @classmethod
    def parse(cls, text: str) -> Slo:
        """`"ttft=500ms,tpot=50ms"`. Raises ConfigurationError."""
        wrong = [part for part in text.split(",") if part.partition("=")[0].strip() not in ("ttft", "tpot")]
        if wrong:
            raise ConfigurationError.of("--slo", text, "write ttft=500ms, tpot=50ms or both")
        load = Load.parse(text)
        return cls(load.ttft_s, load.tpot_s)

    @classmethod
    def of(cls, load: Load) -> Slo:
        return cls(load.ttft_s, load.tpot_s)

    def is_met(self, first_s: float, tpot_s: float) -> bool:
        """By a sequence with these times."""
        return (not self.ttft_s or first_s <= self.ttft_s) and (not self.tpot_s or tpot_s <= self.tpot_s)


def admitted(plan: Plan, slo: Slo) -> int | None:
    """Requests that may wait for a first token: as many prompts as the planned prefill rate computes within the TTFT.

    None without a limit of the TTFT. Raises ConfigurationError for a promise that the plan itself does not keep.
    """
    for key, limit_s in (("ttft", slo.ttft_s), ("tpot", slo.tpot_s)):
        predicted = plan.predicted.get(key)  # without answers of several tokens there is no TPOT
        if limit_s and predicted and predicted.value * 1e-3 > limit_s:
            remedy = f"the plan predicts {predicted.value:.3g} ms with {plan.batch:g} sequences; plan with this --slo"
            raise ConfigurationError.of(f"slo.{key}", f"{limit_s * 1e3:g} ms", remedy)
    if not slo.ttft_s:
        return None
    return max(1, int(slo.ttft_s * plan.predicted["prefill"].value / plan.load.fresh))
