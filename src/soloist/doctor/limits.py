"""Checks of versions, limits of the kernel and the container, and ports."""

from __future__ import annotations

from collections.abc import Iterator

from soloist.doctor.finding import Finding, error, note, ok, warning
from soloist.doctor.machine import Machine

LEAST_SHM = 1 << 30
LEAST_FILES = 4096
LEAST_TORCH = (2, 11)
REGISTERED = 16 << 30  # bytes that an RDMA NIC may have to lock


def check_limits(machine: Machine) -> Iterator[Finding]:
    """What the operating system and the installed packages allow."""
    findings = [*_limits(machine), *_versions(machine)]
    yield from findings
    if not findings:
        told = ", ".join(f"{name} {version}" for name, version in machine.versions.items())
        yield ok("versions and limits", told)


def _limits(machine: Machine) -> Iterator[Finding]:
    if machine.nics and machine.locked_bytes is not None:
        severity = error if machine.locked_bytes < REGISTERED else warning
        yield severity(
            "locked memory",
            f"a process may lock {machine.locked_bytes / 1e6:.0f} MB",
            "RDMA locks the memory it sends from; registration fails or is slow",
            "ulimit -l unlimited; in Docker --ulimit memlock=-1; in Slurm PropagateResourceLimits=NONE",
        )
    if machine.shm_bytes is not None and machine.shm_bytes < LEAST_SHM:
        severity = warning if machine.gpus else note
        yield severity(
            "shared memory",
            f"/dev/shm has {machine.shm_bytes / 1e6:.0f} MB free",
            "NCCL puts buffers of the ranks of a host there; Docker gives 64 MB",
            "docker run --shm-size=8g, or an emptyDir with medium: Memory in Kubernetes",
        )
    if machine.open_files is not None and machine.open_files < LEAST_FILES:
        yield warning(
            "open files",
            f"a process may open {machine.open_files} files",
            "a server with many connections, or many ranks, needs more",
            "ulimit -n 65536",
        )
    for port in machine.ports_taken:
        yield error(
            "ports",
            f"port {port} is taken",
            "ranks or clients would reach another program",
            "choose another: MASTER_PORT for ranks, --port for the server",
        )
    if machine.gpus and machine.cores < 2 * len(machine.gpus):
        yield warning(
            "cores",
            f"{machine.cores} cores for {len(machine.gpus)} GPUs",
            "a rank keeps one busy, and NCCL another",
            "give the container or job more CPUs; look at its cpuset",
        )


def _versions(machine: Machine) -> Iterator[Finding]:
    torch, cuda = machine.versions.get("torch", ""), machine.versions.get("cuda", "")
    if not torch:
        yield note(
            "versions",
            "torch is not installed",
            "planning and simulating work, running does not",
            "in a checkout: pip install '.[run]'",
        )
    elif numbers(torch)[:2] < LEAST_TORCH:
        yield error("versions", f"torch {torch}", "Soloist needs 2.11 or later", "pip install -U 'torch>=2.11'")
    if machine.gpus and torch and not cuda:
        yield error(
            "versions",
            f"torch {torch} was built without CUDA",
            "the GPUs cannot be used",
            "install the CUDA build of torch for this driver",
        )
    if machine.gpus and cuda and machine.driver_cuda and machine.driver_cuda[0] < numbers(cuda)[0]:
        yield error(
            "versions",
            f"the driver {machine.driver} serves CUDA {machine.driver_cuda[0]}.{machine.driver_cuda[1]}, "
            f"torch wants {cuda}",
            "the GPUs cannot be used",
            "update the driver, or install torch for that CUDA",
        )
    if machine.gpus and torch and "triton" not in machine.versions:
        yield error("versions", "triton is not installed", "the GPU kernels are written in it", "pip install triton")


def numbers(version: str) -> tuple[int, ...]:
    """`2.11.0+cu130` → (2, 11, 0)"""
    parts = version.partition("+")[0].split(".")
    return tuple(int(part) for part in parts if part.isdigit())
