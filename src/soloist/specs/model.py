"""The shape of a Mixture-of-Experts decoder, independent of any checkpoint format.

Widths are counted in elements. `specs/hf.py` reads a `ModelSpec` from a Hugging Face `config.json`, `specs/presets.py`
holds the shapes that come without a checkpoint, `specs/parameters.py` lists every weight that a spec implies.
"""

from __future__ import annotations

from functools import cached_property
from typing import Literal

import msgspec

from soloist.errors import ConfigurationError

Dtype = Literal["float32", "bfloat16", "float16"]
DTYPE_BYTES: dict[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2}


class Spec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Base of the frozen records that describe the world."""


class RopeSpec(Spec, frozen=True, kw_only=True):
    """Rotary position embedding. `kind` chooses which of the scaling fields matter."""

    kind: Literal["default", "linear", "llama3", "yarn"] = "default"
    theta: float = 10_000.0
    width: int  # rotated elements of each head
    interleaved: bool = False  # pairs are (0, 1), (2, 3), … instead of (0, w/2), (1, w/2 + 1), …
    factor: float = 1.0
    original_max_positions: int = 0
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    truncate: bool = True  # yarn: round the ramp's ends to whole dimensions
    attention_factor: float = 1.0  # yarn: multiplies cos and sin


class AttentionSpec(Spec, frozen=True, kw_only=True):
    """Grouped-query attention, or DeepSeek's multi-head latent attention (`kind="mla"`).

    For MLA `head_dim` is nope + rope width, `kv_heads` equals `heads`, and the cache holds one row of
    `kv_rank + rope_dim` elements a token.
    """

    kind: Literal["gqa", "mla"] = "gqa"
    heads: int
    kv_heads: int
    head_dim: int  # of queries and keys
    v_head_dim: int  # of values
    scale: float  # multiplies q·k; includes yarn's mscale² where the model has it
    bias: bool = False  # on q, k, v (for MLA: on q_a and kv_a)
    out_bias: bool = False
    qk_norm: Literal["none", "head", "full"] = "none"  # RMSNorm of each head, or of the whole projection
    clip: float | None = None  # OLMoE: clamp q, k, v to ±clip
    sinks: bool = False  # gpt-oss: one learned logit a head, in the softmax's denominator only
    window: int | None = None  # tokens that a position sees, itself included
    window_layers: tuple[int, ...] = ()  # layers in which `window` holds
    q_rank: int | None = None  # MLA; None: no low-rank query
    kv_rank: int = 0  # MLA
    rope_dim: int = 0  # MLA
    latent_norm_eps: float = 1e-6  # MLA: of the norms between its low-rank projections, whatever `norm_eps` is

    @property
    def nope_dim(self) -> int:
        """MLA: elements of a head that carry no position."""
        return self.head_dim - self.rope_dim

    @property
    def kv_elements(self) -> int:
        """Elements of KV cache a token and layer, before any split."""
        if self.kind == "mla":
            return self.kv_rank + self.rope_dim
        return self.kv_heads * (self.head_dim + self.v_head_dim)


class RouterSpec(Spec, frozen=True, kw_only=True):
    """How a token chooses its experts. The order of steps: score, (bias, groups) choose, weigh, renormalise, scale."""

    top_k: int
    scoring: Literal["softmax", "sigmoid", "softmax_of_chosen"] = "softmax"
    renormalise: bool = True
    scaling: float = 1.0
    bias: bool = False  # a bias on the router's logits
    correction_bias: bool = False  # DeepSeek-V3: added to the scores for the choice only
    groups: int = 1  # experts are cut into groups, of which `kept_groups` may be chosen from
    kept_groups: int = 1
    group_score: Literal["max", "top2"] = "max"


class ExpertSpec(Spec, frozen=True, kw_only=True):
    """One expert's feed-forward network. `clamped_swiglu` is gpt-oss's GLU (limit, alpha, up + 1)."""

    kind: Literal["mlp", "swiglu", "clamped_swiglu"] = "swiglu"
    width: int
    activation: Literal["silu", "gelu", "relu"] = "silu"
    bias: bool = False
    limit: float = 7.0
    alpha: float = 1.702

    @property
    def matrices(self) -> int:
        """Weight matrices of an expert: gate, up and down, or up and down."""
        return 2 if self.kind == "mlp" else 3


class ModelSpec(Spec, frozen=True, kw_only=True, dict=True):
    """A decoder: embedding, `layers` blocks of attention and (MoE or dense) feed-forward, final norm, output head."""

    name: str
    family: str  # which table of tensor names reads its checkpoints (models/families.py)
    layers: int
    d_model: int
    vocab: int
    max_positions: int
    dtype: Dtype = "bfloat16"
    fp8_experts: bool = False  # the checkpoint has the experts' matrices in fp8
    norm_eps: float = 1e-6
    tied: bool = False  # the output head is the embedding
    attention: AttentionSpec
    rope: RopeSpec
    experts: int
    router: RouterSpec
    expert: ExpertSpec
    shared_width: int = 0  # all shared experts together; 0: none
    shared_gate: bool = False  # Qwen2-MoE: a sigmoid gate on the shared expert
    dense_layers: tuple[int, ...] = ()  # layers with a dense feed-forward instead of experts
    dense_width: int = 0
    eos_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        _check(self)

    @cached_property
    def moe_layers(self) -> tuple[int, ...]:
        """Layers with experts, in order. A placement's first index counts these."""
        return tuple(layer for layer in range(self.layers) if layer not in self.dense_layers)

    def window(self, layer: int) -> int | None:
        """Tokens that a position of this layer sees, itself included; None: all before it."""
        return self.attention.window if layer in self.attention.window_layers else None


