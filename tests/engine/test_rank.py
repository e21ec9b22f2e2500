"""Steps, sleep, and failures of ranks that are threads and have no model."""

from __future__ import annotations

import pytest
from fake_executor import SPEC, VOCAB, Deployment, continuation

LAYOUTS = ["ep1", "ep4", "pp2", "pp2ep2", "tp2", "dp2ep2", "attn2ep4pp2"]


@pytest.fixture(params=LAYOUTS)
def deployment(request, tmp_path):
    with Deployment(tmp_path, request.param) as deployment:
        yield deployment


def prompts(count: int) -> list[list[int]]:
    return [[1 + (7 * i + j) % (VOCAB - 1) for j in range(1 + 3 * i % 11)] for i in range(count)]


def test_every_request_gets_its_own_continuation(deployment):
    from soloist.scheduling.request import SamplingParams

    params = SamplingParams(max_tokens=9)
    requests = [deployment.front.submit(prompt, params) for prompt in prompts(12)]
    deployment.finish(*requests)
    for request in requests:
        (sequence,) = request.sequences
        assert sequence.tokens == continuation(request.prompt, 9)
        assert sequence.finish_reason == ("stop" if sequence.tokens[-1] in SPEC.eos_ids else "length")
        assert sequence.margin == min(sequence.tokens)
        assert [entry.token for entry in sequence.logprobs] == sequence.tokens


def test_all_sleep_and_wake_again_and_again(deployment):
    for prompt in prompts(6):
        assert deployment.answer(prompt, max_tokens=5) == continuation(prompt, 5)
