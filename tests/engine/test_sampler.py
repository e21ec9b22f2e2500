"""Sampler: against plain references row by row, against transformers' processors, and against the odds."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from scipy.stats import chisquare
from torch import Tensor
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from soloist.engine.history import History
from soloist.engine.sampler import draw, score_prompt
from soloist.scheduling.request import Chunk, Sampled, SamplingParams

V = 64
GREEDY = SamplingParams(temperature=0)
DRAWN = SamplingParams(seed=1)


SAID, PROMPT, SLOTS = (3, 3, 9, 1, 2, 1, 40, 40, 40), 4, 4  # a sequence, its prompt's length, slots of a block


def chunk(params: SamplingParams, sequence: int = 0, stop: int = 5) -> Chunk:
    return Chunk(sequence, (1,), stop - 1, (0,), True, params)


def after(said: tuple[int, ...], params: SamplingParams, forbidden: tuple[int, ...] = (), sequence: int = 0) -> Chunk:
    """Of a sequence whose blocks lie scattered, and shared with others that said the same."""
    blocks = tuple(range(2 * (-(-len(said) // SLOTS)), 0, -2))
    return Chunk(sequence, said[-1:], len(said) - 1, blocks, True, params, min(PROMPT, len(said)), forbidden)


def history(said: tuple[int, ...], device: str = "cpu") -> History:
    """As `after` finds it; what lies behind its end is somebody's, too."""
    written = History(12, SLOTS, torch.device(device))
    blocks = torch.tensor(after(said, GREEDY).blocks)
    padded = torch.tensor([*said, *[5] * (len(blocks) * SLOTS - len(said))])
    slots = (blocks[:, None] * SLOTS + torch.arange(SLOTS)).flatten()
    written.write(slots.to(device), padded.to(device))
    return written


def logits_of(rows: int, seed: int = 0, vocab: int = V) -> Tensor:
    return 2 * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))


def sample(logits_CV: Tensor, chunks: list[Chunk], said: History | None = None) -> list[Sampled]:
    return draw(logits_CV, chunks, said).sampled()


def draws(logits_V: Tensor, params: SamplingParams, count: int) -> list[int]:
    """`count` independent draws: the same row at as many positions."""
    chunks = [chunk(params, stop=position) for position in range(1, count + 1)]
    return [int(s.token) for s in sample(logits_V.expand(count, -1), chunks) if s.token is not None]


def by_transformers(logits_V: Tensor, params: SamplingParams, history: tuple[int, ...]) -> Tensor:
    """Probabilities by transformers' processors, in the order in which its generate() applies them."""
    processors = LogitsProcessorList()
    if params.logit_bias:
        processors.append(SequenceBiasLogitsProcessor([[[token], bias] for token, bias in params.logit_bias]))
    if params.repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    processors.append(TemperatureLogitsWarper(params.temperature))
    if params.top_k:
        processors.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        processors.append(TopPLogitsWarper(params.top_p))
    if params.min_p:
        processors.append(MinPLogitsWarper(params.min_p))
    return processors(torch.tensor([history]), logits_V[None].clone())[0].softmax(-1)


FILTERS = [
    SamplingParams(seed=7, temperature=1.0),
    SamplingParams(seed=7, temperature=0.6),
    SamplingParams(seed=7, temperature=1.7, top_k=5),
    SamplingParams(seed=7, top_p=0.8),
    SamplingParams(seed=7, top_k=12, top_p=0.7, temperature=1.3),
    SamplingParams(seed=7, min_p=0.1),
    SamplingParams(seed=7, top_k=30, top_p=0.95, min_p=0.02, temperature=0.9),
]
PENALTIES = [
    SamplingParams(seed=7, repetition_penalty=1.8, top_k=20),
    SamplingParams(seed=7, repetition_penalty=0.7),
    SamplingParams(seed=7, presence_penalty=1.5, frequency_penalty=-0.5),
    SamplingParams(seed=7, repetition_penalty=1.2, logit_bias=((3, 2.0), (8, -100.0)), frequency_penalty=0.3),
]


@pytest.mark.parametrize("params", FILTERS)
def test_draws_follow_the_distribution_of_transformers(params: SamplingParams) -> None:
    logits_V, count = logits_of(1, seed=3)[0], 20_000
    expected_V = by_transformers(logits_V, params, ()).double() * count
    seen_V = torch.bincount(torch.tensor(draws(logits_V, params, count)), minlength=V)
    assert not seen_V[expected_V == 0].any()
    often = expected_V > 5
    seen = [*seen_V[often].tolist(), int(seen_V[~often].sum())]
    expected = [*expected_V[often].tolist(), float(expected_V[~often].sum())]
    if expected[-1] < 5:
        seen, expected = [*seen[:-2], seen[-2] + seen[-1]], [*expected[:-2], expected[-2] + expected[-1]]
    assert chisquare(seen, [e * count / sum(expected) for e in expected]).pvalue > 1e-4


