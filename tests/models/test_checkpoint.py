"""Checkpoints read back: every weight equals the model's own in memory, any rectangle of it costs only its bytes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from soloist.models.checkpoint import Checkpoint
from soloist.specs.hf import read_config
from soloist.specs.layout import share
from soloist.specs.model import ModelSpec
from soloist.specs.parameters import Param, parameters
from tests.models.tiny import FAMILIES, ODD, save_tiny

CASES = {family: (family, {}) for family in FAMILIES} | ODD
IN_ATTENTION = {
    "attn_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    **{name: f"self_attn.{name}_proj" for name in ("q", "k", "v", "o", "q_a", "q_b", "kv_b")},
    **{name: f"self_attn.{name}" for name in ("q_norm", "k_norm", "sinks")},
    "q_a_norm": "self_attn.q_a_layernorm",
    "kv_a_norm": "self_attn.kv_a_layernorm",
    "kv_a": "self_attn.kv_a_proj_with_mqa",
    **{f"dense_{name}": f"mlp.{name}_proj" for name in ("gate", "up", "down")},
    **{f"shared_{name}": f"mlp.shared_experts?.{name}_proj" for name in ("gate", "up", "down")},
    "shared_expert_gate": "mlp.shared_expert_gate",
    "correction_bias": "mlp.gate.e_score_correction_bias",
}
OUTSIDE = {"embed": "model.embed_tokens", "final_norm": "model.norm", "lm_head": "lm_head"}


def in_memory(memory: dict[str, Tensor], family: str, param: Param) -> Tensor:
    """A logical weight, cut out of the state of transformers' model."""
    if param.expert >= 0:
        return expert_in_memory(memory, family, param)
    bias, name = param.name.endswith("_bias") and param.name != "correction_bias", param.name
    if name in OUTSIDE:
        return memory[OUTSIDE[name] + ".weight"]
    gate = "mlp.router" if family == "gpt_oss" else "mlp.gate"
    path = (IN_ATTENTION | {"router": gate})[name.removesuffix("_bias") if bias else name]
    path = path.replace("experts?", "experts" if family.startswith("deepseek") else "expert")
    suffix = "" if name in ("sinks", "correction_bias") else ".bias" if bias else ".weight"
    return memory[f"model.layers.{param.layer}.{path}{suffix}"]


