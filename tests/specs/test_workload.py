from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from soloist.errors import ConfigurationError
from soloist.specs.workload import Load


def test_compact_form() -> None:
    load = Load.parse("prompt=10k, output=200, rate=2.5, arrival=bursts, ttft=2s, tpot=50ms")
    assert (load.prompt, load.output, load.rate, load.arrival) == (10_000, 200, 2.5, "bursts")
    assert (load.ttft_s, load.tpot_s) == (2.0, 0.05)
    assert load.context == 10_100
    assert load.longest == 10_200


@given(st.integers(1, 10**6), st.integers(1, 10**5), st.integers(0, 10**4), st.sampled_from([0.0, 0.25, 1.5]))
def test_writing_and_reading_agree(prompt: int, output: int, sequences: int, skew: float) -> None:
    load = Load(prompt=prompt, output=output, sequences=sequences, skew=skew)
    assert Load.parse(str(load)) == load


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("prompt", "key=value"), ("promt=3", "promt"), ("prompt=-3", "prompt"), ("prompt=many", "prompt"),
        ("prompt=0", "prompt"), ("rate=1,sequences=2", "rate"), ("prefix=1", "prefix"), ("arrival=never", "never"),
        ("output=1.5", "output"), ("rate=-5", "from 0 up"), ("rate=nan", "rate"), ("tpot=0s", "no limit"),
        ("rate=1e999", "rate"),
    ],
)  # fmt: skip
def test_nonsense_is_named(text: str, names: str) -> None:
    with pytest.raises(ConfigurationError, match=names):
        Load.parse(text)
