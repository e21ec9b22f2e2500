"""Servers for tests: uvicorn in a thread, in front of the shipped model or of leaders without one."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import uvicorn

from soloist.bench.fake_leaders import SIZES, FakeLeader
from soloist.frontend.frontend import FrontEnd
from soloist.frontend.sockets import Hub
from soloist.frontend.wire import ToFrontEnd
from soloist.server.app import Limits, make_app
from soloist.server.run import Listening, configured
from soloist.server.served import Served
from soloist.specs.layout import Layout

LOCAL = Listening(port=0)
NOVELS = Path(__file__).parents[2] / "models" / "novels-moe-11m"
TEMPLATE = """{% for m in messages %}{{ m.role }}: {{ m.content }}
{% endfor %}{% if add_generation_prompt %}{{ name or 'assistant' }}:{% endif %}"""


def patient() -> httpx.Client:
    """A client that waits, and takes a connection for each request: none that its server is about to close."""
    return httpx.Client(timeout=200.0, limits=httpx.Limits(max_keepalive_connections=0))


http = patient()


class Live:
    """A running server."""

    def __init__(self, served: Served, limits: Limits, listening: Listening) -> None:
        self.app = make_app(served, limits, listening.keys, listening.origins)
        self.desk = self.app.state.desk
        self.server = uvicorn.Server(configured(self.app, listening))
        self.thread = threading.Thread(target=self.server.run)

    @property
    def url(self) -> str:
        scheme = "https" if self.server.config.is_ssl else "http"
        return f"{scheme}://127.0.0.1:{self.server.servers[0].sockets[0].getsockname()[1]}"

    def wait(self, condition, seconds: float = 200.0) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "did not happen in time"
            time.sleep(0.01)


@contextmanager
def live(served: Served, listening: Listening = LOCAL, **limits) -> Iterator[Live]:
    running = Live(served, Limits(**limits), listening)
    running.thread.start()
    running.wait(lambda: running.server.started)
    try:
        yield running
    finally:
        running.server.should_exit = True
        running.thread.join(200)
        assert not running.thread.is_alive()


class Fake:
    """Leaders in a thread; `pause` stops their steps, `step_s` slows them."""

    def __init__(self, folder: Path, layout: str = "ep2") -> None:
        self.hub: Hub[ToFrontEnd] = Hub(f"ipc://{folder}/front", ToFrontEnd)
        self.gone: dict[int, str] = {}
        self.front = FrontEnd(Layout.parse(layout), 1000, self.hub, 200.0, lambda: self.gone)
        self.leaders = [FakeLeader(self.hub.address, rank, SIZES) for rank in self.front.leaders]
        self.front.wait_ready(200, lambda ranks: None)
        self.served = Served("fake", self.front)
        self.step_s, self.paused, self.ending = 0.001, False, False
        self.thread = threading.Thread(target=self._lead)
        self.thread.start()

    def _lead(self) -> None:
        while not self.ending:
            for leader in self.leaders:
                if not self.paused:
                    leader.step()
            time.sleep(self.step_s)

    @property
    def left(self) -> int:
        """Sequences that leaders still work on."""
        return sum(len(leader.sequences) for leader in self.leaders)

    def close(self) -> None:
        self.ending = True
        self.thread.join()
        self.front.close()
        for leader in self.leaders:
            leader.spoke.close()
