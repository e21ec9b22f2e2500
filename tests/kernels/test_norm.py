"""Fused norms, and heads on their way into the cache, in Triton's interpreter, against the plain forms.

Shape legend: T tokens, D model width, H query heads, C KV heads, Q width of a head, W rotated elements.
"""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from soloist.kernels.language import AVAILABLE, INTERPRETED
from soloist.kernels.norm import fused_heads, fused_norm
from soloist.models.layers import rms_norm
from soloist.models.rope import Rope
from soloist.specs.model import RopeSpec

pytestmark = pytest.mark.skipif(not (AVAILABLE and INTERPRETED), reason="needs Triton and TRITON_INTERPRET=1")

EPS, SLOTS = 1e-5, 12


@pytest.mark.parametrize("d_model", [40, 64])
@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("tokens", [0, 3])
def test_norm_is_the_plain_one(tokens: int, adds: bool, d_model: int) -> None:
    wide = torch.randn(tokens, d_model + 5)
    x_TD, weight_D = wide[:, :d_model], torch.randn(d_model)  # rows that lie apart
    added_TD = torch.randn(tokens, d_model) if adds else None
    sum_TD, normed_TD = fused_norm(x_TD, added_TD, weight_D, EPS)
    want_TD = x_TD if added_TD is None else x_TD + added_TD
    assert_close(sum_TD, want_TD)
    assert_close(normed_TD, rms_norm(want_TD, weight_D, EPS))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads", "width", "rotated"), [(4, 2, 16, 16), (6, 3, 24, 8), (1, 1, 16, 16)])
def test_heads_are_normed_rotated_and_stored(
    heads: int, kv_heads: int, width: int, rotated: int, normed: bool, interleaved: bool
) -> None:
    tokens = 3
    rope = Rope(RopeSpec(width=rotated, interleaved=interleaved), torch.device("cpu"))
    cos, sin = rope.angles(torch.tensor([0, 7, 91]), torch.float32)
    slots_T = torch.tensor([5, 0, 9])
    norms = (torch.randn(width), torch.randn(width)) if normed else None
    keys, values = (torch.full((SLOTS, kv_heads, width), float("nan")) for _ in range(2))
    qkv_TN = torch.randn(tokens, (heads + 2 * kv_heads) * width)
    q_THQ = fused_heads(qkv_TN, norms, EPS, cos, sin, interleaved, slots_T, keys, values)

    def turned(x: torch.Tensor, index: int) -> torch.Tensor:
        x = x.unflatten(-1, (-1, width))
        x = rms_norm(x, norms[index], EPS) if norms else x
        return torch.cat([rope.rotate(x[..., :rotated], cos, sin), x[..., rotated:]], -1)

    q, k, v = qkv_TN.split([heads * width, kv_heads * width, kv_heads * width], -1)
    assert_close(q_THQ, turned(q, 0))
    assert_close(keys[slots_T], turned(k, 1))
    assert_close(values[slots_T], v.unflatten(-1, (-1, width)))
    untouched = [slot for slot in range(SLOTS) if slot not in slots_T.tolist()]
    assert keys[untouched].isnan().all()
    assert values[untouched].isnan().all()
