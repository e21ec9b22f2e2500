"""Random tokens and choices for the benchmarks, the same on every rank, and the proof that an exchange was right.

Shape legend: T tokens of a rank, D model width, K top-k, E experts, R rows, X expanded rows, S slots.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from soloist.dispatch.base import Dispatcher, ExpertBatch, SlotChoice
from soloist.dispatch.lane import ExchangeShape

Inputs = tuple[Tensor, SlotChoice]  # x_TD and the choice of a rank
DECODE_TOKENS = 512  # of a rank, at most


@dataclass(frozen=True)
class Load:
    """`tokens` a rank; `width` of an expert, where experts run; `tp` ranks share one.

    routing: "uniform", "skewed" (expert e is liked 4·e/E standard deviations less) or "remote" (every choice lies on
    the next rank).
    """

    tokens: int
    d_model: int
    top_k: int
    experts: int
    routing: str = "uniform"
    dtype: torch.dtype = torch.bfloat16
    width: int = 0
    tp: int = 1

    @property
    def is_decode(self) -> bool:
        """So short that many calls are timed in one graph, one after the other."""
        return self.tokens <= DECODE_TOKENS

    @property
    def named(self) -> dict[str, object]:
        """For a point's shape."""
        sizes: dict[str, object] = {"T": self.tokens, "D": self.d_model, "E": self.experts, "K": self.top_k}
        sizes |= {"F": self.width} if self.width else {}
        return sizes | ({"tp": self.tp} if self.tp > 1 else {}) | {"routing": self.routing}

    def slots(self, ranks: int) -> int:
        """Of a group."""
        return self.experts * self.tp // ranks

    def shape(self, ranks: int, fp8: bool = False) -> ExchangeShape:
        return ExchangeShape(
            ranks, self.tp, self.slots(ranks), self.top_k, self.d_model, self.tokens, self.dtype, fp8
        )  # fmt: skip

    def everybody(self, ranks: int, seed: int, device: torch.device) -> list[Inputs]:
        return [self.inputs(rank, ranks, seed, device) for rank in range(ranks)]

    def inputs(self, rank: int, ranks: int, seed: int, device: torch.device) -> Inputs:
        """Of one rank."""
        generator = torch.Generator(device).manual_seed(1009 * seed + rank)
        x_TD = torch.randn(self.tokens, self.d_model, generator=generator, device=device).to(self.dtype)
        liked_TE = torch.randn(self.tokens, self.experts, generator=generator, device=device)
        slots = self.slots(ranks)
        if self.routing == "skewed":
            liked_TE -= 4.0 / self.experts * torch.arange(self.experts, device=device)
        if self.routing == "remote":
            group = (rank + 1) % ranks // self.tp
            liked_TE[:, group * slots : (group + 1) * slots] += 100.0
        weights_TK, ids_TK = liked_TE.topk(self.top_k)
        return x_TD, SlotChoice(ids_TK // slots, ids_TK % slots, weights_TK.softmax(-1))

    def remote_rows(self, choices: list[SlotChoice]) -> list[int]:
        """Rows that leave each rank."""
        gone = []
        for rank, choice in enumerate(choices):
            groups = set(choice.group_TK.flatten().tolist()) - {rank}
            gone.append(sum(int((choice.group_TK == group).any(1).sum()) for group in groups))
        return gone


def check_batch(batch: ExpertBatch, inputs: list[Inputs], rank: int, scale_R: Tensor | None = None) -> int:
    """Asserts that `rank` got the rows, order, weights and offsets that the definition says. Returns X."""
    group_RK = torch.cat([choice.group_TK for _, choice in inputs])
    slot_RK = torch.cat([choice.slot_TK for _, choice in inputs]).where(group_RK == rank, len(batch.offsets_S))
    order_X = torch.argsort(slot_RK.flatten(), stable=True)
    used = int((group_RK == rank).sum())
    weight_X = torch.cat([choice.weight_TK for _, choice in inputs]).flatten()[order_X[:used]]
    counts_S = torch.bincount(slot_RK.flatten(), minlength=len(batch.offsets_S) + 1)[:-1]
    assert torch.equal(batch.offsets_S.long(), counts_S.cumsum(0)), "offsets"
    assert torch.equal(batch.weight_X[:used], weight_X), "weight_X"
    row_X = batch.row_X[:used]
    sent, got = torch.cat([x for x, _ in inputs])[order_X[:used] // slot_RK.shape[1]], batch.rows_RD[row_X]
    if scale_R is None:
        assert torch.equal(got, sent), "rows"
    else:
        error = (got.float() * scale_R[row_X, None] - sent.float()).norm() / sent.float().norm()
        assert error < 0.04, f"fp8 rows differ by {error:.3f}"
    return used


def check_home(out_TD: Tensor, y_RD_of: list[Tensor], choice: SlotChoice, first_row: int) -> None:
    """Asserts that out_TD is the fp32 sum over groups, in order, of the rows that each group was said to give."""
    parts = [y_RD[first_row : first_row + len(out_TD)] for y_RD in y_RD_of]
    assert torch.equal(out_TD, sum_of(parts, choice.group_TK)), "combined rows"


def sum_of(y_TD_of: list[Tensor], group_TK: Tensor) -> Tensor:
    """For each token the fp32 sum, in order of group, over the groups that it goes to."""
    total_TD = torch.zeros_like(y_TD_of[0], dtype=torch.float32)
    for group, y_TD in enumerate(y_TD_of):
        total_TD += y_TD.float().where((group_TK == group).any(1, keepdim=True), 0.0)
    return total_TD.to(y_TD_of[0].dtype)


def check_dispatcher(dispatcher: Dispatcher, inputs: list[Inputs], rank: int) -> None:
    """One call of any dispatcher, compared with the definition. The experts of group g answer x / 2 + g."""
    x_TD, choice = inputs[rank]
    batch = dispatcher.dispatch(x_TD, choice, "bench")
    check_batch(batch, inputs, rank)
    out_TD = dispatcher.combine(batch.rows_RD * 0.5 + rank, batch, "bench")
    assert torch.equal(out_TD, sum_of([x_TD * 0.5 + g for g in range(len(inputs))], choice.group_TK)), "combined rows"
