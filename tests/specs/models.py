"""Tiny shapes for tests that need no weights."""

from __future__ import annotations

from soloist.specs.model import AttentionSpec, ExpertSpec, ModelSpec, RopeSpec, RouterSpec


def tiny_spec(experts: int = 6, top_k: int = 2) -> ModelSpec:
    """Three layers, the first of them dense."""
    return ModelSpec(
        name="tiny",
        family="qwen3_moe",
        layers=3,
        d_model=8,
        vocab=11,
        max_positions=32,
        attention=AttentionSpec(heads=2, kv_heads=1, head_dim=4, v_head_dim=4, scale=0.5),
        rope=RopeSpec(width=4),
        experts=experts,
        router=RouterSpec(top_k=top_k),
        expert=ExpertSpec(width=5),
        dense_layers=(0,),
        dense_width=7,
    )
