"""What changes logits before a token is chosen. Rows that ask for nothing are left alone and cost nothing.

In the order of transformers' processors: biases, repetition penalty, presence and frequency penalty (which transformers
lacks; as OpenAI defines them and vLLM has them), then tokens that must not come.

Shape legend: C chunks (a row of logits each), V vocabulary, R rows that ask for something, P pairs (row, token).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from soloist.engine.history import History
from soloist.engine.host_copy import sent
from soloist.scheduling.request import Chunk, SamplingParams


def changes(chunk: Chunk) -> bool:
    """Whether `adjusted` does anything to a chunk's logits."""
    params = params_of(chunk)
    return bool(params.logit_bias or chunk.forbidden) or _repeats(params) or _says_again(params)


def params_of(chunk: Chunk) -> SamplingParams:
    """Of a chunk that samples or scores its prompt."""
    assert chunk.params is not None
    return chunk.params


def adjusted(logits_CV: Tensor, chunks: Sequence[Chunk], history: History | None) -> Tensor:
    """`logits_CV` (fp32) itself where nobody asks for anything, else a new tensor. The host waits for nothing.

    history: tokens before each chunk's next one; None where no chunk has a penalty.
    """
    logits_CV = _biased(logits_CV, chunks)
    if rows := [row for row, chunk in enumerate(chunks) if _repeats(params_of(chunk))]:
        assert history is not None
        logits_CV = _repetition(logits_CV, rows, [chunks[row] for row in rows], history)
    if rows := [row for row, chunk in enumerate(chunks) if _says_again(params_of(chunk))]:
        assert history is not None
        logits_CV = _said_again(logits_CV, rows, [chunks[row] for row in rows], history)
    forbidden = [(row, token) for row, chunk in enumerate(chunks) for token in chunk.forbidden]
    if forbidden:
        rows_P, tokens_P = sent(forbidden, torch.int64, logits_CV.device).T
        never_P = torch.full_like(rows_P, -torch.inf, dtype=torch.float32)
        logits_CV = logits_CV.index_put((rows_P, tokens_P), never_P)
    return logits_CV


def _repeats(params: SamplingParams) -> bool:
    return params.repetition_penalty != 1


def _says_again(params: SamplingParams) -> bool:
    return params.presence_penalty != 0 or params.frequency_penalty != 0


def _biased(logits_CV: Tensor, chunks: Sequence[Chunk]) -> Tensor:
    biases = [(row, token, bias) for row, chunk in enumerate(chunks) for token, bias in params_of(chunk).logit_bias]
    if not biases:
        return logits_CV
    rows_P, tokens_P = sent([pair[:2] for pair in biases], torch.int64, logits_CV.device).T
    bias_P = sent([bias for *_, bias in biases], torch.float32, logits_CV.device)
    return logits_CV.index_put((rows_P, tokens_P), logits_CV[rows_P, tokens_P] + bias_P)


def _repetition(logits_CV: Tensor, rows: Sequence[int], chunks: Sequence[Chunk], history: History) -> Tensor:
    """Keskar et al. 2019: logits of tokens seen so far are divided by the penalty, or multiplied where negative."""
    device = logits_CV.device
    penalty_R1 = sent([[params_of(chunk).repetition_penalty] for chunk in chunks], torch.float32, device)
    is_seen_RV = history.counts(chunks, logits_CV.shape[1], with_prompt=True) > 0
    rows_R = sent(rows, torch.int64, device)
    old_RV = logits_CV[rows_R]
    new_RV = torch.where(old_RV < 0, old_RV * penalty_R1, old_RV / penalty_R1)
    return logits_CV.index_copy(0, rows_R, torch.where(is_seen_RV, new_RV, old_RV))


def _said_again(logits_CV: Tensor, rows: Sequence[int], chunks: Sequence[Chunk], history: History) -> Tensor:
    """Of what the continuation holds: a token's logit less the presence penalty, and the other for each time."""
    device, params = logits_CV.device, [params_of(chunk) for chunk in chunks]
    penalties_R2 = sent([(p.presence_penalty, p.frequency_penalty) for p in params], torch.float32, device)
    presence_R1, frequency_R1 = penalties_R2.split(1, dim=1)
    count_RV = history.counts(chunks, logits_CV.shape[1], with_prompt=False)
    rows_R = sent(rows, torch.int64, device)
    new_RV = logits_CV[rows_R] - frequency_R1 * count_RV - presence_R1 * (count_RV > 0)
    return logits_CV.index_copy(0, rows_R, new_RV)
