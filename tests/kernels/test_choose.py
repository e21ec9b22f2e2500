"""The choice of a token: the kernel against the definition, the definition against a sort."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from soloist.kernels.choose import choose, gumbel
from soloist.kernels.choose_triton import choose_fused
from soloist.kernels.language import AVAILABLE, INTERPRETED


def case(rows: int, vocab: int, seed: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Logits with many ties, temperatures of which some are 0, keys."""
    generator = torch.Generator().manual_seed(seed)
    logits_CV = (4 * torch.randn(rows, vocab, generator=generator)).round().to(dtype)
    temperature_C1 = torch.rand(rows, 1, generator=generator).sub(0.4).clamp(min=0) * 3
    return logits_CV, temperature_C1, torch.randint(-(2**31), 2**31, (rows, 2), generator=generator, dtype=torch.int32)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 6), st.integers(2, 300), st.integers(0, 99))
def test_the_greatest_score_wins_and_the_lowest_id_among_equals(rows: int, vocab: int, seed: int) -> None:
    logits_CV, temperature_C1, keys_C2 = case(rows, vocab, seed)
    token_C, margin_C = choose(logits_CV, temperature_C1, keys_C2)
    for row in range(rows):
        scores = logits_CV[row]
        if temperature_C1[row] > 0:
            scores = (scores - scores.max()) / temperature_C1[row] + gumbel(keys_C2[row : row + 1], vocab)[0]
        order = sorted(range(vocab), key=lambda i: (-scores[i].item(), i))
        assert token_C[row] == order[0]
        lead = scores[order[0]].item() - scores[order[1]].item()
        assert margin_C[row].item() == pytest.approx(lead, rel=1e-6, abs=1e-6)


def test_a_row_that_is_not_finite_has_no_margin() -> None:
    logits_CV, temperature_C1, keys_C2 = case(4, 40, 1)
    logits_CV[0, 7], logits_CV[1], logits_CV[2, 3] = torch.nan, -torch.inf, torch.inf
    _, margin_C = choose(logits_CV, temperature_C1, keys_C2)
    assert margin_C.isnan().tolist() == [True, True, True, False]


def check(device: str, dtype: torch.dtype) -> None:
    """The kernel gives the definition's token, save where two scores lie closer than rounding."""
    for rows, vocab, seed in ((1, 2, 0), (5, 97, 1), (3, 8192, 2), (4, 20_001, 3)):
        arguments = [x.to(device) for x in case(rows, vocab, seed, dtype)]
        expected, found = choose(*arguments), choose_fused(*arguments)
        clear_C = expected[1] > 1e-5
        exact_C = (arguments[1][:, 0] == 0) | clear_C
        assert (found[0] == expected[0])[exact_C].all()
        torch.testing.assert_close(found[1], expected[1], atol=1e-4, rtol=0)
    broken_CV, temperature_C1, keys_C2 = (x.to(device) for x in case(4, 40, 1))
    broken_CV[0, 7], broken_CV[1], broken_CV[2, 3] = torch.nan, -torch.inf, torch.inf
    token_C, margin_C = choose_fused(broken_CV, temperature_C1, keys_C2)
    assert margin_C.isnan().tolist() == [True, True, True, False]
    assert ((token_C >= 0) & (token_C < 40)).all()


needs_triton = pytest.mark.skipif(not AVAILABLE or not INTERPRETED, reason="needs Triton and TRITON_INTERPRET=1")


@needs_triton
def test_the_kernel_in_the_interpreter() -> None:
    check("cpu", torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_on_a_gpu(dtype: torch.dtype) -> None:
    check("cuda", dtype)
