"""Logs of nccl-tests (`all_reduce_perf` and the like) → rows of the `collectives` calibration table.

Logs are read as people keep them: several programs one after the other, with the ranks' prefixes of mpirun or srun
before each line, and with NCCL's own messages between them. A table belongs to the program and the ranks that were
named last before it. The columns differ between operations and versions (type, redop and root may be missing), so a
result is known by its end: time, algorithm and bus bandwidth and errors, out of place and in place.
"""

from __future__ import annotations

import re

from soloist.errors import ConfigurationError

COLLECTIVES = {
    "all_reduce": "all_reduce", "all_gather": "all_gather", "reduce_scatter": "reduce_scatter",
    "alltoall": "all_to_all", "sendrecv": "send_recv", "broadcast": "broadcast", "reduce": "reduce",
    "gather": "gather_to_root", "scatter": "scatter", "hypercube": "hypercube",
}  # fmt: skip
_PROGRAM = re.compile(rf"(?<![a-z_])({'|'.join(COLLECTIVES)})_perf")
_RANK = re.compile(r"\bRank\s+(\d+)\s+(?:Group\s+(\d+)\s+)?(?:Pid|on|device)\b")
_VERSION = re.compile(r"NCCL version (\d+(?:\.\d+)+)")
_NUMBER = r"\d[\d.]*(?:e[+-]?\d+)?"
_HALF = rf"((?:(?:{_NUMBER}|N/A)\s+){{3}}(?:{_NUMBER}|N/A))"
_RESULT = re.compile(rf"(?<![\w.+-])(\d+)\s+\d+\s+(?:[a-z]\w*\s+){{0,2}}(?:-?\d+\s+)?{_HALF}\s+{_HALF}\s*$")


def parse_nccl_tests(text: str, fabric: str, path: str = "") -> list[dict[str, object]]:
    """Rows `{collective, library, fabric, gpus, bytes, us}`, with the faster of out-of-place and in-place times.
    `path`: of the log, whose name (`all_reduce_perf.log`) stands for a first table that does not name its program.

    Raises ConfigurationError for a log that holds no results, for a table that names neither program nor ranks or only
    one rank, and for results that the test itself found wrong.
    """
    name, library = _program(path), "nccl"
    ranks: list[int] = []
    groups: set[str] = set()
    rows: list[dict[str, object]] = []
    in_table = False
    for number, line in enumerate(text.splitlines(), 1):
        if in_table and (_RANK.search(line) or _program(line)):
            name, ranks, groups, in_table = "", [], set[str](), False
        if rank := _RANK.search(line):
            ranks.append(int(rank[1]))
            groups.add(rank[2] or "0")
        elif version := _VERSION.search(line):
            library = f"nccl-{version[1]}"
        elif (result := _RESULT.search(line)) and int(result[1]):  # no bytes: a size that the ranks do not divide
            where, in_table = f"{path}, line {number}".lstrip(", "), True
            common = {"collective": _known(name, where), "gpus": _gpus(ranks, groups, where)}
            common |= {"role": "fit", "source": "nccl-tests", "library": library, "fabric": fabric}
            rows.append({**common, "bytes": int(result[1]), "us": _microseconds(result, where)})
        else:
            name = _program(line) or name
    if not rows:
        remedy = "holds no results; give what all_reduce_perf and the like print"
        raise ConfigurationError.of("nccl-tests log", path or text[:40], remedy)
    return rows


def _program(line: str) -> str:
    """The one program that a line names; of a loop over several it does not say which one ran."""
    found = set(_PROGRAM.findall(line))
    return found.pop() if len(found) == 1 and "concluded" not in line else ""


def _known(name: str, where: str) -> str:
    if not name:
        known = ", ".join(f"{name}_perf" for name in COLLECTIVES)
        remedy = f"the table does not name its program; put the command that wrote it on a line above: {known}"
        raise ConfigurationError.of("nccl-tests log", where, remedy)
    return COLLECTIVES[name]


def _gpus(ranks: list[int], groups: set[str], where: str) -> int:
    """GPUs that take part in one collective."""
    if not ranks:
        raise ConfigurationError.of("nccl-tests log", where, "the table's ranks are missing: lines like #  Rank  0 …")
    if len(ranks) == 1 or len(set(ranks)) < len(ranks):
        remedy = f"{len(ranks)} process(es) ran by themselves, each as rank 0; build nccl-tests with MPI=1, or give -g"
        raise ConfigurationError.of("nccl-tests log", where, remedy)
    return len(ranks) // len(groups)


def _microseconds(result: re.Match[str], where: str) -> float:
    halves = [half.split() for half in result.group(2, 3)]
    times = [float(half[0]) for half in halves if half[0] != "N/A"]
    if not times:
        raise ConfigurationError.of("nccl-tests log", where, "the line holds no time")
    if any(half[3] != "N/A" and _is_wrong(half[3]) for half in halves):
        raise ConfigurationError.of("nccl-tests log", where, "the line reports wrong results; repeat the run")
    return min(times)


def _is_wrong(errors: str) -> bool:
    """Newer logs count wrong elements, older ones have the greatest difference, of rounding where it is small."""
    return float(errors) > (1e-3 if "e" in errors else 0)
