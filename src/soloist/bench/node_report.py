"""What `soloist.bench.node` has found, in tables: bars, predictions and ratios beside the figures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from rich.table import Table

# Of eight GPUs of one node, 7168 wide, top-8 of 256 experts: what DeepEP and UCCL-EP reach there.
DECODE_US = {"dispatch": 60.0, "combine": 80.0, "there and back": 140.0}
PREFILL_RATE = 300e9  # bytes/s that leave a GPU
Record = dict[str, Any]


def exchange_table(records: Sequence[Record]) -> Table:
    """Every point of the exchange and of the layer against its limit, and against the bar for eight GPUs."""
    shown = Table(
        "what", "variant", "T", "µs", "limit, µs", "of it", "GB/s", "bar for 8 GPUs", title="Exchange and layer"
    )
    for record in records:
        if "bound_by" not in record or "variant" not in record:
            continue
        tokens, seconds = record["shape"].get("T", 0), record["seconds"]
        is_exchange = "GB/s" in record["bound_by"] and " MB at " in record["bound_by"]
        rate = float(record["bound_by"].split(" MB at ")[0]) * 1e6 / seconds if is_exchange else 0.0
        shown.add_row(
            record["what"], record["variant"], str(tokens), f"{seconds * 1e6:.1f}", f"{record['ceiling_s'] * 1e6:.1f}",
            f"{record['ceiling_s'] / seconds:.0%}", f"{rate / 1e9:.0f}" if is_exchange else "",
            _bar(record["what"], tokens, seconds, rate) if is_exchange else "",
        )  # fmt: skip
    return shown


def _bar(what: str, tokens: int, seconds: float, rate: float) -> str:
    """The bar and whether it is met; nothing where there is none."""
    if tokens <= 512 and what in DECODE_US:
        return f"{DECODE_US[what]:.0f} µs: {'met' if seconds * 1e6 <= DECODE_US[what] else 'missed'}"
    if tokens > 512 and what in ("dispatch", "combine"):
        return f"{PREFILL_RATE / 1e9:.0f} GB/s: {'met' if rate >= PREFILL_RATE else 'missed'}"
    return ""


def layout_table(records: Sequence[Record], foreseen: Sequence[Record]) -> Table:
    """Prefill and decode of each layout, measured, predicted, and the machine's limit."""
    columns = ("", "layout", "shape", "ms", "tokens/s", "predicted, ms", "error", "limit, ms")
    shown = Table(*columns, title="Layouts")
    known = {_key(record): record for record in foreseen}
    for record in records:
        if record["what"] not in ("prefill", "TPOT"):
            continue
        guess = known.get(_key(record), {}).get("predicted_s")
        shown.add_row(
            record["what"], record["part"], record["shape"], f"{record['seconds'] * 1e3:,.2f}",
            f"{record['tokens_per_s']:,.0f}", "" if guess is None else f"{guess * 1e3:,.2f}",
            "" if guess is None else f"{guess / record['seconds'] - 1:+.0%}", f"{record['ceiling_s'] * 1e3:,.2f}",
        )  # fmt: skip
    for record in records:
        if record["what"] == "compare":
            memory = (record["weight_bytes_per_rank"] + record["kv_bytes_per_rank"]) / 1e9
            shares = f"exchange {record['exchange_share']:.1%}, waiting {record['waiting_share']:.1%}"
            shown.add_row("phases", record["layout"], f"{shares}, {memory:.1f} GB a rank", *[""] * 5)
    return shown


def ratios(records: Sequence[Record], ours: str) -> Iterator[str]:
    """Whole experts against each of the other layouts: the measured side of what the scenarios claim."""
    rates: dict[tuple[str, str], dict[str, float]] = {}
    for record in records:
        if record["what"] in ("prefill", "TPOT"):
            rates.setdefault((record["what"], record["shape"]), {}).setdefault(record["part"], record["tokens_per_s"])
    for (what, shape), by_layout in rates.items():
        others = {layout: rate for layout, rate in by_layout.items() if layout != ours}
        if ours in by_layout and others:
            compared = ", ".join(f"{by_layout[ours] / rate:.2f} x {layout}" for layout, rate in others.items())
            yield f"{what} {shape}: {ours} gives {compared}"


def _key(record: Record) -> tuple[str, str, str]:
    return record["what"], record["layout"], str(record["shape"])
