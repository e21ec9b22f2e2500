"""A predicted number together with how far it can be trusted.

`origin` says what carries it, from best to worst: *measured* (a calibration point lies right there), *interpolated*
(inside the range of calibration points), *extrapolated* (outside), *bound* (datasheet peak only, a floor). A sum is as
trustworthy as its worst part that matters.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, NamedTuple

Origin = Literal["measured", "interpolated", "extrapolated", "bound"]
ORIGINS: dict[Origin, int] = {"measured": 0, "interpolated": 1, "extrapolated": 2, "bound": 3}
MATTERS = 0.05  # a part below this share of a sum does not decide the sum's origin


class Estimate(NamedTuple):
    """`value` (seconds, unless said otherwise), relative half-width `band` and `origin`."""

    value: float
    band: float
    origin: Origin

    @property
    def low(self) -> float:
        return self.value * (1 - self.band)

    @property
    def high(self) -> float:
        return self.value * (1 + self.band)

    def times(self, factor: float) -> Estimate:
        """The same number `factor` times, with the same relative band."""
        return self if factor == 1.0 else Estimate(self.value * factor, self.band, self.origin)

    def inverse(self, numerator: float) -> Estimate:
        """A rate: `numerator` over this time."""
        return Estimate(numerator / self.value, self.band, self.origin)

    def worse(self, origin: Origin) -> Estimate:
        """At least as untrustworthy as `origin`."""
        if ORIGINS[self.origin] >= ORIGINS[origin]:
            return self
        return Estimate(self.value, self.band, origin)


ZERO = Estimate(0.0, 0.0, "measured")


def total(parts: Iterable[Estimate]) -> Estimate:
    """Sum. Half-widths add up, because the errors of one model are not independent."""
    terms = list(parts)
    value = width = 0.0
    for part, band, _ in terms:
        value += part
        width += part * band
    if value <= 0:
        return ZERO
    least = MATTERS * value
    worst: Origin = "measured"
    for part, _, origin in terms:
        worst = origin if part >= least and ORIGINS[origin] > ORIGINS[worst] else worst
    return Estimate(value, width / value, worst)
