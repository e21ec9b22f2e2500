"""Families with grouped-query attention: Mixtral, Qwen2-MoE, Qwen3-MoE, OLMoE and gpt-oss.

One struct for a family: its own keys, with transformers' defaults for the optional ones, and the spec they mean.
"""

from __future__ import annotations

from typing import Any, ClassVar

from soloist.errors import ConfigurationError
from soloist.specs.hf_family import Family, Natural, Positive, Size
from soloist.specs.model import ExpertSpec, ModelSpec, RouterSpec
from soloist.specs.rope import RopeParameters


class Mixtral(Family, kw_only=True):
    """Softmax over all experts, the chosen renormalised; a sliding window, where given, in all layers."""

    default_theta: ClassVar[float] = 1_000_000.0

    sliding_window: Positive | None = None

    def spec(self, name: str, rope: RopeParameters, eos_ids: tuple[int, ...]) -> ModelSpec:
        every = list(range(self.num_hidden_layers)) if self.sliding_window else []
        return self.model(
            name,
            eos_ids,
            attention=self.attention(**self.windows(self.sliding_window, every)),
            rope=rope.spec(self.head_width()),
            router=RouterSpec(top_k=self.num_experts_per_tok),
            expert=self.expert(self.intermediate_size),
        )


class _Qwen(Family, kw_only=True):
    """Keys of both Qwen families: experts in every `decoder_sparse_step`-th layer that is not in `mlp_only_layers`."""

    moe_intermediate_size: Positive
    norm_topk_prob: bool = False
    decoder_sparse_step: Positive = 1
    mlp_only_layers: list[Natural] = []
    use_sliding_window: bool = False
    sliding_window: Natural | None = None
    max_window_layers: Natural | None = None

    def _qwen(self, name: str, eos_ids: tuple[int, ...], **more: Any) -> ModelSpec:
        layers = range(self.num_hidden_layers)
        for layer in self.mlp_only_layers:
            if layer not in layers:
                raise ConfigurationError.of("mlp_only_layers", layer, f"must be below {self.num_hidden_layers}")
        dense = {layer for layer in layers if (layer + 1) % self.decoder_sparse_step} | set(self.mlp_only_layers)
        return self.model(
            name,
            eos_ids,
            router=RouterSpec(top_k=self.num_experts_per_tok, renormalise=self.norm_topk_prob),
            expert=self.expert(self.moe_intermediate_size),
            **self.dense(dense),
            **more,
        )


class Qwen2Moe(_Qwen, kw_only=True):
    """A shared expert behind a sigmoid gate, biases on q, k, v, and optionally a window in alternate layers."""

    shared_expert_intermediate_size: Natural
    qkv_bias: bool = True
    layer_types: list[str] | None = None

    def spec(self, name: str, rope: RopeParameters, eos_ids: tuple[int, ...]) -> ModelSpec:
        shared = self.shared_expert_intermediate_size
        return self._qwen(
            name,
            eos_ids,
            attention=self.attention(bias=self.qkv_bias, **self._window()),
            rope=rope.spec(self.head_width()),
            shared_width=shared,
            shared_gate=shared > 0,
        )

    def _window(self) -> dict[str, Any]:
        below = 28 if self.max_window_layers is None else self.max_window_layers
        if self.layer_types is not None:
            layers = self.sliding(self.layer_types)
        else:
            layers = [
                layer for layer in range(0, self.num_hidden_layers, 2) if self.use_sliding_window and layer < below
            ]
        return self.windows(self.sliding_window if self.use_sliding_window else None, layers)


class Qwen3Moe(_Qwen, kw_only=True):
    """RMSNorm on each head of q and k; a window, where switched on, in all layers."""

    attention_bias: bool = False

    def spec(self, name: str, rope: RopeParameters, eos_ids: tuple[int, ...]) -> ModelSpec:
        if self.use_sliding_window and self.max_window_layers is not None:
            remedy = "its meaning changed between versions of this family: remove it, then all layers get the window"
            raise ConfigurationError.of("max_window_layers", self.max_window_layers, remedy)
        every = list(range(self.num_hidden_layers)) if self.use_sliding_window else []
        window = self.windows(self.sliding_window, every)
        bias = self.attention_bias
        return self._qwen(
            name,
            eos_ids,
            attention=self.attention(bias=bias, out_bias=bias, qk_norm="head", **window),
            rope=rope.spec(self.head_width()),
        )


class Olmoe(Family, kw_only=True):
    """RMSNorm over the whole projections of q and k, then a clamp of q, k and v."""

    norm_topk_prob: bool = False
    attention_bias: bool = False
    clip_qkv: Size | None = None

    def spec(self, name: str, rope: RopeParameters, eos_ids: tuple[int, ...]) -> ModelSpec:
        width, bias = self.head_width(), self.attention_bias
        if width * self.num_attention_heads != self.hidden_size:
            raise ConfigurationError.of("head_dim", width, "must be hidden_size / num_attention_heads for OLMoE")
        return self.model(
            name,
            eos_ids,
            attention=self.attention(bias=bias, out_bias=bias, qk_norm="full", clip=self.clip_qkv),
            rope=rope.spec(width),
            router=RouterSpec(top_k=self.num_experts_per_tok, renormalise=self.norm_topk_prob),
            expert=self.expert(self.intermediate_size),
        )


class GptOss(Family, kw_only=True):
    """Biases everywhere, sinks, a window in alternate layers, the clamped GLU, softmax over the chosen experts only."""

    default_theta: ClassVar[float] = 150_000.0

    attention_bias: bool = True
    sliding_window: Positive | None = None
    layer_types: list[str] | None = None
    swiglu_limit: Size = 7.0
    swiglu_alpha: Size = 1.702

    def implied_rope(self, raw: dict[str, Any]) -> dict[str, Any]:
        if raw.get("rope_parameters") or raw.get("rope_scaling"):
            return {}
        yarn = {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096, "truncate": False}
        return {"rope_parameters": yarn}

    def spec(self, name: str, rope: RopeParameters, eos_ids: tuple[int, ...]) -> ModelSpec:
        if self.head_dim is None:
            raise ConfigurationError("head_dim is missing: add it to config.json")
        if self.hidden_act != "silu":
            raise ConfigurationError.of("hidden_act", self.hidden_act, "must be silu for gpt_oss")
        expert = ExpertSpec(
            kind="clamped_swiglu",
            width=self.intermediate_size,
            bias=True,
            limit=self.swiglu_limit,
            alpha=self.swiglu_alpha,
        )
        return self.model(
            name,
            eos_ids,
            attention=self.attention(
                bias=self.attention_bias, out_bias=self.attention_bias, sinks=True, **self._window()
            ),
            rope=rope.spec(self.head_width()),
            router=RouterSpec(top_k=self.num_experts_per_tok, scoring="softmax_of_chosen", bias=True),
            expert=expert,
        )

    def _window(self) -> dict[str, Any]:
        layers = range(0, self.num_hidden_layers, 2) if self.layer_types is None else self.sliding(self.layer_types)
        return self.windows(self.sliding_window, list(layers))
