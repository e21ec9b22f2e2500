"""Tiny random checkpoints of every family, made by transformers itself.

Weights are spread so that routing, attention and logits are far from trivial: linear weights keep the variance of
their input, norms scatter around 1, biases, sinks and correction biases are not zero.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

FAMILIES = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v2", "deepseek_v3", "gpt_oss")
YARN = {"rope_type": "yarn", "rope_theta": 5000.0, "factor": 4.0, "original_max_position_embeddings": 64}
DEEPSEEK_YARN = YARN | {"mscale": 0.9, "mscale_all_dim": 0.6, "beta_fast": 16.0, "beta_slow": 2.0}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR = {"rope_type": "linear", "rope_theta": 1000.0, "factor": 2.0}
_ONE_KV_HEAD = {"num_attention_heads": 5, "num_key_value_heads": 1, "head_dim": 6, "hidden_size": 35, "vocab_size": 101}
_TINY: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "max_position_embeddings": 256,
    "num_experts_per_tok": 2,
    "eos_token_id": 0,
    "bos_token_id": None,
    "pad_token_id": None,
    "attn_implementation": "eager",
    "experts_implementation": "eager",  # the grouped kernel wants strides of 16 bytes
}
_LATENT = {
    "num_hidden_layers": 3,
    "num_key_value_heads": 6,
    "intermediate_size": 50,
    "moe_intermediate_size": 22,
    "n_routed_experts": 6,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 20,
    "q_lora_rank": 28,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "routed_scaling_factor": 1.7,
    "rms_norm_eps": 1e-5,
}
_OWN: dict[str, dict[str, Any]] = {
    "mixtral": {"intermediate_size": 38, "num_local_experts": 6},
    "qwen2_moe": {
        "intermediate_size": 50,
        "moe_intermediate_size": 22,
        "shared_expert_intermediate_size": 34,
        "num_experts": 6,
    },
    "qwen3_moe": {
        "intermediate_size": 50,
        "moe_intermediate_size": 22,
        "num_experts": 6,
        "head_dim": 12,
        "norm_topk_prob": True,
    },
    "olmoe": {"intermediate_size": 22, "num_experts": 6, "clip_qkv": 1.1},
    "deepseek_v2": _LATENT,
    "deepseek_v3": _LATENT | {"n_group": 3, "topk_group": 2},
    "gpt_oss": {
        "intermediate_size": 30,
        "num_local_experts": 6,
        "head_dim": 12,
        "sliding_window": 7,
        "swiglu_limit": 1.5,
        "rope_parameters": YARN | {"truncate": False},
    },
}
# name → family and config keys: odd shapes, each router and each RoPE kind
ODD: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral top-1, one KV head, window": (
        "mixtral",
        _ONE_KV_HEAD | {"num_local_experts": 5, "num_experts_per_tok": 1, "intermediate_size": 29, "sliding_window": 5},
    ),
    "mixtral top-all, tied, linear RoPE": (
        "mixtral",
        {"num_local_experts": 7, "num_experts_per_tok": 7, "tie_word_embeddings": True, "rope_parameters": LINEAR},
    ),
    "qwen2_moe dense layers, windows, renormalised": (
        "qwen2_moe",
        {
            "num_hidden_layers": 6,
            "decoder_sparse_step": 2,
            "mlp_only_layers": [5],
            "use_sliding_window": True,
            "sliding_window": 6,
            "max_window_layers": 4,
            "norm_topk_prob": True,
        },
    ),
    "qwen2_moe one KV head, no bias, llama3 RoPE": (
        "qwen2_moe",
        _ONE_KV_HEAD | {"qkv_bias": False, "rope_parameters": LLAMA3, "num_experts": 5, "num_experts_per_tok": 3},
    ),
    "qwen3_moe biases, not renormalised, yarn": (
        "qwen3_moe",
        {"attention_bias": True, "norm_topk_prob": False, "num_experts": 5, "rope_parameters": YARN},
    ),
    "qwen3_moe one KV head, tied, window, llama3 RoPE": (
        "qwen3_moe",
        _ONE_KV_HEAD
        | {"tie_word_embeddings": True, "use_sliding_window": True, "sliding_window": 4, "rope_parameters": LLAMA3},
    ),
    "olmoe biases, renormalised, no clip, linear RoPE": (
        "olmoe",
        {"attention_bias": True, "norm_topk_prob": True, "clip_qkv": None, "rope_parameters": LINEAR},
    ),
    "olmoe one KV head, top-all": (
        "olmoe",
        {
            "hidden_size": 30,
            "num_attention_heads": 5,
            "num_key_value_heads": 1,
            "num_experts": 5,
            "num_experts_per_tok": 5,
        },
    ),
    "deepseek_v2 groups, biases, yarn with mscale": (
        "deepseek_v2",
        {
            "topk_method": "group_limited_greedy",
            "n_group": 3,
            "topk_group": 2,
            "attention_bias": True,
            "rope_parameters": DEEPSEEK_YARN,
        },
    ),
    "deepseek_v2 full-rank query, five heads": (
        "deepseek_v2",
        {"q_lora_rank": None, "num_attention_heads": 5, "num_key_value_heads": 5, "hidden_size": 35},
    ),
    "deepseek_v3 one group, half-split RoPE, yarn with mscale": (
        "deepseek_v3",
        {
            "n_group": 1,
            "topk_group": 1,
            "n_routed_experts": 5,
            "rope_interleave": False,
            "rope_parameters": DEEPSEEK_YARN,
            "norm_topk_prob": False,
        },
    ),
    "deepseek_v3 full-rank query, top-1, tied": (
        "deepseek_v3",
        {"q_lora_rank": None, "num_experts_per_tok": 1, "n_shared_experts": 1, "tie_word_embeddings": True},
    ),
    "gpt_oss one KV head, no attention bias, own windows": (
        "gpt_oss",
        _ONE_KV_HEAD
        | {
            "attention_bias": False,
            "num_local_experts": 5,
            "num_experts_per_tok": 5,
            "num_hidden_layers": 3,
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
            "rope_parameters": {"rope_type": "default", "rope_theta": 3000.0},
        },
    ),
}


def tiny_config(family: str, **odd: Any) -> transformers.PreTrainedConfig:
    """The config of a tiny model of a family; `odd` overrides keys in transformers' spelling."""
    return transformers.AutoConfig.for_model(family, **(_TINY | _OWN[family] | odd))


