"""Which experts a token goes to, with which weights, and which replica of each.

Shape legend: T tokens, D model width, E experts, K top-k, G router groups, M experts of a group, N turns among an
expert's replicas.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from soloist.dispatch.base import SlotChoice
from soloist.kernels.linear import linear
from soloist.moe.reader import Reader
from soloist.placement.placement import Placement
from soloist.placement.replicas import NEAREST, Closeness, turns
from soloist.placement.trace import Array
from soloist.specs.model import ModelSpec, RouterSpec
from soloist.specs.parameters import Param


@dataclass(frozen=True)
class Routing:
    """A token's experts, all different, and the weights of their outputs."""

    expert_ids_TK: Tensor  # int64: logical experts
    weights_TK: Tensor  # fp32

    def of(self, tokens: slice) -> Routing:
        """That of some tokens."""
        return Routing(self.expert_ids_TK[tokens], self.weights_TK[tokens])


class Router:
    """Scores every expert for every token and keeps the best `top_k`.

    Logits, scores and weights are fp32 for every family: the inputs are taken as they are, nothing is rounded in
    between. (DeepSeek asks for that; where other families round logits to the model's dtype, this is closer to their
    fp32 form.)
    """

    def __init__(
        self, spec: RouterSpec, weight_ED: Tensor, bias_E: Tensor | None = None, correction_E: Tensor | None = None
    ) -> None:
        """`correction_E` is added to the scores for the choice only (DeepSeek-V3)."""
        self.spec = spec
        self.weight_ED = weight_ED if _is_cuda_half(weight_ED) else weight_ED.float()
        self.bias_E = None if bias_E is None else bias_E.float()
        self.correction_E = None if correction_E is None else correction_E.float()

    @classmethod
    def load(cls, spec: ModelSpec, source: Reader, layer: int) -> Router:
        """`layer` counts all layers of the model."""
        bias_E = source.read(Param("router_bias", layer)) if spec.router.bias else None
        correction_E = source.read(Param("correction_bias", layer)) if spec.router.correction_bias else None
        return cls(spec.router, source.read(Param("router", layer)), bias_E, correction_E)

    @property
    def experts(self) -> int:
        return len(self.weight_ED)

    def route(self, x_TD: Tensor) -> Routing:
        """Score, choose, weigh, renormalise, scale."""
        logits_TE = self.logits(x_TD)
        if self.spec.scoring == "softmax_of_chosen":
            chosen_TK, expert_ids_TK = logits_TE.topk(self.spec.top_k, dim=-1)
            return Routing(expert_ids_TK, chosen_TK.softmax(-1) * self.spec.scaling)
        scores_TE = logits_TE.sigmoid() if self.spec.scoring == "sigmoid" else logits_TE.softmax(-1)
        expert_ids_TK = self._candidates(scores_TE).topk(self.spec.top_k, dim=-1).indices
        weights_TK = scores_TE.gather(1, expert_ids_TK)
        if self.spec.renormalise:
            weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + 1e-20)
        return Routing(expert_ids_TK, weights_TK * self.spec.scaling)

    def logits(self, x_TD: Tensor) -> Tensor:
        """logits_TE, fp32, the bias in them."""
        if _is_cuda_half(x_TD):
            logits_TE = torch.mm(x_TD, self.weight_ED.T, out_dtype=torch.float32)
            return logits_TE if self.bias_E is None else logits_TE + self.bias_E
        return linear(x_TD.float(), self.weight_ED, self.bias_E)

    def _candidates(self, scores_TE: Tensor) -> Tensor:
        """The scores to choose by: corrected, and −inf outside the kept groups."""
        if self.correction_E is not None:
            scores_TE = scores_TE + self.correction_E
        if self.spec.groups == 1:
            return scores_TE
        scores_TGM = scores_TE.unflatten(1, (self.spec.groups, -1))
        best = 1 if self.spec.group_score == "max" else min(2, scores_TGM.shape[2])
        group_TG = scores_TGM.topk(best, dim=-1).values.sum(-1)
        kept_TG = torch.zeros_like(group_TG, dtype=torch.bool)
        kept_TG.scatter_(1, group_TG.topk(self.spec.kept_groups, dim=-1).indices, True)
        return scores_TGM.where(kept_TG[..., None], -torch.inf).flatten(1)


def _is_cuda_half(x: Tensor) -> bool:
    return x.is_cuda and x.dtype != torch.float32


class SlotTable:
    """One layer's placement as seen by one group: turns experts into slots and chooses among replicas."""

    def __init__(
        self,
        placement: Placement,
        layer: int,
        group: int,
        device: torch.device | None = None,
        node_of_group: Sequence[int] | None = None,
        closeness: Closeness = NEAREST,
    ) -> None:
        """`layer` counts the MoE layers; `group` is the group of the rank whose tokens are routed.

        node_of_group, closeness: which replicas are near, and what that is worth (placement/replicas.py).
        """
        self._turns = partial(turns, placement, layer, group, node_of_group, closeness=closeness)
        self.group_EN, self.slot_EN = (torch.from_numpy(table).to(device) for table in self._turns())
        self.group = group

    @property
    def has_choice(self) -> bool:
        """Whether some expert has several replicas."""
        return self.group_EN.shape[1] > 1

    def weigh(self, load_E: Array) -> None:
        """Deal the turns anew for experts so loaded, in place: a captured graph goes on reading the same memory."""
        for table_EN, new in zip((self.group_EN, self.slot_EN), self._turns(load_E=load_E), strict=True):
            table_EN.copy_(torch.from_numpy(new))

    def choose(self, routing: Routing, live_T: Tensor | None = None) -> SlotChoice:
        """Group and slot of each choice; −1 for tokens that are not live."""
        ids_TK, (_, entries) = routing.expert_ids_TK, self.group_EN.shape
        turn_T1 = torch.arange(self.group, self.group + len(ids_TK), device=ids_TK.device)[:, None] % entries
        group_TK, slot_TK = self.group_EN[ids_TK, turn_T1], self.slot_EN[ids_TK, turn_T1]
        if live_T is not None:
            group_TK, slot_TK = group_TK.where(live_T[:, None], -1), slot_TK.where(live_T[:, None], -1)
        return SlotChoice(group_TK, slot_TK, routing.weights_TK)
