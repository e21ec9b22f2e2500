"""Where each checkpoint family keeps each weight: the names of its tensors and the form of its experts.

`{layer}` and `{expert}` stand for the numbers of a `Param`. Released checkpoints and those that transformers 5 saves
hold one tensor for each expert (gpt-oss: stacks, with gate and up interleaved); the fused form that transformers keeps
in memory is read as well.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Literal, NamedTuple

from soloist.errors import ConfigurationError
from soloist.specs.model import ModelSpec
from soloist.specs.parameters import Param, Shape

MXFP4_GROUP = 32  # values that share a scale, in 16 bytes


class Stored(NamedTuple):
    """Where one weight lies. Its row r is row `first + step · r` of the tensor, or column where that is transposed."""

    tensor: str
    shape: Shape  # of the tensor in the file
    index: int | None = None  # of the expert in a stack
    form: Literal["plain", "mxfp4"] = "plain"
    transposed: bool = False
    first: int = 0
    step: int = 1


_LAYER = "model.layers.{layer}."
_ATTENTION = {
    "attn_norm": "input_layernorm.weight",
    "q": "self_attn.q_proj.weight",
    "k": "self_attn.k_proj.weight",
    "v": "self_attn.v_proj.weight",
    "o": "self_attn.o_proj.weight",
    "q_bias": "self_attn.q_proj.bias",
    "k_bias": "self_attn.k_proj.bias",
    "v_bias": "self_attn.v_proj.bias",
    "o_bias": "self_attn.o_proj.bias",
    "q_norm": "self_attn.q_norm.weight",
    "k_norm": "self_attn.k_norm.weight",
    "sinks": "self_attn.sinks",
    "q_a": "self_attn.q_a_proj.weight",
    "q_a_bias": "self_attn.q_a_proj.bias",
    "q_a_norm": "self_attn.q_a_layernorm.weight",
    "q_b": "self_attn.q_b_proj.weight",
    "kv_a": "self_attn.kv_a_proj_with_mqa.weight",
    "kv_a_bias": "self_attn.kv_a_proj_with_mqa.bias",
    "kv_a_norm": "self_attn.kv_a_layernorm.weight",
    "kv_b": "self_attn.kv_b_proj.weight",
}
_FEED_FORWARD = {
    "mlp_norm": "post_attention_layernorm.weight",
    "dense_gate": "mlp.gate_proj.weight",
    "dense_up": "mlp.up_proj.weight",
    "dense_down": "mlp.down_proj.weight",
    "router": "mlp.gate.weight",
    "gate": "mlp.experts.{expert}.gate_proj.weight",
    "up": "mlp.experts.{expert}.up_proj.weight",
    "down": "mlp.experts.{expert}.down_proj.weight",
}
_STANDARD = {
    "embed": "model.embed_tokens.weight",
    "final_norm": "model.norm.weight",
    "lm_head": "lm_head.weight",
    **{name: _LAYER + tensor for name, tensor in (_ATTENTION | _FEED_FORWARD).items()},
}


def _with(**own: str) -> dict[str, str]:
    return _STANDARD | {name: _LAYER + tensor for name, tensor in own.items()}


_DEEPSEEK = _with(
    correction_bias="mlp.gate.e_score_correction_bias",
    shared_gate="mlp.shared_experts.gate_proj.weight",
    shared_up="mlp.shared_experts.up_proj.weight",
    shared_down="mlp.shared_experts.down_proj.weight",
)
_NAMES: dict[str, dict[str, str]] = {
    "mixtral": _with(
        router="block_sparse_moe.gate.weight",
        gate="block_sparse_moe.experts.{expert}.w1.weight",
        up="block_sparse_moe.experts.{expert}.w3.weight",
        down="block_sparse_moe.experts.{expert}.w2.weight",
    ),
    "qwen2_moe": _with(
        shared_gate="mlp.shared_expert.gate_proj.weight",
        shared_up="mlp.shared_expert.up_proj.weight",
        shared_down="mlp.shared_expert.down_proj.weight",
        shared_expert_gate="mlp.shared_expert_gate.weight",
    ),
    "qwen3_moe": _STANDARD,
    "olmoe": _STANDARD,
    "deepseek_v2": _DEEPSEEK,
    "deepseek_v3": _DEEPSEEK,
    "gpt_oss": _with(router="mlp.router.weight", router_bias="mlp.router.bias"),
}
_ROTARY = re.compile(r"\.rotary_emb\.inv_freq$")
_ANY_LAYER = re.compile(r"^model\.layers\.(\d+)\.")


def locations(spec: ModelSpec, param: Param, shape: Shape) -> Iterator[Stored]:
    """The places where a checkpoint of the spec's family may keep a weight of this shape, the usual one first."""
    if spec.family not in _NAMES:
        raise ConfigurationError.of("family", spec.family, f"has no checkpoints: only {', '.join(_NAMES)} have")
    if param.expert >= 0 and spec.family == "gpt_oss":
        yield from _interleaved(spec, param, shape)
        return
    template = _NAMES[spec.family][param.name]
    yield Stored(template.format(layer=param.layer, expert=param.expert), shape)
    if "block_sparse_moe.gate" in template:
        yield Stored(_STANDARD["router"].format(layer=param.layer), shape)
    if param.expert >= 0:
        yield _fused(spec, param, shape)


def is_harmless(spec: ModelSpec, tensor: str) -> bool:
    """Whether a checkpoint may hold this tensor although the model has no use for it.

    Rotary frequencies, which are computed; an output head that repeats the embedding; and DeepSeek's layers for
    predicting further tokens, which follow the last layer.
    """
    layer = _ANY_LAYER.match(tensor)
    beyond = layer is not None and int(layer[1]) >= spec.layers and spec.family.startswith("deepseek")
    return beyond or bool(_ROTARY.search(tensor)) or (spec.tied and tensor == _STANDARD["lm_head"])


def _fused(spec: ModelSpec, param: Param, shape: Shape) -> Stored:
    """One expert in transformers' stacks: gate_up `[E, 2F, D]`, gate above up; down `[E, D, F]`."""
    prefix = _LAYER.format(layer=param.layer) + "mlp.experts."
    if param.name == "down":
        return Stored(prefix + "down_proj", (spec.experts, *shape), param.expert)
    width, d_model = shape
    first = width if param.name == "up" else 0
    return Stored(prefix + "gate_up_proj", (spec.experts, 2 * width, d_model), param.expert, first=first)


def _interleaved(spec: ModelSpec, param: Param, shape: Shape) -> Iterator[Stored]:
    """One expert in gpt-oss's stacks: gate and up alternate; bf16 is `[E, in, out]`, MXFP4 `[E, out, in / 32, 16]`."""
    kind, is_bias = param.name.removesuffix("_bias"), param.name.endswith("_bias")
    name = "down_proj" if kind == "down" else "gate_up_proj"
    tensor = _LAYER.format(layer=param.layer) + "mlp.experts." + name
    first, step = (0, 1) if kind == "down" else (("gate", "up").index(kind), 2)
    rows = shape[0] * step
    if is_bias:
        yield Stored(f"{tensor}_bias", (spec.experts, rows), param.expert, first=first, step=step)
        return
    blocks = (spec.experts, rows, -(-shape[1] // MXFP4_GROUP), MXFP4_GROUP // 2)
    yield Stored(f"{tensor}_blocks", blocks, param.expert, "mxfp4", first=first, step=step)
    plain = (spec.experts, shape[1], rows)
    yield Stored(tensor, plain, param.expert, transposed=True, first=first, step=step)
