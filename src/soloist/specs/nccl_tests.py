"""Logs of nccl-tests (`all_reduce_perf` and the like) → rows of the `collectives` calibration table.

The columns of these logs differ between operations and versions (type, redop and root may be missing), so lines are
read from the right: the last eight numbers are time, algorithm and bus bandwidth and errors, out of place and in place.
"""

from __future__ import annotations

import re

from soloist.errors import ConfigurationError

COLLECTIVES = {
    "all_reduce": "all_reduce", "all_gather": "all_gather", "reduce_scatter": "reduce_scatter",
    "alltoall": "all_to_all", "sendrecv": "send_recv", "broadcast": "broadcast", "reduce": "reduce",
}  # fmt: skip


def parse_nccl_tests(text: str, fabric: str) -> list[dict[str, object]]:
    """Rows `{collective, library, fabric, gpus, bytes, us}`, with the faster of out-of-place and in-place times.

    Raises ConfigurationError for a log that does not name the program, that holds no results, or whose results the
    test itself found wrong.
    """
    name = _collective(text)
    gpus = len(re.findall(r"^#\s+Rank\s+\d+", text, re.MULTILINE))
    version = re.search(r"NCCL version (\d+(?:\.\d+)+)", text)
    rows = [_row(line.split()) for line in text.splitlines() if re.match(r"\s*\d+\s+\d+\s", line)]
    if not rows or not gpus:
        raise ConfigurationError.of("nccl-tests log", text[:40], "holds no results or names no ranks")
    library = f"nccl-{version[1]}" if version else "nccl"
    common = {"role": "fit", "source": "nccl-tests", "library": library, "fabric": fabric, "gpus": gpus}
    return [{**common, "collective": name, "bytes": size, "us": us} for size, us in rows]


def _collective(text: str) -> str:
    found = re.search(r"(\w+?)_perf", text)
    if found is None or found[1] not in COLLECTIVES:
        known = ", ".join(f"{name}_perf" for name in COLLECTIVES)
        remedy = f"does not name its program; add the command that wrote it as a first line: {known}"
        raise ConfigurationError.of("nccl-tests log", text[:40], remedy)
    return COLLECTIVES[found[1]]


def _row(cells: list[str]) -> tuple[int, float]:
    out_of_place, in_place = cells[-8:-4], cells[-4:]
    times = [float(half[0]) for half in (out_of_place, in_place) if _is_number(half[0])]
    if not times:
        raise ConfigurationError.of("nccl-tests line", " ".join(cells), "holds no time")
    if any(_is_number(half[3]) and float(half[3]) for half in (out_of_place, in_place)):
        raise ConfigurationError.of("nccl-tests line", " ".join(cells), "reports wrong results; repeat the run")
    return int(cells[0]), min(times)


def _is_number(text: str) -> bool:
    return re.fullmatch(r"[\d.]+(e[+-]?\d+)?", text) is not None