def _check(spec: ModelSpec) -> None:
    """Refuse shapes that contradict themselves, naming key, value and remedy."""
    for key in ("layers", "d_model", "vocab", "max_positions", "experts"):
        if getattr(spec, key) < 1:
            raise ConfigurationError.of(key, getattr(spec, key), "must be at least 1")
    a, r = spec.attention, spec.router
    for key in ("heads", "kv_heads", "head_dim", "v_head_dim"):
        if getattr(a, key) < 1:
            raise ConfigurationError.of(f"attention.{key}", getattr(a, key), "must be at least 1")
    if a.heads % a.kv_heads:
        raise ConfigurationError.of("attention.kv_heads", a.kv_heads, f"must divide the {a.heads} heads")
    if not 1 <= r.top_k <= spec.experts:
        raise ConfigurationError.of("router.top_k", r.top_k, f"must lie between 1 and the {spec.experts} experts")
    if r.groups < 1 or spec.experts % r.groups:
        raise ConfigurationError.of("router.groups", r.groups, f"must divide the {spec.experts} experts")
    if not 1 <= r.kept_groups <= r.groups:
        raise ConfigurationError.of("router.kept_groups", r.kept_groups, f"must lie between 1 and {r.groups}")
    if r.top_k > r.kept_groups * (spec.experts // r.groups):
        raise ConfigurationError.of("router.top_k", r.top_k, "is more than the experts of the kept groups")
    if spec.rope.width % 2 or spec.rope.width > a.head_dim:
        raise ConfigurationError.of("rope.width", spec.rope.width, f"must be even and at most {a.head_dim}")
    if a.kind == "mla" and (a.kv_rank < 1 or spec.rope.width != a.rope_dim):
        raise ConfigurationError.of("attention.kv_rank", a.kv_rank, "MLA needs kv_rank and rope.width = rope_dim")
    if spec.expert.width < 1:
        raise ConfigurationError.of("expert.width", spec.expert.width, "must be at least 1")
    if any(not 0 <= layer < spec.layers for layer in spec.dense_layers):
        raise ConfigurationError.of("dense_layers", spec.dense_layers, f"must lie between 0 and {spec.layers - 1}")
    if spec.dense_layers and spec.dense_width < 1:
        raise ConfigurationError.of("dense_width", spec.dense_width, "must be at least 1 where there are dense layers")
