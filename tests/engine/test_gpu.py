"""The engine on real GPUs, through the entry points that the CPU tests use."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from soloist.engine.llm import LLM, Prompt
from soloist.engine.outputs import RequestOutput
from soloist.scheduling.request import SamplingParams
from tests.models.tiny import save_tiny

NOVELS = Path(__file__).parents[2] / "models" / "novels-moe-11m"
PROMPTS = ["It was a dark and stormy night, and", "The old house upon the hill", "My dear Watson,", "She"]
GREEDY = SamplingParams(max_tokens=48, temperature=0.0, logprobs=1)
SCORED = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)
FP32_NATS = 1e-3
BF16_NATS = 0.08  # mean over tokens; transformers' own bf16 differs from its fp32 by 0.05 on these prompts
FP8_NATS = 0.3  # activations of the experts keep three bits behind the point


@dataclass(frozen=True)
class Found:
    """What one start of the engine gave."""

    outputs: list[RequestOutput]  # greedy
    chosen: list[float]  # log probabilities of their tokens, as they were chosen: from graphs, one token at a time
    again: list[float]  # the same tokens, as a prompt has them
    scores: list[float]  # of all tokens but the first ones of some texts


def answer(layout: str, dtype: str, **options: Any) -> list[RequestOutput]:
    with LLM(NOVELS, layout=layout, device="cuda", dtype=dtype, show_progress=False, **options) as llm:
        return llm.generate(PROMPTS, GREEDY)


def answer_and_score(layout: str, dtype: str, of: Sequence[RequestOutput] = ()) -> Found:
    """`of`: answers whose texts are scored, by default the own ones. Few graphs: each takes its time to be captured."""
    few = {"cuda_graphs": "4", "mixed_graphs": "64"}
    with LLM(NOVELS, layout=layout, device="cuda", dtype=dtype, show_progress=False, **few) as llm:
        outputs = llm.generate(PROMPTS, GREEDY)
        own, scores = ([_logprobs(output) for output in llm.generate(_texts(each), SCORED)] for each in (outputs, of))
    chosen = [token.logprob for output in outputs for token in output.outputs[0].logprobs]
    again = [
        value for output, values in zip(outputs, own, strict=True) for value in values[len(output.prompt_tokens) - 1 :]
    ]
    return Found(outputs, chosen, again, [value for values in (scores or own) for value in values])


def _texts(answers: Sequence[RequestOutput]) -> list[Prompt]:
    return [[*answer.prompt_tokens, *answer.outputs[0].tokens] for answer in answers]


def _logprobs(output: RequestOutput) -> list[float]:
    return [token.logprob for token in output.prompt_logprobs]


def mean_difference(found: list[float], expected: list[float]) -> float:
    return mean(abs(a - b) for a, b in zip(found, expected, strict=True))


def on_two(layout: str) -> Any:
    """A layout for a test of two GPUs."""
    return pytest.param(layout, marks=pytest.mark.multigpu)


@pytest.fixture(scope="module")
def one_gpu() -> Found:
    return answer_and_score("ep1", "float32")


@pytest.mark.parametrize("layout", [pytest.param("ep1", marks=pytest.mark.gpu), *map(on_two, ("ep2", "tp2", "pp2"))])
def test_bf16_is_within_rounding_of_fp32_on_one_gpu(layout: str, one_gpu: Found) -> None:
    assert len(one_gpu.scores) > 200
    found = answer_and_score(layout, "bfloat16", one_gpu.outputs)
    assert mean_difference(found.scores, one_gpu.scores) < BF16_NATS
    assert mean_difference(found.chosen, found.again) < BF16_NATS


@pytest.mark.gpu
def test_captured_steps_and_those_scheduled_ahead_change_no_token(one_gpu: Found) -> None:
    """Four sequences in a graph of as many, in one with four rows of padding, and without."""
    plain = answer("ep1", "float32", cuda_graphs="off", ahead="off")
    few = answer("ep1", "float32", cuda_graphs="3,8", mixed_graphs="off")
    for output, expected, other in zip(one_gpu.outputs, plain, few, strict=True):
        margin = min(output.outputs[0].margin, expected.outputs[0].margin, other.outputs[0].margin)
        assert output.outputs[0].text == expected.outputs[0].text == other.outputs[0].text, f"smallest margin {margin}"
    assert mean_difference(one_gpu.chosen, one_gpu.again) < FP32_NATS


@pytest.mark.multigpu
@pytest.mark.parametrize(
    "settings",
    [{"mixed_graphs": "64,1536"}, {"gpus_per_node": 1, "exchange": "hierarchical"}],
    ids=["captured on both streams", "two nodes over NCCL"],
)
def test_halves_that_overlap_change_no_token(settings: dict[str, Any]) -> None:
    """Prompts of few tokens, and of so many that whole blocks travel."""
    long: list[Prompt] = [[7 * i + j for j in range(3, 700)] for i in range(1, 5)]
    found = []
    for overlap in ("on", "off"):
        options = {"overlap": overlap, "cuda_graphs": "8", "max_batch_tokens": 4096, **settings}
        with LLM(NOVELS, layout="ep2", device="cuda", dtype="float32", show_progress=False, **options) as llm:
            found.append([*llm.generate(PROMPTS, GREEDY), *llm.generate(long, GREEDY)])
    for output, expected in zip(*found, strict=True):
        margin = min(output.outputs[0].margin, expected.outputs[0].margin)
        assert output.outputs[0].tokens == expected.outputs[0].tokens, f"smallest margin {margin}"


@pytest.mark.gpu
def test_gpu_and_cpu_agree_in_fp32(one_gpu: Found) -> None:
    with LLM(NOVELS, device="cpu", dtype="float32", show_progress=False) as llm:
        on_cpu = llm.generate(PROMPTS, GREEDY)
    assert [o.outputs[0].tokens for o in on_cpu] == [o.outputs[0].tokens for o in one_gpu.outputs]


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


@pytest.mark.parametrize("layout", [pytest.param("ep1", marks=pytest.mark.gpu), *map(on_two, ("ep2", "tp2"))])
def test_no_request_waits_for_a_compiler(layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's cache grows while the ranks start, and not by prompts of many lengths that come one after the other."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    lengths = [3, 900, 1, 17, 250, 40, 2600, 120, 5, 64, 700]
    prompts = [[(7 * i + n) % 1000 for i in range(length)] for n, length in enumerate(lengths)]
    params = [SamplingParams(max_tokens=4 + n, temperature=0.0, ignore_eos=True) for n in range(len(prompts))]
    fields: dict[str, Any] = {
        "random_weights": 1,
        "rehearse": True,
        "max_positions": 4096,
        "kv_tokens": 16_384,
        "max_batch_tokens": 2048,
    }
    with LLM("qwen3-30b-a3b@2", layout=layout, device="cuda", max_sequences=8, show_progress=False, **fields) as llm:
        compiled = {*tmp_path.rglob("*.cubin")}
        for few in (2, 5, len(prompts)):
            assert not any(output.error for output in llm.generate(prompts[:few], params[:few]))
    assert compiled
    assert [path.name for path in tmp_path.rglob("*.cubin") if path not in compiled] == []


FP8_SIZES = {"hidden_size": 256, "moe_intermediate_size": 256, "n_shared_experts": 1, "num_experts_per_tok": 3}


def in_fp8(folder: Path, by_row: bool, **sizes: int) -> Path:
    """A tiny DeepSeek-V3 whose experts are in fp8, with a scale for 128 × 128 values or for a row."""
    save_tiny("deepseek_v3", folder, **sizes)
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if ".experts." in name]:
        weight = tensors[name].float()
        high, wide = (1, weight.shape[1]) if by_row else (128, 128)
        blocks = weight.unflatten(1, (-1, wide)).unflatten(0, (-1, high))
        scale = blocks.abs().amax((1, 3), keepdim=True) / 448
        tensors[name] = (blocks / scale).view(weight.shape).to(torch.float8_e4m3fn)
        tensors[name + ("_scale" if by_row else "_scale_inv")] = scale[:, 0, :, 0].contiguous()
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.gpu
@pytest.mark.parametrize("by_row", [False, True], ids=["blocks", "rows"])
def test_experts_that_stay_in_fp8_are_within_its_rounding(tmp_path: Path, by_row: bool) -> None:
    """Prefill of long and short prompts and captured decoding, against the same weights as numbers in bf16."""
    folder = in_fp8(tmp_path, by_row, **FP8_SIZES)
    prompts = [[(5 * i + 3 * n) % 131 for i in range(length)] for n, length in enumerate((200, 7, 60))]
    greedy = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True, prompt_logprobs=0)
    found = []
    for keep in (True, False):
        with LLM(folder, device="cuda", dtype="bfloat16", keep_fp8=keep, show_progress=False) as llm:
            answers = llm.generate(prompts, greedy)
        assert all(len(answer.outputs[0].tokens) == 8 for answer in answers)
        found.append([token.logprob for answer in answers for token in answer.prompt_logprobs])
    assert 0 < mean_difference(*found) < FP8_NATS


@pytest.mark.multigpu
@pytest.mark.parametrize("layout", ["ep2", "tp2", "pp2"])
def test_two_gpus_give_the_text_of_one_in_fp32(layout: str, one_gpu: Found) -> None:
    found = answer_and_score(layout, "float32", one_gpu.outputs)
    for output, expected in zip(found.outputs, one_gpu.outputs, strict=True):
        margin = min(output.outputs[0].margin, expected.outputs[0].margin)
        assert output.outputs[0].text == expected.outputs[0].text, f"smallest margin {margin}"
    assert mean_difference(found.scores, one_gpu.scores) < FP32_NATS
