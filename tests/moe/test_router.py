"""Routing of every family against transformers' own routers, and the choice among replicas."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssTopKRouter
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
from transformers.models.olmoe.modeling_olmoe import OlmoeTopKRouter
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeTopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from soloist.moe.router import Router, Routing, SlotTable
from soloist.placement.placement import Placement
from soloist.specs.model import ExpertSpec, RouterSpec
from tests.moe.weights import RandomSource, make_spec

E, D, T = 12, 20, 33


def config(top_k: int, renormalise: bool = True, **more: Any) -> SimpleNamespace:
    common = {"num_experts": E, "num_local_experts": E, "hidden_size": D, "num_experts_per_tok": top_k}
    return SimpleNamespace(**common, norm_topk_prob=renormalise, **more)


def v2(method: str, groups: int, kept: int) -> SimpleNamespace:
    return config(4, False, topk_method=method, n_group=groups, topk_group=kept, routed_scaling_factor=2.5)


def v3(groups: int, kept: int, renormalise: bool = True) -> SimpleNamespace:
    return config(4, renormalise, n_group=groups, topk_group=kept, routed_scaling_factor=2.5)


SIGMOID = {"scoring": "sigmoid", "correction_bias": True, "group_score": "top2", "scaling": 2.5}
FAMILIES: dict[str, tuple[type, SimpleNamespace, RouterSpec]] = {
    "mixtral": (MixtralTopKRouter, config(2), RouterSpec(top_k=2)),
    "mixtral, top 1": (MixtralTopKRouter, config(1), RouterSpec(top_k=1)),
    "mixtral, all": (MixtralTopKRouter, config(E), RouterSpec(top_k=E)),
    "qwen2": (Qwen2MoeTopKRouter, config(3, False), RouterSpec(top_k=3, renormalise=False)),
    "qwen3": (Qwen3MoeTopKRouter, config(3), RouterSpec(top_k=3)),
    "olmoe": (OlmoeTopKRouter, config(5, False), RouterSpec(top_k=5, renormalise=False)),
    "v2 greedy": (DeepseekV2TopkRouter, v2("greedy", 1, 1), RouterSpec(top_k=4, renormalise=False, scaling=2.5)),
    "v2 groups": (
        DeepseekV2TopkRouter,
        v2("group_limited_greedy", 4, 2),
        RouterSpec(top_k=4, renormalise=False, scaling=2.5, groups=4, kept_groups=2),
    ),
    "v3": (DeepseekV3TopkRouter, v3(4, 2), RouterSpec(top_k=4, groups=4, kept_groups=2, **SIGMOID)),
    "v3, one group": (DeepseekV3TopkRouter, v3(1, 1), RouterSpec(top_k=4, **SIGMOID)),
    "v3, raw": (
        DeepseekV3TopkRouter,
        v3(3, 2, False),
        RouterSpec(top_k=4, groups=3, kept_groups=2, renormalise=False, **SIGMOID),
    ),
    "gpt-oss": (GptOssTopKRouter, config(4), RouterSpec(top_k=4, scoring="softmax_of_chosen", bias=True)),
}


def reference(kind: type, settings: SimpleNamespace) -> nn.Module:
    """transformers' router with random weights, its bias and correction bias far from 0."""
    generator = torch.Generator().manual_seed(5)
    router = kind(settings)
    for name, tensor in [*router.named_parameters(), *router.named_buffers()]:
        tensor.data = torch.randn(tensor.shape, generator=generator) * (0.3 if "bias" in name else 0.5)
    return router


