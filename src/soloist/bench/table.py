"""The comparison as a table in the terminal: one column a layout."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from soloist.bench.figures import PHASES, Series

ROWS: tuple[tuple[str, str, float, str], ...] = (
    ("ranks", "ranks", 1, "d"),
    ("output tokens a second", "tps", 1, ".1f"),
    ("… per rank", "tps_per_rank", 1, ".2f"),
    ("TTFT p50, ms", "ttft_p50_s", 1e3, ".1f"),
    ("TTFT p99, ms", "ttft_p99_s", 1e3, ".1f"),
    ("TPOT p50, ms", "tpot_p50_s", 1e3, ".1f"),
    ("TPOT p99, ms", "tpot_p99_s", 1e3, ".1f"),
    *((f"time in {phase}, %", f"{phase}_share", 1e2, ".1f") for phase in PHASES),
    ("bytes a token inside nodes, kB", "bytes_inside_per_token", 1e-3, ".1f"),
    ("bytes a token across nodes, kB", "bytes_across_per_token", 1e-3, ".1f"),
    ("weights per rank, MB", "weight_bytes_per_rank", 1e-6, ".2f"),
    ("KV cache per rank, MB", "kv_bytes_per_rank", 1e-6, ".2f"),
)


def comparison(series: Sequence[Series], title: str) -> Table:
    """Medians over each layout's runs."""
    records = [one.record() for one in series]
    table = Table("", *(str(record["layout"]) for record in records), title=title)
    for column in table.columns[1:]:
        column.justify = "right"
    for label, key, factor, form in ROWS:
        table.add_row(label, *(_cell(record[key], factor, form) for record in records))
    return table


def offline(records: Sequence[dict[str, Any]]) -> Table:
    """The records of `bench.offline`, one a row."""
    table = Table("", "layout", "shape", "ms", "tokens/s", "limit, ms", "of the limit")
    for column in table.columns[3:]:
        column.justify = "right"
    for record in records:
        if record["what"] == "routing":
            table.caption = ", ".join(f"{key} {value}" for key, value in record.items() if key not in ("what", "model"))
            continue
        if record["what"] == "memory":
            continue
        figures = [f"{record['seconds'] * 1e3:,.2f}", "", "", ""]
        if "ceiling_s" in record:
            limit = f"{record['ceiling_s'] * 1e3:,.2f}"
            figures[1:] = f"{record['tokens_per_s']:,.0f}", limit, f"{record['fraction']:.0%}"
        table.add_row(record["what"], record["layout"], record["shape"], *figures)
    return table


def _cell(value: Any, factor: float, form: str) -> str:
    return format(value if factor == 1 else value * factor, form)
