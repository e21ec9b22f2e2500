"""The router in one kernel: logits, scores, the best experts, their weights and slots.

Shape legend: T tokens, D model width, E experts, K top-k, G router groups, N turns among an expert's
replicas, S splits of D, BT and BE tokens and experts of a tile. `EP` and `KP` are powers of two that cover E and K.

    x_TD · weight_ED ─► partial logits by tile and split ─► the last program of a tile of tokens: sum, score, choose,
                                                            weigh, renormalise, scale; slot and group of each choice

`Router.route` and `SlotTable.choose` (moe/router.py) are the definition.
"""

from __future__ import annotations

import torch
from torch import Tensor

from soloist.kernels.follow import early, follow
from soloist.kernels.language import next_power, tl, triton

FEW_TOKENS = 256  # up to here the logits are made in the same kernel, above by a GEMM before it
BT, BE, BD = 16, 32, 128
SPLIT = 512  # columns of a split of D
LOWEST = tl.constexpr(-3.0e38)  # of a choice that cannot be made again
LEAST = tl.constexpr(-1.0e38)  # of one that should not be made: outside the kept groups, not a number


def route(
    x_TD: Tensor,
    weight_ED: Tensor,
    bias_E: Tensor | None,
    correction_E: Tensor | None,
    turns: tuple[Tensor, Tensor],
    own_group: int,
    live_T: Tensor | None,
    arrived: Tensor,
    logits_TE: Tensor | None = None,
    *,
    top_k: int,
    scoring: str,
    renormalise: bool,
    scaling: float,
    groups: int = 1,
    kept_groups: int = 1,
    sums_two: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """expert_ids_TK, weights_TK (fp32), group_TK, slot_TK (int64, −1 for tokens that are not live).

    turns: group_EN, slot_EN (moe/router.py, SlotTable). arrived: int32 zeros, one for BT tokens of FEW_TOKENS, left as
    zeros. logits_TE (fp32, the bias in them): those of more tokens, made by a GEMM. `sums_two`:
    a group's score is the sum of its two best instead of the best.
    """
    (tokens, d), experts = x_TD.shape, len(weight_ED)
    ids_TK = torch.empty(tokens, top_k, dtype=torch.int64, device=x_TD.device)
    group_TK, slot_TK = torch.empty_like(ids_TK), torch.empty_like(ids_TK)
    weights_TK = torch.empty(tokens, top_k, dtype=torch.float32, device=x_TD.device)
    padded = max(16, next_power(experts))
    splits, be = (-(-d // SPLIT), min(BE, padded)) if logits_TE is None else (1, padded)
    logits_STE, made = logits_TE, logits_TE is not None
    if logits_STE is None:
        assert tokens <= FEW_TOKENS
        logits_STE = torch.empty(splits, tokens, experts, dtype=torch.float32, device=x_TD.device)
    if tokens:
        group_EN, slot_EN = turns
        route_kernel[(-(-tokens // BT), padded // be * splits)](
            x_TD, weight_ED, bias_E, correction_E, logits_STE, arrived, group_EN, slot_EN, live_T,
            ids_TK, weights_TK, group_TK, slot_TK, tokens, own_group, scaling,
            D=d, E=experts, EP=padded, K=top_k, KP=next_power(top_k), TURNS=group_EN.shape[1], BT=BT, BE=be,
            BD=BD, SPLITS=splits, SPLIT=SPLIT, GROUPS=groups, KEPT=kept_groups, TWO=sums_two, SCORING=scoring,
            RENORMALISE=renormalise, BIAS=bias_E is not None and not made, CORRECTED=correction_E is not None,
            LIVE=live_T is not None, MADE=made, num_warps=4, **early(x_TD.device),
        )  # fmt: skip
    return ids_TK, weights_TK, group_TK, slot_TK


@triton.jit
def _partial_logits(
    x_TD, weight_ED, logits_STE, token_B, tokens, part, D: tl.constexpr, E: tl.constexpr, BT: tl.constexpr,
    BE: tl.constexpr, BD: tl.constexpr, SPLITS: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """A tile of logits over one split of D."""
    split, expert_B = part % SPLITS, part // SPLITS * BE + tl.arange(0, BE)
    acc = tl.zeros((BT, BE), tl.float32)
    for first in range(0, SPLIT, BD):
        column = split * SPLIT + first + tl.arange(0, BD)
        inside = (column < D)[None, :]
        x = tl.load(x_TD + token_B[:, None] * D + column[None, :], mask=(token_B < tokens)[:, None] & inside, other=0.0)
        w_at = weight_ED + expert_B[:, None] * D + column[None, :]
        w = tl.load(w_at, mask=(expert_B < E)[:, None] & inside, other=0.0)
        acc = tl.dot(x, w.T, acc, input_precision="ieee")
    at = logits_STE + (split * tokens + token_B)[:, None] * E + expert_B[None, :]
    tl.store(at, acc, mask=(token_B < tokens)[:, None] & (expert_B < E)[None, :])


@triton.jit
def _best(score, taken, SIZE: tl.constexpr):
    """The greatest score of each row among those not taken, its index, the lowest of equal ones; `taken` with it."""
    index = tl.arange(0, SIZE)[None, :]
    best, found = tl.max(tl.where(taken, LOWEST, score), 1, return_indices=True, return_indices_tie_break_left=True)
    return best, found, taken | (index == found[:, None])


@triton.jit
def _kept(score_TE, BT: tl.constexpr, EP: tl.constexpr, GROUPS: tl.constexpr, KEPT: tl.constexpr, TWO: tl.constexpr):
    """Whether an expert lies in one of the best groups."""
    score_TGM = score_TE.reshape(BT, GROUPS, EP // GROUPS)
    group_TG = tl.max(score_TGM, 2)
    if TWO:
        first_TG = tl.argmax(score_TGM, 2, tie_break_left=True)
        member = tl.arange(0, EP // GROUPS)[None, None, :]
        group_TG += tl.max(tl.where(member == first_TG[:, :, None], LOWEST, score_TGM), 2)
    kept_TG = tl.zeros((BT, GROUPS), tl.int1)
    for _ in tl.static_range(KEPT):
        _, _, kept_TG = _best(group_TG, kept_TG, GROUPS)
    return tl.broadcast_to(kept_TG[:, :, None], (BT, GROUPS, EP // GROUPS)).reshape(BT, EP)


@triton.jit(do_not_specialize=("tokens", "own_group"))
def route_kernel(
    x_TD, weight_ED, bias_E, correction_E, logits_STE, arrived, group_EN, slot_EN, live_T,
    ids_TK, weights_TK, group_TK, slot_TK, tokens, own_group, scaling,
    D: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, TURNS: tl.constexpr,
    BT: tl.constexpr, BE: tl.constexpr, BD: tl.constexpr, SPLITS: tl.constexpr, SPLIT: tl.constexpr,
    GROUPS: tl.constexpr, KEPT: tl.constexpr, TWO: tl.constexpr, SCORING: tl.constexpr, RENORMALISE: tl.constexpr,
    BIAS: tl.constexpr, CORRECTED: tl.constexpr, LIVE: tl.constexpr, MADE: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of tokens, tiles of experts · splits). MADE: the logits are there already."""
    follow()
    tile = tl.program_id(0)
    token_B = tile * BT + tl.arange(0, BT)
    here_B = token_B < tokens
    is_last = True
    if not MADE:
        _partial_logits(
            x_TD, weight_ED, logits_STE, token_B.to(tl.int64), tokens, tl.program_id(1), D, E, BT, BE, BD, SPLITS, SPLIT
        )
        tl.debug_barrier()
        is_last = tl.atomic_add(arrived + tile, 1, sem="acq_rel", scope="gpu") == tl.num_programs(1) - 1
    if is_last:
        if not MADE:
            tl.store(arrived + tile, 0)
        expert = tl.arange(0, EP)
        exists = (expert < E)[None, :]
        at = token_B.to(tl.int64)[:, None] * E + expert[None, :]
        logit = tl.zeros((BT, EP), tl.float32)
        for split in range(SPLITS):
            logit += tl.load(logits_STE + split * tokens * E + at, mask=here_B[:, None] & exists, other=0.0)
        if BIAS:
            logit += tl.load(bias_E + expert, mask=expert < E, other=0.0)[None, :]
        logit = tl.where(exists & (logit == logit), logit, LEAST)
        score = logit
        if SCORING == "softmax":
            weight = tl.exp(logit - tl.max(logit, 1)[:, None])
            score = weight / tl.sum(weight, 1)[:, None]
        if SCORING == "sigmoid":
            score = tl.sigmoid(logit)
        candidate = score
        if CORRECTED:
            candidate += tl.load(correction_E + expert, mask=expert < E, other=0.0)[None, :]
        if GROUPS > 1:
            candidate = tl.where(_kept(candidate, BT, EP, GROUPS, KEPT, TWO), candidate, LEAST)

        k = tl.arange(0, KP)[None, :]
        id_TK, weight_TK = tl.zeros((BT, KP), tl.int32), tl.zeros((BT, KP), tl.float32)
        taken = tl.broadcast_to(expert[None, :] >= E, (BT, EP))
        for j in tl.static_range(K):
            chosen, found, taken = _best(candidate, taken, EP)
            if CORRECTED:
                chosen = tl.sum(tl.where(expert[None, :] == found[:, None], score, 0.0), 1)
            id_TK = tl.where(k == j, found[:, None], id_TK)
            weight_TK = tl.where(k == j, chosen[:, None], weight_TK)
        if SCORING == "softmax_of_chosen":
            raised = tl.where(k < K, weight_TK, LOWEST)
            weight_TK = tl.exp(raised - tl.max(raised, 1)[:, None])
            weight_TK = weight_TK / tl.sum(weight_TK, 1)[:, None]
        elif RENORMALISE:
            weight_TK = weight_TK / (tl.sum(weight_TK, 1)[:, None] + 1e-20)

        to = token_B.to(tl.int64)[:, None] * K + k
        written = here_B[:, None] & (k < K)
        turn_TK = id_TK * TURNS + ((own_group + token_B) % TURNS)[:, None]
        group = tl.load(group_EN + turn_TK, mask=written, other=-1).to(tl.int64)
        slot = tl.load(slot_EN + turn_TK, mask=written, other=-1).to(tl.int64)
        if LIVE:
            live_B = tl.load(live_T + token_B, mask=here_B, other=0) != 0
            group, slot = tl.where(live_B[:, None], group, -1), tl.where(live_B[:, None], slot, -1)
        tl.store(ids_TK + to, id_TK.to(tl.int64), mask=written)
        tl.store(weights_TK + to, weight_TK * scaling, mask=written)
        tl.store(group_TK + to, group, mask=written)
        tl.store(slot_TK + to, slot, mask=written)