def by_expert(ids_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
    return torch.zeros(len(ids_TK), E).scatter_(1, ids_TK, weights_TK.float())


@pytest.mark.parametrize("family", FAMILIES)
def test_routes_like_transformers(family: str) -> None:
    kind, settings, spec = FAMILIES[family]
    theirs = reference(kind, settings)
    ours = Router(
        spec, theirs.weight.data, getattr(theirs, "bias", None), getattr(theirs, "e_score_correction_bias", None)
    )
    x_TD = torch.randn(T, D, generator=torch.Generator().manual_seed(6))
    with torch.inference_mode():
        _, weights_TK, ids_TK = theirs(x_TD)
        routing = ours.route(x_TD)
    assert torch.equal(routing.expert_ids_TK.sort(-1).values, ids_TK.sort(-1).values)
    torch.testing.assert_close(
        by_expert(routing.expert_ids_TK, routing.weights_TK), by_expert(ids_TK, weights_TK), rtol=1e-6, atol=1e-7
    )


def test_half_precision_is_routed_in_fp32() -> None:
    """Logits of bf16 tokens are those of the same values in fp32."""
    spec = RouterSpec(top_k=3)
    weight_ED, x_TD = torch.randn(E, D).bfloat16(), torch.randn(T, D).bfloat16()
    half, full = Router(spec, weight_ED).route(x_TD), Router(spec, weight_ED.float()).route(x_TD.float())
    assert half.weights_TK.dtype == torch.float32
    assert torch.equal(half.weights_TK, full.weights_TK)
    assert torch.equal(half.expert_ids_TK, full.expert_ids_TK)


def test_groups_of_one_expert() -> None:
    """A group of one has no second-best score."""
    spec = RouterSpec(top_k=2, scoring="sigmoid", groups=E, kept_groups=2, group_score="top2")
    generator = torch.Generator().manual_seed(7)
    x_TD, weight_ED = torch.randn(T, D, generator=generator), torch.randn(E, D, generator=generator) / D
    expected = (x_TD @ weight_ED.T).topk(2).indices
    assert torch.equal(Router(spec, weight_ED).route(x_TD).expert_ids_TK.sort(-1).values, expected.sort(-1).values)


def test_no_tokens() -> None:
    routing = Router(RouterSpec(top_k=4, groups=4, kept_groups=2, **SIGMOID), torch.randn(E, D)).route(
        torch.empty(0, D)
    )
    assert routing.expert_ids_TK.shape == routing.weights_TK.shape == (0, 4)


def test_loads_the_weights_that_its_spec_names() -> None:
    spec = make_spec(ExpertSpec(width=4), RouterSpec(top_k=2, bias=True, correction_bias=True, scoring="sigmoid"))
    router = Router.load(spec, RandomSource(spec), 0)
    assert router.weight_ED.shape == (spec.experts, spec.d_model)
    assert router.bias_E.shape == router.correction_E.shape == (spec.experts,)


# -- replicas -------------------------------------------------------------------------------------------------------
SLOTS = ((0, 1), (2, 0), (), (3, 0, 2))
NODES = (0, 0, 1, 1)


@pytest.mark.parametrize("group", range(4))
def test_the_own_replica_comes_first_then_those_of_the_own_node(group: int) -> None:
    table = SlotTable(Placement(experts=4, slots=(SLOTS,)), 0, group, node_of_group=NODES)
    ids_TK = torch.tensor([[0, 1, 2, 3]] * 7)
    choice = table.choose(Routing(ids_TK, torch.rand(7, 4)))
    for token in range(7):
        for expert in range(4):
            holders = [g for g, slots in enumerate(SLOTS) if expert in slots]
            near = [g for g in holders if NODES[g] == NODES[group]]
            taken = int(choice.group_TK[token, expert])
            assert taken in ([group] if group in holders else near or holders)
            assert SLOTS[taken][choice.slot_TK[token, expert]] == expert


def test_equally_near_replicas_are_taken_in_turn() -> None:
    slots = ((), (0, 1), (0, 2))
    table = SlotTable(Placement(experts=3, slots=(slots,)), 0, 0)
    taken = table.choose(Routing(torch.zeros(48, 1, dtype=torch.int64), torch.ones(48, 1))).group_TK.flatten()
    assert taken.bincount(minlength=3).tolist() == [0, 24, 24]
    assert set(taken[:2].tolist()) == {1, 2}


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_every_choice_holds_its_expert(data: st.DataObject) -> None:
    groups, experts = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 6))
    holders = [data.draw(st.sets(st.integers(0, groups - 1), min_size=1)) for _ in range(experts)]
    slots = tuple(tuple(e for e in range(experts) if g in holders[e]) for g in range(groups))
    ids_TK = torch.randint(experts, (9, 2))
    table = SlotTable(Placement(experts=experts, slots=(slots,)), 0, data.draw(st.integers(0, groups - 1)))
    choice = table.choose(Routing(ids_TK, torch.rand(9, 2)))
    found = [
        [slots[g][s] for g, s in zip(*row, strict=True)] for row in zip(choice.group_TK, choice.slot_TK, strict=True)
    ]
    assert found == ids_TK.tolist()
