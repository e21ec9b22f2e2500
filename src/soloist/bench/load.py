"""Random tokens and choices for the benchmarks, the same on every rank, and the proof that an exchange was right.

Shape legend: T tokens of a rank, D model width, K top-k, E experts, R rows, X expanded rows, S slots.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from soloist.dispatch.base import ExpertBatch, SlotChoice
from soloist.dispatch.lane import ExchangeShape


@dataclass(frozen=True)
class Load:
    """`tokens` a rank. routing: "uniform", "skewed" (expert e is liked 4·e/E standard deviations less) or "remote"
    (every choice lies on the next rank)."""

    tokens: int
    d_model: int
    top_k: int
    experts: int
    routing: str = "uniform"
    dtype: torch.dtype = torch.bfloat16

    def shape(self, ranks: int, fp8: bool = False) -> ExchangeShape:
        slots = self.experts // ranks
        return ExchangeShape(ranks, 1, slots, self.top_k, self.d_model, self.tokens, self.dtype, fp8)

    def inputs(self, rank: int, ranks: int, seed: int, device: torch.device) -> tuple[Tensor, SlotChoice]:
        """x_TD and the choice of one rank."""
        generator = torch.Generator(device).manual_seed(1009 * seed + rank)
        x_TD = torch.randn(self.tokens, self.d_model, generator=generator, device=device).to(self.dtype)
        liked_TE = torch.randn(self.tokens, self.experts, generator=generator, device=device)
        slots = self.experts // ranks
        if self.routing == "skewed":
            liked_TE -= 4.0 / self.experts * torch.arange(self.experts, device=device)
        if self.routing == "remote":
            next_rank = (rank + 1) % ranks
            liked_TE[:, next_rank * slots : (next_rank + 1) * slots] += 100.0
        weights_TK, ids_TK = liked_TE.topk(self.top_k)
        return x_TD, SlotChoice(ids_TK // slots, ids_TK % slots, weights_TK.softmax(-1))

    def remote_rows(self, choices: list[SlotChoice]) -> list[int]:
        """Rows that leave each rank."""
        gone = []
        for rank, choice in enumerate(choices):
            groups = set(choice.group_TK.flatten().tolist()) - {rank}
            gone.append(sum(int((choice.group_TK == group).any(1).sum()) for group in groups))
        return gone


def check_batch(batch: ExpertBatch, inputs: list[tuple[Tensor, SlotChoice]], rank: int, scale_R: Tensor | None) -> int:
    """Asserts that `rank` got the rows, order, weights and offsets that the definition says. Returns X."""
    group_RK = torch.cat([choice.group_TK for _, choice in inputs])
    slot_RK = torch.cat([choice.slot_TK for _, choice in inputs]).where(group_RK == rank, len(batch.offsets_S))
    order_X = torch.argsort(slot_RK.flatten(), stable=True)
    used = int((group_RK == rank).sum())
    row_X = order_X[:used] // slot_RK.shape[1]
    weight_X = torch.cat([choice.weight_TK for _, choice in inputs]).flatten()[order_X[:used]]
    counts_S = torch.bincount(slot_RK.flatten(), minlength=len(batch.offsets_S) + 1)[:-1]
    assert torch.equal(batch.offsets_S.long(), counts_S.cumsum(0)), "offsets"
    assert torch.equal(batch.row_X[:used], row_X), "row_X"
    assert torch.equal(batch.weight_X[:used], weight_X), "weight_X"
    sent, got = torch.cat([x for x, _ in inputs])[row_X], batch.rows_RD[row_X]
    if scale_R is None:
        assert torch.equal(got, sent), "rows"
    else:
        error = (got.float() * scale_R[row_X, None] - sent.float()).norm() / sent.float().norm()
        assert error < 0.04, f"fp8 rows differ by {error:.3f}"
    return used


def check_home(out_TD: Tensor, y_RD_of: list[Tensor], choice: SlotChoice, first_row: int) -> None:
    """Asserts that out_TD is the fp32 sum over groups, in order, of the rows that each group was said to give."""
    total_TD = torch.zeros_like(out_TD, dtype=torch.float32)
    for group, y_RD in enumerate(y_RD_of):
        wanted_T1 = (choice.group_TK == group).any(1, keepdim=True)
        total_TD += y_RD[first_row : first_row + len(out_TD)].float().where(wanted_T1, 0.0)
    assert torch.equal(out_TD, total_TD.to(out_TD.dtype)), "combined rows"
