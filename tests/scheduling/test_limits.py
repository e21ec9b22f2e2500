"""What a request may ask for: every limit is taken itself, the next value is refused, and a refusal's advice holds."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from soloist.errors import RequestError
from soloist.scheduling.config import SchedulerConfig
from soloist.scheduling.request import SamplingParams

INF, NAN = float("inf"), float("nan")
LIMITS: dict[str, tuple[list[Any], list[Any]]] = {  # taken, refused
    "max_tokens": ([1], [0]),
    "temperature": ([0.0, 100.0], [-0.1, INF, NAN]),
    "top_k": ([0, 10**6], [-1]),
    "top_p": ([1e-6, 1.0], [0.0, 1.01, NAN]),
    "min_p": ([0.0, 1.0], [-0.01, 1.01, NAN]),
    "repetition_penalty": ([1e-6, 100.0], [0.0, INF, NAN]),
    "presence_penalty": ([-2.0, 2.0], [-2.01, 2.01, NAN]),
    "frequency_penalty": ([-2.0, 2.0], [-2.01, 2.01, NAN]),
    "min_tokens": ([0, 16], [-1, 17]),  # of 16 at most
    "stop": ([(), ("x",) * 16], [("x",) * 17, ("x", "")]),
    "stop_token_ids": ([(), (1,) * 16], [(1,) * 17]),
    "logit_bias": (
        [tuple((i, -100.0) for i in range(1024)), ((0, 100.0),)],
        [tuple((i, 0.0) for i in range(1025)), ((0, 100.1),), ((0, -100.1),), ((0, NAN),)],
    ),
    "logprobs": ([None, 0, 20], [-1, 21]),
    "prompt_logprobs": ([None, 0, 20], [-1, 21]),
    "n": ([1, 128], [0, 129]),
}


@pytest.mark.parametrize("key", LIMITS)
def test_a_limit_is_taken_and_what_lies_beyond_is_refused_by_name(key: str) -> None:
    taken, refused = LIMITS[key]
    for value in taken:
        SamplingParams(**{key: value}).check()
    for value in refused:
        with pytest.raises(RequestError, match=f"^{key}"):
            SamplingParams(**{key: value}).check()


@given(
    blocks=st.integers(1, 9), block_size=st.integers(1, 5), positions=st.integers(1, 50), prompt=st.integers(1, 60),
    output=st.integers(1, 60),
)  # fmt: skip
def test_a_request_fits_just_if_its_keys_and_values_do(
    blocks: int, block_size: int, positions: int, prompt: int, output: int
) -> None:
    """The last token of a sequence has none: it is not computed any more."""
    sizes = SchedulerConfig(blocks=blocks, block_size=block_size, max_positions=positions)
    cached = min(prompt + output, positions) - 1
    if prompt < positions and cached <= blocks * block_size:
        sizes.check_lengths(prompt, output)
    else:
        with pytest.raises(RequestError):
            sizes.check_lengths(prompt, output)
    if sizes.longest_sequence > 1:  # what a refusal advises to keep to
        sizes.check_lengths(1, sizes.longest_sequence - 1)
        sizes.check_lengths(sizes.longest_sequence - 1, 1)
