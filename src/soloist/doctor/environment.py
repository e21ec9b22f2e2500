"""Checks of environment variables: obsolete ones, and values that contradict the machine or each other."""

from __future__ import annotations

import re
from collections.abc import Iterator

from soloist.doctor.finding import Finding, error, note, ok, warning
from soloist.doctor.machine import Machine
from soloist.planner.environment import OBSOLETE

GONE_PREFIXES = {
    "OMPI_MCA_orte_": "ORTE left Open MPI with version 5; the launcher's settings are PRTE_MCA_…",
    "MV2_": "MVAPICH2's; MVAPICH 3 and others do not read it",
    "MPICH_ASYNC_PROGRESS": "MPICH's name for it is MPIR_CVAR_ASYNC_PROGRESS",
}
SLOW = {
    "CUDA_LAUNCH_BLOCKING": "every kernel is waited for",
    "NCCL_SHM_DISABLE": "ranks of a host talk through the network",
    "TORCH_DISTRIBUTED_DEBUG": "every collective is checked on the CPU",
}


def check_environment(machine: Machine) -> Iterator[Finding]:
    """The variables that NCCL, MPI, CUDA and torch read."""
    findings = [*_obsolete(machine), *_nccl(machine), *_ranks(machine), *_slow(machine)]
    yield from findings
    if not findings:
        count = len(machine.environment)
        kinds = f"variable{'s' * (count != 1)} of NCCL, MPI, CUDA and torch"
        yield ok("environment", f"{count} {kinds}: nothing amiss")


def _obsolete(machine: Machine) -> Iterator[Finding]:
    for name, value in machine.environment.items():
        why = OBSOLETE.get(name) or next((why for start, why in GONE_PREFIXES.items() if name.startswith(start)), "")
        if why:
            yield warning("environment", f"{name}={value} is obsolete", why, f"unset {name}")
    if "openib" in machine.environment.get("OMPI_MCA_btl", ""):
        yield warning(
            "environment",
            f"OMPI_MCA_btl={machine.environment['OMPI_MCA_btl']} names openib",
            "Open MPI 5 has no openib: it is an unknown component",
            "use OMPI_MCA_pml=ucx",
        )


def _nccl(machine: Machine) -> Iterator[Finding]:
    """NCCL's variables against the links and devices of the machine."""
    env = machine.environment
    nvlink = any(gpu.nvlinks_up for gpu in machine.gpus)
    active = [nic.device for nic in machine.nics if nic.state == "ACTIVE"]
    if env.get("NCCL_P2P_DISABLE") == "1" and nvlink:
        yield error(
            "environment",
            "NCCL_P2P_DISABLE=1 on a host with NVLink",
            "NCCL then copies through host memory",
            "unset NCCL_P2P_DISABLE",
        )
    if env.get("NCCL_P2P_LEVEL") == "LOC" and nvlink:
        yield error(
            "environment",
            "NCCL_P2P_LEVEL=LOC on a host with NVLink",
            "the same as NCCL_P2P_DISABLE=1",
            "unset NCCL_P2P_LEVEL",
        )
    if env.get("NCCL_IB_DISABLE") == "1" and active:
        yield error(
            "environment",
            f"NCCL_IB_DISABLE=1 beside {len(active)} active RDMA NICs",
            "NCCL then uses sockets: a tenth of the rate",
            "unset NCCL_IB_DISABLE",
        )
    yield from _names(
        env.get("NCCL_SOCKET_IFNAME", ""),
        [i.name for i in machine.interfaces],
        "NCCL_SOCKET_IFNAME",
        "interface",
        "NCCL finds no interface to start over: it hangs or fails",
    )
    yield from _names(
        env.get("NCCL_IB_HCA", ""),
        [nic.device for nic in machine.nics],
        "NCCL_IB_HCA",
        "RDMA device",
        "NCCL falls back to sockets",
    )
    if env.get("NCCL_ALGO") and env.get("NCCL_PROTO"):
        yield note(
            "environment",
            f"NCCL_ALGO={env['NCCL_ALGO']} and NCCL_PROTO={env['NCCL_PROTO']} are forced",
            "NCCL's own choice depends on size; a forced one is wrong for most",
            "unset both and measure",
        )


def _ranks(machine: Machine) -> Iterator[Finding]:
    """Variables that say how many ranks there will be, and what each may use."""
    env = machine.environment
    visible = env.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and machine.gpus:
        shown = [name for name in visible.split(",") if name.strip() and name.strip() != "-1"]
        if len(shown) < len(machine.gpus):
            yield warning(
                "environment",
                f"CUDA_VISIBLE_DEVICES={visible} shows {len(shown)} of {len(machine.gpus)} GPUs",
                "a launcher that starts a rank for each GPU will start too few",
                "unset it, unless you mean it",
            )
    threads = env.get("OMP_NUM_THREADS", "")
    if threads.isdigit() and machine.gpus and int(threads) * len(machine.gpus) > machine.cores:
        yield warning(
            "environment",
            f"OMP_NUM_THREADS={threads} for {len(machine.gpus)} ranks on {machine.cores} cores",
            "threads of ranks take turns",
            f"OMP_NUM_THREADS={max(1, machine.cores // len(machine.gpus))}",
        )


def _names(value: str, there: list[str], variable: str, what: str, why: str) -> Iterator[Finding]:
    """A list of names or their beginnings, `=` for exact ones, `^` for all but these."""
    if not value or value.startswith("^"):
        return
    exact, wanted = value.startswith("="), [name.split(":")[0] for name in value.lstrip("=").split(",")]
    missing = [name for name in wanted if not any(t == name if exact else t.startswith(name) for t in there)]
    if missing:
        yield error(
            "environment",
            f"{variable}={value}: there is no {what} {', '.join(missing)}",
            why,
            f"this host has {', '.join(there) or 'none'}",
        )


def _slow(machine: Machine) -> Iterator[Finding]:
    for name, why in SLOW.items():
        value = machine.environment.get(name, "")
        if value and not re.fullmatch(r"0|OFF|INFO", value):
            yield warning("environment", f"{name}={value}", why, f"unset {name}")
    if machine.environment.get("NCCL_DEBUG") in ("INFO", "TRACE"):
        yield note(
            "environment",
            f"NCCL_DEBUG={machine.environment['NCCL_DEBUG']}",
            "good for finding faults, long logs",
            "NCCL_DEBUG=WARN in production",
        )
