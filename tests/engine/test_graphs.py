"""Steps of fixed shape, scheduled ahead, on the CPU: every answer is that of plain steps."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from soloist.engine.graphs import StaticSteps, widths
from soloist.engine.llm import LLM
from soloist.engine.options import EngineOptions
from soloist.errors import ConfigurationError
from soloist.scheduling.request import Chunk, SamplingParams, StepBatch

NOVELS = Path(__file__).parents[2] / "models" / "novels-moe-11m"
PROMPTS = ["It was a dark and stormy night, and", "The old house upon the hill", "My dear Watson,", "She", "He said"]
PROMPTS += ["It was a dark and stormy night, and the old house", "My dear Watson, you see, but you do not", "Then"]
WISHES = [
    SamplingParams(max_tokens=12, temperature=0.0),
    SamplingParams(max_tokens=9, temperature=0.8, seed=3),
    SamplingParams(max_tokens=12, temperature=0.9, top_p=0.8, top_k=20, seed=4, logprobs=2),
    SamplingParams(max_tokens=12, temperature=0.0, repetition_penalty=1.4, prompt_logprobs=1),
    SamplingParams(max_tokens=24, temperature=0.0, stop=("the",)),
    SamplingParams(max_tokens=20, temperature=0.0, presence_penalty=0.7, frequency_penalty=0.4, logit_bias=((5, 3.0),)),
    SamplingParams(max_tokens=20, temperature=0.7, seed=9, repetition_penalty=1.2, frequency_penalty=-0.3, n=2),
    SamplingParams(max_tokens=16, temperature=0.0, min_tokens=14, stop_token_ids=tuple(range(300, 316))),
]


def answers(layout: str, **options: Any) -> list[tuple]:
    options = {"kv_tokens": 2048} | options
    with LLM(NOVELS, layout=layout, device="cpu", show_progress=False, **options) as llm:
        outputs = llm.generate(PROMPTS, WISHES)
        stats = llm.stats()
    assert not any(figures.blocks_used for figures in stats.values())
    assert options["kv_tokens"] > 100 or any(figures.preemptions for figures in stats.values())
    done = [completion for output in outputs for completion in output.outputs]
    assert [len(c.logprobs) for c in done] == [0, 0, 12, *[0] * 6]
    assert len(outputs[3].prompt_logprobs) == len(outputs[3].prompt_tokens) - 1
    return [(c.tokens, c.text, c.finish_reason) for c in done]


@pytest.mark.parametrize("layout", ["ep1", "tp2"])
def test_no_answer_changes(layout: str) -> None:
    plain = answers(layout, cuda_graphs="off", ahead="off")
    assert answers(layout, cuda_graphs="3,8", ahead="on") == plain
    assert answers(layout, cuda_graphs="3,8", mixed_graphs="16,24,64", ahead="on") == plain
    assert answers(layout, cuda_graphs="off", ahead="on", kv_tokens=48, block_size=4, max_batch_tokens=9) == plain
    assert answers(layout, cuda_graphs="3,8", ahead="on", kv_tokens=48, block_size=4, prefix_caching=False) == plain


def test_steps_without_a_long_context_have_graphs_of_their_own() -> None:
    held = widths(10_000, 16)
    assert held == (256, 625)
    assert widths(4096, 16) == (256,)
    steps = StaticSteps((2, 4), (), held, 9, lambda rows, _, width: cast(Any, (rows, width)), torch.device("cpu"))
    chunks = [
        Chunk(sequence, (1,), 16 * blocks - 1, tuple(range(blocks)), True) for sequence, blocks in enumerate((3, 257))
    ]
    assert steps.of(StepBatch(0, tuple(chunks[:1]), peak=3, decodes=True)) == (4, 256)
    assert steps.of(StepBatch(0, tuple(chunks), peak=2, decodes=True)) == (2, 625)
    assert steps.of(StepBatch(0, (), peak=1, decodes=True)) == (2, 256)
    assert steps.of(StepBatch(0, tuple(chunks), peak=5, decodes=True)) is None
    assert steps.of(StepBatch(0, tuple(chunks), peak=2, decodes=False)) is None


def test_mixed_steps_take_a_bucket_that_is_not_mostly_padding() -> None:
    def made(tokens: int, sequences: int, width: int) -> Any:
        return SimpleNamespace(at=(tokens, sequences, width), sequences=sequences)

    steps = StaticSteps((2,), (4, 64, 1024, 8192), (256, 625), 9, made, torch.device("cpu"))
    prompt = Chunk(0, (1, 2, 3), 0, (5,), True)

    def of(peak: int, *chunks: Chunk) -> Any:
        found = steps.of(StepBatch(0, chunks, peak=peak))
        return found and found.at

    assert of(3, prompt) == (4, 3, 256)
    assert of(65, prompt) == (1024, 9, 256)  # the host takes longer than the GPU with all of the padding
    assert of(7000, prompt) == (8192, 9, 256)
    assert (of(5000, prompt), of(9000, prompt)) == (None, None)
    assert of(5) == (64, 9, 256)  # others have something to do
    for other in (Chunk(0, (1, 2), 4096, tuple(range(257)), True), Chunk(0, (1, 2), 0, (5,), True, scores_prompt=True)):
        assert of(5, other) is None
        assert steps.bucket(StepBatch(0, (other,), peak=5)) == 64  # the form of the others' exchange
    assert of(5, *[prompt] * 10) is None


def test_buckets() -> None:
    assert EngineOptions().graph_buckets(is_gpu=False) == ()
    assert EngineOptions(max_sequences=20).graph_buckets(is_gpu=True) == (1, 2, 4, 8, 16, 20)
    assert EngineOptions(cuda_graphs="8,1,512").graph_buckets(is_gpu=True) == (1, 8)
    assert EngineOptions().mixed_buckets() == EngineOptions(mixed_graphs="off").mixed_buckets() == ()
    assert EngineOptions(mixed_graphs="8,2,9000").mixed_buckets() == (2, 8)
    for wrong in ("0,4", "some"):
        with pytest.raises(ConfigurationError, match="cuda_graphs"):
            EngineOptions(cuda_graphs=wrong)
    with pytest.raises(ConfigurationError, match="mixed_graphs"):
        EngineOptions(mixed_graphs="1,4")
    with pytest.raises(ConfigurationError, match="ahead"):
        EngineOptions(ahead="on").on("cuda", stages=2)
