"""Recorded requests instead of drawn ones.

`.csv`: the Azure LLM inference traces' columns `TIMESTAMP,ContextTokens,GeneratedTokens`, times as dates or seconds.
`.json`: a list of `{"prompt": tokens, "output": tokens, "time": seconds}`, `time` being optional, or of ShareGPT's
`{"conversations": [{"value": text}, …]}`, of which the first two turns count, at four characters a token.
`.jsonl`: one of these a line, or of Mooncake's `{"timestamp": ms, "input_length": tokens, "output_length": tokens}`.
Requests without times arrive as the load says. Those that got no token (Azure's have such) count with their prompts.
"""

from __future__ import annotations

import csv
from datetime import datetime
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np

from soloist.errors import ConfigurationError
from soloist.simulator.arrivals import Arrivals, gaps
from soloist.specs.files import read_text
from soloist.specs.workload import Load

COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
CHARACTERS = 4  # of a token of English text


class Entry(NamedTuple):
    """One recorded request."""

    time_s: float | None
    prompt: int
    output: int


def read_trace(path: str | Path, load: Load, requests: int = 0, seed: int = 0) -> Arrivals:
    """The first `requests` of a trace (0: all), in order of time. Raises ConfigurationError naming file and line."""
    entries = _read(Path(path))[: requests or None]
    if not entries:
        raise ConfigurationError.of("trace", str(path), "holds no requests")
    prompts = np.array([entry.prompt for entry in entries], np.int64)
    outputs = np.array([entry.output for entry in entries], np.int64)
    shared = (load.prefix * prompts).astype(np.int64)
    if load.sequences:
        return Arrivals(np.zeros(len(entries)), prompts, outputs, shared, load.sequences)
    times_s = np.array([entry.time_s for entry in entries if entry.time_s is not None])
    if not len(times_s):
        if not load.rate:
            raise ConfigurationError.of("trace", str(path), "has no times; state rate=… or sequences=… in the load")
        times_s = np.cumsum(gaps(load, len(entries), np.random.default_rng(seed)))
    elif load.rate:  # the trace's own pattern, at the load's mean rate
        times_s = (times_s - times_s[0]) * (len(times_s) / max(times_s[-1] - times_s[0], 1e-9) / load.rate)
    return Arrivals(times_s - times_s[0], prompts, outputs, shared)


def _read(path: Path) -> list[Entry]:
    text = read_text(path, "trace")
    read = {".json": _json, ".jsonl": _lines}.get(path.suffix.lower(), _csv)
    entries = read(path, text)
    timed = [entry for entry in entries if entry.time_s is not None]
    if timed and len(timed) < len(entries):
        raise ConfigurationError.of("trace", str(path), "some requests have a time and some have none")
    return sorted(entries, key=lambda entry: entry.time_s or 0.0)


def _csv(path: Path, text: str) -> list[Entry]:
    rows = csv.reader(text.splitlines())
    header = tuple(name.strip() for name in next(rows, []))
    if header != COLUMNS:
        raise ConfigurationError.of(f"{path}:1", ",".join(header), f"the first line must be {','.join(COLUMNS)}")
    return [_entry(f"{path}:{number}", row) for number, row in enumerate(rows, 2) if row]


def _entry(where: str, row: list[str]) -> Entry:
    if len(row) != len(COLUMNS):
        raise ConfigurationError.of(where, ",".join(row), f"must have the {len(COLUMNS)} fields {', '.join(COLUMNS)}")
    time_s, prompt, output = row
    prompts = _count(where, "ContextTokens", prompt)
    return Entry(_time(where, time_s), prompts, _count(where, "GeneratedTokens", output, 0))


def _time(where: str, text: str) -> float:
    for read in (float, lambda date: datetime.fromisoformat(date.strip()).timestamp()):
        try:
            time_s = read(text)
        except ValueError:
            continue
        if isfinite(time_s):
            return time_s
    raise ConfigurationError.of(f"{where}: TIMESTAMP", text, "must be a date or seconds")


def _count(where: str, key: str, value: object, least: int = 1) -> int:
    text = str(value).strip()
    if not text.isdecimal() or int(text) < least:
        raise ConfigurationError.of(f"{where}: {key}", value, f"must be a whole number of tokens, at least {least}")
    return int(text)


def _json(path: Path, text: str) -> list[Entry]:
    try:
        items = msgspec.json.decode(text, type=list[dict[str, Any]])
    except msgspec.DecodeError as error:
        raise ConfigurationError.of("trace", str(path), f"must be a JSON list of objects: {error}") from error
    return [_item(f"{path}[{index}]", item) for index, item in enumerate(items)]


def _lines(path: Path, text: str) -> list[Entry]:
    entries: list[Entry] = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                item = msgspec.json.decode(line, type=dict[str, Any])
            except msgspec.DecodeError as error:
                raise ConfigurationError.of("trace", f"{path}:{number}", f"must be a JSON object: {error}") from error
            entries.append(_item(f"{path}:{number}", item))
    return entries


def _item(where: str, item: dict[str, Any]) -> Entry:
    if "conversations" in item:
        return _conversation(where, item["conversations"])
    if "input_length" in item:
        time_ms = item.get("timestamp")
        seconds = time_ms / 1e3 if isinstance(time_ms, int | float) else time_ms
        item = {"prompt": item["input_length"], "output": item.get("output_length"), "time": seconds}
    if unknown := sorted(item.keys() - {"prompt", "output", "time"}):
        raise ConfigurationError.of(where, unknown, "known are prompt, output and time")
    time_s = item.get("time")
    if time_s is not None and not isinstance(time_s, int | float):
        raise ConfigurationError.of(f"{where}.time", time_s, "must be seconds")
    return Entry(time_s, _count(where, "prompt", item.get("prompt")), _count(where, "output", item.get("output"), 0))


def _conversation(where: str, turns: Any) -> Entry:
    values = [turn.get("value") for turn in turns if isinstance(turn, dict)] if isinstance(turns, list) else []
    texts = [text for text in values[:2] if isinstance(text, str)]
    if len(texts) < 2:
        raise ConfigurationError.of(f"{where}.conversations", turns, "must hold two turns with a text as their value")
    prompt, output = (max(1, round(len(text) / CHARACTERS)) for text in texts)
    return Entry(None, prompt, output)
