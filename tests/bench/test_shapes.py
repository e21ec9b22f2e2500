"""The shape that the GPU benchmarks are asked for."""

from __future__ import annotations

import pytest

from soloist.bench.shapes import Wanted
from soloist.errors import ConfigurationError


def test_flags_go_before_the_preset() -> None:
    wanted = Wanted(model="qwen3-30b-a3b", tokens=128, top_k=4)
    assert wanted
    sizes = {"tokens": 128, "d_model": 2048, "experts": 128, "top_k": 4, "routing": "uniform"}
    assert wanted.sizes(2) == sizes
    assert wanted.sizes(2, with_experts=True) == sizes | {"width": 768}
    assert wanted.flags() == ["--model", "qwen3-30b-a3b", "--tokens", "128", "--top-k", "4"]


def test_nothing_asked_for() -> None:
    assert not Wanted()
    assert not Wanted(routing="skewed")  # the table's shapes


def test_a_routing_that_does_not_exist_is_named() -> None:
    with pytest.raises(ConfigurationError, match="--routing = 'even': choose one of uniform"):
        Wanted(routing="even")


@pytest.mark.parametrize(
    ("wanted", "names"),
    [
        (Wanted(tokens=128), "--d-model = None: must be at least 1; give it, or a --model preset"),
        (Wanted(model="qwen3-30b-a3b", tokens=0), "--tokens = 0"),
        (Wanted(model="qwen3-30b-a3b", experts=7, top_k=2), "--experts = 7: must be a multiple of the 2 ranks"),
        (Wanted(model="qwen3-30b-a3b", top_k=129), "--top-k = 129"),
        (Wanted(model="qwen3-30b-a3b", routing="remote", top_k=65), "--top-k = 65"),
        (Wanted(model="qwen3-30"), "near ones are"),
    ],
)
def test_what_does_not_fit_is_named(wanted: Wanted, names: str) -> None:
    with pytest.raises(ConfigurationError, match=names):
        wanted.sizes(2)
