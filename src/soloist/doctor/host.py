"""This host: everything that the kernel, the interpreter and the driver tell, gathered into a `Machine`."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
import shutil
import socket
from collections.abc import Iterable
from pathlib import Path

import soloist
from soloist.doctor import nvidia_smi, nvml
from soloist.doctor.machine import Interface, Machine, Nic

ROOT = Path("/")
PREFIXES = ("CUDA_", "NCCL_", "NVSHMEM_", "NVIDIA_", "TORCH_", "PYTORCH_", "TRITON_", "OMP_", "MASTER_")
MPI_PREFIXES = ("OMPI_", "PMIX_MCA", "PRTE_", "MPIR_", "MPICH_", "MV2_", "I_MPI_", "UCX_", "FI_")


def examine(wanted_ports: Iterable[int] = ()) -> Machine:
    """Everything about this host. Changes nothing and starts nothing on a GPU."""
    found = nvml.read()
    if found is None:
        gpus, driver = nvidia_smi.gpus(nvidia_smi.run(*nvidia_smi.QUERY), nvidia_smi.run("nvlink", "--status"))
        cuda, peers = nvidia_smi.cuda_version(nvidia_smi.run()), {}
    else:
        gpus, driver, cuda, peers = found
    free, total = memory()
    return Machine(
        host=socket.gethostname(),
        gpus=gpus,
        driver=driver,
        driver_cuda=cuda,
        paths=nvidia_smi.paths(nvidia_smi.run("topo", "-m")) if gpus else {},
        peers=peers,
        nics=nics(),
        interfaces=interfaces(),
        versions=versions(),
        environment={key: value for key, value in os.environ.items() if key.startswith(PREFIXES + MPI_PREFIXES)},
        cores=len(os.sched_getaffinity(0)),
        memory_bytes=total,
        memory_free_bytes=free,
        locked_bytes=_limit(resource.RLIMIT_MEMLOCK),
        open_files=_limit(resource.RLIMIT_NOFILE),
        shm_bytes=shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else None,
        ports_taken=tuple(port for port in wanted_ports if _taken(port)),
    )


def nics(root: Path = ROOT) -> tuple[Nic, ...]:
    """From /sys/class/infiniband."""
    peer_memory = any((root / f"sys/module/{name}").exists() for name in ("nvidia_peermem", "nv_peer_mem"))
    ports = sorted((root / "sys/class/infiniband").glob("*/ports/*"))
    return tuple(
        Nic(
            device=port.parent.parent.name,
            port=int(port.name),
            state=_text(port / "state").rpartition(":")[2].strip(),  # "4: ACTIVE"
            rate_Gbps=float(_text(port / "rate").split(" ")[0] or 0),  # "400 Gb/sec (4X NDR)"
            kind=_text(port / "link_layer"),
            peer_memory=peer_memory,
        )
        for port in ports
    )


def interfaces(root: Path = ROOT) -> tuple[Interface, ...]:
    """From /sys/class/net, without the loopback."""
    folders = [folder for folder in sorted((root / "sys/class/net").glob("*")) if folder.name != "lo"]
    return tuple(
        Interface(
            name=folder.name,
            up=_text(folder / "operstate") != "down",
            speed_Mbps=speed if (speed := int(_text(folder / "speed") or -1)) > 0 else None,
        )
        for folder in folders
        if folder.is_dir()
    )


def memory() -> tuple[int, int]:
    """Free and total bytes of the host."""
    lines = (line.split() for line in _text(Path("/proc/meminfo")).splitlines())
    table = {words[0].rstrip(":"): int(words[1]) * 1024 for words in lines if len(words) > 1}
    return table.get("MemAvailable", 0), table.get("MemTotal", 0)


def versions() -> dict[str, str]:
    """Of what has to fit together. torch is asked without touching a GPU."""
    found = {"soloist": soloist.__version__, "python": platform.python_version()}
    for name in ("torch", "triton", "mpi4py", "nvidia-nccl-cu13", "nvidia-nccl-cu12"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    if "torch" in found:
        import torch
        from torch.cuda import nccl

        found["cuda"] = torch.version.cuda or ""
        if torch.version.cuda:
            found["nccl"] = ".".join(map(str, nccl.version()))
    return {name: version for name, version in found.items() if version}


def _limit(which: int) -> int | None:
    soft, _ = resource.getrlimit(which)
    return None if soft == resource.RLIM_INFINITY else soft


def _taken(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return True
    return False


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:  # some files of sysfs answer with an error while a link is down
        return ""
