"""What this machine does at best, measured in the run whose points are held against it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from soloist.bench.report import Ceilings, Point, commit
from soloist.probes.gpus import Bench

SIDE = 8192  # of a square product in bf16
COPIED = 1 << 30  # bytes within a GPU's memory
SENT = 256 << 20  # bytes to the next rank
PAUSE_S = 0.03  # between repeats, as of prefill


@dataclass(frozen=True)
class Machine:
    """The GPUs of this run and their ceilings."""

    name: str
    ceilings: Ceilings

    @classmethod
    def measured(cls, bench: Bench) -> Machine:
        """Called by every rank."""
        name = f"{bench.size} x {torch.cuda.get_device_name(bench.device)}"
        seconds = bench.seconds(_product(bench), _copy(bench), _sending(bench), repeats=9, pause_s=PAUSE_S)
        torch.cuda.empty_cache()
        rates = [work / each for work, each in zip((2 * SIDE**3, 2 * COPIED, SENT), seconds, strict=True)]
        return cls(name, Ceilings(*rates))

    def points(self) -> list[Point]:
        """The ceilings themselves, for the record."""
        c = self.ceilings
        found = {
            f"bf16 product of side {SIDE}": (2 * SIDE**3 / c.flops, f"{c.flops / 1e12:.0f} TFLOP/s"),
            "copy within a GPU": (2 * COPIED / c.memory, f"{c.memory / 1e12:.2f} TB/s, read and written"),
            "copy to the next rank": (SENT / c.link, f"{c.link / 1e9:.0f} GB/s a direction, all at once"),
        }
        return [self.point("ceiling", what, {}, each, each, rate) for what, (each, rate) in found.items()]

    def point(
        self, what: str, variant: str, shape: dict[str, object], seconds: float, ceiling_s: float, bound_by: str
    ) -> Point:
        """One measurement on this machine."""
        return Point(what, variant, shape, seconds, ceiling_s, bound_by, self.name, commit())


def _product(bench: Bench) -> Callable[[], object]:
    a, b = torch.randn(2, SIDE, SIDE, device=bench.device).bfloat16()
    out = torch.empty_like(a)
    return lambda: torch.mm(a, b.T, out=out)


def _copy(bench: Bench) -> Callable[[], object]:
    source = torch.ones(COPIED, dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def _sending(bench: Bench) -> Callable[[], object]:
    window = bench.group.window(SENT)
    source = torch.ones(SENT, dtype=torch.uint8, device=bench.device)
    target = window.view(0, (SENT,), torch.uint8, (bench.rank + 1) % bench.size)
    return lambda: target.copy_(source)
