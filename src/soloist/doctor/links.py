"""Checks of NVLink, peer access and NICs: whether GPUs reach each other as fast as they could."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from soloist.doctor.finding import Finding, error, note, ok, warning
from soloist.doctor.machine import Machine

NEAR = ("PIX", "PXB")  # a GPU and a NIC behind the same PCIe switches


def check_links(machine: Machine, nodes: int = 1) -> Iterator[Finding]:
    """`nodes`: of the plan; NICs matter where there are several."""
    yield from _nvlink(machine)
    yield from _peers(machine)
    yield from _nics(machine, nodes)


def _nvlink(machine: Machine) -> Iterator[Finding]:
    gpus = machine.gpus
    if len(gpus) < 2:
        return
    usual = Counter(gpu.nvlinks_up for gpu in gpus).most_common(1)[0][0]
    lame = [gpu for gpu in gpus if gpu.nvlinks_up < max(usual, gpu.nvlinks)]
    for gpu in lame:
        yield error(
            "NVLink",
            f"GPU {gpu.index} has {gpu.nvlinks_up} of {max(usual, gpu.nvlinks)} NVLinks up",
            "every exchange waits for the GPU with the fewest links",
            f"nvidia-smi nvlink -s -i {gpu.index}; reset the GPU, look at dmesg for Xid 74, reseat",
        )
    pairs = {pair: path for pair, path in machine.paths.items() if pair.split()[1].startswith("GPU")}
    over = Counter(pairs.values())
    if usual and not lame:
        yield ok("NVLink", f"{usual} links up on each of {len(gpus)} GPUs")
    if pairs and not any(path.startswith("NV") for path in over):
        what = ", ".join(f"{path} for {count // 2 or 1} pair(s)" for path, count in over.items())
        yield warning(
            "NVLink",
            f"no NVLink between the GPUs: {what}",
            "tokens travel over PCIe at a tenth of NVLink's rate",
            "prefer layouts that exchange little: small tp, few nodes of experts; soloist plan compares them",
        )
    elif len(over) > 1 and any(path.startswith("NV") for path in over):
        odd = [pair for pair, path in pairs.items() if path != over.most_common(1)[0][0]]
        what = ", ".join(f"{pair.replace(' ', '–')} {pairs[pair]}" for pair in odd[:4])
        yield warning(
            "NVLink",
            f"pairs are not linked alike: {what} …",
            "the slowest pair sets the pace of an exchange",
            "give the cluster file links_GBps, so that placement keeps traffic off them",
        )


def _peers(machine: Machine) -> Iterator[Finding]:
    denied = [pair.replace(" ", " → ") for pair, allowed in machine.peers.items() if not allowed]
    linked = any(path.startswith("NV") for path in machine.paths.values()) or any(g.nvlinks_up for g in machine.gpus)
    if denied and linked:
        yield error(
            "peer access",
            f"no peer access: {', '.join(denied[:6])}",
            "kernels cannot write into the peer's memory",
            "in a container give all GPUs of a host to one container; on NVSwitch hosts start nvidia-fabricmanager; "
            "in a virtual machine turn off ACS",
        )
    elif denied:
        yield note(
            "peer access",
            f"no peer access between {len(denied)} of {len(machine.peers)} pairs",
            "NCCL copies through host memory; symmetric memory cannot be used",
        )
    elif machine.peers:
        yield ok("peer access", f"all {len(machine.peers)} pairs")


def _nics(machine: Machine, nodes: int) -> Iterator[Finding]:
    active = [nic for nic in machine.nics if nic.state == "ACTIVE"]
    for nic in machine.nics:
        if nic.state != "ACTIVE":
            yield warning(
                "NIC",
                f"{nic.device} port {nic.port} is {nic.state or 'silent'}",
                "NCCL leaves it out: a rail less",
                "look at cable, switch port and subnet manager (ibstat); else name the others in NCCL_IB_HCA",
            )
    if len({nic.rate_Gbps for nic in active}) > 1:
        rates = ", ".join(f"{nic.device} {nic.rate_Gbps:g}" for nic in active)
        yield warning(
            "NIC",
            f"rates differ (Gb/s): {rates}",
            "a slow rail holds up all, or a storage NIC is among them",
            "name the compute NICs in NCCL_IB_HCA",
        )
    if active and machine.gpus and not all(nic.peer_memory for nic in active):
        yield warning(
            "GPUDirect",
            "no module lets the NICs read GPU memory",
            "messages to other nodes are copied through the host",
            "modprobe nvidia-peermem (or use a driver with dma-buf, where this is a false alarm)",
        )
    if active:
        kinds = Counter((nic.kind, nic.rate_Gbps) for nic in active)
        yield ok("NIC", ", ".join(f"{n} × {kind} {rate:g} Gb/s" for (kind, rate), n in kinds.items()))
    yield from _rails(machine)
    if nodes > 1 and not active:
        fastest = max((i.speed_Mbps or 0 for i in machine.interfaces if i.up), default=0)
        what = f"no RDMA NIC; the fastest interface has {fastest / 1e3:g} Gb/s" if fastest else "no RDMA NIC"
        yield (error if machine.gpus else note)(
            "NIC",
            what,
            "the plan spans several nodes: NCCL falls back to sockets",
            "load the NIC's driver, or give the container /dev/infiniband",
        )


def _rails(machine: Machine) -> Iterator[Finding]:
    """Each GPU should have a NIC behind its own PCIe switch."""
    devices = {nic.device for nic in machine.nics}
    best: dict[str, set[str]] = {}
    for pair, path in machine.paths.items():
        gpu, other = pair.split()
        if other in devices:
            best.setdefault(gpu, set()).add(path)
    far = [gpu for gpu, paths in best.items() if not paths & set(NEAR)]
    if far and len(far) < len(best):
        yield warning(
            "NIC",
            f"no NIC near {', '.join(far)}",
            "its messages cross the CPU's links and share another's NIC",
            "check that every NIC's driver is loaded; otherwise plan with fewer nics_per_node",
        )
