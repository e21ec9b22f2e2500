"""The keys of `config.json` that all families share, and what follows from them."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

import msgspec

from soloist.errors import ConfigurationError
from soloist.specs.model import AttentionSpec, ExpertSpec, ModelSpec
from soloist.specs.rope import RopeParameters

Positive = Annotated[int, msgspec.Meta(ge=1)]
Natural = Annotated[int, msgspec.Meta(ge=0)]
Size = Annotated[float, msgspec.Meta(gt=0)]

_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "relu": "relu"}
_DTYPES = ("float32", "bfloat16", "float16")


class Family(msgspec.Struct, kw_only=True):
    """Keys that all families share, and what follows from them."""

    default_theta: ClassVar[float] = 10_000.0

    model_type: str
    architectures: list[str] = []
    vocab_size: Positive
    hidden_size: Positive
    intermediate_size: Positive
    num_hidden_layers: Positive
    num_attention_heads: Positive
    num_key_value_heads: Positive | None = None
    head_dim: Positive | None = None
    max_position_embeddings: Positive
    rms_norm_eps: Size
    num_experts: Positive
    num_experts_per_tok: Positive
    hidden_act: str = "silu"
    tie_word_embeddings: bool = False
    dtype: str = "bfloat16"

    def implied_rope(self, raw: dict[str, Any]) -> dict[str, Any]:
        """Rope keys that stand for a config without any."""
        return {}

    def spec(self, name: str, rope: RopeParameters, eos_ids: tuple[int, ...]) -> ModelSpec:
        """The family's ModelSpec."""
        raise NotImplementedError

    def attention(self, **more: Any) -> AttentionSpec:
        heads, width = self.num_attention_heads, self.head_width()
        return AttentionSpec(
            heads=heads,
            kv_heads=self.num_key_value_heads or heads,
            head_dim=width,
            v_head_dim=width,
            scale=width**-0.5,
            **more,
        )

    def model(self, name: str, eos_ids: tuple[int, ...], **more: Any) -> ModelSpec:
        if self.dtype not in _DTYPES:
            raise ConfigurationError.of("dtype", self.dtype, f"must be one of {', '.join(_DTYPES)}")
        if self.num_experts_per_tok > self.num_experts:
            remedy = f"must not exceed the {self.num_experts} experts"
            raise ConfigurationError.of("num_experts_per_tok", self.num_experts_per_tok, remedy)
        return ModelSpec(
            name=name,
            family=self.model_type,
            layers=self.num_hidden_layers,
            d_model=self.hidden_size,
            vocab=self.vocab_size,
            max_positions=self.max_position_embeddings,
            dtype=self.dtype,  # type: ignore[arg-type]  # checked above
            norm_eps=self.rms_norm_eps,
            tied=self.tie_word_embeddings,
            experts=self.num_experts,
            eos_ids=eos_ids,
            **more,
        )

    def expert(self, width: int) -> ExpertSpec:
        if self.hidden_act not in _ACTIVATIONS:
            raise ConfigurationError.of("hidden_act", self.hidden_act, f"must be one of {', '.join(_ACTIVATIONS)}")
        return ExpertSpec(width=width, activation=_ACTIVATIONS[self.hidden_act])  # type: ignore[arg-type]

    def head_width(self) -> int:
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            remedy = f"must be a multiple of the {self.num_attention_heads} heads where head_dim is not given"
            raise ConfigurationError.of("hidden_size", self.hidden_size, remedy)
        return self.head_dim or self.hidden_size // self.num_attention_heads

    def dense(self, layers: set[int]) -> dict[str, Any]:
        """The dense layers and their width; at least one layer must have experts."""
        if len(layers) == self.num_hidden_layers:
            raise ConfigurationError.of("num_hidden_layers", self.num_hidden_layers, "no layer has experts")
        return {"dense_layers": tuple(sorted(layers)), "dense_width": self.intermediate_size if layers else 0}

    def windows(self, window: int | None, layers: list[int]) -> dict[str, Any]:
        if layers and not window:
            raise ConfigurationError.of("sliding_window", window, "must be given for layers with sliding attention")
        return {"window": window, "window_layers": tuple(layers)} if layers else {}

    def sliding(self, layer_types: list[str]) -> list[int]:
        """Layers with sliding attention according to `layer_types`."""
        if len(layer_types) != self.num_hidden_layers:
            raise ConfigurationError.of("layer_types", layer_types, f"must have {self.num_hidden_layers} entries")
        for kind in layer_types:
            if kind not in ("full_attention", "sliding_attention"):
                raise ConfigurationError.of("layer_types", kind, "must be full_attention or sliding_attention")
        return [layer for layer, kind in enumerate(layer_types) if kind == "sliding_attention"]
