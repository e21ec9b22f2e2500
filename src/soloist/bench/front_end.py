"""How many tokens a second the server streams when the ranks are no limit: `soloist bench front-end`.

Three processes: leaders without a model, the server, and this one, which reads. The last run reads the same events from
a socket that writes them as fast as it can, which shows what the reader could take.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from soloist.bench.fake_leaders import lead
from soloist.bench.serve import Planned, send
from soloist.bench.sse import LOOP, Client, Outcome, run
from soloist.frontend.frontend import FrontEnd
from soloist.frontend.sockets import Hub
from soloist.frontend.wire import ToFrontEnd
from soloist.specs.layout import Layout

NAME = "fake"
START_S = 60.0
PIECE = (
    b'data: {"id":"cmpl-0123456789abcdef0123456789abcdef","object":"text_completion","created":1700000000,'
    b'"model":"fake","choices":[{"index":0,"text":" 123","logprobs":null,"finish_reason":null}],"usage":null}\n\n'
)


def measure(streams: int, tokens: int, leaders: int, step_s: float) -> dict[str, Any]:
    """All streams at once. Rates count from the first to the last token; CPU seconds are of the whole run."""
    with tempfile.TemporaryDirectory(prefix="soloist-") as folder:
        server, port = _start(_serve, folder, leaders)
        ranks = multiprocessing.get_context("spawn").Process(
            target=lead, args=(f"ipc://{folder}/front", range(leaders), step_s), daemon=True
        )
        ranks.start()
        outcomes, own_cpu_s = _read(int(port.recv()), streams, tokens)
        port.send("end")
        server_cpu_s = float(port.recv())
        server.join(START_S)
        ranks.join(START_S)
    source, port = _start(_pour, tokens)
    poured, reader_cpu_s = _read(int(port.recv()), streams, tokens)
    source.kill()
    return _record(outcomes, server_cpu_s, own_cpu_s) | {
        "what": "front-end",
        "streams": streams,
        "leaders": leaders,
        "step_ms": step_s * 1e3,
        "asked_tps": streams / step_s if step_s else None,
        "reader_alone_tps": _rate([outcome.tokens for outcome in poured], poured),
        "reader_alone_cpu_us_per_token": 1e6 * reader_cpu_s / sum(outcome.tokens for outcome in poured),
        "loop": LOOP,
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
    }


def _record(outcomes: list[Outcome], server_cpu_s: float, reader_cpu_s: float) -> dict[str, Any]:
    total = sum(outcome.tokens for outcome in outcomes)
    return {
        "tps": _rate([outcome.tokens for outcome in outcomes], outcomes),
        "events_per_s": _rate([outcome.events for outcome in outcomes], outcomes),
        "complete": sum(_is_complete(outcome) for outcome in outcomes),
        "errors": sorted({outcome.error for outcome in outcomes if outcome.error}),
        "server_cpu_us_per_token": 1e6 * server_cpu_s / max(total, 1),
        "reader_cpu_us_per_token": 1e6 * reader_cpu_s / max(total, 1),
        "server_tps_on_a_core_of_its_own": total / server_cpu_s,
    }


def _is_complete(outcome: Outcome) -> bool:
    """Every token once and in order."""
    return outcome.text == "".join(f" {i}" for i in range(outcome.tokens))


def _rate(counts: list[int], outcomes: list[Outcome]) -> float:
    begin, end = min(o.first_s for o in outcomes), max(o.last_s for o in outcomes)
    return sum(counts) / max(end - begin, 1e-9)


def _start(target: Callable[..., None], *arguments: Any) -> tuple[Any, Connection]:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=target, args=(there, *arguments), daemon=True)
    process.start()
    return process, here


def _read(port: int, streams: int, tokens: int) -> tuple[list[Outcome], float]:
    body = {"model": NAME, "prompt": [1, 2, 3], "max_tokens": tokens, "stream": True}
    body |= {"stream_options": {"include_usage": True}}
    client = Client(f"http://127.0.0.1:{port}", timeout_s=300, keep_events=True)
    begin = time.process_time()
    outcomes = run(send(client, [Planned(0.0, body)] * streams, "/v1/completions"))
    return outcomes, time.process_time() - begin


# -- the other processes ----------------------------------------------------------------------------------------------
def _serve(port: Connection, folder: str, leaders: int) -> None:
    """The server, as `soloist serve` runs it."""
    import uvicorn

    from soloist.server.app import Limits, make_app
    from soloist.server.served import Served

    hub: Hub[ToFrontEnd] = Hub(f"ipc://{folder}/front", ToFrontEnd)
    front = FrontEnd(Layout(ep=leaders), 1000, hub, 60.0, dict)
    front.wait_ready(START_S, lambda _: None)
    app = make_app(Served(NAME, front), Limits(max_waiting=100_000))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, access_log=False, backlog=4096))

    async def main() -> None:
        serving = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        begin = time.process_time()
        port.send(server.servers[0].sockets[0].getsockname()[1])
        await asyncio.to_thread(port.recv)
        port.send(time.process_time() - begin)
        server.should_exit = True
        await serving

    run(main())
    front.close()


def _pour(port: Connection, tokens: int) -> None:
    """Answers every request with all of its events at once, in chunks of one event."""
    head = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
    chunk = b"%x\r\n%b\r\n" % (len(PIECE), PIECE)
    end = b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"

    class Source(asyncio.Protocol):
        def connection_made(self, transport: Any) -> None:
            self.transport = transport

        def data_received(self, data: bytes) -> None:
            self.transport.write(head + chunk * tokens + end)

    async def main() -> None:
        server = await asyncio.get_running_loop().create_server(Source, "127.0.0.1", 0, backlog=4096)
        port.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    run(main())
