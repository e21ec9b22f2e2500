"""Many clients at once, well-behaved and not: what a server must come through without losing anything.

The suite runs a small storm. The large one: `python -m tests.server.storm --requests 10000 --malformed 1000`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

from soloist.bench.sse import Client
from soloist.engine.llm import LLM
from soloist.scheduling.request import SamplingParams
from soloist.server.served import Served
from soloist.specs.layout import Layout
from tests.server.live import NOVELS, Live, live

AT_ONCE = 500  # connections
FEW = 5  # answers that may differ where there are few; each must have been a close call
CLOSE = 1e-4  # between two logits or router scores, under which fp32 sums of another order may choose the other
Kind = Literal["stream", "whole", "leave", "malformed"]


@dataclass(frozen=True)
class Wish:
    """One request. A client that leaves does so after `patience` bytes of the answer."""

    kind: Kind
    body: bytes
    key: tuple[tuple[int, ...], int] = ((), 0)  # prompt, max_tokens
    patience: int = 0


@dataclass
class Report:
    """What the storm found."""

    fates: Counter[str] = field(default_factory=Counter)
    answers: list[tuple[Wish, list[int], str]] = field(default_factory=list)  # tokens and text of those that stayed
    wrong: list[str] = field(default_factory=list)


def wishes(requests: int, malformed: int, distinct: int, seed: int) -> list[Wish]:
    """In random order; a tenth of the well-formed ones leaves."""
    rng = random.Random(seed)
    keys = [
        (tuple(rng.randrange(1, 4000) for _ in range(rng.randint(1, 24))), rng.randint(1, 10)) for _ in range(distinct)
    ]
    found = [_well_formed(rng.choices(("stream", "whole", "leave"), (6, 3, 1))[0], rng.choice(keys), rng)
             for _ in range(requests)]  # fmt: skip
    found += [Wish("malformed", _malformed(rng)) for _ in range(malformed)]
    rng.shuffle(found)
    return found


def _well_formed(kind: Kind, key: tuple[tuple[int, ...], int], rng: random.Random) -> Wish:
    body = {"model": "novels", "prompt": key[0], "max_tokens": key[1], "temperature": 0, "return_token_ids": True}
    body |= {"ignore_eos": True, "stream": kind == "stream" or (kind == "leave" and rng.random() < 0.7)}
    return Wish(kind, json.dumps(body).encode(), key, rng.choice((0, 0, 100, 600)))


def _malformed(rng: random.Random) -> bytes:
    """Broken JSON, wrong types, negative numbers, huge lengths, bad unicode."""
    good: dict[str, Any] = {"model": "novels", "prompt": "x", "max_tokens": 3}
    whole = json.dumps(good).encode()
    return rng.choice((
        lambda: whole[: rng.randrange(1, len(whole))],
        lambda: bytes(rng.randrange(256) for _ in range(rng.randrange(1, 200))) + b"\xff",
        lambda: b"[" * rng.randrange(1, 5000),
        lambda: json.dumps(good | {rng.choice(list(good)): rng.choice(([], {}, True, -1, 1.5, None))
                                   } | {"n": "two"}).encode(),
        lambda: json.dumps(good | {"max_tokens": rng.choice((-5, 0, 10**6, 10**30))}).encode(),
        lambda: json.dumps(good | {"temperature": -rng.random() - 0.01}).encode(),
        lambda: json.dumps(good | {"prompt": [rng.choice((-1, 4096, 10**25))]}).encode(),
        lambda: json.dumps(good | {"prompt": [1] * 3000}).encode(),
        lambda: b'{"model":"novels","prompt":"' + rng.choice((b"\xed\xa0\x80", b"\\ud800", b"\xc3(")) + b'"}',
        lambda: json.dumps(good | {"nonsense": 1}).encode(),
        lambda: json.dumps(good | {"stop": ["a"] * 17}).encode(),
    ))()  # fmt: skip


async def storm(url: str, plan: list[Wish]) -> Report:
    """Send everything, at most `AT_ONCE` at a time."""
    report, gate = Report(), asyncio.Semaphore(AT_ONCE)

    async def one(wish: Wish) -> None:
        async with gate:
            report.fates[await _send(url, wish, report)] += 1

    await asyncio.gather(*(one(wish) for wish in plan))
    return report


async def _send(url: str, wish: Wish, report: Report) -> str:
    if wish.kind == "stream":
        return await _stream(url, wish, report)
    if wish.kind == "leave":
        return await _leave(url, wish)
    status, body = await _post(url, wish.body)
    answer = json.loads(body)
    if wish.kind == "malformed":
        if not (400 <= status < 500 and answer["error"]["message"]):
            report.wrong.append(f"{status} for {wish.body[:100]!r}")
        return f"refused {status}"
    if status != 200:
        report.wrong.append(f"{status}: {answer}")
        return f"error {status}"
    choice = answer["choices"][0]
    report.answers.append((wish, choice["token_ids"], choice["text"]))
    return "whole"


async def _stream(url: str, wish: Wish, report: Report) -> str:
    client = Client(url, keep_events=True)
    outcome = await client.stream("/v1/completions", json.loads(wish.body), time.monotonic())
    if outcome.error:
        report.wrong.append(outcome.error)
        return "error"
    choices = [json.loads(event)["choices"][0] for event in outcome.kept]
    tokens = [token for choice in choices for token in choice["token_ids"]]
    report.answers.append((wish, tokens, "".join(choice["text"] for choice in choices)))
    return "stream"


async def _leave(url: str, wish: Wish) -> str:
    reader, writer = await _open(url, wish.body)
    got = await reader.read(wish.patience) if wish.patience else b""
    writer.transport.abort()
    return "left early" if not got else "left"


async def _post(url: str, body: bytes) -> tuple[int, bytes]:
    reader, writer = await _open(url, body)
    head, _, rest = (await reader.read()).partition(b"\r\n\r\n")
    writer.close()
    return int(head.split()[1]), rest


async def _open(url: str, body: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    host, port = url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
    return reader, writer


def check(server: Live, report: Report, plan: list[Wish], reference: LLM) -> dict[str, Any]:
    """Asserts that nothing was lost: every request accounted for, no block held, every answer the reference's."""
    assert not report.wrong, report.wrong[:5]
    assert report.fates.total() == len(plan)
    server.wait(lambda: server.desk.calls == 0)
    desk = server.desk
    assert desk.waiting == 0
    assert desk.accepted == desk.ended.total()
    assert set(desk.ended) <= {"complete", "cancelled"}
    stayed = report.fates["whole"] + report.fates["stream"]
    assert stayed <= desk.ended["complete"] <= stayed + report.fates["left"] + report.fates["left early"]
    assert not desk.front.requests.waiting_for()
    _check_blocks(server)
    differ = _differences(report, reference)
    assert differ <= FEW + len(report.answers) / 1000
    return {"fates": dict(report.fates), "ended": dict(desk.ended), "differ": differ, "compared": len(report.answers)}


