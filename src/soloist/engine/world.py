"""The groups of ranks that one rank talks to, built once from its seat in the layout."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from soloist.dispatch.base import Topology
from soloist.dispatch.hierarchical import Rails
from soloist.kernels.language import AVAILABLE
from soloist.specs.layout import Layout, Seat
from soloist.transport.base import Transport
from soloist.transport.local import LocalGroup, LocalTransport
from soloist.transport.nvlink import Channels, NvlinkTransport
from soloist.transport.symmetric import SymmetricGroup, Watch

Windows = Callable[[Sequence[int]], SymmetricGroup]


@dataclass
class World:
    """One rank's transports. A group that would hold this rank alone is None, `experts` excepted.

    On GPUs the data transports are NCCL and `control`, between the leaders of a replica, is gloo on the CPU.
    """

    seat: Seat
    topology: Topology  # of this stage's expert groups over the declared nodes
    root: Transport  # all ranks
    experts: Transport  # seat.expert_peers: tokens travel here
    tp: Transport | None  # seat.tp_peers: shares of the same experts
    attention: Transport | None  # seat.attention_peers: shares of the same heads
    pipeline: Transport | None  # seat.pipeline_peers: the same place in every stage
    control: Transport | None  # seat.leaders; None on ranks that lead nobody
    rails: Rails | None = None  # how this rank's group reaches those of other nodes; None: one node, or flat exchange
    rail: Transport | None = None  # to the same place in the other nodes
    node: Transport | None = None  # to the other groups of the own node
    inside: Transport | None = None  # all ranks of the own node, where it has memory that they share
    windows: Windows | None = None  # where the GPUs of a node reach each other's memory
    gpus_per_node: int = 1
    await_everybody: Callable[[str], None] = lambda stage: None  # on the host: until all ranks have come so far
    watches: list[Watch] = field(default_factory=list)

    @classmethod
    def build(
        cls,
        root: Transport,
        layout: Layout,
        gpus_per_node: int,
        control: Transport | None = None,
        windows: Windows | None = None,
        inside: Transport | None = None,
        by_node: bool = False,
        collectives: bool = False,
    ) -> World:
        """Called by all ranks of `root`, which are all ranks of the layout. `control` overrides the CPU group.

        windows: makes the group of some ranks whose GPUs reach each other over NVLink; none where they do not.
        inside: all ranks of the own declared node, where they have a faster transport than `root`; groups that lie on
        one node are made of it. by_node: prepare for hierarchical exchange, which a single node has no use for.
        collectives: small sums of attention groups by kernels over NVLink, where `windows` serve them.

        Every rank builds the kinds in the same order, and the groups of a kind are disjoint, so that whoever waits
        for a member waits for one that is still busy with an earlier kind: there is no circle to wait in.
        """
        assert root.size == layout.size, f"{root.size} ranks, but layout {layout} needs {layout.size}"
        seat = layout.at(root.rank)
        topology = Topology.of(layout.ep, layout.tp, gpus_per_node, seat.stage_start)
        rails = Rails(topology, seat.group) if by_node and len(set(topology.node_of_group)) > 1 else None
        peers = seat.expert_peers
        world = cls(
            seat=seat,
            topology=topology,
            root=root,
            experts=root if len(peers) == root.size else root.subgroup(peers),
            tp=_group(root, inside, seat.tp_peers),
            attention=_group(root, inside, seat.attention_peers),
            pipeline=_group(root, inside, seat.pipeline_peers),
            control=control or (root.subgroup(seat.leaders) if seat.is_leader else None),
            rails=rails,
            rail=_members(root, inside, [peers[group] for group in rails.rail]) if rails else None,
            node=_members(root, inside, [peers[group] for group in rails.node]) if rails else None,
            inside=inside,
            windows=windows,
            gpus_per_node=gpus_per_node,
        )
        if collectives and world.attention is not None:
            world.attention = world._over_nvlink(world.attention)
        return world

    def _over_nvlink(self, beneath: Transport) -> Transport:
        """With kernels for what is small, where the members reach each other's memory. Called by all of them."""
        group = self.nvlink(beneath.ranks) if AVAILABLE else None
        if group is None:
            return beneath
        channels = Channels(group.window(Channels.size(beneath.size)))
        return NvlinkTransport(beneath, channels, self.watch(beneath.ranks))

    def nvlink(self, ranks: Sequence[int]) -> SymmetricGroup | None:
        """Memory that these ranks share, where they are on one node whose GPUs reach each other. Collective."""
        one_node = len({rank // self.gpus_per_node for rank in ranks}) == 1
        return self.windows(ranks) if self.windows and one_node else None

    def watch(self, ranks: Sequence[int]) -> Watch:
        """A record of those of `ranks` that keep this rank's kernels waiting; `check` looks at it."""
        index = tuple(ranks).index(self.seat.rank)
        self.watches.append(Watch(index, tuple(ranks), self.root.device, self.root.deadline_s))
        return self.watches[-1]

    def check(self) -> None:
        """Raises CommunicationError if a kernel gave up on a peer; costs no synchronisation."""
        for watch in self.watches:
            watch.check()

    @property
    def data_transports(self) -> list[Transport]:
        """Those that a step's tensors travel over."""
        held = (self.experts, self.tp, self.attention, self.pipeline, self.rail, self.node)
        return [transport for transport in held if transport is not None]

    def take_traffic(self) -> tuple[dict[int, int], dict[int, float]]:
        """Bytes sent to each rank and seconds waited for it, since the last call; `control` does not count."""
        bytes_to: Counter[int] = Counter()
        waited_for_s: defaultdict[int, float] = defaultdict(float)
        for transport in self.data_transports:
            bytes_to.update(dict(zip(transport.ranks, transport.traffic.bytes_to, strict=True)))
            for rank, seconds in zip(transport.ranks, transport.traffic.waited_for_s, strict=True):
                waited_for_s[rank] += seconds
            transport.traffic.reset()
        return {rank: sent for rank, sent in bytes_to.items() if sent}, {r: s for r, s in waited_for_s.items() if s}

    def close(self) -> None:
        """Release every transport; waits for nobody."""
        for transport in (self.control, *self.data_transports, self.inside, self.root):
            if transport is not None:
                transport.close()


def _group(root: Transport, inside: Transport | None, members: Sequence[int]) -> Transport | None:
    return _members(root, inside, members) if len(members) > 1 else None


def _members(root: Transport, inside: Transport | None, members: Sequence[int]) -> Transport:
    """A transport of some world ranks, this one included: inside the node where all of them are there."""
    if len(members) == 1:
        return LocalTransport(LocalGroup(members), 0, root.deadline_s)
    if inside is not None and set(members) <= set(inside.ranks):
        return inside.subgroup([inside.ranks.index(rank) for rank in members])
    return root.subgroup(members)
