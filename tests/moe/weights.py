"""Specs and random weights for the parts of an MoE layer, and the layer as a dense loop over experts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from soloist.specs.model import AttentionSpec, ExpertSpec, ModelSpec, RopeSpec, RouterSpec
from soloist.specs.parameters import Param, parameters


def make_spec(expert: ExpertSpec, router: RouterSpec, experts: int = 6, d_model: int = 16) -> ModelSpec:
    """One MoE layer."""
    return ModelSpec(
        name="test",
        family="qwen3_moe",
        layers=1,
        d_model=d_model,
        vocab=7,
        max_positions=8,
        attention=AttentionSpec(heads=1, kv_heads=1, head_dim=4, v_head_dim=4, scale=0.5),
        rope=RopeSpec(width=4),
        experts=experts,
        router=router,
        expert=expert,
    )


class RandomSource:
    """Weights of a spec in memory."""

    threads = 2

    def __init__(self, spec: ModelSpec, dtype: torch.dtype = torch.float32, seed: int = 0) -> None:
        self.dtype, self.device = dtype, torch.device("cpu")
        generator = torch.Generator().manual_seed(seed)
        self.full = {
            param: (torch.randn(shape, generator=generator) / shape[-1] ** 0.5 * 1.5).to(dtype)
            for param, shape in parameters(spec)
        }

    def read(self, param: Param, rows: tuple[int, int] | None = None, columns: tuple[int, int] | None = None) -> Tensor:
        full = self.full[param]
        if rows:
            full = full[rows[0] : rows[1]]
        if columns:
            full = full[:, columns[0] : columns[1]]
        return full.contiguous().clone()


def dense_expert(spec: ModelSpec, source: RandomSource, expert: int, x_TD: Tensor) -> Tensor:
    """One whole expert on all tokens, in fp64."""
    found = {
        name: source.full[Param(name, 0, expert)].double() if Param(name, 0, expert) in source.full else None
        for name in ("gate", "up", "down", "gate_bias", "up_bias", "down_bias")
    }
    up = F.linear(x_TD.double(), found["up"], found["up_bias"])
    if spec.expert.kind == "mlp":
        return F.linear(getattr(F, spec.expert.activation)(up), found["down"], found["down_bias"])
    gate = F.linear(x_TD.double(), found["gate"], found["gate_bias"])
    if spec.expert.kind == "swiglu":
        hidden = getattr(F, spec.expert.activation)(gate) * up
    else:
        gate, up = gate.clamp(max=spec.expert.limit), up.clamp(-spec.expert.limit, spec.expert.limit)
        hidden = (up + 1) * gate * torch.sigmoid(gate * spec.expert.alpha)
    return F.linear(hidden, found["down"], found["down_bias"])


def dense_layer(
    spec: ModelSpec, source: RandomSource, x_TD: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor
) -> Tensor:
    """Every expert on every token, those that were not chosen with weight 0; fp64."""
    out_TD = torch.zeros(x_TD.shape, dtype=torch.float64)
    for expert in range(spec.experts):
        weight_T = (weights_TK.double() * (expert_ids_TK == expert)).sum(-1)
        out_TD += weight_T[:, None] * dense_expert(spec, source, expert, x_TD)
    return out_TD