@settings(max_examples=150, deadline=None)
@given(
    rows=st.lists(
        st.tuples(
            st.sampled_from([0.0, 0.3, 1.0, 2.5]),
            st.integers(0, 40),
            st.sampled_from([1.0, 0.95, 0.5, 0.05]),
            st.sampled_from([0.0, 0.05, 1.0]),
            st.sampled_from([1.0, 1.3]),
            st.sampled_from([(), ((3, 4.0), (9, -4.0), (20, 1.0))]),
        ),
        min_size=1,
        max_size=6,
    ),
    seed=st.integers(0, 10_000),
)
def test_a_row_of_a_mixed_batch_gets_what_it_gets_alone_and_transformers_keeps(
    rows: list[tuple[float, int, float, float, float, tuple]], seed: int
) -> None:
    wishes = [
        SamplingParams(temperature=t, top_k=k, top_p=p, min_p=m, repetition_penalty=r, logit_bias=b, seed=seed)
        for t, k, p, m, r, b in rows
    ]
    logits_CV, said = logits_of(len(rows), seed), history(SAID)
    chunks = [after(SAID, wish, sequence=i) for i, wish in enumerate(wishes)]
    for row, (wish, got) in enumerate(zip(wishes, sample(logits_CV, chunks, said), strict=True)):
        kept_V = by_transformers(logits_CV[row], replace(wish, temperature=wish.temperature or 1.0), SAID)
        assert kept_V[got.token] > 0
        assert got == sample(logits_CV[row : row + 1], [chunks[row]], said)[0]
        if not wish.temperature:
            best = kept_V.log().topk(2) if kept_V.count_nonzero() > 1 else kept_V.topk(2)
            assert got.token == best.indices[0]


def test_a_draw_depends_on_seed_position_and_logits_only() -> None:
    logits_CV = logits_of(40)
    row = logits_CV[17]
    wish = SamplingParams(seed=5, top_p=0.95)
    (alone,) = sample(row[None], [chunk(wish, sequence=3, stop=9)])
    chunks = [chunk(replace(wish, seed=i, top_k=i), sequence=i, stop=i + 1) for i in range(40)]
    chunks[17] = chunk(wish, sequence=99, stop=9)
    together = sample(logits_CV, chunks)[17]
    assert (together.token, together.margin) == (alone.token, alone.margin)
    assert len(set(draws(row, wish, 200))) > 5
    assert len({sample(row[None], [chunk(replace(wish, seed=s))])[0].token for s in range(200)}) > 5


def test_the_draw_of_a_seed_never_changes() -> None:
    """Recorded draws: a seed means the same text in every release and on every device."""
    assert draws(torch.zeros(1000), SamplingParams(seed=42), 6) == [466, 762, 636, 36, 507, 728]


def test_without_a_seed_requests_differ_and_each_repeats_itself() -> None:
    logits_CV = torch.zeros(50, V)
    chunks = [chunk(SamplingParams(), sequence=i) for i in range(50)]
    tokens = [s.token for s in sample(logits_CV, chunks)]
    assert len(set(tokens)) > 20
    assert [s.token for s in sample(logits_CV, chunks)] == tokens


def test_neighbouring_seeds_and_positions_are_independent() -> None:
    """Every token of a flat distribution is drawn about equally often over a grid of seeds and positions."""
    seeds, positions = 60, 200
    counts = torch.zeros(V)
    for seed in range(seeds):
        drawn = draws(torch.zeros(V), SamplingParams(seed=seed), positions)
        counts += torch.bincount(torch.tensor(drawn), minlength=V)
    assert chisquare(counts.numpy()).pvalue > 1e-4


def test_greedy_takes_the_lowest_id_among_equals() -> None:
    logits_CV = torch.zeros(2, V)
    logits_CV[0, [9, 4, 30]] = 1
    chosen = sample(logits_CV, [chunk(GREEDY), chunk(GREEDY)])
    assert [(s.token, s.margin) for s in chosen] == [(4, 0.0), (0, 0.0)]


def test_top_k_of_one_and_tiny_temperatures_are_greedy() -> None:
    logits_CV = logits_of(3)
    wishes = [SamplingParams(top_k=1), SamplingParams(temperature=1e-38), SamplingParams(top_p=1e-9)]
    for seed in range(20):
        chosen = sample(logits_CV, [chunk(replace(wish, seed=seed)) for wish in wishes])
        assert [s.token for s in chosen] == logits_CV.argmax(-1).tolist()


@pytest.mark.parametrize("wish", [GREEDY, DRAWN, SamplingParams(top_k=4, top_p=0.5, seed=1)])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_row_that_is_not_finite_gives_no_token_and_harms_no_other(wish: SamplingParams, value: float) -> None:
    logits_CV = logits_of(3)
    expected = sample(logits_CV, [chunk(wish)] * 3)
    broken_CV = logits_CV.clone()
    broken_CV[1] = value
    got = sample(broken_CV, [chunk(wish)] * 3)
    assert got[1].token is None
    assert (got[0], got[2]) == (expected[0], expected[2])
    if value != -float("inf"):
        broken_CV[1] = logits_CV[1]
        broken_CV[1, 5] = value
        assert sample(broken_CV, [chunk(wish)] * 3)[1].token is None


