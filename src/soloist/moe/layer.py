"""One MoE layer: tokens travel to their experts and back, and something else may be computed meanwhile: work that the
layer is given, or another half of the step's tokens, since the layer pauses while its own travel (moe/pauses.py).

Shape legend: T tokens of this rank, D model width, R rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import cast

import torch
from torch import Tensor

from soloist.dispatch.base import Dispatcher, ExpandedDispatcher, ExpertBatch, PendingBatch, PendingRows, PendingTokens
from soloist.moe.choice import Chooser
from soloist.moe.experts import Experts
from soloist.moe.pauses import Pausing
from soloist.moe.router import Router, Routing, SlotTable
from soloist.moe.stats import LoadStats
from soloist.timing import Stopwatch


@dataclass
class MoELayer:
    """Router, experts, and the dispatchers that join them.

    dispatcher: for tokens that differ between the ranks of a TP group. replicated: for tokens that are the same on all
    of them; with TP inside the experts its results are partial sums, which the caller adds up over the group. own: it
    takes the choices of this rank's own group and moves nothing (`own_part`).
    """

    router: Router
    table: SlotTable
    dispatcher: Dispatcher
    replicated: Dispatcher
    experts: Experts
    layer: int = 0
    own: bool = False
    stats: LoadStats = field(default_factory=lambda: LoadStats(0))
    watch: Stopwatch = field(default_factory=Stopwatch)

    def __post_init__(self) -> None:
        self.choose = Chooser(self.router, self.table)

    def fuse(self, fused: bool) -> None:
        """Use the fused kernels where there are some, or the plain forms, which define them."""
        self.choose.fused = fused and self.choose.serves
        self.experts.fused = fused

    def travel(
        self,
        x_TD: Tensor,
        meanwhile: Callable[[], Tensor] | None = None,
        gather_in_group: bool = True,
        live_T: Tensor | None = None,
        most: int | None = None,
    ) -> Pausing[Tensor]:
        """out_TD: for each token the weighted sum of its experts, plus what `meanwhile` returns.

        Pauses when the tokens are on their way, and again when the results are. `meanwhile` runs before the first
        pause. live_T (bool): tokens that are not only there to fill a batch; the others go nowhere. `most`: the most
        tokens that any rank brings, a number that all ranks agree on; None stands for as many as dispatchers hold. More
        than that go in rounds. Called by all ranks of a stage together, also with T = 0.
        """
        dispatcher = self.dispatcher if gather_in_group else self.replicated
        if most is not None and dispatcher.limit is not None and most > dispatcher.limit:
            return (yield from self._in_rounds(x_TD, meanwhile, gather_in_group, live_T, most, dispatcher.limit))
        dispatcher = dispatcher if most is None else dispatcher.fit(most)
        where = f"layer {self.layer}"
        # 1. Choose experts, and a slot for each of them.
        with self.watch("router"):
            routing, choice = self.choose(x_TD, live_T)
        # 2. Send the tokens off, do the other work, take in what has arrived from everybody.
        with self.watch("exchange"):
            arriving = dispatcher.start_dispatch(x_TD, choice, where)
        with self.watch("experts"):
            other_TD = meanwhile() if meanwhile else None
        yield
        # 3. Run the local experts, and send the results home.
        returning = self._through_experts(dispatcher, arriving, where, partial(self._count, routing, live_T))
        yield
        # 4. Each token sums up its own.
        with self.watch("exchange"):
            out_TD = returning.wait()
        return out_TD if other_TD is None else out_TD + other_TD

    def own_part(self, x_TD: Tensor, live_T: Tensor | None, counted: slice) -> Tensor:
        """Partial sums over the groups, where all ranks of the stage have the same tokens: nothing travels.

        counted: the tokens whose choices this rank counts; every token has one rank that does.
        """
        where = f"layer {self.layer}"
        with self.watch("router"):
            routing, choice = self.choose(x_TD, live_T)
            choice = choice.of_group(self.table.group)
        arriving = self.replicated.start_dispatch(x_TD, choice, where)
        count = partial(self._count, routing.of(counted), None if live_T is None else live_T[counted])
        return self._through_experts(self.replicated, arriving, where, count).wait()

    def _in_rounds(
        self, x_TD: Tensor, meanwhile: Callable[[], Tensor] | None, gather_in_group: bool, live_T: Tensor | None,
        most: int, limit: int,
    ) -> Pausing[Tensor]:  # fmt: skip
        """The same, `limit` tokens of each rank at a time; a rank that has no more of them joins with none."""
        parts = []
        for first in range(0, most, limit):
            span = slice(first, first + limit)
            live = None if live_T is None else live_T[span]
            round_ = self.travel(x_TD[span], None, gather_in_group, live, min(limit, most - first))
            parts.append((yield from round_))
        out_TD = torch.cat(parts)
        return out_TD if meanwhile is None else out_TD + meanwhile()

    def _count(self, routing: Routing, live_T: Tensor | None, batch: ExpertBatch) -> None:
        self.stats.record(self.layer, routing, batch, live_T)

    def _through_experts(
        self, dispatcher: Dispatcher, arriving: PendingBatch, where: str, count: Callable[[ExpertBatch], None]
    ) -> PendingTokens:
        """By the fused kernels where experts and dispatcher both can, otherwise row by row.

        `count` gets the batch before its results go home: from then on peers may send the next one into its memory.
        """
        if isinstance(dispatcher, ExpandedDispatcher):
            coming = cast(PendingRows, arriving)
            tiles = self.experts.tiles(coming.rows * self.router.spec.top_k / self.router.experts)
            if tiles is not None:
                with self.watch("exchange"):
                    as_they_come = self.experts.takes_rows(tiles)
                    batch, x_XD = (coming.wait(), None) if as_they_come else coming.wait_expanded()
                count(batch)
                with self.watch("experts"):
                    y_XD = self.experts.expanded(batch, tiles, x_XD)
                with self.watch("exchange"):
                    return dispatcher.start_combine_expanded(y_XD, batch, where)
        with self.watch("exchange"):
            batch = arriving.wait()
        count(batch)
        with self.watch("experts"):
            y_RD = self.experts.forward(batch)
        with self.watch("exchange"):
            return dispatcher.start_combine(y_RD, batch, where)
