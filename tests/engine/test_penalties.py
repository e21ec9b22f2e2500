"""Penalties and biases: transformers' processors are the reference, OpenAI's definition where they have none."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.generation.logits_process import (
    MinNewTokensLengthLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
)

from soloist.engine.penalties import adjusted, changes
from soloist.scheduling.request import SamplingParams
from tests.engine.test_sampler import PROMPT, V, after, history, logits_of

sequences = st.lists(st.integers(0, V - 1), min_size=1, max_size=20).map(tuple)
wishes = st.builds(
    SamplingParams,
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.7]),
    presence_penalty=st.sampled_from([0.0, 0.5, -2.0]),
    frequency_penalty=st.sampled_from([0.0, 1.1, -0.25]),
    logit_bias=st.sampled_from([(), ((3, 2.0), (8, -100.0))]),
)


def reference(logits_V: Tensor, said: tuple[int, ...], wish: SamplingParams, forbidden: tuple[int, ...]) -> Tensor:
    ids, row = torch.tensor([said]), logits_V[None].clone()
    if wish.logit_bias:
        row = SequenceBiasLogitsProcessor([[[token], bias] for token, bias in wish.logit_bias])(ids, row)
    row = RepetitionPenaltyLogitsProcessor(wish.repetition_penalty)(ids, row)
    for token, times in Counter(said[PROMPT:]).items():
        row[0, token] -= wish.presence_penalty + times * wish.frequency_penalty
    if forbidden:
        row = MinNewTokensLengthLogitsProcessor(len(said), 1, list(forbidden))(ids, row)
    return row[0]


@settings(max_examples=100, deadline=None)
@given(said=sequences, rows=st.lists(st.tuples(wishes, st.sampled_from([(), (7, 3)])), min_size=1, max_size=5))
def test_every_row_of_a_batch_is_that_of_the_reference(said, rows):
    logits_CV = logits_of(len(rows), seed=len(said))
    before_CV = logits_CV.clone()
    chunks = [after(said, wish, forbidden) for wish, forbidden in rows]
    got_CV = adjusted(logits_CV, chunks, history(said))
    assert torch.equal(logits_CV, before_CV)
    for row, (wish, forbidden) in enumerate(rows):
        torch.testing.assert_close(got_CV[row], reference(logits_CV[row], said, wish, forbidden))
        assert changes(chunks[row]) or torch.equal(got_CV[row], logits_CV[row])


def test_who_asks_for_nothing_pays_nothing():
    logits_CV = logits_of(2)
    assert adjusted(logits_CV, [after((1, 2), SamplingParams(top_k=3, temperature=0.0))] * 2, None) is logits_CV


@pytest.mark.parametrize("wish", [SamplingParams(presence_penalty=1.0), SamplingParams(repetition_penalty=2.0)])
def test_a_row_that_is_not_finite_harms_no_other(wish):
    logits_CV = logits_of(2)
    expected = adjusted(logits_CV, [after((1, 2), wish)] * 2, history((1, 2)))
    logits_CV[0] = torch.nan
    got = adjusted(logits_CV, [after((1, 2), wish)] * 2, history((1, 2)))
    assert got[0].isnan().all()
    assert torch.equal(got[1], expected[1])
