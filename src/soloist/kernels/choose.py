"""The choice of a token in plain PyTorch: the greatest score wins, the lowest id among equals.

For a greedy row (temperature 0) the scores are the logits; for a drawn one logits / temperature plus Gumbel noise, the
greatest of which is distributed as softmax. The noise is a function of a row's key and of the token id.

Shape legend: C rows, V vocabulary, 1 and 2 columns of a row's settings.
"""

from __future__ import annotations

import torch
from torch import Tensor

COLDEST = 1e-30  # lowest temperature that divides


def choose(logits_CV: Tensor, temperature_C1: Tensor, keys_C2: Tensor) -> tuple[Tensor, Tensor]:
    """token_C (int64), and margin_C (fp32), by how much its score leads: NaN for a row that is not finite.

    logits_CV: any float dtype. temperature_C1: fp32. keys_C2: int32, 64 bits that no two draws should share.
    """
    logits_CV = logits_CV.float()
    drawn_CV = tempered(logits_CV, temperature_C1) + gumbel(keys_C2, logits_CV.shape[1])
    return best_of(torch.where(temperature_C1 > 0, drawn_CV, logits_CV))


def best_of(scores_CV: Tensor) -> tuple[Tensor, Tensor]:
    """token_C and margin_C, see `choose`."""
    best_C2 = scores_CV.topk(2).values
    margin_C = torch.where(best_C2[:, 0].isfinite(), best_C2[:, 0] - best_C2[:, 1], torch.nan)
    return scores_CV.argmax(-1), margin_C


def tempered(logits_CV: Tensor, temperature_C1: Tensor) -> Tensor:
    """Scores without noise, the best of each row 0."""
    return (logits_CV - logits_CV.amax(-1, keepdim=True)) / temperature_C1.clamp(min=COLDEST)


def gumbel(keys_C2: Tensor, vocab: int) -> Tensor:
    """Standard Gumbel noise for every token id, -log(-log u), a function of a row's key and the id alone."""
    ids_V = torch.arange(vocab, device=keys_C2.device, dtype=torch.int32)
    bits_CV = _mix((_mix(ids_V) ^ keys_C2[:, :1]) + keys_C2[:, 1:]) & 0x7FFFFFFF
    # Where u is 1 - tiny the noise is greatest: count from that end, at which floating point is finest.
    complement_CV = ((bits_CV.float() + 0.5) * 2.0**-31).clamp(max=1 - 2.0**-24)
    return -(-torch.log1p(-complement_CV)).log()


def _mix(x: Tensor) -> Tensor:
    """A bijection of 32-bit integers whose output bits depend on all input bits (constants: C. Wellons, lowbias32)."""
    x = (x ^ ((x >> 16) & 0xFFFF)) * 0x7FEB352D
    x = (x ^ ((x >> 15) & 0x1FFFF)) * (0x846CA68B - 2**32)
    return x ^ ((x >> 16) & 0xFFFF)