def expert_in_memory(memory: dict[str, Tensor], family: str, param: Param) -> Tensor:
    stack = f"model.layers.{param.layer}.mlp.experts." + ("down_proj" if "down" in param.name else "gate_up_proj")
    is_bias = param.name.endswith("_bias")
    value = memory[stack + "_bias" * is_bias][param.expert]
    if family == "gpt_oss":
        value = value if is_bias else value.t()
        return value if "down" in param.name else value[int("up" in param.name) :: 2]
    return value if "down" in param.name else value.chunk(2)[int("up" in param.name)]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Saves each tiny model once: name → its folder, spec and state in memory."""
    known: dict[str, tuple[Path, ModelSpec, dict[str, Tensor]]] = {}

    def get(name: str) -> tuple[Path, ModelSpec, dict[str, Tensor]]:
        if name not in known:
            folder = tmp_path_factory.mktemp("tiny")
            family, odd = CASES[name]
            model = save_tiny(family, folder, **odd)
            known[name] = folder, read_config(folder), model.state_dict()
        return known[name]

    return get


@pytest.mark.parametrize("name", CASES)
def test_every_weight_is_the_one_in_memory(saved, name: str) -> None:
    folder, spec, memory = saved(name)
    source = Checkpoint(folder, spec, torch.float32)
    for param, shape in parameters(spec):
        weight = source.read(param)
        assert (tuple(weight.shape), weight.is_contiguous()) == (shape, True)
        assert torch.equal(weight, in_memory(memory, spec.family, param)), str(param)
    assert source.bytes_read == source.total_bytes == 4 * sum(torch.Size(s).numel() for _, s in parameters(spec))


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_rectangles_are_cut_from_the_whole(saved, name: str, data: st.DataObject) -> None:
    folder, spec, _ = saved(name)
    source = Checkpoint(folder, spec, torch.float32)
    param, shape = data.draw(st.sampled_from(list(parameters(spec))))
    spans = [tuple(sorted(data.draw(st.tuples(st.integers(0, n), st.integers(0, n))))) for n in shape]
    part = source.read(param, *spans)
    before = source.bytes_read
    whole = Checkpoint(folder, spec, torch.float32).read(param)
    assert torch.equal(part, whole[tuple(slice(*span) for span in spans)])
    assert part.is_contiguous()
    together = 2 if spec.family == "gpt_oss" and param.expert >= 0 and "down" not in param.name else 1
    assert before == 4 * part.numel() * together


def test_gate_and_up_that_are_interleaved_are_read_once(saved) -> None:
    folder, spec, _ = saved("gpt_oss")
    source = Checkpoint(folder, spec, torch.float32)
    for name in ("gate", "up"):
        source.read(Param(name, 0, 3), (4, 9), (0, 7))
    assert source.bytes_read == 4 * 2 * 5 * 7
    source.read(Param("gate", 0, 2), (4, 9), (0, 7))
    assert source.bytes_read == 2 * 4 * 2 * 5 * 7


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_an_expert_parallel_rank_reads_its_experts_and_the_shared_part(tmp_path: Path, name: str) -> None:
    experts = {"num_experts": 16} if name == "qwen3_moe" else {"num_local_experts": 16}
    save_tiny(name, tmp_path, max_shard_size="60KB", **experts)
    spec = read_config(tmp_path)
    sizes = {param: 4 * torch.Size(shape).numel() for param, shape in parameters(spec)}
    shared = sum(size for param, size in sizes.items() if param.expert < 0)
    for rank in (0, 7, 15):
        source = Checkpoint(tmp_path, spec, torch.float32)
        start, stop = share(16, 16, rank)
        own = [param for param in sizes if param.expert < 0 or start <= param.expert < stop]
        for param in own:
            source.read(param)
        assert source.bytes_read == shared + (source.total_bytes - shared) // 16


def test_shards_and_a_single_file_hold_the_same(saved, tmp_path: Path) -> None:
    _, spec, memory = saved("deepseek_v3")
    save_tiny("deepseek_v3", tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    source = Checkpoint(str(tmp_path), spec, torch.float32)
    for param, _ in parameters(spec):
        assert torch.equal(source.read(param), in_memory(memory, "deepseek_v3", param))


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "deepseek_v2"])
def test_fused_experts_as_in_memory(saved, tmp_path: Path, name: str) -> None:
    _, spec, memory = saved(name)
    save_file({key: value.contiguous() for key, value in memory.items()}, tmp_path / "model.safetensors")
    source = Checkpoint(tmp_path, spec, torch.float32)
    for param, shape in parameters(spec):
        assert torch.equal(source.read(param), in_memory(memory, name, param))
        if param.expert >= 0:
            span = (1, shape[0] - 2)
            assert torch.equal(source.read(param, span), in_memory(memory, name, param)[slice(*span)])


def test_weights_belong_to_the_caller(saved) -> None:
    folder, spec, _ = saved("mixtral")
    source = Checkpoint(folder, spec, torch.float32)
    first = source.read(Param("q", 0))
    first.zero_()
    assert source.read(Param("q", 0)).abs().sum() > 0
    assert first.untyped_storage().nbytes() == first.numel() * 4


def test_the_dtype_is_the_engines_but_for_the_correction_bias(saved) -> None:
    folder, spec, memory = saved("deepseek_v3")
    source = Checkpoint(folder, spec, torch.bfloat16)
    assert torch.equal(source.read(Param("q_a", 0)), memory["model.layers.0.self_attn.q_a_proj.weight"].bfloat16())
    bias = source.read(Param("correction_bias", 1))
    assert torch.equal(bias, memory["model.layers.1.mlp.gate.e_score_correction_bias"])


def test_progress_is_told_every_byte(saved) -> None:
    folder, spec, _ = saved("olmoe")
    told: list[int] = []
    source = Checkpoint(folder, spec, torch.float32, progress=told.append)
    for param, _ in parameters(spec):
        source.read(param)
    assert sum(told) == source.bytes_read == source.total_bytes


def test_harmless_tensors_are_passed_over(saved, tmp_path: Path) -> None:
    folder, spec, _ = saved("deepseek_v3")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    tensors[f"model.layers.{spec.layers}.eh_proj.weight"] = torch.ones(2, 2)
    save_file(tensors, tmp_path / "model.safetensors")
    assert Checkpoint(tmp_path, spec, torch.float32).total_bytes == Checkpoint(folder, spec, torch.float32).total_bytes


def test_a_tied_head_may_repeat_the_embedding(saved, tmp_path: Path) -> None:
    folder, spec, _ = saved("mixtral top-all, tied, linear RoPE")
    tensors = load_file(folder / "model.safetensors")
    assert "lm_head.weight" not in tensors
    save_file(
        tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, tmp_path / "model.safetensors"
    )
    Checkpoint(tmp_path, spec, torch.float32)


def test_the_index_of_shards_is_what_transformers_writes(tmp_path: Path) -> None:
    save_tiny("olmoe", tmp_path, max_shard_size="60KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {path.name for path in tmp_path.glob("*.safetensors")}
