"""The plain forms around the expert GEMMs: unused entries never show, and sums keep their order."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from soloist.dispatch.rows import expert_major
from soloist.kernels.reference import (
    GroupedLinear,
    expand,
    grouped_linear,
    grouped_linear_loop,
    member_table,
    ordered_sum,
    weighted_sum,
)


def random_slots(rows: int, top_k: int, slots: int, seed: int) -> torch.Tensor:
    """slot_RK: different slots in a row, at least one, about half of the choices belonging to other groups."""
    generator = torch.Generator().manual_seed(seed)
    liked_R2S = torch.rand(rows, 2 * max(slots, top_k), generator=generator)
    if slots:
        liked_R2S[torch.arange(rows), torch.randint(slots, (rows,), generator=generator)] += 1
    slot_RK = liked_R2S.topk(top_k).indices
    return slot_RK.where(slot_RK < slots, -1).int()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 20), st.integers(1, 5), st.integers(1, 6), st.integers(0, 99), st.booleans())
def test_weighted_sum_with_poisoned_tail(rows: int, top_k: int, slots: int, seed: int, is_poisoned: bool) -> None:
    """Bit for bit: fp32, in slot order, rounded once; entries behind the last offset hold NaN."""
    generator = torch.Generator().manual_seed(seed)
    slot_RK, weight_RK = random_slots(rows, top_k, slots, seed), torch.rand(rows, top_k, generator=generator)
    row_X, weight_X, offsets_S = expert_major(slot_RK, weight_RK, slots)
    used = int(offsets_S[-1])
    out_XD = torch.randn(len(row_X), 3, generator=generator).bfloat16()
    out_XD[used:], weight_X[used:] = torch.nan, torch.nan
    if not is_poisoned:
        row_X, weight_X, out_XD = row_X[:used], weight_X[:used], out_XD[:used]
    y_RD = weighted_sum(out_XD, row_X, weight_X, offsets_S, rows, min(top_k, slots))
    for row in range(rows):
        total = torch.zeros(3)
        for x in [x for x in range(used) if row_X[x] == row]:
            total = total + weight_X[x] * out_XD[x].float()
        assert torch.equal(y_RD[row], total.bfloat16())


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 20), st.integers(1, 5), st.integers(0, 6), st.integers(0, 99))
def test_expert_major_order(rows: int, top_k: int, slots: int, seed: int) -> None:
    slot_RK, weight_RK = random_slots(rows, top_k, slots, seed), torch.rand(rows, top_k)
    row_X, weight_X, offsets_S = expert_major(slot_RK, weight_RK, slots)
    pairs = [(slot, row, k) for row in range(rows) for k, slot in enumerate(slot_RK[row].tolist()) if slot >= 0]
    pairs.sort()
    assert offsets_S.tolist() == [sum(p[0] <= slot for p in pairs) for slot in range(slots)]
    assert row_X[: len(pairs)].tolist() == [row for _, row, _ in pairs]
    assert weight_X[: len(pairs)].tolist() == [float(weight_RK[row, k]) for _, row, k in pairs]
    assert len(row_X) == rows * top_k
    assert ((row_X >= 0) & (row_X < max(rows, 1))).all()


@pytest.mark.parametrize("form", [grouped_linear, grouped_linear_loop])
@pytest.mark.parametrize("has_bias", [False, True])
def test_grouped_linear(form: GroupedLinear, has_bias: bool) -> None:
    """Empty slots first, in between and last; rows behind the last offset hold NaN."""
    generator = torch.Generator().manual_seed(0)
    x_XD, weight_SND = torch.randn(11, 8, generator=generator), torch.randn(5, 12, 8, generator=generator)
    x_XD[7:] = torch.nan
    bias_SN = torch.randn(5, 12, generator=generator) if has_bias else None
    out_XN = form(x_XD, weight_SND, torch.tensor([0, 3, 3, 7, 7], dtype=torch.int32), bias_SN)
    expected = torch.cat([x_XD[:3] @ weight_SND[1].T, x_XD[3:7] @ weight_SND[3].T])
    if bias_SN is not None:
        expected += torch.cat([bias_SN[1].expand(3, -1), bias_SN[3].expand(4, -1)])
    assert out_XN.shape == (11, 12)
    torch.testing.assert_close(out_XN[:7], expected)


@pytest.mark.parametrize("form", [grouped_linear, grouped_linear_loop])
def test_grouped_linear_without_rows(form: GroupedLinear) -> None:
    out_XN = form(torch.empty(0, 8), torch.randn(2, 12, 8), torch.zeros(2, dtype=torch.int32), torch.randn(2, 12))
    assert out_XN.shape == (0, 12)


def test_member_table() -> None:
    """Entries in ascending order; those of sum 3, which is none of the three, are left out."""
    member_PJ = member_table(torch.tensor([2, 0, 3, 2, 3, 2]), 3, 3)
    assert member_PJ.tolist() == [[1, 6, 6], [6, 6, 6], [0, 3, 5]]


def test_the_order_of_a_sum_is_kept() -> None:
    """1e8 − 1e8 + 1 is 1 from the left; any other order loses the 1."""
    values = torch.tensor([[1.0], [1e8], [-1e8]])
    assert ordered_sum(values, torch.tensor([[1, 2, 0], [0, 1, 2]])).tolist() == [[1.0], [0.0]]


def test_expand_reads_strided_rows() -> None:
    wide = torch.randn(4, 10)
    assert torch.equal(expand(wide[:, :6], torch.tensor([3, 0, 0])), wide[[3, 0, 0], :6])
