from __future__ import annotations

from math import prod

import msgspec
import pytest

from soloist.planner.memory import MemoryLoad, activation_bytes, memory_parts, pushed_tokens, worst_rank
from soloist.planner.precision import Precision
from soloist.planner.weights import PARTS, held_kv_heads, rank_weights
from soloist.specs.layout import Layout
from soloist.specs.parameters import parameters
from soloist.specs.presets import preset

BF16 = Precision.named("bf16")


@pytest.mark.parametrize("name", ["ref-16l", "qwen3-30b-a3b", "deepseek-v3", "gpt-oss-20b"])
def test_one_rank_holds_every_weight(name: str) -> None:
    spec = preset(name)
    parts = rank_weights(spec, Layout().at(0), spec.experts, BF16)
    assert tuple(parts) == PARTS
    assert sum(parts.values()) == pytest.approx(2 * sum(prod(shape) for _, shape in parameters(spec)))


@pytest.mark.parametrize("text", ["ep16", "tp8pp2", "attn8ep8pp2", "ep8tp2", "dp2ep8"])
def test_ranks_hold_the_model_together(text: str) -> None:
    spec, layout = preset("ref-16l"), Layout.parse(text)
    held = [rank_weights(spec, layout.at(rank), spec.experts / layout.ep, BF16) for rank in range(layout.size)]
    whole = rank_weights(spec, Layout().at(0), spec.experts, BF16)
    for part in ("experts", "embedding and head"):
        copies = layout.dp if part == "experts" else layout.dp * layout.attention_groups
        assert sum(h[part] for h in held) == pytest.approx(copies * whole[part], rel=1e-4)  # the last norm is small


def test_kv_cache_of_the_scenario() -> None:
    """1.28 M tokens × 16 layers × 2 × 4096 × 2 bytes = 335.5 GB, 21 GB on each of 16 GPUs."""
    spec = preset("ref-16l")
    load = MemoryLoad(sequences=8, longest=10_000, block=16)
    parts = memory_parts(spec, Layout(ep=16).at(0), BF16, load)
    assert parts["KV cache"] == pytest.approx(335.5e9 / 16, rel=0.001)


def test_latent_cache_is_held_by_every_rank_of_an_attention_group() -> None:
    spec, load = preset("deepseek-v3"), MemoryLoad(sequences=1, longest=1600, block=16)
    alone = memory_parts(spec, Layout(ep=8).at(0), BF16, load)["KV cache"]
    shared = memory_parts(spec, Layout(tp=8).at(3), BF16, load)["KV cache"]
    assert alone == shared == 61 * 576 * 2 * (1600 + 16)  # and the block that padding writes to


def test_kv_heads_are_repeated_when_there_are_more_ranks() -> None:
    assert held_kv_heads(preset("qwen3-30b-a3b"), 8) == 1
    assert held_kv_heads(preset("qwen3-30b-a3b"), 2) == 2


def test_experts_divide_by_ep_and_by_tp() -> None:
    spec, load = preset("deepseek-v3"), MemoryLoad(sequences=1, longest=16)
    by_ep = worst_rank(spec, Layout(ep=64), Precision.named("fp8"), load)["experts"]
    by_tp = worst_rank(spec, Layout(ep=8, tp=8), Precision.named("fp8"), load)["experts"]
    assert by_ep == by_tp == 58 * 4 * 3 * 7168 * 2048


def test_experts_of_an_fp8_checkpoint_stay_in_fp8() -> None:
    spec = msgspec.structs.replace(preset("qwen3-30b-a3b"), fp8_experts=True)
    kept, widened = (
        rank_weights(spec, Layout().at(0), 128, Precision.of(spec, keep_fp8=keep)) for keep in (True, False)
    )
    assert kept["experts"] == pytest.approx(widened["experts"] / 2, rel=3e-4)  # and a scale for each block
    assert kept["experts"] > widened["experts"] / 2
    assert kept["attention"] == widened["attention"]


def test_shares_that_cut_blocks_are_no_longer_in_fp8() -> None:
    """768 columns are three blocks for each of two ranks, one and a half for each of four."""
    spec = msgspec.structs.replace(preset("qwen3-30b-a3b"), fp8_experts=True)
    plain, dtypes = preset("qwen3-30b-a3b"), Precision.of(spec)
    assert (dtypes.experts_on(spec, 2), dtypes.experts_on(spec, 4)) == ("fp8", "bf16")
    two, four = (rank_weights(spec, Layout(tp=tp).at(0), 128, dtypes)["experts"] for tp in (2, 4))
    assert four == rank_weights(plain, Layout(tp=4).at(0), 128, BF16)["experts"]
    assert two == pytest.approx(four, rel=3e-4)


def test_activations_of_fp8_experts() -> None:
    """A row in fp8 there, 16 bits back; hidden rows in both."""
    spec, load = preset("qwen3-30b-a3b"), MemoryLoad(sequences=1, longest=16, step_tokens=8192)
    wide, narrow = (activation_bytes(spec, Layout(), load, "pushed", 128, dtype) for dtype in ("bf16", "fp8"))
    assert wide - narrow == 8192 * 8 * (2048 - 768)


