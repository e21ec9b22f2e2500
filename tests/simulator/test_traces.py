"""Traces are read as they are written, and broken ones are refused by line."""

from __future__ import annotations

from pathlib import Path

import pytest

from soloist.errors import ConfigurationError
from soloist.simulator.traces import read_trace
from soloist.specs.workload import Load

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,109
2023-11-16 18:15:48.2360690,879,55
"""


def test_azure(tmp_path: Path) -> None:
    path = tmp_path / "code.csv"
    path.write_text(AZURE)
    trace = read_trace(path, Load())
    assert trace.times_s.tolist() == pytest.approx([0, 1.555479, 4.314579], abs=1e-5)
    assert trace.prompts.tolist() == [374, 879, 396]
    assert trace.outputs.tolist() == [44, 55, 109]
    assert len(read_trace(path, Load(), requests=2)) == 2


def test_a_request_that_got_no_token_is_one_all_the_same(tmp_path: Path) -> None:
    path = tmp_path / "code.csv"
    path.write_text(AZURE + "2023-11-16 18:15:47,500,0\n")
    trace = read_trace(path, Load())
    assert (trace.prompts.tolist(), trace.outputs.tolist()) == ([374, 500, 879, 396], [44, 0, 55, 109])


def test_a_rate_stretches_the_pattern(tmp_path: Path) -> None:
    path = tmp_path / "code.csv"
    path.write_text(AZURE)
    times = read_trace(path, Load(rate=30)).times_s
    assert times[-1] == pytest.approx(0.1)
    assert times[1] / times[2] == pytest.approx(1.555479 / 4.314579, rel=1e-5)


def test_json_lines_and_mooncake_s_names(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(
        '{"timestamp": 1500, "input_length": 70, "output_length": 5, "hash_ids": [1]}\n\n'
        '{"prompt": 30, "output": 2, "time": 1.0}\n'
    )
    found = read_trace(path, Load.parse(""))
    assert (found.prompts.tolist(), found.outputs.tolist(), found.times_s.tolist()) == ([30, 70], [2, 5], [0.0, 0.5])


def test_lengths_without_times_arrive_as_the_load_says(tmp_path: Path) -> None:
    path = tmp_path / "lengths.json"
    path.write_text('[{"prompt": 3, "output": 4}, {"conversations": [{"value": "12345678"}, {"value": "1234"}]}]')
    assert read_trace(path, Load(rate=2, arrival="uniform")).times_s.tolist() == [0, 0.5]
    closed = read_trace(path, Load(sequences=2))
    assert closed.in_flight == 2
    assert (closed.prompts.tolist(), closed.outputs.tolist()) == ([3, 2], [4, 1])
    with pytest.raises(ConfigurationError, match="has no times"):
        read_trace(path, Load())


@pytest.mark.parametrize(
    ("name", "text", "names"),
    [
        ("a.csv", "time,in,out\n", r"a.csv:1 = 'time,in,out'"),
        ("a.csv", AZURE + "2023-11-16 18:15:50,7\n", r"a.csv:5 = .*must have the 3 fields"),
        ("a.csv", AZURE + "yesterday,7,8\n", r"a.csv:5: TIMESTAMP = 'yesterday'"),
        ("a.csv", AZURE + "nan,7,8\n", r"a.csv:5: TIMESTAMP = 'nan'"),
        ("a.csv", AZURE + "2023-11-16 18:15:50,-7,8\n", r"a.csv:5: ContextTokens = '-7'"),
        ("a.csv", AZURE + "2023-11-16 18:15:50,0,7\n", r"a.csv:5: ContextTokens = '0'"),
        ("a.csv", AZURE + "2023-11-16 18:15:50,7,-1\n", r"a.csv:5: GeneratedTokens = '-1'"),
        ("a.csv", AZURE.splitlines()[0], "holds no requests"),
        ("a.json", "{}", "must be a JSON list"),
        ("a.json", '[{"prompt": 1, "output": 2, "when": 3}]', r"a.json\[0\] = \['when'\]"),
        ("a.json", '[{"prompt": 1}]', r"a.json\[0\]: output = None"),
        ("a.json", '[{"prompt": 1, "output": 2, "time": "now"}]', r"a.json\[0\].time = 'now'"),
        ("a.json", '[{"prompt": 1, "output": 2, "time": 1}, {"prompt": 1, "output": 2}]', "some have none"),
        ("a.json", '[{"conversations": [{"value": "alone"}]}]', "must hold two turns"),
        ("a.jsonl", '{"prompt": 1, "output": 2}\n{"prompt": 1', r"a.jsonl:2': must be a JSON object"),
        ("a.jsonl", '{"input_length": 9, "output_length": 2, "timestamp": "late"}', r"a.jsonl:1.time = 'late'"),
    ],
)
def test_a_broken_trace_is_refused_by_line(tmp_path: Path, name: str, text: str, names: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ConfigurationError, match=names):
        read_trace(path, Load(rate=1))


def test_a_trace_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="cannot be read"):
        read_trace(tmp_path / "none.csv", Load())