def save_tiny(
    family: str, folder: Path | str, *, seed: int = 0, max_shard_size: str = "5GB", **odd: Any
) -> transformers.PreTrainedModel:
    """Save a tiny random model of a family, in fp32, and return it in evaluation mode.

    `odd` overrides keys of the config, in transformers' spelling. A small `max_shard_size` ("20KB") makes shards.
    """
    config = tiny_config(family, **odd)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    _randomise(model, torch.Generator().manual_seed(seed))
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return model


@torch.no_grad()
def _randomise(model: transformers.PreTrainedModel, generator: torch.Generator) -> None:
    buffers = [(name, buffer) for name, buffer in model.named_buffers() if name.endswith("correction_bias")]
    for name, tensor in [*model.named_parameters(), *buffers]:
        noise = torch.randn(tensor.shape, generator=generator)
        tensor.copy_(noise * _spread(name, tensor) + ("norm" in name))


def _spread(name: str, tensor: Tensor) -> float:
    """Standard deviation of a weight's noise."""
    if tensor.dim() == 1 or "bias" in name:
        return 1.0 if name.endswith("sinks") else 0.2
    if "embed" in name:
        return 0.5
    fan_in = min(tensor.shape[-2:]) if tensor.dim() == 3 else tensor.shape[-1]  # stacked, either way round
    decisive = 2.0 if name.endswith(("gate.weight", "router.weight")) else 1.0
    return decisive / fan_in**0.5
