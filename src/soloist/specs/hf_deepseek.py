"""DeepSeek-V2 and DeepSeek-V3: multi-head latent attention, shared experts, leading dense layers, expert groups."""

from __future__ import annotations

import math

from soloist.errors import ConfigurationError
from soloist.specs.hf_family import Family, Natural, Positive
from soloist.specs.model import AttentionSpec, ModelSpec, RouterSpec
from soloist.specs.rope import RopeParameters


class Deepseek(Family, kw_only=True):
    """The keys of both versions."""

    moe_intermediate_size: Positive
    n_shared_experts: Natural = 0
    first_k_dense_replace: Natural = 0
    moe_layer_freq: int = 1
    kv_lora_rank: Positive
    q_lora_rank: Positive | None = None
    qk_nope_head_dim: Positive
    qk_rope_head_dim: Positive
    v_head_dim: Positive
    attention_bias: bool = False
    mlp_bias: bool = False
    n_group: Positive = 1
    topk_group: Positive = 1
    routed_scaling_factor: float = 1.0
    norm_topk_prob: bool = False
    topk_method: str | None = None
    scoring_func: str | None = None

    def _deepseek(
        self, name: str, rope: RopeParameters, eos_ids: tuple[int, ...], router: RouterSpec, interleaved: bool
    ) -> ModelSpec:
        self._check()
        return self.model(
            name,
            eos_ids,
            attention=self._latent(rope),
            rope=rope.spec(self.qk_rope_head_dim, interleaved),
            router=router,
            expert=self.expert(self.moe_intermediate_size),
            shared_width=self.moe_intermediate_size * self.n_shared_experts,
            **self.dense(set(range(min(self.first_k_dense_replace, self.num_hidden_layers)))),
        )

    def _latent(self, rope: RopeParameters) -> AttentionSpec:
        width = self.qk_nope_head_dim + self.qk_rope_head_dim
        return AttentionSpec(
            kind="mla",
            heads=self.num_attention_heads,
            kv_heads=self.num_attention_heads,
            head_dim=width,
            v_head_dim=self.v_head_dim,
            scale=rope.softmax_factor() / math.sqrt(width),
            bias=self.attention_bias,
            out_bias=self.attention_bias,
            q_rank=self.q_lora_rank,
            kv_rank=self.kv_lora_rank,
            rope_dim=self.qk_rope_head_dim,
        )

    def _check(self) -> None:
        if self.num_key_value_heads not in (None, self.num_attention_heads):
            remedy = f"must equal the {self.num_attention_heads} heads: latent attention has no grouped heads"
            raise ConfigurationError.of("num_key_value_heads", self.num_key_value_heads, remedy)
        if self.qk_rope_head_dim % 2:
            raise ConfigurationError.of("qk_rope_head_dim", self.qk_rope_head_dim, "must be even")
        if self.moe_layer_freq != 1:
            raise ConfigurationError.of("moe_layer_freq", self.moe_layer_freq, "only 1 is supported")
        if self.mlp_bias:
            raise ConfigurationError.of("mlp_bias", self.mlp_bias, "only false is supported")

    def _require(self, key: str, *allowed: str | None) -> None:
        if (value := getattr(self, key)) not in allowed:
            known = ", ".join(str(name) for name in allowed if name)
            raise ConfigurationError.of(key, value, f"must be {known} for model_type {self.model_type}")


class DeepseekV2(Deepseek, kw_only=True):
    """Softmax scores, chosen greedily, from all experts or from the groups with the best single scores."""

    def spec(self, name: str, rope: RopeParameters, eos_ids: tuple[int, ...]) -> ModelSpec:
        self._require("topk_method", None, "greedy", "group_limited_greedy")
        self._require("scoring_func", None, "softmax")
        if self.norm_topk_prob:
            raise ConfigurationError.of("norm_topk_prob", True, "DeepSeek-V2's reference code never renormalises")
        limited = self.topk_method == "group_limited_greedy"
        router = RouterSpec(
            top_k=self.num_experts_per_tok,
            renormalise=False,
            scaling=self.routed_scaling_factor,
            groups=self.n_group if limited else 1,
            kept_groups=self.topk_group if limited else 1,
        )
        return self._deepseek(name, rope, eos_ids, router=router, interleaved=True)


class DeepseekV3(Deepseek, kw_only=True):
    """Sigmoid scores, a correction bias for the choice, groups ranked by the sum of their two best."""

    norm_topk_prob: bool = True
    routed_scaling_factor: float = 2.5
    rope_interleave: bool = True

    def spec(self, name: str, rope: RopeParameters, eos_ids: tuple[int, ...]) -> ModelSpec:
        self._require("topk_method", None, "noaux_tc")
        self._require("scoring_func", None, "sigmoid")
        if self.n_group > 1 and self.num_experts < 2 * self.n_group:
            raise ConfigurationError.of("n_group", self.n_group, "every group needs two experts or more")
        router = RouterSpec(
            top_k=self.num_experts_per_tok,
            scoring="sigmoid",
            renormalise=self.norm_topk_prob,
            scaling=self.routed_scaling_factor,
            correction_bias=True,
            groups=self.n_group,
            kept_groups=self.topk_group,
            group_score="top2",
        )
        return self._deepseek(name, rope, eos_ids, router=router, interleaved=self.rope_interleave)
