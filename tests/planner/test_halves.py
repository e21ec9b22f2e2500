"""Which steps go as two halves, and how large what goes through the layers at once can be."""

from __future__ import annotations

import msgspec
import pytest

from soloist.errors import ConfigurationError
from soloist.planner.halves import Halves, first_half
from soloist.planner.kernels import OWN_LIBRARY, Kernels
from soloist.planner.layer import Deployment
from soloist.planner.memory import MemoryLoad, window_bytes
from soloist.planner.precision import Precision
from soloist.planner.refit import load_calibration
from soloist.planner.runtime import Runtime
from soloist.planner.score import Options, Scorer
from soloist.planner.step import Overlap, StepModel
from soloist.specs.cluster import cluster
from soloist.specs.layout import Layout
from soloist.specs.presets import preset
from soloist.specs.workload import Load


@pytest.mark.parametrize("text", ["off", "on", "prefill=4096", "decode=512", "prefill=4096,decode=512"])
def test_texts_are_read_and_written(text: str) -> None:
    assert str(Halves.parse(text)) == text
    assert bool(Halves.parse(text)) == (text != "off")


@pytest.mark.parametrize("text", ["", "yes", "prefill", "prefill=1", "prefill=-4", "prefill=4,prefill=8", "tokens=9"])
def test_others_are_refused(text: str) -> None:
    with pytest.raises(ConfigurationError, match="overlap = .*: must be off, on, or tokens like"):
        Halves.parse(text)


def test_steps_are_taken_by_kind_and_size() -> None:
    found = Halves.parse("prefill=64")
    assert [found.takes(tokens, decodes=False) for tokens in (63, 64, 9999)] == [False, True, True]
    assert not found.takes(9999, decodes=True)
    both = Halves.parse("on").at_least(100)
    assert [both.takes(tokens, decodes) for tokens in (99, 100) for decodes in (False, True)] == [False] * 2 + [
        True
    ] * 2


@pytest.mark.parametrize(
    ("text", "largest"),
    [("off", 8192), ("decode=64", 8192), ("on", 4096), ("prefill=2048", 4096), ("prefill=6000", 5999)],
)
def test_the_largest_call(text: str, largest: int) -> None:
    assert Halves.parse(text).largest(8192, 256) == largest


def test_whole_decoding_steps_need_their_room() -> None:
    assert Halves.parse("prefill=2").largest(300, 256) == 256
    assert Halves.parse("prefill=2").largest(200, 256) == 200


def test_no_rank_has_a_larger_half_than_the_one_with_most_tokens() -> None:
    halves = [first_half(tokens) for tokens in range(2000)]
    assert halves == sorted(halves)
    assert all(tokens - half <= half <= tokens for tokens, half in enumerate(halves))
    assert all(half % 8 == 0 for half in halves[64:])


# -- where they pay ----------------------------------------------------------------------------------------------------
def deployment(layout: str, model: str = "deepseek-v3") -> Deployment:
    spec = preset(model)
    return Deployment(model=spec, layout=Layout.parse(layout), precision=Precision.of(spec))


def halves(layout: str, overlap: Overlap = "auto", batch: float = 64) -> Halves:
    scorer = Scorer(*_own(), Load(prompt=2000))
    return scorer.halves(scorer.score(deployment(layout), Options(overlap=overlap), batch))


def test_a_plan_says_from_which_size_on() -> None:
    across = halves("ep64")
    assert across.prefill
    assert 512 <= across.prefill <= 8192, "large steps across nodes, not small ones"
    assert not halves("tp8"), "nothing travels"
    assert not halves("ep64", "off")
    assert str(halves("ep64", "on")) == "on"


def test_small_gains_are_not_taken() -> None:
    """Inside a node, where what copy engines move is little."""
    thick = StepModel(deployment("ep8", "ref-16l"), *_own(), "auto", (8192,))
    whole, halved = (StepModel(thick.deployment, *_own(), overlap, (8192,)) for overlap in ("off", "on"))
    gain = 1 - halved.prefill(8192, 500).seconds.value / whole.prefill(8192, 500).seconds.value
    assert gain < 0.05
    assert not thick.prefill(8192, 500).is_overlapped


def _own() -> tuple[Kernels, Runtime]:
    used = load_calibration("2xh200")
    return Kernels(cluster("hgx-h200"), used, OWN_LIBRARY), Runtime.named("soloist", used)


def test_halves_in_a_graph_share_its_padding() -> None:
    """Each has half of the graph's tokens, as if it filled one of half the size."""
    thin = StepModel(deployment("ep2", "qwen3-30b-a3b"), *_own(), "on", (2304,))
    small = StepModel(thin.deployment, *_own(), "off", (1152,))
    both, one = thin.prefill(2000, 500).parts, small.prefill(1000, 500).parts
    for name in ("projections", "attention", "experts"):
        assert both[name].value == pytest.approx(2 * one[name].value)


def test_the_host_starts_the_kernels_of_both_halves() -> None:
    """Layers so thin that it takes longer than the GPU, unless graphs hold them."""
    kernels, runtime = _own()

    def seconds(overlap: Overlap, *graphs: int) -> float:
        thin = deployment("ep2", "qwen3-30b-a3b")
        return StepModel(thin, kernels, runtime, overlap, graphs).prefill(4096, 500).seconds.value

    assert seconds("on") == pytest.approx(2 * seconds("off"), rel=0.1)
    assert seconds("on", 4096) < seconds("on")
    assert seconds("auto") == seconds("off")


def test_two_windows_of_half_the_size_take_as_much() -> None:
    d, load = deployment("ep8", "qwen3-30b-a3b"), MemoryLoad(sequences=64, longest=2048, step_tokens=8192)
    whole, halved, decode = (
        window_bytes(d.model, d.layout, d.precision, msgspec.structs.replace(load, halves=Halves.parse(text)), 16)
        for text in ("off", "on", "decode=64")
    )
    assert halved == whole
    assert decode == 2 * whole