def test_masked_tokens_are_never_drawn() -> None:
    logits_V = torch.full((V,), -float("inf"))
    logits_V[[3, 8]] = 0.0
    assert set(draws(logits_V, SamplingParams(seed=0), 200)) == {3, 8}
    assert set(draws(logits_V, SamplingParams(seed=0, top_p=0.99, top_k=30), 200)) == {3, 8}


def test_log_probabilities_are_those_of_the_model() -> None:
    logits_CV = logits_of(4)
    logits_CV[2, [50, 7, 20]] = 9.0
    wishes = [
        GREEDY,
        replace(GREEDY, logprobs=0),
        SamplingParams(seed=1, logprobs=3, temperature=0.3, top_k=4, repetition_penalty=2.0),
        replace(GREEDY, logprobs=5),
    ]
    before = logits_CV.clone()
    chosen = sample(logits_CV, [after(SAID, wish, sequence=i) for i, wish in enumerate(wishes)], history(SAID))
    assert torch.equal(logits_CV, before)
    raw_CV = logits_CV.log_softmax(-1)
    assert chosen[0].logprob is None
    for row, s in enumerate(chosen[1:], start=1):
        assert s.logprob is not None
        assert s.logprob.token == s.token
        assert s.logprob.logprob == pytest.approx(raw_CV[row, s.token].item(), abs=1e-5)
        count = wishes[row].logprobs or 0
        assert [lp for _, lp in s.logprob.top] == pytest.approx(raw_CV[row].topk(count).values.tolist(), abs=1e-5)
        assert [lp for _, lp in s.logprob.top] == pytest.approx(
            [raw_CV[row, token].item() for token, _ in s.logprob.top], abs=1e-5
        )
    assert chosen[2].logprob is not None
    assert [token for token, _ in chosen[2].logprob.top] == [7, 20, 50]  # equals: the lowest id first


@pytest.mark.parametrize(("following", "targets"), [(-1, [5, 6]), (7, [5, 6, 7])])
def test_prompt_log_probabilities(following: int, targets: list[int]) -> None:
    logits_NV = logits_of(3)
    wish = SamplingParams(prompt_logprobs=2)
    part = Chunk(0, (4, 5, 6), 0, (0,), False, wish, scores_prompt=True, following=following)
    raw_NV = logits_NV.log_softmax(-1)
    got = score_prompt(logits_NV, part).logprobs()
    assert [t.token for t in got] == targets
    for row, t in enumerate(got):
        assert t.logprob == pytest.approx(raw_NV[row, t.token].item(), abs=1e-5)
        assert [token for token, _ in t.top] == raw_NV[row].topk(2).indices.tolist()


def test_prompt_log_probabilities_of_one_token_and_of_many() -> None:
    wish = SamplingParams(prompt_logprobs=0)
    assert score_prompt(logits_of(1), Chunk(0, (4,), 0, (0,), True, wish, scores_prompt=True)).logprobs() == ()
    tokens = tuple(i % V for i in range(700))
    logits_NV = logits_of(700)
    got = score_prompt(logits_NV, Chunk(0, tokens, 0, (0,), True, wish, scores_prompt=True)).logprobs()
    expected = logits_NV.log_softmax(-1)[range(699), tokens[1:]]
    assert [t.logprob for t in got] == pytest.approx(expected.tolist(), abs=1e-5)


def test_nothing_to_sample() -> None:
    assert sample(torch.empty(0, V), []) == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_draws_what_the_cpu_draws() -> None:
    logits_CV = logits_of(60, vocab=5000)
    wishes = [GREEDY, *FILTERS, *PENALTIES, replace(GREEDY, logprobs=4)]
    chunks = [after(SAID, wishes[i % len(wishes)], (i,), sequence=i) for i in range(60)]
    on_cpu = sample(logits_CV, chunks, history(SAID))
    on_gpu = sample(logits_CV.cuda(), chunks, history(SAID, "cuda"))
    assert [s.token for s in on_gpu] == [s.token for s in on_cpu]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_host_does_not_wait_for_a_gpu_that_draws() -> None:
    logits_CV = logits_of(30, vocab=5000).cuda()
    wishes = [GREEDY, *FILTERS, *PENALTIES, replace(GREEDY, logprobs=4), replace(GREEDY, prompt_logprobs=2)]
    chunks = [after(SAID, wishes[i % len(wishes)], (i,), sequence=i) for i in range(30)]
    said = history(SAID, "cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        drawn, scored = (
            draw(logits_CV, chunks, said),
            score_prompt(logits_CV[:1], replace(chunks[-1], params=wishes[-1])),
        )
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(drawn.sampled()) == 30
    assert scored.logprobs() == ()
