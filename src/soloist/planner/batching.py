"""How many chunks a call of the exchange travels in, how large its messages are, and whether it goes by node at all.

A hierarchical call has two stages, across nodes and inside them. In c chunks, of which each stage works on one while
the other works on the next, a stage i of n_i bytes on a link of latency L_i and rate W_i takes
t_i = L_i + n_i / (c W_i) for a chunk, and the call

    T(c) = t_1 + t_2 + (c − 1) · max(t_1, t_2)

Small calls are all latency: many small messages are joined, c = 1. In large ones the shorter stage hides behind the
longer one, at c near sqrt(n_2 / (W_2 L_1)) where the network is the longer one. A chunk also has to fit into the
buffer. A flat call has one stage, in which every copy of a token goes by itself.

Pure functions of numbers, so that plan, engine and tests share them. Sizes in bytes of one rank, times in seconds.
"""

from __future__ import annotations

from functools import lru_cache
from math import ceil

from soloist.errors import ConfigurationError
from soloist.planner.routing import distinct, limited_distinct
from soloist.specs.cluster import ClusterSpec
from soloist.specs.layout import Layout
from soloist.specs.model import ModelSpec, Spec

BUFFER_BYTES = 64 << 20  # of a chunk on its way; twice as many are held while stages overlap
MOST_CHUNKS = 16


class Link(Spec, frozen=True, kw_only=True):
    """What a rank's exchange with some peers costs: seconds until the first byte, bytes/s after it."""

    latency_s: float
    rate: float

    @classmethod
    def parse(cls, text: str, key: str = "link") -> Link:
        """`MB/s,µs`: "12.5,200" are 12.5 MB/s after 200 µs. Raises ConfigurationError for anything else."""
        try:
            rate, latency = (float(part) for part in text.split(","))
        except ValueError:
            raise ConfigurationError.of(key, text, "write MB/s,µs, for instance 12.5,200") from None
        if rate <= 0 or latency < 0:
            raise ConfigurationError.of(key, text, "the rate must be positive, the latency not negative")
        return cls(latency_s=latency / 1e6, rate=rate * 1e6)

    def seconds(self, size: float) -> float:
        return self.latency_s + size / self.rate

    def __str__(self) -> str:
        return f"{self.rate / 1e6:,.4g} MB/s after {self.latency_s * 1e6:,.4g} µs"


class Links(Spec, frozen=True, kw_only=True):
    """The links of a rank: to its rail's other nodes, to its node's other ranks, and to everybody, as flat calls go.

    source: "measured", "declared" or the name of a cluster.
    """

    network: Link
    inside: Link
    flat: Link
    source: str


class Traffic(Spec, frozen=True, kw_only=True):
    """What a token causes, in expectation: rows that leave for other nodes, and for other groups of a node.

    nodes: one for each other node; groups: one for each other group on other nodes (flat); inside: one for each group
    other than that of the rank which forwards it.
    """

    nodes: float
    groups: float
    inside: float
    row_bytes: int  # to the experts; the way back is about as long

    @classmethod
    def of(cls, model: ModelSpec, layout: Layout, gpus_per_node: int, row_bytes: int) -> Traffic:
        """Experts and sources spread evenly; with router groups lying on the nodes in order."""
        router, groups = model.router, layout.ep
        nodes = max(1, ceil(layout.stage_ranks / gpus_per_node))
        each = groups / nodes
        reached = distinct(groups, max(model.experts, groups), router.top_k)
        at = limited_distinct(nodes, max(model.experts, nodes), router.top_k, router.groups, router.kept_groups)
        return cls(
            nodes=at * (1 - 1 / nodes),
            groups=reached * (1 - 1 / nodes),
            inside=reached * (1 - 1 / each) if each > 1 else 0.0,
            row_bytes=row_bytes,
        )


class Batching(Spec, frozen=True, kw_only=True):
    """How a call of `tokens` tokens a rank travels, and how long it is expected to take; `flat_s`: the other way."""

    tokens: int
    hierarchical: bool
    chunks: int
    network_bytes: float  # of a rank's chunk across nodes
    inside_bytes: float  # the same inside the node
    seconds: float
    flat_s: float
    hierarchical_s: float

    def __str__(self) -> str:
        if not self.hierarchical:
            return f"{_tokens(self.tokens)} a rank: flat ({_ms(self.flat_s)}; by node {_ms(self.hierarchical_s)})"
        size = -(-self.tokens // self.chunks)
        return (
            f"{_tokens(self.tokens)} a rank: by node ({_ms(self.hierarchical_s)}; flat {_ms(self.flat_s)}), "
            f"{self.chunks} chunk{'s' * (self.chunks > 1)} of {_tokens(size)}, "
            f"{_kb(self.network_bytes)} each across nodes, {_kb(self.inside_bytes)} inside"
        )


@lru_cache(maxsize=4096)
def choose(
    tokens: int,
    traffic: Traffic,
    links: Links,
    exchange: str = "auto",
    chunks: int | None = None,
    buffer_bytes: int = BUFFER_BYTES,
) -> Batching:
    """The fastest way for calls of at most `tokens` tokens a rank.

    exchange: "flat" or "hierarchical" leave no choice; chunks: not to be chosen either.
    """
    across, inside = (tokens * rows * traffic.row_bytes for rows in (traffic.nodes, traffic.inside))
    least = min(MOST_CHUNKS, max(1, ceil(max(across, inside) / buffer_bytes)))
    most = max(least, min(MOST_CHUNKS, tokens))
    best = chunks or min(range(least, most + 1), key=lambda c: pipeline_seconds(c, across, inside, links))
    by_node = pipeline_seconds(best, across, inside, links)
    flat = links.flat.seconds(tokens * traffic.groups * traffic.row_bytes)
    fans_out = traffic.inside > 0  # else both ways send the same, and only the noise of measured links would choose
    hierarchical = exchange == "hierarchical" or (exchange == "auto" and fans_out and by_node < flat)
    return Batching(
        tokens=tokens,
        hierarchical=hierarchical,
        chunks=best if hierarchical else 1,
        network_bytes=across / best,
        inside_bytes=inside / best,
        seconds=by_node if hierarchical else flat,
        flat_s=flat,
        hierarchical_s=by_node,
    )


def pipeline_seconds(chunks: int, network_bytes: float, inside_bytes: float, links: Links) -> float:
    """T(c) of the formula above."""
    first, second = links.network.seconds(network_bytes / chunks), links.inside.seconds(inside_bytes / chunks)
    return first + second + (chunks - 1) * max(first, second)


def links_of(cluster: ClusterSpec) -> Links:
    """The declared links of a cluster; a flat call waits for the NIC's latency, too."""
    network = Link(latency_s=cluster.nic_latency_us / 1e6, rate=cluster.nic or 1.0)
    inside = Link(latency_s=cluster.nvlink_latency_us / 1e6, rate=cluster.nvlink or network.rate)
    return Links(network=network, inside=inside, flat=network, source=cluster.name or "cluster")


def _tokens(count: int) -> str:
    return f"{count} token{'s' * (count != 1)}"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.3g} ms"


def _kb(size: float) -> str:
    return f"{size / 1e3:,.4g} kB" if size < 1e6 else f"{size / 1e6:,.4g} MB"
