"""`soloist top`: the dashboard in a terminal."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any

import numpy as np
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from soloist.errors import ClusterError, ConfigurationError

SHADES = " ░▒▓█"
SHADES_A_LINE = 64  # with its neighbours a line of 80 columns
NEAR, NEXT = (0, 2, 0, 0), (0, 1, 0, 0)  # padding of tables that fit into 80 columns
INTERVAL_S = 2.0
MOST_WAITS = 4
ANSWER_S = 10.0


def watch(url: str, key: str | None, once: bool, console: Console) -> None:
    """Show a server's details, again and again unless `once`, until interrupted. Raises ClusterError."""
    with Live(view(fetch(url, key)), console=console, screen=not once, auto_refresh=False) as live:
        while not once:
            time.sleep(INTERVAL_S)
            live.update(view(fetch(url, key)), refresh=True)


def fetch(url: str, key: str | None) -> dict[str, Any]:
    """What `/details` answers."""
    if not url.startswith(("http://", "https://")):
        raise ConfigurationError.of("URL", url, "write http://HOST:PORT")
    address = f"{url.rstrip('/')}/details"
    request = urllib.request.Request(address, headers={"Authorization": f"Bearer {key}"} if key else {})
    try:
        with urllib.request.urlopen(request, timeout=ANSWER_S) as answer:
            return json.load(answer)
    except (urllib.error.URLError, OSError, ValueError) as error:
        raise ClusterError(f"{address}: {error}; is a server running there, and is the key right?") from error


def view(details: Mapping[str, Any]) -> Group:
    """Everything on one screen."""
    return Group(_head(details), _alerts(details), _experts(details), _ranks(details), _waits(details))


def _head(details: Mapping[str, Any]) -> Table:
    shown = Table(title=f"{details['model']} on {details['layout']}", box=None, padding=NEAR, pad_edge=False)
    used, total = (sum(one[key] for one in details["leaders"]) for key in ("blocks_used", "blocks_total"))
    cells = {
        "tokens/s": f"{details['tokens']['tps']:.1f}",
        "TTFT p50/p99, ms": f"{_ms(details['ttft_s']['p50'])} / {_ms(details['ttft_s']['p99'])}",
        "TPOT p50/p99, ms": f"{_ms(details['tpot_s']['p50'])} / {_ms(details['tpot_s']['p99'])}",
        "open / waiting": f"{details['requests']['open']} / {details['requests']['waiting']}",
        "KV blocks": f"{used / max(total, 1):.0%} of {total}",
    }
    for name in cells:
        shown.add_column(name, justify="right", no_wrap=True)
    shown.add_row(*cells.values())
    return shown


def _ms(seconds: float | None) -> str:
    return "–" if seconds is None else f"{seconds * 1e3:.1f}"


def _alerts(details: Mapping[str, Any]) -> Text:
    if not details["alerts"]:
        return Text("all within their thresholds", style="green")
    return Text("\n".join(f"▲ {alert['text']}" for alert in details["alerts"]), style="red")


def _experts(details: Mapping[str, Any]) -> Table:
    """A shade for each expert: its tokens over the layer's mean, full from twice the mean on."""
    shown = Table(box=None, padding=NEXT, pad_edge=False)
    for name in ("layer", "experts (shade: tokens over the mean)", "max/mean"):
        shown.add_column(name, no_wrap=True)
    for layer, loads in details["experts"].items():
        relative = np.array(loads) / (np.mean(loads) or 1.0)
        shades = "".join(SHADES[min(len(SHADES) - 1, int(value * (len(SHADES) - 1) / 2))] for value in relative)
        lines = (shades[start : start + SHADES_A_LINE] for start in range(0, len(shades), SHADES_A_LINE))
        shown.add_row(layer, "\n".join(lines), f"{relative.max():.2f}")
    return shown


def _ranks(details: Mapping[str, Any]) -> Table:
    """`waited for`: the share of their time that the others, on average, waited for this rank; the slowest has most."""
    shown = Table(box=None, padding=NEAR, pad_edge=False)
    for name in ("rank", "rows", "steps", "waited", "waited for", "sent, MB", "memory, MB"):
        shown.add_column(name, justify="right", no_wrap=True)
    window_s, others = details["window_s"] or 1.0, max(1, len(details["ranks"]) - 1)
    for rank in details["ranks"]:
        memory = (rank["weight_bytes"] + rank["kv_bytes"]) / 1e6
        waits = (f"{rank['waited_s'] / window_s:.0%}", f"{rank['kept_waiting_s'] / others / window_s:.0%}")
        cells = (rank["rank"], rank["rows"], rank["steps"], *waits)
        shown.add_row(*map(str, cells), f"{rank['sent_bytes'] / 1e6:.2f}", f"{memory:.1f}")
    return shown


def _waits(details: Mapping[str, Any]) -> Text:
    waits = details["longest_waits"][:MOST_WAITS]
    found = ", ".join(f"rank {w['rank']} for {w['for']}: {w['seconds'] / details['window_s']:.1%}" for w in waits)
    return Text(f"longest waits: {found}" if found else "")
