from __future__ import annotations

import lzma
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from soloist.dispatch.rows import RowFormat
from soloist.engine.llm import LLM
from soloist.engine.recording import record_prompts, windows
from soloist.errors import ConfigurationError
from soloist.placement.placement import Placement
from soloist.placement.recording import merge
from soloist.placement.trace import RoutingTrace
from soloist.placement.traffic import measure
from soloist.scheduling.request import SamplingParams
from soloist.specs.hf import read_config
from tests.placement.cases import random_placement

MODEL = Path(__file__).parents[2] / "models" / "novels-moe-11m"
PROMPTS = [list(range(100 + i, 190 + i)) for i in range(3)]


@pytest.fixture(scope="module")
def alone() -> Iterator[tuple[LLM, RoutingTrace]]:
    with LLM(MODEL, record="ids", show_progress=False, kv_tokens=1024) as llm:
        yield llm, record_prompts(llm, PROMPTS)


@pytest.mark.parametrize("layout", ["ep2", "tp2pp2"])
def test_every_layout_records_every_token_once(layout: str, alone: tuple[LLM, RoutingTrace]) -> None:
    _, expected = alone
    with LLM(MODEL, layout, record="ids", show_progress=False, kv_tokens=1024, prefix_caching=False) as llm:
        found = record_prompts(llm, PROMPTS)
    assert found.sample.prompts() == PROMPTS == expected.sample.prompts()
    same = np.sort(found.sample.ids_LTK, axis=2) == np.sort(expected.sample.ids_LTK, axis=2)
    assert same.mean() > 0.999  # sums in another order may turn a near tie


def test_counts_are_those_of_the_ids(alone: tuple[LLM, RoutingTrace]) -> None:
    _, expected = alone
    with LLM(MODEL, record="counts", show_progress=False, kv_tokens=1024) as llm:
        found = record_prompts(llm, PROMPTS)
    assert found.tokens == expected.tokens
    assert found.sample is None
    assert np.array_equal(found.together_LEE, expected.together_LEE)


def test_texts_are_cut_into_windows(tmp_path: Path, alone: tuple[LLM, RoutingTrace]) -> None:
    llm, _ = alone
    (tmp_path / "a.txt").write_text("It was a dark and stormy night. " * 20)
    cut = windows(llm, [tmp_path / "a.txt"], tokens=70, window=32)
    assert [len(window) for window in cut] == [32, 32]
    assert sum(cut, []) == llm.tokens((tmp_path / "a.txt").read_text())[:64]
    with pytest.raises(ConfigurationError, match="window of 4096"):
        windows(llm, [tmp_path / "a.txt"], 10_000, 4096)
    with pytest.raises(ConfigurationError, match="cannot be read"):
        windows(llm, [tmp_path / "none.txt"], 10, 5)


def test_a_packed_text_is_read_whole_or_refused(tmp_path: Path, alone: tuple[LLM, RoutingTrace]) -> None:
    llm, _ = alone
    packed, text = tmp_path / "a.txt.xz", "It was a dark and stormy night – " * 20
    packed.write_bytes(lzma.compress(text.encode()))
    assert windows(llm, [packed], 32, 32) == [llm.tokens(text)[:32]]
    packed.write_bytes(packed.read_bytes()[:-8])
    with pytest.raises(ConfigurationError, match="cannot be read"):
        windows(llm, [packed], 32, 32)


def test_an_engine_that_does_not_record_says_so() -> None:
    with LLM(MODEL, show_progress=False, kv_tokens=1024) as llm, pytest.raises(ConfigurationError, match="record"):
        record_prompts(llm, PROMPTS)


@pytest.mark.parametrize("seed", [None, 3], ids=["linear", "replicas and an uneven rest"])
def test_predicted_rows_are_those_that_travel(seed: int | None) -> None:
    """Bytes that ranks say they sent to the other node, against rows counted from what they routed."""
    spec = read_config(MODEL)
    placement = Placement.linear(spec, 4) if seed is None else random_placement(16, 4, seed, layers=6)
    with LLM(MODEL, "ep4", placement, record="ids", show_progress=False, kv_tokens=1024, gpus_per_node=2) as llm:
        llm.figures()
        llm.generate([[*prompt] for prompt in PROMPTS for _ in range(2)], SamplingParams(max_tokens=3))
        figures = llm.figures()
    trace = merge(spec, [told.routing for told in figures.values()])
    traffic = measure(placement, trace, [0, 0, 1, 1], trace.sample.source_T)
    sent = [(rank // 2, peer // 2, count) for rank, told in figures.items() for peer, count in told.bytes_to.items()]
    row_bytes = RowFormat(torch.float32, spec.d_model, spec.router.top_k).row_bytes + 4 * spec.d_model
    crossing = sum(count for own, other, count in sent if own != other)
    assert crossing == traffic.cross_node_rows(hierarchical=False) * row_bytes > 0
