"""The load generator: what it plans, what it reads, what it counts."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import msgspec
import numpy as np
import pytest

from soloist.bench.front_end import measure
from soloist.bench.serve import plan_file, plan_random, send, summarise, table, write
from soloist.bench.sse import Client, Outcome
from soloist.errors import ConfigurationError
from soloist.specs.workload import Load
from tests.server.live import Fake, live

LOAD = Load.parse("prompt=20,output=8,rate=200,spread=0.5,prefix=0.5,ttft=5s,tpot=1s")


@pytest.fixture
def fake(short_path):
    made = Fake(short_path)
    yield made
    made.close()


def test_a_plan_is_the_load_and_repeats():
    planned = plan_random(LOAD, 400, "m", 1, vocab=50)
    assert planned == plan_random(LOAD, 400, "m", 1, vocab=50)
    assert planned != plan_random(LOAD, 400, "m", 2, vocab=50)
    prompts = [request.body["prompt"] for request in planned]
    assert np.mean([len(prompt) for prompt in prompts]) == pytest.approx(20, rel=0.1)
    assert max(map(max, prompts)) < 50
    assert planned[0].due_s == 0
    assert planned[-1].due_s == pytest.approx(2.0, rel=0.25)
    first, second = sorted(prompts, key=len)[-2:]
    assert first[: len(first) // 2] == second[: len(first) // 2]


def test_a_file_of_conversations(tmp_path):
    path = tmp_path / "share.json"
    turns = [[{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "x" * 20}], [{"from": "gpt", "value": ""}]]
    path.write_text(json.dumps([{"conversations": turn} for turn in turns]))
    planned = plan_file(LOAD, path, 3, "m", 0)
    assert {request.body["prompt"] for request in planned} == {"Who?"}
    assert {request.body["max_tokens"] for request in planned} == {5}
    path.write_text("[1]")
    with pytest.raises(ConfigurationError, match="--dataset"):
        plan_file(LOAD, path, 3, "m", 0)


CHAT = """HTTP/1.1 200 OK\r
Transfer-Encoding: chunked\r
\r
{size:x}\r
{events}\r
0\r
\r
"""
DELTAS = ({"role": "assistant", "content": ""}, {"content": "I am"}, {"content": " Who."})


async def ask_a_chat_server(planned) -> list[Outcome]:
    """One that answers with `DELTAS`, whatever it is asked."""
    chunks = [json.dumps({"choices": [{"index": 0, "delta": delta}]}) for delta in DELTAS]
    events = "".join(f"data: {chunk}\n\n" for chunk in (*chunks, "[DONE]"))

    async def answer(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(CHAT.format(size=len(events), events=events).encode())
        await writer.drain()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        return await send(Client(f"127.0.0.1:{port}", keep_events=True), planned, "/v1/chat/completions")


def test_prompts_of_a_file_may_be_messages(tmp_path):
    path = tmp_path / "share.json"
    path.write_text(json.dumps([{"conversations": [{"value": "Who?"}, {"value": "x" * 20}]}]))
    planned = plan_file(LOAD, path, 2, "m", 0, chat=True)
    assert planned[0].body["messages"] == [{"role": "user", "content": "Who?"}]
    assert "prompt" not in planned[0].body
    for outcome in asyncio.run(ask_a_chat_server(planned)):
        assert (outcome.error, outcome.text) == (None, "I am Who.")
        assert outcome.tokens == 2  # what opens a chat is none


def test_every_token_is_read_and_counted(fake, tmp_path):
    load = msgspec.structs.replace(LOAD, ttft_s=100.0, tpot_s=100.0)
    with live(fake.served) as server:
        planned = plan_random(load, 30, "fake", 0, vocab=50)
        client = Client(server.url, keep_events=True)
        outcomes = asyncio.run(send(client, planned, "/v1/completions"))
    for outcome, request in zip(outcomes, planned, strict=True):
        assert outcome.error is None
        assert outcome.tokens == request.body["max_tokens"]
        assert outcome.text == "".join(f" {i}" for i in range(outcome.tokens))
        assert outcome.due_s <= outcome.first_s <= outcome.last_s
    summary = summarise(outcomes, load, Path("talks.json"))
    assert summary["dataset"] == "talks.json"
    assert summary["tokens"] == sum(request.body["max_tokens"] for request in planned)
    assert summary["met_slo"] == 1.0
    assert "30 of 30" in table(summary).title
    assert all(path.stat().st_size > 0 for path in write(outcomes, summary, tmp_path / "out"))


def test_errors_are_outcomes(fake):
    wrong = plan_random(LOAD, 2, "other", 0, vocab=50)
    with live(fake.served) as server:
        outcomes = asyncio.run(send(Client(server.url), wrong, "/v1/completions"))
    assert all("status 404" in outcome.error for outcome in outcomes)
    outcomes += asyncio.run(send(Client("http://127.0.0.1:1"), wrong, "/v1/completions"))
    assert "cannot connect" in outcomes[-1].error
    summary = summarise(outcomes, LOAD)
    assert summary["answered"] == summary["tokens"] == 0
    assert sum(summary["errors"].values()) == 4
    table(summary)


def test_goodput_counts_what_met_the_slo():
    quick = Outcome(0.0, first_s=1.0, last_s=2.0, tokens=11)
    slow = Outcome(0.0, first_s=6.0, last_s=7.0, tokens=11)
    stuttering = Outcome(0.0, first_s=1.0, last_s=21.0, tokens=11)
    summary = summarise([quick, slow, stuttering, Outcome(0.0, error="x")], LOAD)
    assert summary["met_slo"] == 0.25
    assert summary["goodput_per_s"] == pytest.approx(1 / 21)


@pytest.mark.slow
def test_the_front_end_loses_nothing_at_full_speed():
    record = measure(streams=32, tokens=100, leaders=2, step_s=0.002)
    assert record["complete"] == 32
    assert not record["errors"]