def test_windows_of_replicated_tokens_follow_how_many_there_are() -> None:
    spec, layout = preset("qwen3-30b-a3b"), Layout.parse("attn2ep4")
    few, many = (MemoryLoad(sequences=1, longest=64, replicated=below) for below in (64, 257))
    one, other = (memory_parts(spec, layout.at(0), BF16, load, "pushed")["exchange buffers"] for load in (few, many))
    assert one < other < 1.2 * one


def test_low_latency_buffers_grow_with_slots() -> None:
    spec, load = preset("deepseek-v3"), MemoryLoad(sequences=1, longest=16)
    one = worst_rank(spec, Layout(ep=256), Precision.named("fp8"), load, "low_latency", slots=1)
    two = worst_rank(spec, Layout(ep=256), Precision.named("fp8"), load, "low_latency", slots=2)
    assert two["exchange buffers"] == 2 * one["exchange buffers"]
    assert two["experts"] == 2 * one["experts"]


def test_a_pushed_call_leaves_room_for_what_it_expands() -> None:
    """Eight choices of 7168 bf16 there and back and 2048 between them, of each token of eight ranks: 2.1 MB."""
    spec, tokens = preset("deepseek-v3"), pushed_tokens(preset("deepseek-v3"), Layout(ep=8), 8192, 2)
    assert tokens == int(6e9 / (8 * 8 * (2 * 7168 + 2048) * 2)) == 2861
    assert pushed_tokens(spec, Layout(ep=8), 128, 2) == 128
    assert pushed_tokens(preset("ref-16l"), Layout(ep=2), 8192, 2) == 8192


# What a rank of ep1 held on an H200 (soloist bench offline and bench memory, steps of 8192 tokens): rows of all
# captured steps, KV cache in tokens, activations and what PyTorch had reserved, in GB. Each captured step kept its own
# logits then, in fp32; they share their memory since, so these are left out of both sides.
ON_GPU = [
    ("qwen3-30b-a3b", 289, 73984, 1.0859, 70.0868), ("ref-16l", 289, 73984, 1.3373, 127.1105),
    ("qwen3-30b-a3b@24", 142, 32896, 0.9972, 34.4038), ("ref-16l@4", 142, 32896, 1.3081, 30.8197),
    ("qwen3-30b-a3b@8", 1255, 65536, 1.6785, 14.1579), ("ref-16l@4", 1255, 65536, 1.5384, 33.1539),
]  # fmt: skip


@pytest.mark.parametrize(("model", "graph_rows", "kv_tokens", "activations", "reserved"), ON_GPU)
def test_what_a_gpu_held(model: str, graph_rows: int, kv_tokens: int, activations: float, reserved: float) -> None:
    spec, layout = preset(model), Layout.parse("ep1")
    load = MemoryLoad(sequences=1, longest=kv_tokens, step_tokens=8192, block=64, graph_rows=1)
    parts, logits = memory_parts(spec, layout.at(0), Precision.of(spec), load, "pushed"), 4e-9 * graph_rows * spec.vocab
    whole = sum(size for name, size in parts.items() if name != "workspace")
    assert parts["activations"] / 1e9 == pytest.approx(activations - logits, rel=0.05)
    assert whole / 1e9 == pytest.approx(reserved - logits, rel=0.05)


# What the ranks of two H200 held (the memory records of soloist bench offline, 7e64d56), Qwen3's shape: layout, rank,
# tokens of the step in a graph and of that without, rows of the largest decoding step, KV cache in tokens, activations
# and what PyTorch had reserved, windows beside it, in GB.
ON_TWO_GPUS = [
    ("tp2", 0, 8192, 0, 32, 66080, 0.7694, 35.4403), ("ep2", 0, 8192, 0, 16, 33040, 1.5194, 37.3996),
    ("ep2", 1, 8192, 0, 16, 33040, 1.5194, 37.3661), ("pp2", 0, 0, 8192, 256, 66080, 1.0460, 35.1934),
    ("pp2", 1, 0, 8192, 256, 66080, 1.0237, 35.2772),
]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "rank", "captured", "eager", "rows", "kv_tokens", "activations", "reserved"), ON_TWO_GPUS
)
def test_what_two_gpus_held(
    text: str, rank: int, captured: int, eager: int, rows: int, kv_tokens: int, activations: float, reserved: float
) -> None:
    spec = preset("qwen3-30b-a3b")
    load = MemoryLoad(
        sequences=1, longest=kv_tokens, step_tokens=8192, graph_rows=rows, captured=captured, eager=eager
    )  # fmt: skip
    parts = memory_parts(spec, Layout.parse(text).at(rank), Precision.of(spec), load, "pushed")
    whole = sum(size for name, size in parts.items() if name != "workspace")
    assert parts["activations"] / 1e9 == pytest.approx(activations, rel=0.03)
    assert whole / 1e9 == pytest.approx(reserved, rel=0.025)


def test_steps_in_graphs_and_without_keep_their_activations_apart() -> None:
    spec, layout = preset("qwen3-30b-a3b"), Layout()

    def activations(captured: int, eager: int | None) -> float:
        load = MemoryLoad(sequences=1, longest=64, step_tokens=8192, captured=captured, eager=eager)
        return memory_parts(spec, layout.at(0), Precision.of(spec), load, "pushed")["activations"]

    assert activations(8192, 0) == activations(0, None) == activations(0, 8192)
    assert activations(8192, None) == pytest.approx(2 * activations(0, None), rel=0.1)
    assert activations(1024, None) < 1.2 * activations(0, None)
