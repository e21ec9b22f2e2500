"""Models known by name: the reference shapes of the scenarios, and published models.

A reference name takes suffixes, `ref-16l-mlp-top1`: `-mlp` for experts of two matrices instead of SwiGLU, `-top1` for
the number of experts a token goes to, `-mha` for plain attention where latent attention is the default. Every name
takes a number of layers: `ref-16l@1` is the same model with its first layer only. The published shapes are the
`config.json` files of the models' own repositories.
"""

from __future__ import annotations

import difflib
import re
from typing import Any

from msgspec.structs import replace

from soloist.errors import ConfigurationError
from soloist.specs.hf import read_config
from soloist.specs.model import AttentionSpec, ExpertSpec, ModelSpec, RopeSpec, RouterSpec

_MIXTRAL: dict[str, Any] = {
    "model_type": "mixtral",
    "num_experts_per_tok": 2,
    "num_local_experts": 8,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "eos_token_id": 2,
}
_QWEN3: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "norm_topk_prob": True,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "vocab_size": 151936,
    "eos_token_id": [151645, 151643],
}
_GPT_OSS: dict[str, Any] = {
    "model_type": "gpt_oss",
    "head_dim": 64,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "max_position_embeddings": 131072,
    "num_attention_heads": 64,
    "num_experts_per_tok": 4,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "sliding_window": 128,
    "vocab_size": 201088,
    "eos_token_id": [200002, 199999, 200012],
}
_DEEPSEEK_V3: dict[str, Any] = {
    "model_type": "deepseek_v3",
    "first_k_dense_replace": 3,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "moe_intermediate_size": 2048,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    "rope_scaling": {
        "type": "yarn",
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
    },
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "v_head_dim": 128,
    "vocab_size": 129280,
    "eos_token_id": 1,
}
_PUBLISHED: dict[str, dict[str, Any]] = {
    "mixtral-8x7b": _MIXTRAL
    | {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "vocab_size": 32000,
    },
    "mixtral-8x22b": _MIXTRAL
    | {
        "hidden_size": 6144,
        "intermediate_size": 16384,
        "max_position_embeddings": 65536,
        "num_attention_heads": 48,
        "num_hidden_layers": 56,
        "vocab_size": 32768,
    },
    "qwen3-30b-a3b": _QWEN3
    | {
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_attention_heads": 32,
        "num_hidden_layers": 48,
    },
    "qwen3-235b-a22b": _QWEN3
    | {
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "moe_intermediate_size": 1536,
        "num_attention_heads": 64,
        "num_hidden_layers": 94,
    },
    "deepseek-v3": _DEEPSEEK_V3,
    "gpt-oss-20b": _GPT_OSS | {"num_hidden_layers": 24, "num_local_experts": 32},
    "gpt-oss-120b": _GPT_OSS | {"num_hidden_layers": 36, "num_local_experts": 128},
}
_REPOSITORIES = {
    "mixtral-8x7b": "mistralai/Mixtral-8x7B-v0.1",
    "mixtral-8x22b": "mistralai/Mixtral-8x22B-v0.1",
    "qwen3-30b-a3b": "Qwen/Qwen3-30B-A3B",
    "qwen3-235b-a22b": "Qwen/Qwen3-235B-A22B",
    "deepseek-v3": "deepseek-ai/DeepSeek-V3",
    "gpt-oss-20b": "openai/gpt-oss-20b",
    "gpt-oss-120b": "openai/gpt-oss-120b",
}
_REFERENCE = {
    "ref-16l": {"layers": 16, "experts": 16, "d_model": 4096, "heads": 32, "head_dim": 128, "width": 16384},
    "ref-4l": {"layers": 4, "experts": 16, "d_model": 8192, "heads": 16, "head_dim": 512, "width": 32768},
}
_NAME = re.compile(r"(?P<base>.+?)(?P<mlp>-mlp)?(?P<mha>-mha)?(?:-top(?P<top_k>\d+))?(?:@(?P<layers>\d+))?")


def names() -> list[str]:
    """Names without suffixes, the reference shapes first."""
    return [*_REFERENCE, "ref-61l", *_PUBLISHED]


