"""The engine on real GPUs, through the entry points that the CPU tests use."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import pytest

from soloist.engine.llm import LLM, Prompt
from soloist.engine.outputs import RequestOutput
from soloist.scheduling.request import SamplingParams

NOVELS = Path(__file__).parents[2] / "models" / "novels-moe-11m"
PROMPTS = ["It was a dark and stormy night, and", "The old house upon the hill", "My dear Watson,", "She"]
GREEDY = SamplingParams(max_tokens=48, temperature=0.0)
SCORED = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)
BF16_NATS = 0.08  # mean over tokens; transformers' own bf16 differs from its fp32 by 0.05 on these prompts


def answer(
    layout: str, dtype: str, params: SamplingParams, prompts: Sequence[Prompt] = PROMPTS, **options: Any
) -> list[RequestOutput]:
    with LLM(NOVELS, layout=layout, device="cuda", dtype=dtype, show_progress=False, **options) as llm:
        return llm.generate(prompts, params)


def scores(layout: str, dtype: str, answers: list[RequestOutput]) -> list[float]:
    """Log probabilities of all tokens of earlier answers but their first ones."""
    texts = [[*answer.prompt_tokens, *answer.outputs[0].tokens] for answer in answers]
    scored = answer(layout, dtype, SCORED, texts)
    return [token.logprob for output in scored for token in output.prompt_logprobs]


def mean_difference(found: list[float], expected: list[float]) -> float:
    return mean(abs(a - b) for a, b in zip(found, expected, strict=True))


@pytest.fixture(scope="module")
def one_gpu() -> list[RequestOutput]:
    return answer("ep1", "float32", GREEDY)


@pytest.fixture(scope="module")
def one_gpu_scores(one_gpu: list[RequestOutput]) -> list[float]:
    return scores("ep1", "float32", one_gpu)


@pytest.mark.gpu
def test_shipped_model_in_bf16_is_within_rounding_of_fp32(one_gpu, one_gpu_scores: list[float]) -> None:
    assert len(one_gpu_scores) > 200
    assert mean_difference(scores("ep1", "bfloat16", one_gpu), one_gpu_scores) < BF16_NATS


@pytest.mark.gpu
def test_captured_steps_and_those_scheduled_ahead_change_no_token(one_gpu: list[RequestOutput]) -> None:
    plain = answer("ep1", "float32", GREEDY, cuda_graphs="off", ahead="off")
    few = answer("ep1", "float32", GREEDY, cuda_graphs="3,8")  # four sequences: four rows of padding
    for output, expected, other in zip(one_gpu, plain, few, strict=True):
        margin = min(output.outputs[0].margin, expected.outputs[0].margin, other.outputs[0].margin)
        assert output.outputs[0].text == expected.outputs[0].text == other.outputs[0].text, f"smallest margin {margin}"


@pytest.mark.gpu
def test_gpu_and_cpu_agree_in_fp32(one_gpu: list[RequestOutput]) -> None:
    with LLM(NOVELS, device="cpu", dtype="float32", show_progress=False) as llm:
        on_cpu = llm.generate(PROMPTS, GREEDY)
    assert [o.outputs[0].tokens for o in on_cpu] == [o.outputs[0].tokens for o in one_gpu]


@pytest.mark.gpu
def test_a_layer_of_the_reference_model_runs_in_bf16() -> None:
    prompt = [(7 * i) % 51200 for i in range(300)]
    params = SamplingParams(max_tokens=8, temperature=0.0, logprobs=1, ignore_eos=True)
    with LLM("ref-16l@1", device="cuda", random_weights=1, kv_tokens=4096, show_progress=False) as llm:
        first, second = (llm.generate([prompt], params)[0] for _ in range(2))
    assert first.error is None
    assert len(first.outputs[0].tokens) == 8
    assert first.outputs[0].tokens == second.outputs[0].tokens
    assert all(math.isfinite(token.logprob) for token in first.outputs[0].logprobs)


@pytest.mark.multigpu
@pytest.mark.parametrize("layout", ["ep2", "tp2", "pp2"])
def test_two_gpus_give_the_text_of_one_in_fp32(layout: str, one_gpu: list[RequestOutput]) -> None:
    found = answer(layout, "float32", GREEDY)
    for output, expected in zip(found, one_gpu, strict=True):
        margin = min(output.outputs[0].margin, expected.outputs[0].margin)
        assert output.outputs[0].text == expected.outputs[0].text, f"smallest margin {margin}"


@pytest.mark.multigpu
@pytest.mark.parametrize("layout", ["ep2", "tp2", "pp2"])
def test_two_gpus_are_within_bf16_rounding_of_one(layout: str, one_gpu, one_gpu_scores: list[float]) -> None:
    assert mean_difference(scores(layout, "bfloat16", one_gpu), one_gpu_scores) < BF16_NATS
