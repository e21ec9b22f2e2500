from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest

from soloist.errors import ConfigurationError
from soloist.placement.recording import TOKEN_FIELDS, merge, pack
from soloist.placement.trace import RoutingTrace, Sample, TraceModel, together
from soloist.specs.hf import read_config
from soloist.specs.presets import preset
from tests.placement.cases import random_trace, tiny_spec


def test_file_round_trip(tmp_path: Path) -> None:
    trace = random_trace(tokens=40)
    trace.save(tmp_path / "a.trace")
    found = RoutingTrace.load(tmp_path / "a.trace")
    assert found.model == trace.model
    assert found.tokens == 40
    assert np.array_equal(found.counts_LE, trace.counts_LE)
    assert np.array_equal(found.together_LEE, trace.together_LEE)
    assert np.array_equal(found.sample.ids_LTK, np.sort(trace.sample.ids_LTK, axis=2))
    assert found.sample.prompts() == trace.sample.prompts()


def test_trace_without_a_sample(tmp_path: Path) -> None:
    trace = random_trace(tokens=40).keep(0)
    trace.save(tmp_path / "a.trace")
    found = RoutingTrace.load(tmp_path / "a.trace")
    assert np.array_equal(found.together_LEE, trace.together_LEE)
    with pytest.raises(ConfigurationError, match="counts only"):
        _ = found.needed_sample


def test_co_activation_is_what_a_loop_counts() -> None:
    ids_TK = random_trace(tokens=30).sample.ids_LTK[0]
    expected = np.zeros((6, 6))
    for ids in ids_TK:
        for a in ids:
            for b in ids:
                expected[a, b] += 1
    assert np.array_equal(together(ids_TK, 6), expected)


def test_trace_of_another_model_is_refused() -> None:
    trace, spec = random_trace(), tiny_spec()
    trace.check(spec)
    trace.check(msgspec.structs.replace(spec, name="Owner/Tiny"))
    for other in (msgspec.structs.replace(spec, name="tinier"), tiny_spec(experts=8), preset("ref-16l")):
        with pytest.raises(ConfigurationError) as error:
            trace.check(other)
        assert str(trace.model) in str(error.value)
        assert str(TraceModel.of(other)) in str(error.value)
        assert ("call that tiny again" in str(error.value)) == (other.name == "tinier")


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.trace"
    random_trace().save(path)
    content = path.read_bytes()
    for damage in (b"", b"something else", content[: len(content) // 2]):
        path.write_bytes(damage)
        with pytest.raises(ConfigurationError, match=r"a\.trace"):
            RoutingTrace.load(path)
    with pytest.raises(ConfigurationError, match="cannot be read"):
        RoutingTrace.load(tmp_path / "none.trace")


def test_ranks_and_stages_become_one_trace() -> None:
    """Two ranks of the first stage with a token each, computed twice on one of them, and one of the second stage."""
    spec = tiny_spec()  # MoE layers 1 and 2
    rows = {name: np.array(values) for name, values in zip(TOKEN_FIELDS, FIELDS, strict=True)}
    first = {name: column[:1] for name, column in rows.items()} | {"ids_LTK": np.array([[[4, 1]]])}
    second = {name: column[1:].repeat(2) for name, column in rows.items()}
    second["ids_LTK"] = np.array([[[2, 3], [5, 0]]])
    last = rows | {"ids_LTK": np.array([[[0, 1], [2, 5]]])}
    parts = [pack({"layers": np.array(layers)} | part) for layers, part in (([1], first), ([1], second), ([2], last))]
    trace = merge(spec, parts)
    assert trace.sample.ids_LTK.tolist() == [[[2, 3], [4, 1]], [[2, 5], [0, 1]]]
    assert trace.sample.prompts() == [[9], [8]]
    assert trace.counts_LE.sum(axis=1).tolist() == [4, 4]


FIELDS = ([8, 9], [7, 3], [0, 0], [0, 1], [0, 0])  # token, sequence, position, source, index


def test_nothing_recorded_is_an_error() -> None:
    with pytest.raises(ConfigurationError, match="record"):
        merge(tiny_spec(), [])


def test_a_sample_of_another_shape_is_refused(tmp_path: Path) -> None:
    trace = random_trace(tokens=4)
    wrong = Sample(**(vars(trace.sample) | {"ids_LTK": trace.sample.ids_LTK[:, :, :1]}))
    RoutingTrace(trace.model, 4, trace.counts_LE, trace.together_LEE, wrong).save(tmp_path / "a.trace")
    with pytest.raises(ConfigurationError, match="shape"):
        RoutingTrace.load(tmp_path / "a.trace")


def test_shipped_trace_is_the_shipped_model() -> None:
    folder = Path(__file__).parents[2] / "models" / "novels-moe-11m"
    trace = RoutingTrace.load(folder / "routing.trace")
    trace.check(read_config(folder))
    assert trace.tokens == trace.sample.tokens == 32768
    assert {len(prompt) for prompt in trace.sample.prompts()} == {512}
    assert np.array_equal(together(trace.sample.ids_LTK[3], 16), trace.together_LEE[3])
