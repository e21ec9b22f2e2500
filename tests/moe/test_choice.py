"""Router and slot table in one kernel, in Triton's interpreter, against the plain forms."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from soloist.kernels import route as kernel
from soloist.kernels.language import AVAILABLE, INTERPRETED
from soloist.moe.choice import Chooser, serves
from soloist.moe.router import Router, SlotTable
from soloist.placement.placement import Placement
from soloist.specs.model import RouterSpec

pytestmark = pytest.mark.skipif(not (AVAILABLE and INTERPRETED), reason="needs Triton and TRITON_INTERPRET=1")

SIGMOID = {"scoring": "sigmoid", "correction_bias": True, "scaling": 2.5}


@dataclass(frozen=True)
class Rule:
    """A family's rule and its number of experts."""

    spec: RouterSpec
    experts: int = 12


RULES = {
    "mixtral": Rule(RouterSpec(top_k=2), 8),
    "top 1": Rule(RouterSpec(top_k=1)),
    "all": Rule(RouterSpec(top_k=12)),
    "qwen2": Rule(RouterSpec(top_k=3, renormalise=False)),
    "gpt-oss": Rule(RouterSpec(top_k=4, scoring="softmax_of_chosen", bias=True), 33),
    "v2 groups": Rule(RouterSpec(top_k=4, renormalise=False, scaling=2.5, groups=4, kept_groups=2), 16),
    "v3": Rule(RouterSpec(top_k=4, groups=4, kept_groups=2, group_score="top2", **SIGMOID), 32),
    "v3, one group": Rule(RouterSpec(top_k=4, **SIGMOID)),
}


def chooser(rule: Rule, group: int, d_model: int) -> Chooser:
    generator, experts = torch.Generator().manual_seed(4), rule.experts
    holders = [{e % 3, (2 * e + 1) % 3} for e in range(experts)]
    slots = tuple(tuple(e for e in range(experts) if g in holders[e]) for g in range(3))
    router = Router(
        rule.spec,
        torch.randn(experts, d_model, generator=generator) / d_model**0.5,
        torch.randn(experts, generator=generator) if rule.spec.bias else None,
        torch.rand(experts, generator=generator) if rule.spec.correction_bias else None,
    )
    return Chooser(router, SlotTable(Placement(experts=experts, slots=(slots,)), 0, group))


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("tokens", [0, 1, 19])
def test_one_kernel_chooses_what_the_plain_forms_choose(name: str, tokens: int) -> None:
    d_model = 700 if tokens == 19 else 40  # two splits
    choose = chooser(RULES[name], tokens % 3, d_model)
    assert serves(choose.router)
    generator = torch.Generator().manual_seed(tokens)
    x_TD, live_T = torch.randn(tokens, d_model, generator=generator), torch.arange(tokens) % 4 != 3
    for _ in range(2):  # counters are left as they were found
        routing, choice = choose.in_one_kernel(x_TD, live_T)
        wanted, slots = choose(x_TD, live_T)
        assert torch.equal(routing.expert_ids_TK, wanted.expert_ids_TK)
        assert torch.equal(choice.group_TK, slots.group_TK)
        assert torch.equal(choice.slot_TK, slots.slot_TK)
        torch.testing.assert_close(routing.weights_TK, wanted.weights_TK, rtol=1e-5, atol=1e-6)


def test_logits_of_many_tokens_come_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("soloist.moe.choice.FEW_TOKENS", 16)
    choose = chooser(RULES["gpt-oss"], 0, 40)
    x_TD = torch.randn(21, 40, generator=torch.Generator().manual_seed(0))
    routing, _ = choose.in_one_kernel(x_TD, None)
    assert torch.equal(routing.expert_ids_TK, choose(x_TD)[0].expert_ids_TK)


def test_equal_and_missing_scores_still_give_different_experts() -> None:
    choose = chooser(RULES["mixtral"], 0, 40)
    x_TD = torch.stack([torch.zeros(40), torch.full((40,), torch.nan)])
    ids_TK = choose.in_one_kernel(x_TD, None)[0].expert_ids_TK
    assert ids_TK.tolist() == [[0, 1], [0, 1]]
    assert kernel.FEW_TOKENS % kernel.BT == 0
