"""Some rows of a step attend as they do among the others.

Shape legend: T tokens of the step, H query heads, Q width of keys and values, N sequences, M blocks of a table.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from soloist.kernels.paged_attention import PagedBatch, paged_attention

SIZE = 4  # of a block
STARTS, LENGTHS = [0, 3, 4, 4, 11], [9, 5, 2, 7]  # the third sequence has no token in the step


def step() -> PagedBatch:
    tables_NM = torch.arange(12, dtype=torch.int32).view(4, 3)
    return PagedBatch.of(STARTS, LENGTHS, tables_NM, SIZE)


@pytest.mark.parametrize("bounds", [False, True])
@pytest.mark.parametrize("cut", [0, 2, 3, 4, 7, 11])
def test_of_two_parts(cut: int, bounds: bool) -> None:
    """A sequence may be cut: its first tokens do not see the others. Lists that only bound leave the tensors right."""
    generator = torch.Generator().manual_seed(cut)
    q_THQ, k_cache, v_cache = (torch.randn(n, 2, 8, generator=generator) for n in (STARTS[-1], 48, 48))
    args = torch.arange(2), 0.3
    whole_THQ, whole = paged_attention(q_THQ, k_cache, v_cache, step(), *args), step()
    for first, stop in ((0, cut), (cut, STARTS[-1])):
        part = whole.rows(first, stop, bounds)
        assert part.query_starts[-1] == stop - first
        held = (
            part if not bounds else replace(part, query_starts=part.starts_N.tolist(), lengths=part.lengths_N.tolist())
        )
        assert (held.query_starts, held.lengths) == (held.starts_N.tolist(), held.lengths_N.tolist())
        found_THQ = paged_attention(q_THQ[first:stop], k_cache, v_cache, held, *args)
        torch.testing.assert_close(found_THQ, whole_THQ[first:stop], rtol=1e-5, atol=1e-5)


def test_sequences_elsewhere_are_left_out() -> None:
    assert step().rows(0, 3).lengths == [9]
    assert step().rows(4, 11).lengths == [7]
    assert step().rows(5, 5).lengths == []
    single = PagedBatch.of([0, 1, 2, 3], [5, 6, 7], torch.zeros(3, 2, dtype=torch.int32), SIZE)
    assert single.rows(1, 3, bounds=True).lengths == [6, 7], "each has one token, whatever the lists are"


def test_bounds_keep_both_kinds_of_launches() -> None:
    """One token of a sequence, and several of another one."""
    several = PagedBatch.of([0, 1, 2, 3, 24], [9] * 4, torch.zeros(4, 3), SIZE)
    assert set(several.rows(0, 12, bounds=True).counts) == {0, 1, 11}
    assert PagedBatch.of([0, 24], [9], torch.zeros(1, 3), SIZE).rows(12, 24, bounds=True).counts == [12]
