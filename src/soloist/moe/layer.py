"""One MoE layer: tokens travel to their experts and back, and something else may be computed meanwhile.

Shape legend: T tokens of this rank, D model width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from soloist.dispatch.base import Dispatcher
from soloist.moe.experts import Experts
from soloist.moe.router import Router, SlotTable
from soloist.moe.stats import LoadStats
from soloist.timing import Stopwatch


@dataclass
class MoELayer:
    """Router, experts, and the dispatchers that join them.

    dispatcher: for tokens that differ between the ranks of a TP group. replicated: for tokens that are the same on all
    of them; with TP inside the experts its results are partial sums, which the caller adds up over the group.
    """

    router: Router
    table: SlotTable
    dispatcher: Dispatcher
    replicated: Dispatcher
    experts: Experts
    layer: int = 0
    stats: LoadStats = field(default_factory=lambda: LoadStats(0))
    watch: Stopwatch = field(default_factory=Stopwatch)

    def __call__(
        self, x_TD: Tensor, meanwhile: Callable[[], Tensor] | None = None, gather_in_group: bool = True
    ) -> Tensor:
        """out_TD: for each token the weighted sum of its experts, plus what `meanwhile` returns.

        `meanwhile` runs while the tokens travel. Called by all ranks of a stage together, also with T = 0.
        """
        dispatcher = self.dispatcher if gather_in_group else self.replicated
        where = f"layer {self.layer}"
        # 1. Choose experts, and a slot for each of them.
        with self.watch("router"):
            routing = self.router.route(x_TD)
            choice = self.table.choose(routing)
        # 2. Send the tokens off, do the other work, take in what has arrived from everybody.
        with self.watch("exchange"):
            arriving = dispatcher.start_dispatch(x_TD, choice, where)
        with self.watch("experts"):
            other_TD = meanwhile() if meanwhile else None
        with self.watch("exchange"):
            batch = arriving.wait()
        self.stats.record(self.layer, routing, batch)
        # 3. Run the local experts.
        with self.watch("experts"):
            y_RD = self.experts.forward(batch)
        # 4. Send the results home, where each token sums up its own.
        with self.watch("exchange"):
            out_TD = dispatcher.combine(y_RD, batch, where)
        return out_TD if other_TD is None else out_TD + other_TD
