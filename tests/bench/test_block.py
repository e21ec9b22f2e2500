"""The block benchmark's comparison, on a CPU, where fused and plain forms are the same."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest
import torch

from soloist.bench.block import BlockRun
from soloist.engine.options import EngineOptions
from soloist.moe.router import Router, Routing
from soloist.specs.layout import Layout
from soloist.specs.presets import preset


def test_a_token_that_changed_its_expert_is_told_from_a_wrong_value(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = preset("qwen3-30b-a3b@2")
    spec = msgspec.structs.replace(spec, d_model=64, vocab=512, expert=msgspec.structs.replace(spec.expert, width=32))
    options = EngineOptions(replicate_below=64, max_batch_tokens=64, max_sequences=8, kv_tokens=1024, block_size=16)
    bench = cast(Any, SimpleNamespace(device=torch.device("cpu"), rank=0, size=1))
    run = BlockRun(bench, spec, Layout.parse("ep1"), 5, options)
    with torch.inference_mode():
        run.prepare()
        assert run.error() == (0.0, 0.0, 0)
        calls, route = iter(range(4)), Router.route

        def flipped(router: Router, x_TD: torch.Tensor) -> Routing:
            routing = route(router, x_TD)
            if next(calls) == 2:  # in the first layer of the plain form
                routing.expert_ids_TK[3, 0] = (routing.expert_ids_TK[3] + 1).remainder(128).sort().values[0]
            return routing

        monkeypatch.setattr(Router, "route", flipped)
        error, whole, moved = run.error()
    assert (error, moved) == (0.0, 1)
    assert whole > 1e-3
