"""A trace of one call of a benchmark for https://ui.perfetto.dev: a row for each stream of the first rank's GPU."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function


@dataclass(frozen=True)
class Trace:
    """`path` is None where nothing is to be traced, as on all ranks but the first."""

    path: Path | None

    @classmethod
    def of(cls, path: Path | None, rank: int) -> Trace:
        return cls(path if rank == 0 else None)

    def shot(self, case: str, work: Callable[[], object]) -> None:
        """Run `work` once more, on all ranks; its trace goes to a file of its own."""
        torch.cuda.synchronize()
        if self.path is None:
            work()
            torch.cuda.synchronize()
            return
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler, record_function(case):
            work()
            torch.cuda.synchronize()
        name = re.sub(r"[^a-z0-9]+", "-", case.lower()).strip("-")
        profiler.export_chrome_trace(str(self.path.with_name(f"{self.path.stem}-{name}.json")))
