from __future__ import annotations

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from soloist.errors import ConfigurationError
from soloist.kernels.experts import choose_fp8_tiles, choose_tiles
from soloist.planner.exchange import GATHERED_ROWS, PRIORS, ExchangeShape, copies, exchange_seconds, fabric, row_bytes
from soloist.specs.cluster import cluster

H100 = cluster("dgx-h100")
GUESS = {mode: {name: prior.guess for name, prior in priors.items()} for mode, priors in PRIORS.items()}


def shape(mode: str, ranks: int, tokens: float = 128) -> ExchangeShape:
    fields = {"mode": mode, "ranks": ranks, "ranks_per_node": min(8, ranks), "tokens": tokens, "row_bytes": 7392.0}
    return msgspec.convert({**fields, "top_k": 8, "experts": 256}, ExchangeShape)


def test_low_latency_sends_one_copy_for_each_expert() -> None:
    found = copies(shape("low_latency", 64))
    assert found.nic == pytest.approx(8 * 7 / 8)
    assert found.nvlink == pytest.approx(7 / 8)


def test_hierarchy_sends_one_copy_for_each_node() -> None:
    flat, ragged, normal = (copies(shape(mode, 16)).nic for mode in ("low_latency", "ragged", "normal"))
    assert normal < ragged < flat
    assert flat / normal == pytest.approx(4.0, abs=0.05)  # two nodes, top-8


def test_inside_one_node_nothing_crosses_a_nic() -> None:
    assert all(copies(shape(mode, 8)).nic == 0 for mode in PRIORS)


@given(st.sampled_from(sorted(PRIORS)), st.sampled_from([2, 8, 16, 64, 256]), st.integers(1, 8192))
@settings(max_examples=60, deadline=None)
def test_more_tokens_and_more_skew_never_cost_less(mode: str, ranks: int, tokens: int) -> None:
    one = exchange_seconds(shape(mode, ranks, tokens), H100, GUESS[mode])
    assert one < exchange_seconds(shape(mode, ranks, tokens + 100), H100, GUESS[mode])
    assert one < exchange_seconds(shape(mode, ranks, tokens), H100, GUESS[mode], skew=1.5)


def test_traced_copies_take_the_place_of_the_formula() -> None:
    traced = msgspec.structs.replace(shape("normal", 64), node_copies=2.0)
    assert copies(traced).nic == pytest.approx(2.0 * 7 / 8)


def test_fabrics_by_name() -> None:
    assert fabric("H800+CX7-400G", 8).nvlink == 200e9
    assert fabric("A100+HDR-200G", 8).nic == 25e9
    assert fabric("GB200-NVL72", 72).nodes(64) == 1
    assert fabric("EFA-400G", 8).nic_latency_us > fabric("CX7-400G", 8).nic_latency_us


def test_rows_carry_their_scales() -> None:
    assert row_bytes(7168, "fp8") == 7168 + 56 * 4
    with pytest.raises(ConfigurationError, match="int3"):
        row_bytes(1, "int3")


def test_rows_are_read_where_they_are_as_long_as_our_kernels_do() -> None:
    """The planner needs no torch, so it has its own copy of that limit."""
    for fp8 in (False, True):
        few, more = (
            choose_fp8_tiles(rows, in_blocks=True) if fp8 else choose_tiles(rows, 2048, torch.bfloat16)
            for rows in (GATHERED_ROWS, GATHERED_ROWS + 1)
        )
        assert few.gather
        assert not more.gather


@pytest.mark.parametrize("mode", ["ragged", "pushed"])
def test_of_one_sender_s_rows_every_rank_lays_out_its_part(mode: str) -> None:
    """What the sender's links and memory take does not change; rows behind them are spread over all ranks."""
    all_send, constants = shape(mode, 8, 4096), GUESS[mode] | {"local_us": 0.0}
    one, nobody = (msgspec.structs.replace(all_send, share=share) for share in (1 / 8, 0.0))
    whole, spread, sent = (exchange_seconds(each, H100, constants) for each in (all_send, one, nobody))
    assert spread - sent == pytest.approx((whole - sent) / 8)
    assert sent == pytest.approx(
        4096 * 7392 * copies(all_send).endpoint / (constants["endpoint"] * H100.gpu.bandwidth)
        + 4096 * 7392 * copies(all_send).nvlink / (constants["nvlink"] * H100.nvlink)
    )
