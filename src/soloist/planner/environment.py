"""Environment variables for NCCL and MPI: what to set on a cluster and why, and which of those found are obsolete."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from soloist.specs.cluster import ClusterSpec


class Variable(NamedTuple):
    """One variable with the reason for its value."""

    name: str
    value: str
    why: str


OBSOLETE = {
    "NCCL_TREE_THRESHOLD": "gone since NCCL 2.5; 0 used to switch trees off, not on. Use NCCL_ALGO=Tree or =Ring",
    "NCCL_LL_THRESHOLD": "gone since NCCL 2.5; NCCL_PROTO=LL, LL128 or Simple says it today",
    "NCCL_IB_CUDA_SUPPORT": "replaced by NCCL_NET_GDR_LEVEL",
    "NCCL_ASYNC_ERROR_HANDLING": "renamed TORCH_NCCL_ASYNC_ERROR_HANDLING",
    "NCCL_BLOCKING_WAIT": "renamed TORCH_NCCL_BLOCKING_WAIT",
}
MEANING = {
    "NCCL_IB_DISABLE": "0 is the default: InfiniBand and RoCE where found; 1 forces sockets and costs most of the rate",
    "NCCL_SOCKET_IFNAME": "interface for bootstrap and sockets; an InfiniBand one (ib0) only if it has an IP address",
    "NCCL_DEBUG": "INFO logs the topology and the choice of algorithms at start; WARN is enough in production",
    "NCCL_ALGO": "forces an algorithm; leave it to NCCL's own tuning unless a measurement says otherwise",
    "NCCL_PROTO": "forces a protocol; LL128 without NVLink or on unsupported networks can corrupt data",
    "NCCL_P2P_DISABLE": "1 forbids NVLink between GPUs; never on a node with NVLink",
}


def recommended(cluster: ClusterSpec, gpus: int, mpi: bool = False) -> list[Variable]:
    """Variables worth setting. NCCL finds the rest out for itself."""
    found = [Variable("NCCL_DEBUG", "WARN", "says why a communicator failed, and nothing else")]
    if cluster.nodes(gpus) > 1:
        found += [
            Variable(
                "NCCL_SOCKET_IFNAME", "<interface>", "bootstrap must not end up on a management or container network"
            ),
            Variable(
                "NCCL_IB_HCA", "<mlx5 devices>", "one compute NIC for each GPU; leaves out storage and management NICs"
            ),
            Variable("NCCL_CROSS_NIC", "0", "keeps rings on one rail, so that no message crosses the spine needlessly"),
            Variable("NCCL_NET_GDR_LEVEL", "PHB", "GPU memory straight to the NIC also across a PCIe host bridge"),
        ]
    found.append(Variable("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1", "a broken communicator raises instead of hanging"))
    return found + (_mpi() if mpi else [])


def _mpi() -> list[Variable]:
    return [
        Variable("OMPI_MCA_pml", "ucx", "one transport for shared memory, InfiniBand and GPU memory"),
        Variable(
            "UCX_RNDV_THRESH", "16384", "larger messages go without a copy; this is what a large buffer is wanted for"
        ),
        Variable(
            "MPIR_CVAR_ASYNC_PROGRESS", "1", "MPICH: a thread moves messages while ranks compute; costs a core each"
        ),
        Variable("OMPI_MCA_hwloc_base_binding_policy", "numa", "ranks stay beside their GPU and NIC"),
    ]


def review(environment: Mapping[str, str]) -> list[str]:
    """What to know about variables that are set: obsolete ones by name, the others by meaning."""
    lines = [f"{name}: obsolete, {OBSOLETE[name]}" for name in environment if name in OBSOLETE]
    return lines + [f"{name}={environment[name]}: {MEANING[name]}" for name in environment if name in MEANING]
