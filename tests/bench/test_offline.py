"""The offline benchmark: its limits against counts made by hand, and a small run from the command line."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from soloist.bench.offline import Prefill, decode_s
from soloist.cli import app
from soloist.errors import ConfigurationError
from soloist.specs.layout import Layout
from soloist.specs.presets import preset


def test_the_limit_of_a_decoding_step_is_bytes_over_the_memory_rate() -> None:
    """16 layers of top-2 of 16 SwiGLU experts of 4096 × 16384 in bf16: 51.5 GB of experts on two GPUs."""
    spec = preset("ref-16l")
    experts = 16 * 8 * 3 * 4096 * 16384 * 2
    attention = sum(n for n in (4096 * 4096 * 4,)) * 16 * 2  # q, k, v, o
    head = 51200 * 4096 * 2
    kv = 16 * 2 * 4096 * 2 * 192 * 128
    expected = (experts + attention + head + kv) / 3.0e12
    assert decode_s(spec, Layout(ep=2), 256, 192) == pytest.approx(expected, rel=2e-2)
    assert decode_s(spec, Layout(tp=2), 1, 192) < decode_s(spec, Layout(ep=2), 1, 192)


def test_a_prefill_is_written_count_x_tokens() -> None:
    assert Prefill.parse("8x8000") == Prefill(8, 8000)
    with pytest.raises(ConfigurationError, match="COUNTxTOKENS"):
        Prefill.parse("8000")


def test_every_point_of_every_layout_is_written(tmp_path) -> None:
    lines = tmp_path / "lines.jsonl"
    options = ["--prefill", "2x8", "--decode", "3", "--context", "4", "--tokens", "32", "--runs", "1", "--routing"]
    command = ["bench", "offline", "ref-16l@1", "--layout", "ep1", "--random-weights", "1", "--lines", str(lines)]
    small = ["models/novels-moe-11m" if word == "ref-16l@1" else word for word in command]
    done = CliRunner().invoke(app, [*small, *options, "--device", "cpu"])
    assert done.exit_code == 0, done.output
    records = [json.loads(line) for line in lines.read_text().splitlines()]
    single = ["start, one start", "prefill, one start", "TPOT, one start"]
    assert [record["what"] for record in records] == [*single, "prefill", "TPOT", "memory", "start", "routing"]
    assert "start:" in done.stderr
    assert "ep1, TPOT, one start, 3:" in done.stderr
    by_name = {record["what"]: record for record in records}
    (phases,) = by_name["start"]["phases_s"]
    assert list(phases) == ["connecting", "weights", "KV cache and graphs", "ready"]
    assert sorted(phases.values()) == list(phases.values())
    assert all(by_name[name]["seconds"] > 0 for name in ("prefill", "TPOT", "start"))
    assert by_name["memory"]["bytes"]["0"]["experts"] > 0
    assert 0 < by_name["routing"]["experts_touched_3"] <= 12
    assert by_name["routing"]["rank_max_over_mean_2x8"] == by_name["routing"]["rank_max_over_mean_3"] == [1, 1]


def test_reading_the_shipped_checkpoint() -> None:
    done = CliRunner().invoke(app, ["bench", "reading", "models/novels-moe-11m", "--repeats", "1"])
    assert done.exit_code == 0, done.output
    assert [line.split(":")[0] for line in done.output.splitlines()] == ["disk", "checkpoint", "cached"]
