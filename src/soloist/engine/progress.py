"""How far the ranks are with their start: a bar for a person, lines for a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Literal

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from soloist.frontend.frontend import RankReport

Show = bool | Literal["lines"]  # True: a bar, silent where nobody watches


class StartUp:
    """Ranks that are ready, bytes that all of them have read, and when the last of them came to each part."""

    def __init__(self, ranks: int, show: Show) -> None:
        console = Console(stderr=True)
        columns = ("[bold]{task.description}", "ranks ready", "· {task.fields[read]} read ·")
        self._bar = Progress(
            TextColumn(columns[0]),
            BarColumn(),
            MofNCompleteColumn(),
            *map(TextColumn, columns[1:]),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not (show is True and console.is_terminal),
        )
        self._task = self._bar.add_task("processes", total=ranks, read="0 MB")
        self._begin_s, self._lines = time.monotonic(), show == "lines"
        self.reached_s: dict[str, float] = {}  # from the beginning on

    def update(self, ranks: Mapping[int, RankReport]) -> None:
        """A phase is reached when the last rank has reached it."""
        for phase in next(iter(ranks.values())).phases:
            if phase not in self.reached_s and all(phase in report.phases for report in ranks.values()):
                last_s = max(report.phases[phase] for report in ranks.values())
                self._reached(phase, last_s - self._begin_s)
        read = sum(report.bytes_read for report in ranks.values())
        shown = f"{read / 1e9:.1f} GB" if read >= 1e9 else f"{read / 1e6:.0f} MB"
        ready = sum(report.ready for report in ranks.values())
        if ready == len(ranks):
            self._reached("ready", time.monotonic() - self._begin_s)
        self._bar.update(
            self._task, description=next(reversed(self.reached_s), "processes"), completed=ready, read=shown
        )

    def _reached(self, phase: str, seconds: float) -> None:
        self.reached_s[phase] = seconds
        if self._lines:
            print(f"start: {seconds:6.1f} s  {phase}", file=sys.stderr, flush=True)

    def __enter__(self) -> StartUp:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()
