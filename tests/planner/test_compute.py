from __future__ import annotations

import pytest

from soloist.planner.calibration import Calibration
from soloist.planner.collectives import collective_seconds
from soloist.planner.compute import (
    DecodeAttention,
    ExpertWork,
    active_experts,
    decode_attention_seconds,
    experts_seconds,
    predict_experts,
)
from soloist.planner.tables import ExpertRow
from soloist.specs.cluster import cluster, preset_gpus

PUBLISHED = Calibration.published()
GEMM = PUBLISHED.find("experts", "gemm").constants
ATTENTION = PUBLISHED.find("attention", "decode", "mla").constants
NCCL = PUBLISHED.find("collectives", "nccl").constants
H100 = preset_gpus()["H100-80GB"]


def experts(pairs: float, active: float, gpu: str = "H100-80GB", dtype: str = "fp8") -> float:
    work = ExpertWork(pairs=pairs, active=active, hidden=7168, width=2048, dtype=dtype)
    return experts_seconds(work, preset_gpus()[gpu], GEMM)


def test_few_rows_cost_the_reading_of_weights() -> None:
    """An fp8 expert of 44 MB takes about 16 µs to read on an H100, whatever its few rows."""
    assert experts(32, 8) - experts(16, 4) == pytest.approx(4 * 16.1e-6, rel=0.05)
    assert experts(16, 4) == pytest.approx(experts(4, 4), rel=0.01)


def test_many_rows_cost_arithmetic() -> None:
    assert experts(65536, 4) / experts(32768, 4) == pytest.approx(2, rel=0.05)


def test_no_rows_no_time() -> None:
    assert experts(0, 0) == 0


def test_a_stated_mfu_takes_the_place_of_the_calibrated_one() -> None:
    rate = 2 * 3 * 7168 * 2048 * 65536 / experts(65536, 4, "card-400tf", "bf16")
    assert 0.75 * 240e12 < rate < 240e12


def test_faster_memory_speeds_up_decode_attention() -> None:
    work = DecodeAttention("gqa", 64, 4096, 4, 1024.0, 512.0)
    h100, h200 = (decode_attention_seconds(work, preset_gpus()[g], ATTENTION) for g in ("H100-80GB", "H200"))
    assert h200 < h100


@pytest.mark.parametrize("kind", ["all_reduce", "all_gather", "reduce_scatter", "all_to_all"])
@pytest.mark.parametrize("gpus", [2, 4, 8, 16, 64])
def test_collectives_grow_with_size(kind: str, gpus: int) -> None:
    times = [collective_seconds(kind, gpus, 4**i * 1024, cluster("dgx-h100"), NCCL) for i in range(10)]
    assert times == sorted(times)
    assert times[-1] > 3 * times[0]


def test_crossing_nodes_costs_more_than_staying_inside() -> None:
    inside, across = (collective_seconds("all_reduce", n, 1 << 22, cluster("dgx-h100"), NCCL) for n in (8, 16))
    assert across > inside


def test_one_gpu_needs_no_collective() -> None:
    assert collective_seconds("all_reduce", 1, 1 << 20, cluster("dgx-h100"), NCCL) == 0


def expert_row(group_tokens: int, source: str = "aiconfigurator", active: float | None = None) -> ExpertRow:
    return ExpertRow(
        role="check", source=source, gpu="H800", dtype="fp8", hidden=7168, ffn=2048, experts=256, top_k=8, ep=64,
        group_tokens=group_tokens, routing="uniform", us=1.0, active=active,
    )  # fmt: skip


def test_rows_of_deepgemm_are_products_alone() -> None:
    """Four experts with 8192 rows each: 1443 GFLOP of gate and up at 1297 TFLOP/s, 481 of down at 1099, by DeepGEMM's
    own figures. A whole layer has passes over 32768 rows besides."""
    alone, whole = (predict_experts(expert_row(262144, source), H100, GEMM) for source in ("DeepGEMM H800", "a layer"))
    measured = 4 * 8192 * 2 * 7168 * (4096 / 1297e12 + 2048 / 1099e12)
    assert alone == pytest.approx(measured, rel=0.15)
    assert whole > 1.3 * alone


def test_experts_that_were_counted_take_the_place_of_those_expected() -> None:
    assert active_experts(expert_row(8)) == pytest.approx(4 * (1 - (1 - 8 / 256) ** 8))
    assert active_experts(expert_row(8, active=2.5)) == 2.5
    one, two = (predict_experts(expert_row(8, active=active), H100, GEMM) for active in (1.0, 2.0))
    assert two > one
