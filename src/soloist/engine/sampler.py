"""From logits to tokens: penalties, temperature, filters, a reproducible draw, log probabilities.

Everything that chooses a token is brought into one matrix of scores, of which the greatest wins, the lowest id among
equals. For a greedy row the scores are the logits. For a drawn one they are logits / temperature, cut off below a
threshold by the filters, plus Gumbel noise: the greatest of them is distributed as softmax (Gumbel-max). The noise is a
function of (seed, position, token id), so a draw depends on nothing but these and the logits: not on the rest of
the batch, the layout, the rank or the device.

Filters come in the order of transformers' processors: top-k, then top-p over what is left, then min-p. All of them
keep the tokens at or above some score; equals of the last token kept are kept too, so that ties cannot depend on a
sorting order.

Shape legend: C chunks that sample (a row of logits each), V vocabulary, R drawn rows, L rows with log probabilities,
W best scores of a row, B best tokens, N positions of a prompt.
"""

from __future__ import annotations

import hashlib
import secrets
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from math import isnan

import torch
from torch import Tensor

from soloist.engine.history import History
from soloist.engine.host_copy import HostCopy, sent
from soloist.engine.penalties import adjusted, changes, params_of
from soloist.kernels.choose import best_of, gumbel, tempered
from soloist.scheduling.request import Chunk, Sampled, TokenLogprob

ROWS_AT_ONCE = 256  # of prompt positions: bounds the memory for log probabilities


@dataclass(frozen=True)
class Drawn:
    """The tokens of some chunks: on the device, where the next step finds them, and on their way to the host."""

    token_C: Tensor  # int64
    chunks: Sequence[Chunk]
    wanted: Sequence[int]  # rows with log probabilities
    numbers: HostCopy  # token_C, margin_C, and those

    def sampled(self, deadline_s: float = 60.0) -> list[Sampled]:
        """One for each chunk; waits for the copy."""
        token_C, margin_C, *rows = self.numbers.wait(deadline_s)
        logprobs = dict(zip(self.wanted, rows[0].tolist(), strict=True)) if rows else {}
        return [
            _sampled(chunk, token, margin, logprobs.get(row))
            for row, (chunk, token, margin) in enumerate(
                zip(self.chunks, token_C.tolist(), margin_C.tolist(), strict=True)
            )
        ]


def draw(logits_CV: Tensor, chunks: Sequence[Chunk], history: History | None = None) -> Drawn:
    """Choose the token after each chunk. Row i of `logits_CV` (fp32, left unchanged) belongs to `chunks[i]`.

    Log probabilities are those of the model: of the logits as they are, before penalties, temperature and filters.
    `margin` is the lead of the chosen score; it is exact for greedy rows, too. A row that is not finite gives no
    token. `history` is wanted where a chunk has a penalty. The host waits for nothing.
    """
    wanted = [row for row, chunk in enumerate(chunks) if params_of(chunk).logprobs is not None]
    token_C, margin_C = best_of(_draw_scores(adjusted(logits_CV, chunks, history), chunks))
    parts = [token_C, margin_C]
    if wanted:
        rows_L = sent(wanted, torch.int64, logits_CV.device)
        count = max(params_of(chunks[row]).logprobs or 0 for row in wanted)
        parts.append(_logprobs(logits_CV[rows_L], token_C[rows_L, None], count))
    return Drawn(token_C, chunks, wanted, HostCopy(parts))


def takes_plain_choice(chunk: Chunk) -> bool:
    """Neither filters nor penalties nor log probabilities: `kernels.choose` gives the same token."""
    params = params_of(chunk)
    is_filtered = params.temperature > 0 and (params.top_k > 0 or params.top_p < 1 or params.min_p > 0)
    return not is_filtered and not changes(chunk) and params.logprobs is None


@dataclass(frozen=True)
class ScoredPrompt:
    """Log probabilities of a chunk's tokens, on their way to the host."""

    targets: Sequence[int]
    count: int  # of best tokens beside each
    numbers: HostCopy

    def logprobs(self, deadline_s: float = 60.0) -> tuple[TokenLogprob, ...]:
        """Those of `chunk.tokens[1:]` and of `chunk.following`, if any; waits for the copy."""
        (rows_NX,) = self.numbers.wait(deadline_s)
        rows = zip(self.targets, rows_NX.tolist(), strict=True)
        return tuple(_token_logprob(target, row, self.count) for target, row in rows)


def score_prompt(logits_NV: Tensor, chunk: Chunk) -> ScoredPrompt:
    """By the logits (fp32) before each token. `logits_NV` holds those of all of the chunk's tokens."""
    targets = [*chunk.tokens[1:], *([chunk.following] if chunk.following >= 0 else [])]
    count = params_of(chunk).prompt_logprobs or 0
    target_N1 = sent(targets, torch.int64, logits_NV.device)[:, None]
    pieces = zip(logits_NV[: len(targets)].split(ROWS_AT_ONCE), target_N1.split(ROWS_AT_ONCE), strict=True)
    rows_NX = torch.cat([_logprobs(logits, target, count) for logits, target in pieces])
    return ScoredPrompt(targets, count, HostCopy([rows_NX]))


