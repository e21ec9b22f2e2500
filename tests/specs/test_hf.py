"""Specs read from config.json: every family's meaning, both spellings of keys, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from soloist.errors import CheckpointError, ConfigurationError
from soloist.specs.hf import read_config
from soloist.specs.model import ModelSpec
from tests.models.tiny import DEEPSEEK_YARN, FAMILIES, LLAMA3, ODD, YARN, tiny_config


def config_of(family: str, **odd: Any) -> dict[str, Any]:
    """What transformers writes to config.json."""
    return json.loads(tiny_config(family, **odd).to_json_string())


def odd_spec(name: str) -> ModelSpec:
    family, odd = ODD[name]
    return read_config(config_of(family, **odd))


@pytest.mark.parametrize("family", FAMILIES)
def test_sizes(family: str) -> None:
    config = tiny_config(family)
    spec = read_config(json.loads(config.to_json_string()))
    assert (spec.family, spec.layers, spec.d_model, spec.vocab) == (family, config.num_hidden_layers, 48, 131)
    assert (spec.experts, spec.router.top_k, spec.max_positions) == (6, 2, 256)
    assert (spec.norm_eps, spec.tied, spec.eos_ids) == (config.rms_norm_eps, False, (0,))
    assert spec.attention.heads == 6


def test_routers() -> None:
    kinds = {family: read_config(config_of(family)).router for family in FAMILIES}
    assert all(kinds[f].scoring == "softmax" for f in ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v2"))
    assert [kinds[f].renormalise for f in ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v2")] == [
        True,
        False,
        True,
        False,
        False,
    ]
    assert kinds["deepseek_v2"].scaling == 1.7
    v3 = kinds["deepseek_v3"]
    assert (v3.scoring, v3.correction_bias, v3.renormalise, v3.scaling) == ("sigmoid", True, True, 1.7)
    assert (v3.groups, v3.kept_groups, v3.group_score) == (3, 2, "top2")
    assert (kinds["gpt_oss"].scoring, kinds["gpt_oss"].bias) == ("softmax_of_chosen", True)
    limited = odd_spec("deepseek_v2 groups, biases, yarn with mscale").router
    assert (limited.groups, limited.kept_groups, limited.group_score) == (3, 2, "max")


def test_greedy_choice_ignores_groups() -> None:
    assert read_config(config_of("deepseek_v2", n_group=3, topk_group=1)).router.groups == 1


def test_attention_of_grouped_query_families() -> None:
    qwen2, qwen3, olmoe = (read_config(config_of(f)).attention for f in ("qwen2_moe", "qwen3_moe", "olmoe"))
    assert (qwen2.bias, qwen2.out_bias, qwen2.qk_norm, qwen2.head_dim) == (True, False, "none", 8)
    assert (qwen3.bias, qwen3.qk_norm, qwen3.head_dim, qwen3.scale) == (False, "head", 12, 12**-0.5)
    assert (olmoe.qk_norm, olmoe.clip) == ("full", 1.1)
    biased = odd_spec("qwen3_moe biases, not renormalised, yarn").attention
    assert (biased.bias, biased.out_bias) == (True, True)
    assert odd_spec("qwen2_moe one KV head, no bias, llama3 RoPE").attention.bias is False


def test_gpt_oss() -> None:
    spec = read_config(config_of("gpt_oss", num_hidden_layers=3))
    assert (spec.attention.sinks, spec.attention.bias, spec.attention.out_bias) == (True, True, True)
    assert [spec.window(layer) for layer in range(3)] == [7, None, 7]
    assert (spec.expert.kind, spec.expert.bias, spec.expert.limit) == ("clamped_swiglu", True, 1.5)
    assert odd_spec("gpt_oss one KV head, no attention bias, own windows").attention.window_layers == (1, 2)


def test_latent_attention() -> None:
    spec = read_config(config_of("deepseek_v3"))
    a = spec.attention
    assert (a.kind, a.head_dim, a.v_head_dim, a.q_rank, a.kv_rank, a.rope_dim) == ("mla", 20, 10, 28, 20, 8)
    assert (spec.rope.width, spec.rope.interleaved) == (8, True)
    assert (spec.shared_width, spec.dense_layers, spec.dense_width) == (44, (0,), 50)
    assert odd_spec("deepseek_v3 full-rank query, top-1, tied").attention.q_rank is None
    assert not odd_spec("deepseek_v3 one group, half-split RoPE, yarn with mscale").rope.interleaved


def test_windows_and_dense_layers_of_qwen() -> None:
    spec = odd_spec("qwen2_moe dense layers, windows, renormalised")
    assert (spec.attention.window, spec.attention.window_layers) == (6, (0, 2))
    assert (spec.dense_layers, spec.dense_width, spec.moe_layers) == ((0, 2, 4, 5), 50, (1, 3))
    assert (spec.shared_width, spec.shared_gate) == (34, True)
    assert odd_spec("qwen3_moe one KV head, tied, window, llama3 RoPE").attention.window_layers == (0, 1)
    unused = read_config(config_of("qwen3_moe", sliding_window=5, max_window_layers=28))
    assert unused.attention.window is None


@pytest.mark.parametrize("rope", [YARN, DEEPSEEK_YARN, YARN | {"attention_factor": 1.3}, YARN | {"factor": 1.0}])
def test_yarn_factors_are_those_of_transformers(rope: dict[str, Any]) -> None:
    config = tiny_config("deepseek_v3", rope_parameters=dict(rope))
    spec = read_config(json.loads(config.to_json_string()))
    _, factor = ROPE_INIT_FUNCTIONS["yarn"](config, "cpu")
    assert spec.rope.attention_factor == pytest.approx(factor, abs=1e-12)
    model = transformers.AutoModelForCausalLM.from_config(config)
    assert spec.attention.scale == pytest.approx(model.model.layers[0].self_attn.scaling, abs=1e-12)


def test_llama3_and_linear_ropes() -> None:
    rope = odd_spec("qwen2_moe one KV head, no bias, llama3 RoPE").rope
    assert (rope.kind, rope.theta, rope.factor) == ("llama3", 500.0, 8.0)
    assert (rope.low_freq_factor, rope.high_freq_factor, rope.original_max_positions) == (1.0, 4.0, 64)
    rope = odd_spec("olmoe biases, renormalised, no clip, linear RoPE").rope
    assert (rope.kind, rope.theta, rope.factor) == ("linear", 1000.0, 2.0)


def test_default_thetas() -> None:
    for family, theta in {"mixtral": 1e6, "olmoe": 1e4, "gpt_oss": 1.5e5}.items():
        config = config_of(family)
        del config["rope_parameters"]
        assert read_config(config).rope.theta == theta
    assert read_config(config).rope.kind == "yarn"  # gpt-oss without any rope keys
    assert read_config(config).rope.truncate is False


def test_old_spellings_mean_the_same() -> None:
    new = config_of("qwen3_moe", rope_parameters=dict(YARN))
    old = {key: value for key, value in new.items() if key not in ("rope_parameters", "num_local_experts", "dtype")}
    scaling = {key: value for key, value in YARN.items() if key not in ("rope_type", "rope_theta")}
    old |= {"rope_theta": YARN["rope_theta"], "rope_scaling": scaling | {"type": "yarn"}}
    old |= {"num_experts": 6, "torch_dtype": "float16"}
    assert read_config(old) == read_config(new | {"dtype": "float16"})


def test_missing_original_length_is_that_of_the_model() -> None:
    rope = {key: value for key, value in LLAMA3.items() if key != "original_max_position_embeddings"}
    config = config_of("mixtral") | {"rope_parameters": rope}
    assert read_config(config).rope.original_max_positions == 256


def test_end_of_sequence_ids(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config_of("mixtral", eos_token_id=[3, 4])))
    assert read_config(tmp_path).eos_ids == (3, 4)
    (tmp_path / "generation_config.json").write_text('{"do_sample": true}')
    assert read_config(tmp_path).eos_ids == (3, 4)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 9}')
    assert read_config(tmp_path).eos_ids == (9,)
    assert read_config(tmp_path).name == tmp_path.name
    assert read_config(config_of("mixtral", eos_token_id=None)).eos_ids == ()


@pytest.mark.parametrize("text", ["{", "[1, 2]", "null", '{"hidden_size": NaN}'])
def test_unreadable_configs(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        read_config(tmp_path)


def test_folder_without_config(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json: cannot be read"):
        read_config(tmp_path)


BY_ROW = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}
COMPRESSED = {"quant_method": "compressed-tensors", "format": "float-quantized"}
FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128], "fmt": "e4m3", "activation_scheme": "dynamic"}


def test_released_quantisations_are_accepted() -> None:
    assert read_config(config_of("deepseek_v3") | {"quantization_config": FP8}).fp8_experts
    by_row = COMPRESSED | {"config_groups": {"group_0": {"weights": BY_ROW}}, "ignore": ["lm_head"]}
    assert read_config(config_of("mixtral") | {"quantization_config": by_row}).fp8_experts
    mxfp4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    assert not read_config(config_of("gpt_oss") | {"quantization_config": mxfp4}).fp8_experts  # read as bf16


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("mixtral", {"model_type": "llama"}, r"model_type = 'llama'"),
    ("mixtral", {"model_type": None}, r"model_type = None"),
    ("mixtral", {"architectures": ["MixtralForSequenceClassification"]}, r"architectures = 'MixtralForSeq"),
    ("mixtral", {"architectures": 7}, r"architectures = 7"),
    ("mixtral", {"hidden_act": "gelu_new"}, r"hidden_act = 'gelu_new'"),
    ("gpt_oss", {"hidden_act": "gelu"}, r"hidden_act = 'gelu'"),
    ("mixtral", {"dtype": "float8_e4m3fn"}, r"dtype = 'float8_e4m3fn'"),
    ("mixtral", {"hidden_size": "48"}, r"hidden_size = '48': expected `int`"),
    ("mixtral", {"hidden_size": 0}, r"hidden_size = 0"),
    ("mixtral", {"hidden_size": None}, r"hidden_size is missing"),
    ("mixtral", {"hidden_size": 50}, r"hidden_size = 50: must be a multiple of the 6 heads"),
    ("mixtral", {"head_dim": 7}, r"head_dim = 7: must be even"),
    ("mixtral", {"num_key_value_heads": 4}, r"num_key_value_heads = 4: must divide the 6 heads"),
    ("mixtral", {"num_experts_per_tok": 7}, r"num_experts_per_tok = 7: must not exceed the 6 experts"),
    ("mixtral", {"num_experts": 8}, r"num_\w*experts = \d: contradicts another spelling"),
    ("mixtral", {"eos_token_id": "</s>"}, r"eos_token_id = '</s>'"),
    ("mixtral", {"attention_bias": True}, r"attention_bias = True: is not supported for model_type mixtral"),
    ("mixtral", {"layer_types": ["sliding_attention", "full_attention"]}, r"layer_types = "),
    ("mixtral", {"final_logit_softcapping": 30.0}, r"final_logit_softcapping = 30.0"),
    ("qwen2_moe", {"mlp_only_layers": [2]}, r"mlp_only_layers = 2: must be below 2"),
    ("qwen2_moe", {"decoder_sparse_step": 3}, r"num_hidden_layers = 2: no layer has experts"),
    ("qwen2_moe", {"decoder_sparse_step": 0}, r"decoder_sparse_step = 0"),
    ("qwen2_moe", {"layer_types": ["full_attention"]}, r"layer_types = .*must have 2 entries"),
    ("qwen2_moe", {"layer_types": ["full_attention", "linear_attention"]}, r"layer_types = 'linear_attention'"),
    ("qwen2_moe", {"layer_types": ["full_attention", "sliding_attention"]}, r"sliding_window = None"),
    ("qwen3_moe", {"use_sliding_window": True, "sliding_window": None}, r"sliding_window = None"),
    ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}, r"max_window_layers = 1"),
    ("qwen3_moe", {"n_shared_experts": 1}, r"n_shared_experts = 1: is not supported for model_type qwen3_moe"),
    ("olmoe", {"head_dim": 16}, r"head_dim = 16: must be hidden_size / num_attention_heads"),
    ("olmoe", {"clip_qkv": -1.0}, r"clip_qkv = -1.0"),
    ("olmoe", {"sliding_window": 5}, r"sliding_window = 5"),
    ("deepseek_v2", {"topk_method": "noaux_tc"}, r"topk_method = 'noaux_tc'"),
    ("deepseek_v2", {"scoring_func": "sigmoid"}, r"scoring_func = 'sigmoid'"),
    ("deepseek_v2", {"norm_topk_prob": True}, r"norm_topk_prob = True"),
    ("deepseek_v2", {"moe_layer_freq": 2}, r"moe_layer_freq = 2"),
    ("deepseek_v2", {"mlp_bias": True}, r"mlp_bias = True"),
    ("deepseek_v3", {"topk_method": "greedy"}, r"topk_method = 'greedy'"),
    ("deepseek_v3", {"scoring_func": "softmax"}, r"scoring_func = 'softmax'"),
    ("deepseek_v3", {"num_key_value_heads": 3}, r"num_key_value_heads = 3: must equal the 6 heads"),
    ("deepseek_v3", {"first_k_dense_replace": 3}, r"num_hidden_layers = 3: no layer has experts"),
    ("deepseek_v3", {"n_group": 4}, r"n_group = 4"),
    ("deepseek_v3", {"n_group": 6}, r"n_group = 6: every group needs two experts"),
    ("deepseek_v3", {"topk_group": 4}, r"topk_group = 4"),
    ("deepseek_v3", {"num_experts_per_tok": 5}, r"num_experts_per_tok = 5: is more than the experts of the kept"),
    ("deepseek_v3", {"qk_rope_head_dim": 7}, r"qk_rope_head_dim = 7: must be even"),
    ("gpt_oss", {"head_dim": None}, r"head_dim is missing: add it to config.json$"),
    ("mixtral", {"rope_parameters": {"rope_type": "longrope"}}, r"rope_parameters\.rope_type = 'longrope'"),
    ("mixtral", {"rope_parameters": {"rope_type": ["yarn"]}}, r"rope_type = \['yarn'\]"),
    ("mixtral", {"rope_parameters": YARN | {"beta_fast": -1.0}}, r"beta_fast = -1.0"),
    ("mixtral", {"rope_parameters": {"rope_type": "linear"}}, r"rope_parameters\.factor = None"),
    ("mixtral", {"rope_parameters": {"rope_type": "linear", "factor": -2}}, r"rope_parameters\.factor = -2"),
    ("mixtral", {"rope_parameters": {"rope_type": "yarn"}}, r"rope_parameters\.factor = None"),
    ("mixtral", {"rope_parameters": {"rope_type": "default", "factor": 2.0}}, r"factor = 2.0: does not belong"),
    ("mixtral", {"rope_parameters": {"partial_rotary_factor": 0.5}}, r"partial_rotary_factor = 0.5"),
    ("mixtral", {"partial_rotary_factor": 0.25}, r"partial_rotary_factor = 0.25"),
    ("mixtral", {"rope_parameters": {"rope_theta": 0.5}}, r"rope_theta = 0.5"),
    ("mixtral", {"rope_parameters": {"rope_type": "yarn", "type": "linear"}}, r"type = 'linear': contradicts"),
    ("mixtral", {"rope_parameters": LLAMA3 | {"high_freq_factor": 1.0}}, r"high_freq_factor = 1.0"),
    ("mixtral", {"rope_parameters": {"full_attention": {"rope_type": "default"}}}, r"one RoPE for all layers"),
    ("mixtral", {"rope_scaling": {"type": "linear", "factor": 2.0}}, r"rope_scaling = .*contradicts rope_parameters"),
    ("mixtral", {"rope_parameters": ["yarn"]}, r"rope_parameters = \['yarn'\]: must be an object"),
    ("mixtral", {"quantization_config": {"quant_method": "awq"}}, r"quantization_config\.quant_method = 'awq'"),
    ("mixtral", {"quantization_config": {"quant_method": "mxfp4"}}, r"quantization_config\.quant_method = 'mxfp4'"),
    ("gpt_oss", {"quantization_config": FP8}, r"quantization_config\.quant_method = 'fp8'"),
    ("deepseek_v3", {"quantization_config": FP8 | {"weight_block_size": [64, 64]}}, r"weight_block_size = \[64, 64\]"),
    ("deepseek_v3", {"quantization_config": {"quant_method": "fp8"}}, r"weight_block_size = None"),
    (
        "mixtral",
        {"quantization_config": COMPRESSED | {"config_groups": {"a": {"weights": BY_ROW | {"strategy": "tensor"}}}}},
        r"config_groups\.a\.weights\.strategy = 'tensor': only 'channel'",
    ),
    ("mixtral", {"quantization_config": COMPRESSED | {"format": "int-quantized"}}, r"format = 'int-quantized'"),
    ("deepseek_v3", {"quantization_config": FP8 | {"activation_scheme": "static"}}, r"activation_scheme = 'static'"),
]


@pytest.mark.parametrize(("family", "change", "message"), REFUSED, ids=[f"{f}-{next(iter(c))}" for f, c, _ in REFUSED])
def test_refused(family: str, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        read_config(config_of(family) | change)


def test_unset_keys_of_other_families_are_harmless() -> None:
    extra = {"attention_bias": False, "n_group": None, "layer_types": ["full_attention"] * 2, "unsloth_version": "1"}
    assert read_config(config_of("mixtral") | extra) == read_config(config_of("mixtral"))


def test_scale_without_mscale_is_plain() -> None:
    assert read_config(config_of("deepseek_v2")).attention.scale == 1 / math.sqrt(20)
