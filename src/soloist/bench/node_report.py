"""What `soloist.bench.node` has found, in tables: bars, predictions and ratios beside the figures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from statistics import median
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
    for record in points(records):
        guess = predicted(record, foreseen)
        shown.add_row(
            record["what"], record["part"], record["shape"], f"{record['seconds'] * 1e3:,.2f}",
            f"{record['tokens_per_s']:,.0f}", "" if guess is None else f"{guess * 1e3:,.2f}",
            "" if guess is None else f"{guess / record['seconds'] - 1:+.0%}",
            f"{record['ceiling_s'] * 1e3:,.2f}" if "ceiling_s" in record else "cut off",
        )  # fmt: skip
    for record in records:
        if record["what"] == "compare":
            memory = (record["weight_bytes_per_rank"] + record["kv_bytes_per_rank"]) / 1e9
            shares = f"exchange {record['exchange_share']:.1%}, waiting {record['waiting_share']:.1%}"
            shown.add_row("phases", record["layout"], f"{shares}, {memory:.1f} GB a rank", *[""] * 5)
    return shown


def points(records: Sequence[Record]) -> list[Record]:
    """Prefill and decode. Of a command that did not come to its end: what it had measured until then."""
    whole = [record for record in records if record["what"] in ("prefill", "TPOT")]
    known, found = {_named(record) for record in whole}, list(whole)
    for record in records:
        what = record["what"].removesuffix(", one start")
        made = record | {"what": what}
        if what in ("prefill", "TPOT") and _named(made) not in known:
            seconds = median(record["times_s"])
            found.append(
                made | {"seconds": seconds, "tokens_per_s": prod(map(int, record["shape"].split("x"))) / seconds}
            )
    return found


def _named(record: Record) -> tuple[str, str, str]:
    return record["part"], record["what"], record["shape"]


def predicted(record: Record, foreseen: Sequence[Record]) -> float | None:
    """Seconds. Predictions are of layouts on one node."""
    if record["part"] != record["layout"]:
        return None
    keys = "what", "layout", "shape"
    return next((one["predicted_s"] for one in foreseen if all(one[key] == record[key] for key in keys)), None)


def ratios(records: Sequence[Record], foreseen: Sequence[Record], ours: str) -> Iterator[str]:
    """Whole experts against each of the other layouts: the measured side of what the scenarios claim."""
    by_shape: dict[tuple[str, str], dict[str, Record]] = {}
    for record in points(records):
        by_shape.setdefault((record["what"], record["shape"]), {})[record["part"]] = record
    for (what, shape), by_part in by_shape.items():
        own = by_part.pop(ours, None)
        if own and by_part:
            compared = [f"{_times(own, other, foreseen)} {part}" for part, other in by_part.items()]
            yield f"{what} {shape}: {ours} gives {', '.join(compared)}"


def _times(own: Record, other: Record, foreseen: Sequence[Record]) -> str:
    guess, others_guess = predicted(own, foreseen), predicted(other, foreseen)
    word = f" ({others_guess / guess:.2f} predicted)" if guess and others_guess else ""
    return f"{other['seconds'] / own['seconds']:.2f} x{word}"


def misses(records: Sequence[Record], foreseen: Sequence[Record]) -> Iterator[str]:
    """How far the predictions are from what was measured."""
    guesses = [(record, predicted(record, foreseen)) for record in points(records)]
    off = [abs(guess / record["seconds"] - 1) for record, guess in guesses if guess is not None]
    if off:
        yield f"{len(off)} predictions: median {median(off):.1%} off, worst {max(off):.1%}"
