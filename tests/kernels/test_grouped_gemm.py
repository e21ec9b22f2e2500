"""Grouped GEMM, quantisation and experts in Triton's interpreter, against plain PyTorch.

Shape legend: R rows, X expanded rows, S slots, D input width, N output width, F expert width.
"""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from soloist.kernels.experts import ExpertTiles, Fp8Experts, choose_tiles, fits, swiglu_experts
from soloist.kernels.grouped_gemm import BLOCK, Tile, grouped_gemm
from soloist.kernels.language import AVAILABLE, INTERPRETED
from soloist.kernels.quantise import FP8, quantise

pytestmark = pytest.mark.skipif(not (AVAILABLE and INTERPRETED), reason="needs Triton and TRITON_INTERPRET=1")

COUNTS = [3, 0, 17]  # rows of each slot: an empty one, one that fills no tile, one that needs two
SPARE = 4  # rows behind the last offset
TILE = Tile(16, 16, 16, warps=4, stages=2, programs=2)


def offsets() -> Tensor:
    return torch.tensor(COUNTS).cumsum(0).to(torch.int32)


def by_slot(x_XD: Tensor, weight_SND: Tensor, gated: bool) -> Tensor:
    """The product of each slot's rows with its weight, in fp32."""
    parts = []
    for slot, (start, stop) in enumerate(pairwise([0, *offsets().tolist()])):
        out = x_XD[start:stop].float() @ weight_SND[slot].float().T
        gate, up = out.chunk(2, -1) if gated else (out, out)
        parts.append(F.silu(gate) * up if gated else out)
    return torch.cat(parts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("gathered", [False, True], ids=["rows in order", "rows through the index"])
def test_product_by_slot(gathered: bool, gated: bool, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    rows_RD = torch.randn(9, 32, generator=generator).to(dtype)
    row_X = torch.randint(0, 9, (sum(COUNTS) + SPARE,), generator=generator)
    weight_SND = (torch.randn(3, 64 if gated else 32, 32, generator=generator) / 6).to(dtype)
    x_XD = rows_RD[row_X]
    out_XN = torch.full((len(row_X), 32), float("nan"), dtype=dtype)
    x, index = (rows_RD, row_X) if gathered else (x_XD, None)
    grouped_gemm(x, weight_SND, offsets(), TILE, index, gated, out_XN=out_XN)
    used = sum(COUNTS)
    tolerance = 1e-5 if dtype == torch.float32 else 3e-3
    torch.testing.assert_close(out_XN[:used].float(), by_slot(x_XD, weight_SND, gated), rtol=tolerance, atol=tolerance)
    assert out_XN[used:].isnan().all(), "rows behind the last offset were written"


def test_no_rows_make_no_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA knows no descriptor of an empty tensor."""
    monkeypatch.setattr("soloist.kernels.grouped_gemm.TensorDescriptor", None)
    out_XN = grouped_gemm(torch.zeros(0, 32), torch.zeros(3, 32, 32), offsets() * 0, TILE)
    assert out_XN.shape == (0, 32)


@pytest.mark.parametrize("width", [None, BLOCK], ids=["row", "block"])
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_fp8_scales(gated: bool, width: int | None) -> None:
    """Against a product of the same fp8 values, so that only the scales can be wrong."""
    generator = torch.Generator().manual_seed(1)
    used, d = sum(COUNTS), 2 * BLOCK
    x_XD = torch.randn(used + SPARE, d, generator=generator) * torch.logspace(-2, 0, used + SPARE)[:, None]
    q_XD, scale_XB = quantise(x_XD, width, offsets())
    restored_XD = (q_XD.float().unflatten(1, (scale_XB.shape[1], -1)) * scale_XB[..., None]).flatten(1)
    assert (restored_XD - x_XD)[:used].norm() < 0.1 * x_XD[:used].norm()
    height = (2 if gated else 1) * BLOCK
    q_SND = (torch.randn(3, height, d, generator=generator) / 4).to(FP8)
    if width is None:
        scale_SN = torch.rand(3, height, generator=generator)
        weight_SND = q_SND.float() * scale_SN[..., None]
    else:
        scale_SN = torch.rand(3, height // BLOCK, d // BLOCK, generator=generator)
        weight_SND = q_SND.float() * scale_SN.repeat_interleave(BLOCK, 1).repeat_interleave(BLOCK, 2)
    tile = Tile(16, BLOCK, BLOCK, programs=2)
    out_XN = grouped_gemm(
        q_XD, q_SND, offsets(), tile, gated=gated, scale_R=scale_XB, scale_SN=scale_SN, dtype=torch.float32
    )
    want_XN = by_slot(restored_XD, weight_SND, gated)
    assert (out_XN[:used] - want_XN).norm() < 1e-5 * want_XN.norm()


@pytest.mark.parametrize("gather", [False, True])
def test_experts(gather: bool) -> None:
    generator = torch.Generator().manual_seed(2)
    rows_RD = torch.randn(6, 32, generator=generator)
    row_X = torch.randint(0, 6, (sum(COUNTS) + SPARE,), generator=generator)
    gate_up, down = torch.randn(3, 32, 32, generator=generator) / 6, torch.randn(3, 32, 16, generator=generator) / 4
    y_XD = swiglu_experts(rows_RD, row_X, offsets(), gate_up, down, ExpertTiles(TILE, TILE, gather))
    hidden_XF = by_slot(rows_RD[row_X], gate_up, gated=True)
    torch.testing.assert_close(y_XD[: sum(COUNTS)], by_slot(hidden_XF, down, gated=False), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("width", [None, BLOCK], ids=["row", "block"])
def test_fp8_experts(width: int | None) -> None:
    """Rows expanded together with their scales; within what three bits behind the point allow."""
    generator = torch.Generator().manual_seed(3)
    rows_RD = torch.randn(6, 2 * BLOCK, generator=generator) * torch.logspace(-2, 0, 6)[:, None]
    row_X = torch.randint(0, 6, (sum(COUNTS) + SPARE,), generator=generator)
    gate_up, down = (
        torch.randn(3, 2 * BLOCK, 2 * BLOCK, generator=generator) / 16,
        torch.randn(3, 2 * BLOCK, BLOCK) / 11,
    )
    tile = Tile(16, BLOCK, BLOCK, programs=2)
    experts = Fp8Experts.quantised(gate_up, down, width)
    y_XD = experts.forward(rows_RD, row_X, offsets(), ExpertTiles(tile, tile, gather=False))[: sum(COUNTS)]
    want_XD = by_slot(by_slot(rows_RD[row_X], gate_up, gated=True), down, gated=False)
    assert (y_XD - want_XD).norm() < 0.15 * want_XD.norm()  # the interpreter rounds e4m3 towards zero


def test_tiles_follow_the_load() -> None:
    assert choose_tiles(4, 768).gate_up.bm < choose_tiles(4096, 768).gate_up.bm
    assert choose_tiles(4096, 768) != choose_tiles(4096, 2048)
    assert fits(choose_tiles(4096, 768), 2048, 768)
    assert fits(choose_tiles(0.1, 768), 2048, 768)
    assert fits(choose_tiles(0.1, 384), 2048, 384)
    assert fits(choose_tiles(4, 128, torch.float32), 256, 128)
    assert not fits(choose_tiles(4096, 700), 2048, 700)
