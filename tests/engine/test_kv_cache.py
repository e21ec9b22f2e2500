"""How many KV blocks there are."""

from __future__ import annotations

import pytest
import torch
from fake_executor import SPEC

from soloist.engine.kv_cache import blocks_that_fit
from soloist.engine.options import EngineOptions
from soloist.errors import CapacityError
from soloist.models.attention import Heads

HEADS = [Heads.of(SPEC.attention.heads, SPEC.attention.kv_heads, 0, 1)] * SPEC.layers


def blocks(**options) -> int:
    return blocks_that_fit(SPEC, HEADS, EngineOptions(block_size=16, **options), torch.device("cpu"), 4)


def test_as_many_as_were_asked_for():
    assert blocks(kv_tokens=100) == 7
    assert blocks(kv_tokens=1) == 1


def test_no_more_than_a_request_can_use():
    assert blocks(max_positions=64, max_sequences=4) == 16


def test_more_than_the_machine_has():
    with pytest.raises(CapacityError, match=r"kv_tokens = 1000000000000000: they take .* ask for fewer"):
        blocks(kv_tokens=10**15)
