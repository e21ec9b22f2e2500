"""The index in its two forms, in Triton's interpreter, against the definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from soloist.kernels import index
from soloist.kernels.language import AVAILABLE, INTERPRETED

pytestmark = pytest.mark.skipif(not (AVAILABLE and INTERPRETED), reason="needs Triton and TRITON_INTERPRET=1")


@pytest.mark.parametrize("few", [0, 9999], ids=["in parts", "slot by slot"])
@pytest.mark.parametrize(("rows", "slots", "chosen"), [(1100, 5, 3), (70, 140, 8), (1, 1, 1), (40, 7, 0)])
def test_index(few: int, rows: int, slots: int, chosen: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row chooses up to `chosen` slots."""
    monkeypatch.setattr(index, "FEW_ROWS", few)
    monkeypatch.setattr(index, "MANY_SLOTS", 1000)
    generator, top_k = torch.Generator().manual_seed(rows), max(1, chosen)
    slots_RK = torch.stack([torch.randperm(slots, generator=generator)[:top_k] for _ in range(rows)]).int()
    slots_RK[torch.rand(rows, top_k, generator=generator) < 0.4 if chosen else torch.ones(rows, top_k).bool()] = -1
    weights_RK = torch.rand(rows, top_k, generator=generator)
    out = (
        torch.zeros(rows * top_k, dtype=torch.int64),
        torch.zeros(rows * top_k),
        torch.full((rows, top_k), -7, dtype=torch.int32),
        torch.full((slots,), -7, dtype=torch.int32),
    )
    index.make_index(slots_RK, weights_RK, rows, top_k, slots, out)
    row_X, weight_X, place_RK, offsets_S = out
    for found, wanted in zip((row_X, weight_X), _defined(slots_RK, weights_RK, slots), strict=True):
        assert torch.equal(found[: len(wanted)], wanted)
        assert not found[len(wanted) :].any()
    counts_S = torch.bincount(slots_RK[slots_RK >= 0], minlength=slots)
    assert torch.equal(offsets_S.long(), counts_S.cumsum(0))
    for row in range(rows):
        wanted = sorted(slots_RK[row][slots_RK[row] >= 0].tolist())
        places = place_RK[row, : len(wanted)].long()
        assert (row_X[places] == row).all()
        assert torch.searchsorted(offsets_S.long(), places, right=True).tolist() == wanted
        assert (place_RK[row, len(wanted) :] == -7).all()


def _defined(slots_RK: Tensor, weights_RK: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    """By slot, then row."""
    key_RK = slots_RK.long().where(slots_RK >= 0, slots)
    order = torch.argsort(key_RK.flatten(), stable=True)[: int((slots_RK >= 0).sum())]
    return order // slots_RK.shape[1], weights_RK.flatten()[order]
