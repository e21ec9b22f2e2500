"""The dashboard in a terminal."""

from __future__ import annotations

from io import StringIO
from typing import Any

import pytest
from rich.console import Console

from soloist.server.top import SHADES_A_LINE, view

# As wide as numbers become.
DETAILS: dict[str, Any] = {
    "model": "qwen3-30b-a3b",
    "layout": "attn2ep16",
    "tokens": {"tps": 123456.7},
    "ttft_s": {"p50": 1.2345, "p99": 12.3456},
    "tpot_s": {"p50": 0.1234, "p99": 1.2345},
    "requests": {"open": 12345, "waiting": 1234},
    "leaders": [{"blocks_used": 1234567, "blocks_total": 1234567}],
    "alerts": [],
    "window_s": 60.0,
    "ranks": [
        {
            "rank": rank, "rows": 1234567890, "steps": 1234567, "waited_s": 60.0, "kept_waiting_s": 60.0,
            "sent_bytes": 123456789012, "weight_bytes": 60e9, "kv_bytes": 60e9,
        }
        for rank in (0, 127)
    ],
    "longest_waits": [],
}  # fmt: skip


def lines(experts: int) -> list[str]:
    """In a terminal of 80 columns, three layers with as many experts, one of which has all tokens."""
    loads = {str(layer): [0] * (experts - 1) + [9] for layer in (0, 1, 60)}
    console = Console(width=80, file=StringIO())
    with console.capture() as shown:
        console.print(view(DETAILS | {"experts": loads}))
    return shown.get().splitlines()


@pytest.mark.parametrize("experts", [8, 64, 256])
def test_no_column_is_broken_or_cut(experts: int) -> None:
    found = lines(experts)
    assert max(map(len, found)) <= 80
    assert "…" not in "".join(found)
    each = -(-experts // SHADES_A_LINE)  # of a layer
    assert len(found) == 3 + 1 + 1 + 3 * each + 1 + 2 + 1


def test_shades_of_a_layer_stand_below_each_other() -> None:
    found = [line for line in lines(256) if "█" in line]
    assert [line.index("█") for line in found] == [len("layer ") + SHADES_A_LINE - 1] * 3
