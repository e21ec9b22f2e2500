"""Logs of nccl-tests as people keep them."""

from __future__ import annotations

import pytest

from soloist.errors import ConfigurationError
from soloist.specs.nccl_tests import parse_nccl_tests

LOG = """# Collective test starting: alltoall_perf
# nThread 1 nGpus 2 minBytes 1048576
#  Rank  0 Group  0 Pid  11 on host device  0 [0000:19:00] NVIDIA H100 80GB HBM3
#  Rank  1 Group  0 Pid  11 on host device  1 [0000:3b:00] NVIDIA H100 80GB HBM3
NCCL version 2.28.9+cuda13.0
#       size         count      type   redop    root     time   algbw   busbw #wrong     time   algbw   busbw #wrong
     1048576        131072     float    none      -1    21.10   49.69   24.85      0    20.30   51.65   25.83    N/A
    67108864       8388608     float    none      -1    144.2  465.39  232.69      0    145.0  462.82  231.41    N/A
# Avg bus bandwidth    : 130
"""


def log_of(program: str, ranks: int) -> str:
    """A table of a log, without the command."""
    named = "".join(
        f"#  Rank {r:2} Group  0 Pid  {90 + r} on host device  {r} [0x19] NVIDIA H100\n" for r in range(ranks)
    )
    return f"{program}\n{named}\n{LOG[LOG.index('#       size') :]}".replace("alltoall", "")


def test_nccl_tests_log() -> None:
    rows = parse_nccl_tests(LOG, "2xH100-NVLink")
    assert [(r["collective"], r["gpus"], r["bytes"], r["us"]) for r in rows] == [
        ("all_to_all", 2, 1048576, 20.3),
        ("all_to_all", 2, 67108864, 144.2),
    ]
    assert rows[0]["library"] == "nccl-2.28.9"


def test_nccl_tests_log_without_or_with_wrong_results() -> None:
    with pytest.raises(ConfigurationError, match="no results"):
        parse_nccl_tests("all_reduce_perf", "x")
    with pytest.raises(ConfigurationError, match="wrong results"):
        parse_nccl_tests(LOG.replace("24.85      0", "24.85      7"), "x")


def test_several_programs_in_one_log() -> None:
    """A table is of the program and the ranks named last before it, whatever else is printed."""
    text = (
        log_of("+ mpirun ./build/all_reduce_perf_mpi -b 8", 16) + LOG + "# Collective test concluded: alltoall_perf\n"
    )
    rows = parse_nccl_tests(text + log_of("$ hypercube_perf", 8) + log_of("$ sendrecv_perf", 2), "x")
    assert [(row["collective"], row["gpus"]) for row in rows[::2]] == [
        ("all_reduce", 16), ("all_to_all", 2), ("hypercube", 8), ("send_recv", 2),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "prefix", ["[1,0]<stdout>:", " 0: ", "2024-05-01T12:00:00.123Z stdout F ", "[1,0]<stdout>: \r"]
)
def test_lines_with_the_prefixes_of_launchers(prefix: str) -> None:
    text = "".join(prefix + line + "\r\n" for line in LOG.splitlines())
    assert parse_nccl_tests(text.replace("\r[", "["), "x") == parse_nccl_tests(LOG, "x")


def test_old_columns_and_sizes_of_no_bytes() -> None:
    text = (
        log_of("all_reduce_perf", 4)
        + """
           0             0   float     sum    158.3    0.00    0.00  1e-07    158.4    0.00    0.00  0e+00
       65536          2048     float    52.01    1.26    1.10  0e+00    50.09    1.31    1.14  3e-08
    33554432       8388608   float     sum   1464.2   22.92   45.65    N/A   1458.1   23.01   45.84    N/A
"""
    )
    assert [(row["bytes"], row["us"]) for row in parse_nccl_tests(text, "x")[2:]] == [
        (65536, 50.09),
        (33554432, 1458.1),
    ]


def test_the_file_s_name_stands_for_the_program_of_its_first_table() -> None:
    rows = parse_nccl_tests(log_of("", 8), "x", "logs/all_gather_perf.txt")
    assert {row["collective"] for row in rows} == {"all_gather"}
    with pytest.raises(
        ConfigurationError, match=r"all_gather_perf.txt, line 2\d': the table does not name its program"
    ):
        parse_nccl_tests(log_of("", 8) + log_of("", 8), "x", "logs/all_gather_perf.txt")


def test_a_loop_over_programs_names_none() -> None:
    with pytest.raises(ConfigurationError, match="does not name its program"):
        parse_nccl_tests(log_of("for t in all_reduce_perf all_gather_perf; do", 8), "x")


@pytest.mark.parametrize(("text", "said"), [
    (log_of("all_reduce_perf", 0), "ranks are missing"),
    (log_of("all_reduce_perf", 1), "MPI=1"),
    ("".join(line + "\n" + line + "\n" for line in log_of("all_reduce_perf", 1).splitlines()), "2 process.es. ran by"),
    ("12 34 numbers of another program", "no results"),
    ("", "no results"),
])  # fmt: skip
def test_what_is_missing_is_named(text: str, said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        parse_nccl_tests(text, "x")
