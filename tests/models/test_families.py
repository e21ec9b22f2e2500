"""Names and forms of tensors in released checkpoints."""

from __future__ import annotations

import pytest

from soloist.models.families import Stored, is_harmless, locations
from soloist.specs.parameters import Param
from soloist.specs.presets import preset

# tensor names and shapes as they stand in the models' own repositories
RELEASED = [
    ("mixtral-8x7b", Param("up", 3, 5), (14336, 4096), "model.layers.3.block_sparse_moe.experts.5.w3.weight"),
    ("mixtral-8x7b", Param("router", 3), (8, 4096), "model.layers.3.block_sparse_moe.gate.weight"),
    ("qwen3-30b-a3b", Param("down", 0, 127), (2048, 768), "model.layers.0.mlp.experts.127.down_proj.weight"),
    ("qwen3-30b-a3b", Param("k_norm", 47), (128,), "model.layers.47.self_attn.k_norm.weight"),
    ("deepseek-v3", Param("shared_gate", 3), (2048, 7168), "model.layers.3.mlp.shared_experts.gate_proj.weight"),
    ("deepseek-v3", Param("dense_up", 0), (18432, 7168), "model.layers.0.mlp.up_proj.weight"),
    ("deepseek-v3", Param("correction_bias", 3), (256,), "model.layers.3.mlp.gate.e_score_correction_bias"),
    ("deepseek-v3", Param("kv_a", 0), (576, 7168), "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"),
    ("gpt-oss-20b", Param("router_bias", 1), (32,), "model.layers.1.mlp.router.bias"),
    ("gpt-oss-20b", Param("sinks", 1), (64,), "model.layers.1.self_attn.sinks"),
]


@pytest.mark.parametrize(("model", "param", "shape", "tensor"), RELEASED)
def test_released_names(model: str, param: Param, shape: tuple[int, ...], tensor: str) -> None:
    assert next(locations(preset(model), param, shape)) == Stored(tensor, shape)


def test_gpt_oss_interleaves_and_quantises() -> None:
    spec = preset("gpt-oss-20b")
    quantised, plain = locations(spec, Param("up", 2, 7), (2880, 2880))
    assert quantised.tensor == "model.layers.2.mlp.experts.gate_up_proj_blocks"
    assert (quantised.shape, quantised.index) == ((32, 5760, 90, 16), 7)
    assert (plain.shape, plain.transposed, plain.first, plain.step) == ((32, 2880, 5760), True, 1, 2)
    (bias,) = locations(spec, Param("gate_bias", 2, 7), (2880,))
    assert (bias.shape, bias.first, bias.step) == ((32, 5760), 0, 2)


def test_harmless_tensors() -> None:
    v3, mixtral = preset("deepseek-v3"), preset("mixtral-8x7b")
    assert is_harmless(v3, "model.layers.61.self_attn.q_a_proj.weight_scale_inv")
    assert not is_harmless(v3, "model.layers.60.extra")
    assert is_harmless(mixtral, "model.layers.1.self_attn.rotary_emb.inv_freq")
    assert not is_harmless(mixtral, "model.layers.32.self_attn.q_proj.weight")
    assert not is_harmless(mixtral, "lm_head.weight")
