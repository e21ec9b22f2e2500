"""What this machine does at best, measured in the run whose points are held against it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from soloist.bench.report import Ceilings, Point, commit
from soloist.probes.gpus import Bench, OneGpu

SIDE = 8192  # of a square product in bf16
COPIED = 1 << 30  # bytes within a GPU's memory
SENT = 256 << 20  # bytes to the next rank
PAUSE_S = 0.03  # between repeats, as of prefill; NVLink goes to sleep in a pause, so it has none


@dataclass(frozen=True)
class Machine:
    """The GPUs of this run and their ceilings."""

    name: str
    ceilings: Ceilings
    linked: bool = True

    @classmethod
    def measured(cls, bench: OneGpu) -> Machine:
        """Called by every rank. A GPU alone has no link."""
        product, copy = bench.seconds(_product(bench), _copy(bench), repeats=9, pause_s=PAUSE_S)
        ceilings, gpus = Ceilings(2 * SIDE**3 / product, 2 * COPIED / copy), 1
        if isinstance(bench, Bench):
            gpus = bench.size
            (sending,) = bench.seconds(_sending(bench), repeats=9)
            ceilings = replace(ceilings, link=SENT / sending)
        torch.cuda.empty_cache()
        return cls(f"{gpus} x {torch.cuda.get_device_name(bench.device)}", ceilings, isinstance(bench, Bench))

    def points(self) -> list[Point]:
        """The ceilings themselves, for the record."""
        c = self.ceilings
        found = {
            f"bf16 product of side {SIDE}": (2 * SIDE**3 / c.flops, f"{c.flops / 1e12:.0f} TFLOP/s"),
            "copy within a GPU": (2 * COPIED / c.memory, f"{c.memory / 1e12:.2f} TB/s, read and written"),
        }
        if self.linked:
            found["copy to the next rank"] = (SENT / c.link, f"{c.link / 1e9:.0f} GB/s a direction, all at once")
        return [self.point("ceiling", what, {}, each, each, rate) for what, (each, rate) in found.items()]

    def point(
        self, what: str, variant: str, shape: dict[str, object], seconds: float, ceiling_s: float, bound_by: str
    ) -> Point:
        """One measurement on this machine."""
        return Point(what, variant, shape, seconds, ceiling_s, bound_by, self.name, commit())


def _product(bench: OneGpu) -> Callable[[], object]:
    a, b = torch.randn(2, SIDE, SIDE, device=bench.device).bfloat16()
    out = torch.empty_like(a)
    return lambda: torch.mm(a, b.T, out=out)


def _copy(bench: OneGpu) -> Callable[[], object]:
    source = torch.ones(COPIED, dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def _sending(bench: Bench) -> Callable[[], object]:
    window = bench.group.window(SENT)
    source = torch.ones(SENT, dtype=torch.uint8, device=bench.device)
    peer = (bench.rank + 1) % bench.size
    # The view alone would not keep the mapping.
    return lambda: window.view(0, (SENT,), torch.uint8, peer).copy_(source)
