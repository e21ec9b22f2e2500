"""Recordings of several ranks become one trace, if all of them know the same tokens."""

from __future__ import annotations

import numpy as np
import pytest

from soloist.errors import ClusterError
from soloist.placement.recording import TOKEN_FIELDS, merge, pack
from soloist.specs.model import ModelSpec
from soloist.specs.presets import preset


def part(spec: ModelSpec, layer: int, tokens: int) -> bytes:
    ids_LTK = np.tile(np.arange(spec.router.top_k), (1, tokens, 1))
    fields = {name: np.arange(tokens) for name in TOKEN_FIELDS}
    return pack({"layers": np.array([layer]), "ids_LTK": ids_LTK, **fields})


def test_every_stage_must_know_every_token() -> None:
    spec = preset("qwen3-30b-a3b@2")
    merged = merge(spec, [part(spec, layer, 3) for layer in spec.moe_layers])
    assert merged.counts_LE[:, 0].tolist() == [3, 3]
    with pytest.raises(ClusterError, match="as when one is lost: record again"):
        merge(spec, [part(spec, spec.moe_layers[0], 4), part(spec, spec.moe_layers[1], 3)])
