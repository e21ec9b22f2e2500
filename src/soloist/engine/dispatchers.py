"""Which dispatchers a rank's MoE layers use, and the memory that the layers share, since they take turns.

tokens stay on this rank            local       one expert group, or one GPU; and replicated tokens of a stage that is
                                                one attention group: each rank does what its own experts have to do
peers in one NVLink domain          one_sided   kernels write and read the peers' memory
few tokens across nodes of GPUs     railed      equal splits over NCCL, one_sided inside the node; where asked for
anything else, and CPUs             ragged, or hierarchical across nodes, over the transports (engine/crossing.py)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from soloist.dispatch.base import Dispatcher, ExpertBatch, PendingBatch, PendingTokens, SlotChoice, Topology
from soloist.dispatch.lane import ExchangeShape, Lane, WindowPlan
from soloist.dispatch.local import LocalDispatcher, LocalIndex
from soloist.dispatch.one_sided import OneSidedDispatcher
from soloist.dispatch.ragged import RaggedDispatcher
from soloist.dispatch.railed import RailedExpandedDispatcher, require_equal_nodes
from soloist.engine.crossing import Crossings
from soloist.engine.options import EngineOptions
from soloist.engine.world import World
from soloist.kernels.language import AVAILABLE
from soloist.placement.placement import Placement
from soloist.planner.memory import pushed_tokens
from soloist.planner.ways import Way, way
from soloist.specs.model import ModelSpec
from soloist.transport.local import LocalGroup, LocalTransport


class Dispatchers:
    """Made once for all layers of a rank; `of` gives a layer's."""

    def __init__(
        self,
        spec: ModelSpec,
        placement: Placement,
        slots: Sequence[int],
        world: World,
        options: EngineOptions,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """`slots`: of this rank's group, in each of its layers. Collective where windows are opened."""
        self.spec, self.world, self.dtype, self.sms = spec, world, dtype, options.exchange_sms
        self.device, self.most = device, max(slots, default=0)
        layout, seat = world.seat.layout, world.seat
        halves = options.halves(layout)
        most = halves.largest(options.max_batch_tokens, options.max_sequences)
        self.tokens, self.lanes = -(-most // layout.attention_ranks), 2 if halves else 1
        few = min(options.max_batch_tokens, options.replicate_below)
        # All ranks of the stage have the same replicated tokens, and only one group the expert of a choice.
        self.repeats = placement.has_replicas or placement.has_empty_groups
        self.own = layout.ep > 1 and self.way(replicated=True) == "stays"
        self.crossings = Crossings(spec, world, options, dtype)
        captured = max(options.graph_buckets(is_gpu=True), default=0) if options.exchange_captured else 0
        self.index = None
        if device.type == "cuda" and AVAILABLE and (layout.ep == 1 or self.own) and self.most:
            tokens = options.max_batch_tokens if layout.ep == 1 else few
            self.index = LocalIndex.of(tokens, spec.router.top_k, self.most, device)
        stage = tuple(range(seat.stage_start, seat.stage_start + layout.stage_ranks))
        self.sharded = self._one_sided(
            stage, layout.tp, pushed_tokens(spec, layout, self.tokens, dtype.itemsize), self.lanes
        )  # fmt: skip
        self.railed = None if self.sharded else self._railed(-(-captured // layout.attention_ranks))
        self.replicated = None
        if layout.attention_ranks > 1 and layout.ep > 1 and not self.own:
            self.replicated = self._one_sided(seat.expert_peers, 1, -(-few * layout.tp // layout.attention_ranks))

    def captures(self, replicated: bool) -> bool:
        """Whether no call of a step of this form asks the host for anything, so that a CUDA graph can hold it.

        Where the planner expects it (planner/ways.py), if this machine has what it takes.
        """
        if not self.spec.moe_layers:
            return True
        shared = replicated and self.world.attention is not None
        inside, across = (self.replicated, None) if shared else (self.sharded, self.railed)
        return {"stays": self.index, "inside": inside, "across": across}[self.way(replicated)] is not None

    def way(self, replicated: bool) -> Way:
        """Where the tokens of a step of this form go."""
        return way(self.world.seat.layout, self.world.gpus_per_node, replicated, self.repeats)

    def of(self, slots: int) -> tuple[Dispatcher, Dispatcher]:
        """For tokens that differ between the ranks of a TP group, and for tokens that are the same on all of them."""
        layout = self.world.seat.layout
        local = LocalDispatcher(slots, self.index) if self.index else None
        sharded = _resized(self.sharded, slots) or (local if layout.stage_ranks == 1 else None)
        replicated = local or _resized(self.replicated, slots) or (self.here(slots) if self.own else None)
        return (
            sharded or self._across_nodes(slots),
            replicated or self.crossings.of(slots),
        )

    def _across_nodes(self, slots: int) -> Dispatcher:
        many = self.crossings.of(slots, self.world.tp)
        return many if self.railed is None else FewByRails(self.railed.with_slots(slots), many)

    def here(self, slots: int) -> Dispatcher:
        """Within this rank, without kernels."""
        world = self.world
        alone = LocalTransport(LocalGroup((world.seat.rank,)), 0, world.root.deadline_s)
        return RaggedDispatcher(alone, Topology((0,)), slots)

    @property
    def nbytes(self) -> int:
        """Of the windows on this rank, of what stands beside them, and of the local index."""
        held = (self.sharded, self.replicated, self.railed.inside if self.railed else None)
        lanes = {lane for one in held if isinstance(one, OneSidedDispatcher) for lane in one.lanes}
        index = sum(value.nbytes for value in vars(self.index).values()) if self.index else 0
        return index + sum(lane_bytes(lane) for lane in lanes)

    def _one_sided(
        self, ranks: tuple[int, ...], tp: int, capacity: int, lanes: int = 1
    ) -> OneSidedDispatcher | None:  # fmt: skip
        """For calls of at most `capacity` tokens a rank between these ranks, groups of `tp`, as many of them at once as
        there are lanes; None without NVLink."""
        group = self.world.nvlink(ranks) if len(ranks) > 1 else None
        if group is None:
            return None
        shape = ExchangeShape(
            len(ranks), tp, self.most, self.spec.router.top_k, self.spec.d_model, capacity, self.dtype
        )  # fmt: skip
        watch = self.world.watch(ranks)
        windows = [group.window(WindowPlan(shape).size) for _ in range(lanes)]
        return OneSidedDispatcher.of(shape, tuple(Lane(window, shape) for window in windows), watch, sms=self.sms)

    def _railed(self, tokens: int) -> RailedExpandedDispatcher | None:
        """For calls of at most `tokens` tokens a rank; None on one node, and without NVLink.

        Raises ConfigurationError for nodes that are not equally full.
        """
        rails, rail, seat = self.world.rails, self.world.rail, self.world.seat
        if rails is None or rail is None or self.device.type != "cuda" or not (AVAILABLE and tokens and self.most):
            return None
        require_equal_nodes(rails)
        tp, inside_tokens = seat.layout.tp, len(rails.nodes) * tokens
        ranks = tuple(seat.stage_start + group * tp + index for group in rails.node for index in range(tp))
        inside = self._one_sided(ranks, tp, inside_tokens)
        if len(ranks) == 1:
            index = LocalIndex.of(inside_tokens, self.spec.router.top_k, self.most, self.device)
            inside = LocalDispatcher(self.most, index)
        return None if inside is None else RailedExpandedDispatcher(rail, inside, rails, tokens)


@dataclass(frozen=True)
class FewByRails(Dispatcher):
    """Calls that captured steps make, in a form that a graph can hold; larger ones in the form for many tokens."""

    few: RailedExpandedDispatcher
    many: Dispatcher

    def fit(self, tokens: int) -> Dispatcher:
        return self.few.fit(tokens) if tokens <= self.few.capacity else self.many.fit(tokens)

    def start_dispatch(self, x_TD: torch.Tensor, choice: SlotChoice, where: str = "") -> PendingBatch:
        return self.many.start_dispatch(x_TD, choice, where)

    def start_combine(self, y_RD: torch.Tensor, batch: ExpertBatch, where: str = "") -> PendingTokens:
        return self.many.start_combine(y_RD, batch, where)


def lane_bytes(lane: Lane) -> int:
    """Of a lane's window on this rank, and of its tensors that do not lie in it."""
    own = lane.window.bytes_of[lane.window.rank]
    first, end = own.data_ptr(), own.data_ptr() + own.nbytes
    tensors = [value for value in vars(lane).values() if isinstance(value, torch.Tensor)]
    return own.nbytes + sum(t.nbytes for t in tensors if not first <= t.data_ptr() < end)


def _resized(dispatcher: OneSidedDispatcher | None, slots: int) -> OneSidedDispatcher | None:
    return None if dispatcher is None else dispatcher.with_slots(slots)
