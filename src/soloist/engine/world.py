"""The groups of ranks that one rank talks to, built once from its seat in the layout."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from soloist.dispatch.base import Topology
from soloist.specs.layout import Layout, Seat
from soloist.transport.base import Transport
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
    windows: Windows | None = None  # where the GPUs of a node reach each other's memory
    gpus_per_node: int = 1
    watches: list[Watch] = field(default_factory=list)

    @classmethod
    def build(
        cls,
        root: Transport,
        layout: Layout,
        gpus_per_node: int,
        control: Transport | None = None,
        windows: Windows | None = None,
    ) -> World:
        """Called by all ranks of `root`, which are all ranks of the layout. `control` overrides the CPU group.

        windows: makes the group of some ranks whose GPUs reach each other over NVLink; none where they do not.

        Every rank builds the kinds in the same order, and the groups of a kind are disjoint, so that whoever waits
        for a member waits for one that is still busy with an earlier kind: there is no circle to wait in.
        """
        assert root.size == layout.size, f"{root.size} ranks, but layout {layout} needs {layout.size}"
        seat = layout.at(root.rank)
        return cls(
            seat=seat,
            topology=Topology.of(layout.ep, layout.tp, gpus_per_node, seat.stage_start),
            root=root,
            experts=root if len(seat.expert_peers) == root.size else root.subgroup(seat.expert_peers),
            tp=_group(root, seat.tp_peers),
            attention=_group(root, seat.attention_peers),
            pipeline=_group(root, seat.pipeline_peers),
            control=control or (root.subgroup(seat.leaders) if seat.is_leader else None),
            windows=windows,
            gpus_per_node=gpus_per_node,
        )

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
        return [t for t in (self.experts, self.tp, self.attention, self.pipeline) if t is not None]

    def take_traffic(self) -> tuple[dict[int, int], float]:
        """Bytes sent to each rank, and seconds waited for peers, since the last call; `control` does not count."""
        bytes_to: Counter[int] = Counter()
        waited_s = 0.0
        for transport in self.data_transports:
            bytes_to.update(dict(zip(transport.ranks, transport.traffic.bytes_to, strict=True)))
            waited_s += transport.traffic.waited_s
            transport.traffic.reset()
        return {rank: sent for rank, sent in bytes_to.items() if sent}, waited_s

    def close(self) -> None:
        """Release every transport; waits for nobody."""
        for transport in (self.control, *self.data_transports, self.root):
            if transport is not None:
                transport.close()


def _group(root: Transport, members: Sequence[int]) -> Transport | None:
    return root.subgroup(members) if len(members) > 1 else None
