"""Shows a person how far the ranks are with loading."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from soloist.frontend.frontend import RankReport


class LoadingBar:
    """Ranks that are ready, and bytes that all of them have read. Silent where nobody watches."""

    def __init__(self, ranks: int, show: bool) -> None:
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
            disable=not (show and console.is_terminal),
        )
        self._task = self._bar.add_task("loading", total=ranks, read="0 MB")

    def update(self, ranks: dict[int, RankReport]) -> None:
        read = sum(report.bytes_read for report in ranks.values())
        shown = f"{read / 1e9:.1f} GB" if read >= 1e9 else f"{read / 1e6:.0f} MB"
        self._bar.update(self._task, completed=sum(report.ready for report in ranks.values()), read=shown)

    def __enter__(self) -> LoadingBar:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()
