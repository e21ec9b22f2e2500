"""Collectives of dense layers: all-reduce, all-gather, reduce-scatter, all-to-all, point to point.

    T = max(floor, setup + S/B + 2 √(chunk · S/B)),   floor = base + steps · hop

The floor is NCCL's latency model: a base and a hop for each of the 2(p−1) or p−1 steps. The large-message time is
that of a chunked pipeline with the best chunk, `chunk` being the cost of one more chunk; S counts the bytes that each
GPU sends, B what the algorithm reaches of NVLink. Eight GPUs on a switch with reduction in the switch (NVLS) reach more
of it than a ring does. One- and two-shot all-reduce are what serving engines use for small messages.

Across nodes: reduce-scatter inside, all-reduce of the shards over the NICs, all-gather inside.
"""

from __future__ import annotations

from math import log2, sqrt

from soloist.planner.fitting import Constants, Prior
from soloist.specs.cluster import ClusterSpec

NCCL: dict[str, Prior] = {
    "base_us": Prior(6.6, 0.05), "hop_us": Prior(0.6, 0.05), "setup_us": Prior(9, 0.3), "small": Prior(0.45, 0.3, 1.0),
    "ring": Prior(0.78, 0.08, 1.0), "nvls": Prior(1.1, 0.1), "all_to_all": Prior(0.78, 0.1, 1.0),
    "ring_chunk_us": Prior(4, 0.4), "nvls_chunk_us": Prior(8, 0.5), "all_to_all_chunk_us": Prior(4, 0.7),
    "nic": Prior(0.88, 0.1, 1.0), "nic_hop_us": Prior(8, 0.3),
    "send_us": Prior(6.6, 0.3), "send": Prior(0.78, 0.1, 1.0),
}  # fmt: skip
DIRECT: dict[str, Prior] = {
    "one_shot_us": Prior(4.5, 0.3), "two_shot_us": Prior(9, 0.3), "direct": Prior(0.8, 0.08, 1.0),
}  # fmt: skip
OWN_SUM_BYTES = 4 << 20  # that a member sends, up to which our own kernel sums (transport/nvlink.py)
OWN_GATHER_BYTES = 2 << 20  # the same of a gather of columns; above, NCCL gathers and a copy puts them side by side
ONE_SHOT_BYTES = {2: 1 << 23, 4: 1 << 19, 8: 1 << 18}  # below it vLLM's custom all-reduce reads all peers at once


def collective_seconds(
    collective: str, gpus: int, size: float, cluster: ClusterSpec, constants: Constants, direct: bool = False
) -> float:
    """Time over `gpus` GPUs, `size` bytes in each one's full buffer (for all-gather: of the result).

    `direct` allows one- and two-shot all-reduce inside a node. GPUs of a node are neighbours.
    """
    if gpus <= 1 or size <= 0:
        return 0.0
    inside = min(gpus, cluster.gpus_per_node)
    if inside < gpus:
        return _across_nodes(collective, gpus // inside, inside, size, cluster, constants)
    nccl = _nccl(collective, gpus, size, cluster.nvlink, constants)
    if direct and collective == "all_reduce":
        return min(nccl, direct_seconds(gpus, size, cluster, constants))
    return nccl


def direct_seconds(gpus: int, size: float, cluster: ClusterSpec, constants: Constants) -> float:
    """One-shot all-reduce for small buffers (everybody reads everything), two-shot above."""
    rate = constants["direct"] * cluster.nvlink
    if size < ONE_SHOT_BYTES.get(gpus, 1 << 18):
        return 1e-6 * constants["one_shot_us"] + (gpus - 1) * size / rate
    return 1e-6 * constants["two_shot_us"] + 2 * (gpus - 1) / gpus * size / rate


def gather_seconds(gpus: int, size: float, cluster: ClusterSpec, constants: Constants) -> float:
    """Our own gather of columns: each GPU sends `size` bytes to every other."""
    return 1e-6 * constants["one_shot_us"] + (gpus - 1) * size / (constants["direct"] * cluster.nvlink)


def point_to_point_seconds(size: float, same_node: bool, cluster: ClusterSpec, constants: Constants) -> float:
    """One message between neighbours of a pipeline."""
    if same_node:
        return 1e-6 * (constants["send_us"] + cluster.nvlink_latency_us) + size / (constants["send"] * cluster.nvlink)
    return 1e-6 * (constants["send_us"] + constants["nic_hop_us"]) + size / (constants["nic"] * cluster.nic)


def _nccl(collective: str, gpus: int, size: float, nvlink: float, constants: Constants) -> float:
    sweeps = 2 if collective == "all_reduce" else 1
    kind = "all_to_all" if collective == "all_to_all" else "nvls" if sweeps == 2 and gpus >= 8 else "ring"
    steps = (gpus - 1) * (1 if kind == "ring" and sweeps == 1 else 2)
    floor = 1e-6 * (constants["base_us"] + steps * constants["hop_us"])
    sent = size * sweeps * (gpus - 1) / gpus
    wire = sent / (constants[kind] * nvlink)
    large = 1e-6 * constants["setup_us"] + wire + 2 * sqrt(1e-6 * constants[f"{kind}_chunk_us"] * wire)
    small = floor + sent / (constants["small"] * nvlink) if sweeps == 2 else large
    return max(floor, min(small, large))


def _across_nodes(
    collective: str, nodes: int, inside: int, size: float, cluster: ClusterSpec, constants: Constants
) -> float:
    hops = 1e-6 * (constants["base_us"] + 2 * log2(nodes) * constants["nic_hop_us"])
    wire = constants["nic"] * cluster.nic
    if collective == "all_to_all":
        return hops + size * (1 - 1 / nodes) / wire
    share = size / inside
    sweeps = 2 if collective == "all_reduce" else 1
    local = sweeps * _nccl("all_gather", inside, size, cluster.nvlink, constants) if inside > 1 else 0.0
    return local + hops + sweeps * (nodes - 1) / nodes * share / wire
