"""What `nvidia-smi`, sysfs and NCCL say on several kinds of machine, in the formats that their manuals describe."""

from __future__ import annotations

from pathlib import Path

from soloist.doctor import host, nvidia_smi
from soloist.doctor.machine import Machine

VERSIONS = {"soloist": "0.1.0", "python": "3.12.3", "torch": "2.11.0+cu130", "cuda": "13.0", "nccl": "2.28.9",
            "triton": "3.6.0"}  # fmt: skip


def gpu_line(index: int, name: str = "NVIDIA H100 80GB HBM3", **changes: object) -> str:
    """A line of `nvidia-smi --query-gpu=… --format=csv,noheader,nounits`."""
    values = {
        "index": index,
        "name": name,
        "driver_version": "580.65.06",
        "memory.total": 81559,
        "memory.free": 81079,
        "clocks.sm": 345,
        "clocks.max.sm": 1980,
        "clocks_throttle_reasons.active": "0x0000000000000001",
        "power.limit": "700.00",
        "power.default_limit": "700.00",
        "temperature.gpu": 31,
        "persistence_mode": "Enabled",
        "mig.mode.current": "Disabled",
        "ecc.errors.uncorrected.volatile.total": 0,
        "pcie.link.width.current": 16,
        "pcie.link.width.max": 16,
    }
    values |= {key.replace("__", "."): value for key, value in changes.items()}
    return ", ".join(str(values[field]) for field in nvidia_smi.FIELDS)


def nvlink_status(gpus: int, links: int, rate: str = "26.562 GB/s", down: tuple[tuple[int, int], ...] = ()) -> str:
    """`nvidia-smi nvlink --status`."""
    lines = []
    for gpu in range(gpus):
        lines.append(f"GPU {gpu}: NVIDIA H100 80GB HBM3 (UUID: GPU-00000000-0000-0000-0000-{gpu:012d})")
        lines += [f"\t Link {link}: {'<inactive>' if (gpu, link) in down else rate}" for link in range(links)]
    return "\n".join(lines)


HGX_TOPOLOGY = (
    "\t\x1b[4mGPU0\tGPU1\tGPU2\tGPU3\tNIC0\tNIC1\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\x1b[0m\n"
    "GPU0\t X \tNV18\tNV18\tNV18\tPIX\tSYS\t0-55\t0\t\tN/A\n"
    "GPU1\tNV18\t X \tNV18\tNV18\tPXB\tSYS\t0-55\t0\t\tN/A\n"
    "GPU2\tNV18\tNV18\t X \tNV18\tSYS\tPIX\t56-111\t1\t\tN/A\n"
    "GPU3\tNV18\tNV18\tNV18\t X \tSYS\tPXB\t56-111\t1\t\tN/A\n"
    "NIC0\tPIX\tPXB\tSYS\tSYS\t X \tSYS\n"
    "NIC1\tSYS\tSYS\tPIX\tPXB\tSYS\t X \n"
    "\nLegend:\n\n  X    = Self\n  NV#  = Connection traversing a bonded set of # NVLinks\n"
    "\nNIC Legend:\n\n  NIC0: mlx5_0\n  NIC1: mlx5_1\n"
)
PCIE_TOPOLOGY = (
    "\tGPU0\tGPU1\tCPU Affinity\tNUMA Affinity\n"
    "GPU0\t X \tSYS\t0-15\t0\n"
    "GPU1\tSYS\t X \t16-31\t1\n"
)  # fmt: skip

NCCL_GOOD = """\
node1:211:211 [0] NCCL INFO NCCL version 2.28.9+cuda13.0
node1:211:240 [0] NCCL INFO NET/IB : Using [0]mlx5_0:1/IB [1]mlx5_1:1/IB [RO]; OOB eth0:10.0.0.1<0>
node1:211:240 [0] NCCL INFO Using network IB
node1:211:240 [0] NCCL INFO Channel 00/0 : 0[0] -> 1[1] via P2P/CUMEM
node1:211:240 [0] NCCL INFO Channel 00/0 : 7[7] -> 8[0] [send] via NET/IB/0/GDRDMA
"""
NCCL_SOCKETS = """\
node1:211:211 [0] NCCL INFO NCCL version 2.28.9+cuda13.0
node1:211:240 [0] NCCL INFO Failed to initialize NET plugin IB
node1:211:240 [0] NCCL INFO NET/Socket : Using [0]eth0:10.0.0.1<0>
node1:211:240 [0] NCCL INFO Using network Socket
node1:211:240 [0] NCCL INFO Channel 00 : 0[0] -> 1[1] via SHM/direct/direct
node1:211:241 [0] transport/net_socket.cc:471 NCCL WARN NET/Socket : peer 10.0.0.2<41231> message truncated
"""


def machine(gpus: str = "", nvlinks: str = "", topology: str = "", root: Path | None = None, **more: object) -> Machine:
    """A host that says this; healthy in everything else."""
    facts, driver = nvidia_smi.gpus(gpus, nvlinks)
    found = {
        "host": "node1",
        "gpus": facts,
        "driver": driver,
        "driver_cuda": (13, 0) if facts else None,
        "paths": nvidia_smi.paths(topology),
        "nics": host.nics(root) if root else (),
        "interfaces": host.interfaces(root) if root else (),
        "versions": VERSIONS,
        "cores": 112,
        "memory_bytes": 1 << 40,
        "memory_free_bytes": 1 << 39,
        "open_files": 1 << 20,
        "shm_bytes": 1 << 36,
    }
    return Machine(**{**found, **more})  # type: ignore[arg-type]


def hgx(root: Path | None = None, lines: list[str] | None = None, down: tuple = (), **more: object) -> Machine:
    """Four H100s behind NVSwitch, with two rails."""
    lines = lines or [gpu_line(i) for i in range(4)]
    peers = {f"{a} {b}": True for a in range(4) for b in range(4) if a != b}
    return machine(
        "\n".join(lines), nvlink_status(4, 18, down=down), HGX_TOPOLOGY, root, **{"peers": peers, **more}
    )  # fmt: skip


def infiniband(root: Path, device: str, state: str = "4: ACTIVE", rate: str = "400 Gb/sec (4X NDR)") -> None:
    """A port below /sys/class/infiniband."""
    port = root / "sys/class/infiniband" / device / "ports/1"
    port.mkdir(parents=True)
    for name, text in (("state", state), ("rate", rate), ("link_layer", "InfiniBand")):
        (port / name).write_text(text + "\n")


def ethernet(root: Path, name: str, speed: str = "100000", state: str = "up") -> None:
    """An interface below /sys/class/net."""
    folder = root / "sys/class/net" / name
    folder.mkdir(parents=True)
    for key, text in (("speed", speed), ("operstate", state)):
        (folder / key).write_text(text + "\n")