# ------------------------------------------------------------------------------------------------------------ scores


def _draw_scores(logits_CV: Tensor, chunks: Sequence[Chunk]) -> Tensor:
    """Scores of all rows: the logits themselves where the temperature is 0."""
    drawn = [row for row, chunk in enumerate(chunks) if params_of(chunk).temperature > 0]
    if not drawn:
        return logits_CV
    device, vocab = logits_CV.device, logits_CV.shape[1]
    params = [params_of(chunks[row]) for row in drawn]
    settings_R4 = sent([(p.temperature, p.top_p, p.min_p, p.top_k or vocab) for p in params], torch.float32, device)
    temperature_R1, top_p_R1, min_p_R1, top_k_R1 = settings_R4.split(1, dim=1)
    keys_R2 = sent([key_of(chunks[row]) for row in drawn], torch.int32, device)

    rows_R = sent(drawn, torch.int64, device)
    scores_RV = tempered(logits_CV[rows_R], temperature_R1)
    threshold_R1 = min_p_R1.log()  # the best score is 0
    ranked = [p.top_k or vocab for p in params if p.top_k or p.top_p < 1]
    if ranked:
        ranked_R1 = _ranked_threshold(scores_RV, min(max(ranked), vocab), top_k_R1, top_p_R1)
        threshold_R1 = threshold_R1.maximum(ranked_R1)
    scores_RV = scores_RV.masked_fill(scores_RV < threshold_R1, -torch.inf) + gumbel(keys_R2, vocab)
    return logits_CV.index_copy(0, rows_R, scores_RV)


def _ranked_threshold(scores_RV: Tensor, width: int, top_k_R1: Tensor, top_p_R1: Tensor) -> Tensor:
    """Score of the last token that top-k and then top-p keep; -inf for rows with neither.

    `width` is the greatest top-k. Sums are taken in double precision: they do not depend on it then.
    """
    best_RW = scores_RV.topk(width).values
    in_top_k_RW = torch.arange(width, device=scores_RV.device) < top_k_R1
    weight_RW = best_RW.double().exp() * in_top_k_RW
    sum_RW = weight_RW.cumsum(-1)
    in_top_p_RW = (sum_RW - weight_RW < top_p_R1 * sum_RW[:, -1:]) | (top_p_R1 >= 1)
    last_R1 = (in_top_k_RW & in_top_p_RW).sum(-1, keepdim=True).clamp(min=1) - 1
    is_off_R1 = (top_k_R1 >= scores_RV.shape[1]) & (top_p_R1 >= 1)
    return best_RW.gather(1, last_R1).masked_fill(is_off_R1, -torch.inf)


# ------------------------------------------------------------------------------------------------------------- noise


@cache
def _process_seed() -> str:
    return secrets.token_hex(16)


def key_of(chunk: Chunk) -> tuple[int, int]:
    """64 bits that stand for a request's seed and the position of the token to be drawn.

    A request without a seed has one that lasts as long as the process.
    """
    seed = params_of(chunk).seed
    source = f"{_process_seed()} {chunk.sequence}" if seed is None else str(seed)
    return struct.unpack("<2i", hashlib.blake2b(f"{source} {chunk.stop}".encode(), digest_size=8).digest())


# ------------------------------------------------------------------------------------------------- log probabilities


def _logprobs(logits_LV: Tensor, chosen_L1: Tensor, count: int) -> Tensor:
    """For each row, in doubles: the chosen token's log probability, then the best tokens' ids, then theirs."""
    best_LB = _best_ids(logits_LV, count)
    norm_L1 = logits_LV.logsumexp(-1, keepdim=True)
    chosen, best = (logits_LV.gather(1, ids) - norm_L1 for ids in (chosen_L1, best_LB))
    return torch.cat((chosen.double(), best_LB.double(), best.double()), dim=1)


def _best_ids(logits_LV: Tensor, count: int) -> Tensor:
    """Ids of the `count` best logits, best first, the lowest id first among equals (which topk leaves open).

    Both go into one integer: a float's bits in an order-preserving form above, the reversed id below.
    """
    vocab = logits_LV.shape[1]
    bits_LV = (logits_LV + 0.0).view(torch.int32).long()  # + 0.0 makes one zero of two
    ordered_LV = bits_LV ^ ((bits_LV >> 31) & 0x7FFFFFFF)
    reversed_V = torch.arange(vocab - 1, -1, -1, device=logits_LV.device)
    return ((ordered_LV << 32) | reversed_V).topk(min(count, vocab)).indices


def _token_logprob(token: int, row: list[float], count: int) -> TokenLogprob:
    """From a row of `_logprobs`, with the first `count` of its best tokens."""
    width = len(row) // 2
    best = zip(row[1 : 1 + count], row[1 + width : 1 + width + count], strict=True)
    return TokenLogprob(token, row[0], tuple((int(id), logprob) for id, logprob in best))


def _sampled(chunk: Chunk, token: float, margin: float, row: list[float] | None) -> Sampled:
    if isnan(margin):
        return Sampled(chunk.sequence, None)
    logprob = _token_logprob(int(token), row, params_of(chunk).logprobs or 0) if row else None
    return Sampled(chunk.sequence, int(token), logprob, margin=margin)
