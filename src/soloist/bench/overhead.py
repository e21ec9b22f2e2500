"""`soloist bench overhead`: the same requests on the same ranks, offline and through HTTP, in turn.

Offline this process reads what the ranks send. Through HTTP it is the server, as `soloist serve` runs it, and another
process reads the streams. Time per output token is that of the window in which every sequence decodes.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import platform
from collections.abc import Callable
from multiprocessing.connection import Connection
from statistics import median
from typing import Any

import msgspec
import numpy as np
import uvicorn

from soloist.bench.pace import steady_tpot_s, token_times
from soloist.bench.report import commit
from soloist.bench.serve import Planned, send
from soloist.bench.sse import Client, run
from soloist.engine.llm import LLM
from soloist.engine.options import EngineOptions
from soloist.errors import ClusterError
from soloist.server.app import Limits, make_app
from soloist.server.served import Served
from soloist.specs.layout import Layout

NAME = "model"
ANSWER_S = 600.0


def measure(
    model: str, layout: str, options: EngineOptions, streams: int, prompt: int, tokens: int, runs: int,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:  # fmt: skip
    """One start of the ranks; `runs` times each way in ABBA order after a rehearsal of both.

    `say` is told each figure as it comes. Raises ConfigurationError where not all sequences ever decode at once.
    """
    cut = Layout.parse(layout)
    most = -(-streams // (cut.attention_groups * cut.dp))
    sized = msgspec.structs.replace(
        options, prefix_caching=False, max_sequences=max(most, 1), max_positions=prompt + tokens + 1
    )
    found: dict[str, list[float]] = {"offline": [], "http": []}
    with LLM(model, cut, options=sized, show_progress="lines") as llm, Reader() as reader:
        draw = np.random.default_rng(0).integers(1, llm.spec.vocab, (streams, prompt))
        ways = {"offline": lambda n: token_times(llm, draw.tolist(), n), "http": lambda n: _http(llm, reader, draw, n)}
        for way in ways.values():
            way(4)
        for turn in range(runs):
            for name in ("offline", "http") if turn % 2 == 0 else ("http", "offline"):
                found[name].append(steady_tpot_s(ways[name](tokens)))
                say(f"{name}: {found[name][-1] * 1e3:.3f} ms a token")
    offline_s, http_s = median(found["offline"]), median(found["http"])
    return {
        "what": "overhead", "model": model, "layout": layout, "streams": streams, "prompt": prompt, "tokens": tokens,
        "runs": runs, "tpot_offline_s": offline_s, "tpot_http_s": http_s, "overhead": http_s / offline_s - 1,
        "all_offline_s": found["offline"], "all_http_s": found["http"],
        "machine": platform.node(), "commit": commit(),
    }  # fmt: skip


class Reader:
    """A process that sends requests to a server and tells when each token came."""

    def __enter__(self) -> Reader:
        context = multiprocessing.get_context("spawn")
        self.port, there = context.Pipe()
        self.process = context.Process(target=_read, args=(there,), daemon=True)
        self.process.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.join()

    def times(self) -> list[list[float]]:
        """Of the answers to what was sent. Raises ClusterError where one of them was an error."""
        answer = self.port.recv()
        if isinstance(answer, str):
            raise ClusterError(answer)
        return answer


def _http(llm: LLM, reader: Reader, prompts: np.ndarray, tokens: int) -> list[list[float]]:
    """Serve the prompts through HTTP once; the server ends with it, the ranks go on."""
    app = make_app(Served(NAME, llm.front), Limits(max_waiting=len(prompts) + 1))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, access_log=False, backlog=4096))

    async def serve() -> list[list[float]]:
        serving = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        reader.port.send((server.servers[0].sockets[0].getsockname()[1], prompts.tolist(), tokens))
        try:
            return await asyncio.to_thread(reader.times)
        finally:
            server.should_exit = True
            await serving

    return run(serve())


def _read(port: Connection) -> None:
    """The reader's side, until it is killed."""
    while True:
        address, prompts, tokens = port.recv()
        shared = {"model": NAME, "max_tokens": tokens, "stream": True, "temperature": 0.0, "ignore_eos": True}
        shared |= {"return_token_ids": True}
        planned = [Planned(0.0, shared | {"prompt": prompt}) for prompt in prompts]
        client = Client(f"http://127.0.0.1:{address}", timeout_s=ANSWER_S, keep_times=True)
        outcomes = run(send(client, planned, "/v1/completions"))
        wrong = [
            outcome.error or "an answer is too short" for outcome in outcomes if outcome.error or not outcome.times_s
        ]
        port.send(wrong[0] if wrong else [outcome.times_s for outcome in outcomes])