def _check_blocks(server: Live) -> None:
    """A last token from every leader, whose message tells what it still holds."""
    leaders = len(server.desk.front.leaders)
    body = {"model": "novels", "prompt": [1, 2], "max_tokens": 1, "n": leaders}
    status, _ = asyncio.run(_post(server.url, json.dumps(body).encode()))
    assert status == 200
    for rank in server.desk.front.leaders:
        stats = server.desk.front.ranks[rank].stats
        assert (stats.running, stats.waiting, stats.blocks_used) == (0, 0, 0), f"rank {rank}: {stats}"


def _differences(report: Report, reference: LLM) -> int:
    """Answers that differ from an undisturbed run; each must have had a close call where it first does."""
    keys = sorted({wish.key for wish, _, _ in report.answers})
    params = [SamplingParams(max_tokens=most, temperature=0.0, ignore_eos=True) for _, most in keys]
    outputs = reference.generate([list(prompt) for prompt, _ in keys], params)
    expected = {key: output.outputs[0] for key, output in zip(keys, outputs, strict=True)}
    differ = 0
    for wish, tokens, text in report.answers:
        right = expected[wish.key]
        assert len(tokens) == wish.key[1]
        if tokens == right.tokens:
            assert text == right.text
            continue
        same = next(i for i, (ours, theirs) in enumerate(zip(tokens, right.tokens, strict=True)) if ours != theirs)
        distance = closest_call((*wish.key[0], *tokens[:same]))
        print(json.dumps({"prompt": wish.key[0], "ours": tokens, "reference": right.tokens, "distance": distance}))
        assert distance < CLOSE, f"{wish}: {tokens} instead of {right.tokens}"
        differ += 1
    return differ


@cache
def closest_call(tokens: tuple[int, ...]) -> float:
    """How near another choice was, by transformers: between the two best logits of the next token, or between the
    score of the last expert chosen and of the next one, in any layer and for any of the tokens."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(NOVELS, dtype=torch.float32)
    with torch.no_grad():
        found = model(torch.tensor([list(tokens)]), output_router_logits=True)
    best, second = found.logits[0, -1].topk(2).values.tolist()
    k = model.config.num_experts_per_tok
    scores = [logits.softmax(-1).topk(k + 1).values for logits in found.router_logits]
    return min(best - second, *((s[:, k - 1] - s[:, k]).min().item() for s in scores))


def _memory_mb() -> dict[str, float]:
    """Resident memory of this process, which is the server, and of all ranks together."""

    def resident(pid: int) -> float:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6

    ranks = [process.pid for process in multiprocessing.active_children() if process.pid]
    return {"server": resident(os.getpid()), "ranks": sum(map(resident, ranks))}


def check_memory(waves: list[dict[str, float]]) -> None:
    """Asserts that it has settled by the middle of the storm. The server's process keeps all answers for `check`."""
    middle, last = waves[len(waves) // 2], waves[-1]
    for who in last:
        assert last[who] < 1.03 * middle[who], f"{who}: {middle[who]:.1f} MB in the middle, {last[who]:.1f} in the end"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--malformed", type=int, default=1000)
    parser.add_argument("--layout", default="ep16")
    parser.add_argument("--waves", type=int, default=10, help="memory is looked at after each")
    arguments = parser.parse_args()
    plan = wishes(arguments.requests, arguments.malformed, arguments.requests // 5, seed=0)
    share, memory, total = -(-len(plan) // arguments.waves), [], Report()
    layout = Layout.parse(arguments.layout)  # one node: sums over groups go in the order of the experts, as in ep1
    begin = time.monotonic()
    with (
        LLM(NOVELS, device="cpu", show_progress=False) as reference,
        LLM(NOVELS, layout, device="cpu", kv_tokens=4096, gpus_per_node=layout.size, ahead="on") as llm,
        live(Served.of(llm, "novels"), max_waiting=100_000) as server,
    ):
        for start in range(0, len(plan), share):
            report = asyncio.run(storm(server.url, plan[start : start + share]))
            total.fates += report.fates
            total.answers += report.answers
            total.wrong += report.wrong
            memory.append(_memory_mb())
            print(json.dumps({"seconds": time.monotonic() - begin, "memory_MB": memory[-1]}), flush=True)
        print(json.dumps(check(server, total, plan, reference) | {"memory_MB": memory}), flush=True)
        check_memory(memory)


if __name__ == "__main__":
    main()
