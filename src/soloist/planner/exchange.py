"""Dispatch and combine of an expert-parallel group: copies of a token that cross NICs and NVLink, and their time.

    T = alpha + (nic^p + node^p)^(1/p),  node = endpoint + nvlink
    alpha = local + [several nodes] · (remote + hop · log2 nodes)

`nic`, `nvlink` and `endpoint` are bytes over rates: off-node copies over the NIC, copies inside a node over NVLink, and
all copies of a token through the sender's and receiver's memory. The two stages overlap, not perfectly (p = 2). How
often a token is copied is the exchange's *mode*:

    low_latency  one copy for each chosen expert, straight to its rank
    two_sided    the same inside one NVLink domain, sent once for each destination rank
    ragged       once for each destination rank, over NICs too
    pushed       the same for few tokens, in one kernel that stores them into the peers' memory
    local        nothing travels: rows are laid out for the experts and summed up again, in one GPU's memory
    normal       once for each destination node over the NIC, there forwarded to the ranks (hierarchical)

Source of the form: DeepEP's and aiconfigurator's published times follow it within a few percent.
"""

from __future__ import annotations

import re
from functools import lru_cache
from math import hypot, log2
from typing import Literal

import msgspec

from soloist.planner.compute import BYTES, dtype_named
from soloist.planner.fitting import Constants, Prior
from soloist.planner.routing import distinct, limited_distinct
from soloist.planner.tables import ExchangeRow
from soloist.specs.cluster import ClusterSpec, preset_clusters, preset_gpus

Mode = Literal["low_latency", "two_sided", "ragged", "pushed", "local", "normal"]
OURS = ("ragged", "pushed", "local")
GATHERED_ROWS = 96  # of an expert, up to which our kernels read them through an index
PHASES = ("dispatch", "combine")
MODES: dict[str, Mode] = {
    "low_latency": "low_latency", "ll": "low_latency", "two_sided": "two_sided", "one_sided": "two_sided",
    "ragged": "ragged", "pushed": "pushed", "local": "local", "normal": "normal", "high_throughput": "normal",
    "ht": "normal",
}  # fmt: skip
INFINIBAND_US, EFA_US = 4.0, 15.0  # one-way delay of a small message
ROUNDS = 4  # counts, payload, flag and acknowledgement cross the network one after the other

PRIORS: dict[str, dict[str, Prior]] = {
    "low_latency": {
        "local_us": Prior(14, 0.6), "remote_us": Prior(8, 0.8), "hop_us": Prior(3, 0.8),
        "nic": Prior(0.94, 0.02, 1.0), "nvlink": Prior(0.8, 0.15, 1.0), "endpoint": Prior(0.2, 0.4),
    },
    "normal": {
        "local_us": Prior(80, 0.5), "remote_us": Prior(10, 0.8), "hop_us": Prior(5, 0.8),
        "nic": Prior(0.94, 0.02, 1.0), "nvlink": Prior(0.8, 0.15, 1.0), "endpoint": Prior(0.2, 0.4),
    },
    "two_sided": {
        "local_us": Prior(15, 0.6), "remote_us": Prior(8, 0.8), "hop_us": Prior(3, 0.8),
        "nic": Prior(0.94, 0.02, 1.0), "nvlink": Prior(0.9, 0.1, 1.0), "endpoint": Prior(0.16, 0.3),
    },
    "ragged": {
        "local_us": Prior(30, 0.6), "remote_us": Prior(10, 0.8), "hop_us": Prior(4, 0.8),
        "nic": Prior(0.85, 0.05, 1.0), "nvlink": Prior(0.7, 0.15, 1.0), "endpoint": Prior(0.2, 0.4),
    },
    "pushed": {
        "local_us": Prior(8, 0.6), "remote_us": Prior(8, 0.8), "hop_us": Prior(3, 0.8),
        "nic": Prior(0.85, 0.05, 1.0), "nvlink": Prior(0.7, 0.15, 1.0), "endpoint": Prior(0.2, 0.4),
    },
}  # fmt: skip
PRIORS["local"] = {**PRIORS["ragged"], "local_us": Prior(3, 0.6), "endpoint": Prior(0.4, 0.4)}


