"""From a token to slots: router and slot table, in one kernel on a GPU.

Shape legend: T tokens, D model width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from soloist.dispatch.base import SlotChoice
from soloist.kernels.language import AVAILABLE
from soloist.kernels.route import BT, FEW_TOKENS, route
from soloist.moe.router import Router, Routing, SlotTable


class Chooser:
    """What `Router.route` and `SlotTable.choose` say, by whichever form is faster."""

    def __init__(self, router: Router, table: SlotTable) -> None:
        self.router, self.table = router, table
        self.serves = AVAILABLE and router.weight_ED.is_cuda and serves(router)
        self.fused = self.serves
        self._turns = (table.group_EN.contiguous(), table.slot_EN.contiguous())
        self._arrived = torch.zeros(FEW_TOKENS // BT, dtype=torch.int32, device=router.weight_ED.device)

    def __call__(self, x_TD: Tensor, live_T: Tensor | None = None) -> tuple[Routing, SlotChoice]:
        """Each token's experts, and group and slot of each of them; −1 for tokens that are not live."""
        if self.fused:
            return self.in_one_kernel(x_TD, live_T)
        routing = self.router.route(x_TD)
        return routing, self.table.choose(routing, live_T)

    def in_one_kernel(self, x_TD: Tensor, live_T: Tensor | None) -> tuple[Routing, SlotChoice]:
        """The logits of many tokens are made by a GEMM before it."""
        router, table, spec = self.router, self.table, self.router.spec
        logits_TE = router.logits(x_TD) if len(x_TD) > FEW_TOKENS else None
        ids_TK, weights_TK, group_TK, slot_TK = route(
            x_TD.contiguous(), router.weight_ED, router.bias_E, router.correction_E,
            self._turns, table.group, live_T, self._arrived, logits_TE,
            top_k=spec.top_k, scoring=spec.scoring, renormalise=spec.renormalise, scaling=spec.scaling,
            groups=spec.groups, kept_groups=spec.kept_groups, sums_two=spec.group_score == "top2",
        )  # fmt: skip
        return Routing(ids_TK, weights_TK), SlotChoice(group_TK, slot_TK, weights_TK)


def serves(router: Router) -> bool:
    """Whether the kernel does: it cuts experts into groups of a power of two."""
    experts, groups = router.experts, router.spec.groups
    is_power = experts & (experts - 1) == 0 and groups & (groups - 1) == 0
    return experts <= 512 and (groups == 1 or (is_power and experts >= 16))
