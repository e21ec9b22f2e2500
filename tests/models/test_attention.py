from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from soloist.kernels.paged_attention import PagedBatch, paged_attention
from soloist.models.attention import Heads


@given(kv_heads=st.integers(1, 6), each=st.integers(1, 5), size=st.integers(1, 20))
def test_heads_cover_everything_and_own_each_kv_head_once(kv_heads: int, each: int, size: int) -> None:
    heads = kv_heads * each
    shares = [Heads.of(heads, kv_heads, index, size) for index in range(size)]
    assert [h for s in shares for h in range(*s.query)] == list(range(heads))
    assert [h for s in shares for h in range(*s.kv_owned)] == list(range(kv_heads))
    for s in shares:
        needed = {h // each for h in range(*s.query)}
        assert set(range(*s.kv)) == needed
        assert (s.kv_of_query(heads, kv_heads) + s.kv[0]).tolist() == [h // each for h in range(*s.query)]


def dense(q, k, v, kv_head, scale, window, sinks):
    """One sequence, written out: loops over heads and queries."""
    queries, length = q.shape[0], k.shape[0]
    out = torch.zeros(queries, q.shape[1], v.shape[-1])
    for h in range(q.shape[1]):
        for i in range(queries):
            position = length - queries + i
            first = 0 if window is None else max(0, position - window + 1)
            scores = k[first : position + 1, kv_head[h]] @ q[i, h] * scale
            if sinks is not None:
                scores = torch.cat([scores, sinks[h : h + 1]])
            weights = scores.softmax(0)[: position + 1 - first]
            out[i, h] = weights @ v[first : position + 1, kv_head[h]]
    return out


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_paged_attention_reads_the_cache_through_its_tables(window: int | None, with_sinks: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    block, heads, width, value_width = 4, 3, 6, 5
    cache_k = torch.full((40, 2, width), float("nan"))  # whatever no table names must not be read
    cache_v = torch.full((40, 2, value_width), float("nan"))
    kv_head = torch.tensor([0, 1, 1])
    sinks = torch.randn(heads, generator=generator) if with_sinks else None
    lengths, queries, tables = [9, 4, 1], [2, 4, 1], [[7, 2, 5], [0, 0, 0], [9, 0, 0]]
    q = torch.randn(sum(queries), heads, width, generator=generator)
    expected = []
    for length, table, rows in zip(lengths, tables, q.split(queries), strict=True):
        k, v = (
            torch.randn(length, 2, width, generator=generator),
            torch.randn(length, 2, value_width, generator=generator),
        )
        for position in range(length):
            slot = table[position // block] * block + position % block
            cache_k[slot], cache_v[slot] = k[position], v[position]
        expected.append(dense(rows, k, v, kv_head, 0.3, window, sinks))
    batch = PagedBatch.of([0, 2, 6, 7], lengths, torch.tensor(tables), block)
    found = paged_attention(q, cache_k, cache_v, batch, kv_head, 0.3, window, sinks)
    torch.testing.assert_close(found, torch.cat(expected), rtol=1e-5, atol=1e-5)


def test_a_rank_without_heads_returns_nothing() -> None:
    batch = PagedBatch.of([0, 2], [2], torch.tensor([[0]]), 4)
    empty = torch.zeros(8, 0, 6)
    found = paged_attention(torch.zeros(2, 0, 6), empty, empty, batch, torch.zeros(0, dtype=torch.int64), 1.0)
    assert found.shape == (2, 0, 6)
