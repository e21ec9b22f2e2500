"""`python -m soloist.simulator [GPUS [REQUESTS [RATE]]]`: how long simulating takes, against what is simulated.

DeepSeek-V3's shape in fp8 on HGX H100, one expert group a GPU, 1000 tokens in, 200 out, Poisson arrivals of RATE
requests a second. Runs of growing length show how the time grows with the steps. Ends with one line of JSON.
"""

from __future__ import annotations

import resource
import sys
from time import process_time
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table

from soloist.simulator.deployment import Setup, simulate
from soloist.specs.cluster import cluster
from soloist.specs.presets import preset
from soloist.specs.workload import Load

PARTS = (8, 4, 2, 1)  # the runs' shares of all requests
COLUMNS = ("requests", "steps", "tokens", "seconds", "ms_per_step", "us_per_token", "peak_MB")


def measure(gpus: int, requests: int, rate: int) -> dict[str, Any]:
    """One run: its size, its time on one core and the process's peak memory so far."""
    setup = Setup.of(preset("deepseek-v3"), cluster("hgx-h100"), f"ep{gpus}", "fp8")
    began_s = process_time()
    result, run = simulate(setup, Load(prompt=1000, output=200, rate=rate), requests)
    seconds, tokens = process_time() - began_s, int(run.requests.outputs.sum())
    values = (requests, result.steps, tokens, round(seconds, 3), 1e3 * seconds / result.steps, 1e6 * seconds / tokens)
    peak_MB = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    return dict(zip(COLUMNS, (*values, peak_MB), strict=True))


def main(gpus: int = 1024, requests: int = 10_000, rate: int = 100) -> None:
    """Print the curve."""
    table = Table(*COLUMNS, title=f"Simulating ep{gpus}, {rate} requests/s", title_justify="left")
    rows = [measure(gpus, max(1, requests // part), rate) for part in PARTS]
    for row in rows:
        table.add_row(*(f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()))
    Console().print(table)
    print(msgspec.json.encode({"gpus": gpus, "rate": rate, "runs": rows}).decode())


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
