"""The choice of a token in one kernel: a program reads a row of logits twice and writes nothing but the outcome.

Shape legend: C rows, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from soloist.kernels.choose import COLDEST
from soloist.kernels.follow import early, follow
from soloist.kernels.language import next_power, tl, triton

BLOCK = 8192  # ids at a time


def choose_fused(logits_CV: Tensor, temperature_C1: Tensor, keys_C2: Tensor) -> tuple[Tensor, Tensor]:
    """`kernels.choose.choose` for rows whose elements are neighbours; capturable."""
    assert logits_CV.stride(1) == 1
    rows, vocab = logits_CV.shape
    token_C = torch.empty(rows, dtype=torch.int64, device=logits_CV.device)
    margin_C = torch.empty(rows, dtype=torch.float32, device=logits_CV.device)
    block = min(BLOCK, next_power(vocab))
    if rows:
        choose_kernel[(rows,)](
            logits_CV, temperature_C1, keys_C2, token_C, margin_C, logits_CV.stride(0), *keys_C2.stride(), vocab,
            COLDEST=COLDEST, BLOCK=block, num_warps=max(1, min(16, block // 512)),
            **early(logits_CV.device),
        )  # fmt: skip
    return token_C, margin_C


@triton.jit
def choose_kernel(
    logits, temperatures, keys, tokens, margins, row_stride, key_stride, half_stride, vocab,
    COLDEST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row. What is not a number is found by comparing it with itself."""
    follow()
    row = tl.program_id(0)
    temperature = tl.load(temperatures + row)
    first, second = tl.load(keys + row * key_stride), tl.load(keys + row * key_stride + half_stride)
    logits += row.to(tl.int64) * row_stride
    inside = tl.arange(0, BLOCK)

    top = float("-inf")
    # Of ids that lie BLOCK apart first: one reduction at the end instead of one in each turn.
    best_B = tl.full((BLOCK,), float("-inf"), tl.float32)
    if temperature > 0:
        top_B = best_B
        for start in range(0, vocab, BLOCK):
            logit = tl.load(logits + start + inside, start + inside < vocab, other=float("-inf")).to(tl.float32)
            top_B = tl.maximum(top_B, logit)
        top = tl.max(top_B, 0)

    runner_up_B, winner_B, broken_B = best_B, inside, tl.zeros((BLOCK,), tl.int32)
    for start in range(0, vocab, BLOCK):
        ids = start + inside
        score = tl.load(logits + ids, ids < vocab, other=float("-inf")).to(tl.float32)
        broken_B |= (score != score).to(tl.int32)
        if temperature > 0:
            score = (score - top) / tl.maximum(temperature, COLDEST)
            score = tl.where(ids < vocab, score + _gumbel(ids, first, second), float("-inf"))
        runner_up_B = tl.maximum(runner_up_B, tl.minimum(best_B, score))
        winner_B = tl.where(score > best_B, ids, winner_B)
        best_B = tl.maximum(best_B, score)
    best, broken = tl.max(best_B, 0), tl.max(broken_B, 0)
    winner = tl.min(tl.where(best_B == best, winner_B, vocab), 0)
    runner_up = tl.max(tl.where(winner_B == winner, runner_up_B, best_B), 0)
    is_good = (broken == 0) & (tl.abs(best) < float("inf"))
    tl.store(tokens + row, tl.minimum(winner, vocab - 1).to(tl.int64))
    tl.store(margins + row, tl.where(is_good, best - runner_up, float("nan")))


@triton.jit
def _gumbel(ids, first, second):
    """See `kernels.choose.gumbel`; log1p(x) is log(y) - ((y - 1) - x) / y with y = 1 + x, rounded."""
    bits = _mix((_mix(ids) ^ first) + second) & 0x7FFFFFFF
    x = -tl.minimum((bits.to(tl.float32) + 0.5) * (1.0 / 2147483648.0), 1.0 - 1.0 / 16777216.0)
    y = 1.0 + x
    return -tl.log(-(tl.log(y) - ((y - 1.0) - x) / y))


@triton.jit
def _mix(x):
    x = (x ^ ((x >> 16) & 0xFFFF)) * 0x7FEB352D
    x = (x ^ ((x >> 15) & 0x1FFFF)) * -2073254261
    return x ^ ((x >> 16) & 0xFFFF)