class ExchangeShape(msgspec.Struct, frozen=True, kw_only=True):
    """What is exchanged. `tokens` of each rank; `row_bytes` of one copy; `ranks_per_node` of this group.

    `laid_out`: rows are copied to where experts want them, or summed up from there; few rows are read where they are.
    `share`: tokens of a rank on average over `tokens`, those of the one with most; they are laid out where they arrive.
    `tp` neighbouring ranks have shares of the same experts, so a token goes to all of them.
    `kept_groups` of `groups` router groups may be used by a token. `node_copies` and `rank_copies`, where given, are
    the distinct nodes and ranks of a token measured on a routing trace; they take the place of the formulas.
    """

    mode: Mode
    ranks: int
    ranks_per_node: int
    tokens: float
    row_bytes: float
    top_k: int
    experts: int
    groups: int = 1
    kept_groups: int = 1
    tp: int = 1
    laid_out: bool = True
    share: float = 1.0
    node_copies: float | None = None
    rank_copies: float | None = None

    @property
    def nodes(self) -> int:
        return -(-self.ranks // self.ranks_per_node)


class Copies(msgspec.Struct, frozen=True):
    """Copies of one token: over the sender's NIC, over NVLink, and through memory at either end; and through memory
    where it arrives, for the experts."""

    nic: float
    nvlink: float
    endpoint: float
    laid_out: float = 0.0


@lru_cache(maxsize=65536)
def copies(shape: ExchangeShape) -> Copies:
    """Expected copies of a token, experts and sources spread evenly."""
    nodes, inside = shape.nodes, min(shape.ranks, shape.ranks_per_node)
    off_node, off_rank = 1 - 1 / nodes, 1 - 1 / inside
    if shape.mode == "low_latency":
        return Copies(shape.top_k * off_node, shape.top_k / nodes * off_rank, shape.top_k)
    groups = shape.ranks // shape.tp
    ranks = shape.tp * (shape.rank_copies or distinct(groups, max(shape.experts, groups), shape.top_k))
    if shape.mode == "local":
        return Copies(0.0, 0.0, 1.0, shape.top_k) if shape.laid_out else Copies(0.0, 0.0, 0.0)
    if shape.mode in OURS:  # rows are laid out for the experts, and summed up, in the same two halves
        return Copies(ranks * off_node, ranks / nodes * off_rank, ranks, shape.tp * shape.top_k)
    if shape.mode == "two_sided":
        return Copies(ranks * off_node, ranks / nodes * off_rank, shape.top_k)
    reached = shape.node_copies or limited_distinct(
        nodes, max(shape.experts, nodes), shape.top_k, shape.groups, shape.kept_groups
    )
    return Copies(reached * off_node, ranks * off_rank, ranks)


def exchange_seconds(shape: ExchangeShape, cluster: ClusterSpec, constants: Constants, skew: float = 1.0) -> float:
    """Time of one phase. `skew` is the fullest rank's or NIC's share of the traffic over the mean (incast)."""
    c, sent = copies(shape), shape.tokens * shape.row_bytes * skew
    nic = sent * c.nic / (constants["nic"] * cluster.nic) if c.nic else 0.0
    nvlink = sent * c.nvlink / (constants["nvlink"] * cluster.nvlink) if c.nvlink and cluster.nvlink else 0.0
    endpoint = sent * (c.endpoint + shape.share * c.laid_out) / (constants["endpoint"] * cluster.gpu.bandwidth)
    return latency_seconds(shape.nodes, cluster, constants) + hypot(nic, endpoint + nvlink)


def latency_seconds(nodes: int, cluster: ClusterSpec, constants: Constants) -> float:
    """The part that does not depend on tokens. NICs slower to answer than InfiniBand cost their delay in each round."""
    if nodes == 1:
        return 1e-6 * constants["local_us"]
    slower = ROUNDS * max(0.0, cluster.nic_latency_us - INFINIBAND_US)
    return 1e-6 * (constants["local_us"] + constants["remote_us"] + constants["hop_us"] * log2(nodes) + slower)


def lays_out(phase: str, tokens: float, top_k: int, experts: int) -> bool:
    """Whether our engine copies rows in this phase (kernels/experts.py): decode reads them through an index."""
    return phase == "combine" or tokens * top_k > GATHERED_ROWS * experts


def row_bytes(width: int, dtype: str) -> float:
    """Bytes of one activation row; fp8 carries a fp32 scale for every 128 elements, fp4 a byte for every 16."""
    scales = {"fp8": 4 / 128, "fp4": 1 / 16}
    name = dtype_named(dtype)
    return width * ({**BYTES, "fp4": 0.5}[name] + scales.get(name, 0.0))


def mode_named(text: str) -> Mode | None:
    """A mode as tables spell it."""
    return MODES.get(text.strip().lower().replace("-", "_").replace(" ", "_"))


@lru_cache(maxsize=4096)
def shape_of(row: ExchangeRow, phase: str) -> ExchangeShape:
    """What one phase of a published measurement exchanged. Unknown modes count as `normal` (`mode_named`).

    pplx's kernels have no hierarchical mode: they send one copy for each expert whatever the batch.
    """
    dtype = row.dispatch_dtype if phase == "dispatch" else row.combine_dtype
    mode = mode_named(row.mode) or "normal"
    if row.library.startswith("pplx"):
        mode = "low_latency"
    return ExchangeShape(
        mode=mode, ranks=row.ep * row.tp, ranks_per_node=min(row.ep * row.tp, row.joined), tokens=row.tokens,
        row_bytes=row_bytes(row.hidden, dtype), top_k=row.top_k, experts=row.experts, tp=row.tp,
        laid_out=mode != "local" or lays_out(phase, row.tokens, row.top_k, row.experts),
    )  # fmt: skip


def gpu_in(name: str) -> str:
    """The preset GPU that a fabric is named after, nothing if none: H200 of `8xH200-NVSwitch`, not H20."""
    longest_first = sorted(preset_gpus(), key=len, reverse=True)
    return next((gpu for gpu in longest_first if gpu.split("-")[0] in name), "")


@lru_cache(maxsize=256)
def fabric(name: str, gpus_per_node: int) -> ClusterSpec:
    """A cluster from how tables name it: `H800+CX7-400G`, `GB200-NVL72`, `8xH100-NVSwitch`. H100 and 400 Gb/s else."""
    found = gpu_in(name) or "H100-80GB"
    rate = re.search(r"(\d+)G\b", name)
    base = next(c for c in preset_clusters().values() if c.gpu.name == found)
    changes = {"nic_GBps": float(rate[1]) / 8 if rate else base.nic_GBps, "gpus_per_node": gpus_per_node}
    if "EFA" in name:
        changes["nic_latency_us"] = EFA_US
    return msgspec.structs.replace(base, name=name, max_gpus=None, **changes)