def checkpoint_of(name: str) -> str | None:
    """The hub's repository of a published model; None for a shape that has no checkpoint; other names stay."""
    parts = _NAME.fullmatch(name)
    is_shape = parts is not None and parts["base"] in names()
    return _REPOSITORIES.get(name) if is_shape else name


def released(name: str) -> ModelSpec:
    """The preset of a release, by the last part of its hub id: `Qwen/Qwen3-30B-A3B-Instruct-2507`.

    Raises ConfigurationError, naming the presets.
    """
    short = name.rstrip("/").rsplit("/", 1)[-1].lower()
    short = re.sub("^deepseek-r1", "deepseek-v3", short)
    if known := [preset_name for preset_name in names() if short.startswith(preset_name)]:
        return preset(max(known, key=len))
    remedy = f"is no preset ({', '.join(names())}); give its config.json's folder as MODEL"
    raise ConfigurationError.of("model", name, remedy)


def preset(name: str) -> ModelSpec:
    """The model of this name. Raises ConfigurationError for an unknown one, naming those that are near."""
    parts = _NAME.fullmatch(name)
    base = parts["base"] if parts else name
    if parts is None or base not in names():
        near = difflib.get_close_matches(base, names(), n=3, cutoff=0.4)
        hint = f"near ones are {', '.join(near)}" if near else f"there are {', '.join(names())}"
        raise ConfigurationError.of("model", name, f"is no folder and no preset; {hint}")
    spec = _build(base, name, is_mlp=bool(parts["mlp"]), is_mha=bool(parts["mha"]))
    if parts["top_k"]:
        spec = replace(spec, router=replace(spec.router, top_k=int(parts["top_k"])))
    return spec if parts["layers"] is None else with_layers(spec, int(parts["layers"]))


def with_layers(spec: ModelSpec, layers: int) -> ModelSpec:
    """The first `layers` layers of a model; at least one of them must have experts."""
    dense = tuple(layer for layer in spec.dense_layers if layer < layers)
    if not len(dense) < layers <= spec.layers:
        remedy = f"must lie between {len(spec.dense_layers) + 1} and the model's {spec.layers}"
        raise ConfigurationError.of("layers", layers, remedy)
    windows = tuple(layer for layer in spec.attention.window_layers if layer < layers)
    attention = replace(spec.attention, window_layers=windows)
    return replace(spec, layers=layers, dense_layers=dense, attention=attention)


def _build(base: str, name: str, is_mlp: bool, is_mha: bool) -> ModelSpec:
    if is_mlp and base not in _REFERENCE:
        raise ConfigurationError.of("model", name, f"-mlp belongs to {' and '.join(_REFERENCE)}")
    if is_mha and base != "ref-61l":
        raise ConfigurationError.of("model", name, "-mha belongs to ref-61l")
    if base == "ref-61l":
        return _ref_61l(name, is_mha)
    if base in _REFERENCE:
        return _reference(base, name, is_mlp)
    return read_config(_PUBLISHED[base], name)


def _reference(base: str, name: str, is_mlp: bool) -> ModelSpec:
    """A shape of the scenarios. They leave the router open: softmax, two experts, renormalised."""
    shape = _REFERENCE[base]
    return ModelSpec(
        name=name,
        family="reference",
        layers=shape["layers"],
        d_model=shape["d_model"],
        vocab=51200,
        max_positions=10_000,
        dtype="float16" if base == "ref-4l" else "bfloat16",
        attention=_multi_head(shape["heads"], shape["head_dim"]),
        rope=RopeSpec(width=shape["head_dim"]),
        experts=shape["experts"],
        router=RouterSpec(top_k=2),
        expert=ExpertSpec(kind="mlp" if is_mlp else "swiglu", width=shape["width"]),
    )


def _ref_61l(name: str, is_mha: bool) -> ModelSpec:
    """DeepSeek-V3's shape, with latent attention or with 128 plain heads of 128."""
    spec = replace(read_config(_DEEPSEEK_V3, name), family="reference")
    if not is_mha:
        return spec
    return replace(spec, attention=_multi_head(128, 128), rope=RopeSpec(width=128))


def _multi_head(heads: int, head_dim: int) -> AttentionSpec:
    return AttentionSpec(heads=heads, kv_heads=heads, head_dim=head_dim, v_head_dim=head_dim, scale=head_dim**-0.5)
