"""What NCCL says of itself when NCCL_DEBUG=INFO: which network it chose, and how GPUs reach each other."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator

from soloist.doctor.finding import Finding, error, note, ok, warning
from soloist.doctor.machine import Machine


def check_nccl_log(text: str, machine: Machine) -> Iterator[Finding]:
    """Findings in a log of one or several ranks."""
    lines = text.splitlines()
    version = next((found[1] for line in lines if (found := re.search(r"NCCL version ([\d.]+)", line))), "")
    if not version and not any("NCCL INFO" in line for line in lines):
        yield note("NCCL log", "nothing of NCCL's in it", "NCCL logs only with NCCL_DEBUG=INFO", "set it and run again")
        return
    yield from _network(lines, machine)
    yield from _channels(lines, machine)
    warnings = Counter(line.partition("NCCL WARN ")[2] for line in lines if "NCCL WARN " in line)
    for message, times in warnings.most_common(5):
        yield warning(
            "NCCL log", f"{times} × {message}", "NCCL warns of what makes it fail or slow", "see its documentation"
        )
    yield ok("NCCL log", f"version {version or 'unknown'}")


def _network(lines: list[str], machine: Machine) -> Iterator[Finding]:
    used = [found[1] for line in lines if (found := re.search(r"NCCL INFO (?:Using network |NET/)(\w+)", line))]
    sockets = "Socket" in used and "IB" not in used
    if any("Failed to open libibverbs" in line for line in lines):
        yield error(
            "NCCL log",
            "NCCL cannot open libibverbs",
            "it falls back to sockets: a tenth of the rate",
            "install rdma-core (libibverbs1) in the image",
        )
    elif sockets and any(nic.state == "ACTIVE" for nic in machine.nics):
        yield error(
            "NCCL log",
            "NCCL uses sockets although there are RDMA NICs",
            "a tenth of their rate",
            "look for NET/IB in the log; check NCCL_IB_DISABLE, NCCL_IB_HCA, /dev/infiniband in the container",
        )
    elif used:
        yield ok("NCCL log", f"network: {', '.join(dict.fromkeys(used))}")
    if "IB" in used and any(re.search(r"via NET/IB/\d+(?!/GDRDMA)\b(?!/)", line) for line in lines):
        yield warning(
            "NCCL log",
            "messages to other nodes are copied through host memory (no GDRDMA)",
            "half the rate, and the CPU's memory is loaded",
            "modprobe nvidia-peermem; check NCCL_NET_GDR_LEVEL",
        )


def _channels(lines: list[str], machine: Machine) -> Iterator[Finding]:
    kinds = Counter(found[1] for line in lines if (found := re.search(r"Channel .* via (P2P|SHM|NET)", line)))
    nvlink = any(gpu.nvlinks_up for gpu in machine.gpus)
    if nvlink and kinds["SHM"]:
        yield error(
            "NCCL log",
            f"{kinds['SHM']} channels go through host memory (SHM) although there is NVLink",
            "an exchange is ten times slower",
            "check peer access, NCCL_P2P_DISABLE and NCCL_P2P_LEVEL",
        )
    elif kinds:
        yield ok("NCCL log", "channels: " + ", ".join(f"{count} {kind}" for kind, count in kinds.items()))
