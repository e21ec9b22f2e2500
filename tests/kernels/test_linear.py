"""A row's result does not depend on the rows beside it, however many threads there are."""

from __future__ import annotations

from itertools import accumulate, pairwise

import pytest
import torch

from soloist.kernels.linear import grouped_mm, linear
from soloist.kernels.paged_attention import PagedBatch, paged_attention
from tests.blas import where_measured

pytestmark = where_measured

ROWS = (1, 2, 3, 5, 6, 7, 11, 16, 33)
BLOCK = 16


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("shape", [(256, 16), (256, 512), (128, 256), (1000, 130)], ids=str)
def test_linear(shape, threads):
    inner, outer = shape
    x_TD, weight_ND, bias_N = torch.randn(64, inner), torch.randn(outer, inner), torch.randn(outer)
    whole = linear(x_TD, weight_ND, bias_N)
    torch.testing.assert_close(whole, torch.nn.functional.linear(x_TD, weight_ND, bias_N))
    for rows in ROWS:
        assert torch.equal(linear(x_TD[:rows], weight_ND, bias_N), whole[:rows]), rows


def test_groups(threads):
    x_XD, weight_SND = torch.randn(64, 128), torch.randn(4, 256, 128)
    for offsets in ([1, 1, 8, 20], [3, 12, 14, 64]):
        found = grouped_mm(x_XD, weight_SND, torch.tensor(offsets, dtype=torch.int32))
        for weight_ND, start, stop in zip(weight_SND, [0, *offsets], offsets, strict=False):
            assert torch.equal(found[start:stop], linear(x_XD, weight_ND)[start:stop]), (start, stop)


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("length", [40, 300, 450])
def test_attention(length, sinks, threads):
    """Of a context in one chunk, in uneven chunks, and token by token at its end."""
    heads, kv_heads, width = 4, 2, 64
    q_THQ = torch.randn(length, heads, width)
    k_cache, v_cache = torch.randn(2, -(-length // BLOCK) * BLOCK, kv_heads, width)
    tables_NM = torch.arange(len(k_cache) // BLOCK)[None]
    sinks_H = torch.randn(heads) if sinks else None

    def attend(*chunks: tuple[int, int]) -> torch.Tensor:
        """Chunks of the same context, as if of several sequences."""
        starts = [0, *accumulate(stop - start for start, stop in chunks)]
        batch = PagedBatch.of(starts, [stop for _, stop in chunks], tables_NM.expand(len(chunks), -1), BLOCK)
        q_tHQ = torch.cat([q_THQ[start:stop] for start, stop in chunks])
        kv_head_H = torch.arange(heads) // (heads // kv_heads)
        return paged_attention(q_tHQ, k_cache, v_cache, batch, kv_head_H, width**-0.5, sinks_H=sinks_H)

    whole = attend((0, length))
    chunks = list(pairwise([0, 1, 4, 23, *range(length - 9, length + 1)]))
    assert torch.equal(torch.cat([attend(chunk) for chunk in chunks]), whole)
    assert torch.equal(attend(*chunks), whole)
