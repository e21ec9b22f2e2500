"""A client that reads many token streams at once: HTTP/1.1 over asyncio, answers parsed by httptools as they come."""

from __future__ import annotations

import asyncio
import importlib.util
import ssl
import time
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httptools
import msgspec

LOOP = "uvloop" if importlib.util.find_spec("uvloop") else "asyncio"
_EVENT = b"data: "
Result = TypeVar("Result")


@dataclass
class Outcome:
    """What became of one request. Times count from when it was due, so that a late client is not flattering."""

    due_s: float  # on the clock of time.monotonic
    late_s: float = 0.0  # sent so long after it was due
    status: int = 0
    first_s: float = float("nan")
    last_s: float = float("nan")
    events: int = 0  # with text
    tokens: int = 0  # as the server counts them; otherwise the events
    prompt_tokens: int = 0  # as the server counts them
    cached_tokens: int | None = None  # of the prompt, found in the server's prefix cache; None: it does not tell
    longest_gap_s: float = 0.0
    error: str | None = None
    kept: list[bytes] = field(default_factory=list)  # the events themselves, where they are kept
    times_s: list[float] = field(default_factory=list)  # when each token came, where that is kept

    @property
    def text(self) -> str:
        """All text, of kept events."""
        choices = [msgspec.json.decode(event)["choices"][0] for event in self.kept]
        return "".join(choice.get("text") or choice.get("delta", {}).get("content") or "" for choice in choices)

    @property
    def tpot_s(self) -> float | None:
        """Mean seconds between tokens after the first."""
        return (self.last_s - self.first_s) / (self.tokens - 1) if self.tokens > 1 else None


class Stream(asyncio.Protocol):
    """One connection, one request, its events counted as they arrive."""

    def __init__(self, outcome: Outcome, keep_events: bool, keep_times: bool) -> None:
        self.outcome, self.keep_events, self.keep_times = outcome, keep_events, keep_times
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._parser = httptools.HttpResponseParser(self)
        self._rest = b""

    # -- asyncio ----------------------------------------------------------------------------------------------------
    def data_received(self, data: bytes) -> None:
        self._now = time.monotonic()
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._end(f"no HTTP: {error}")

    def connection_lost(self, error: Exception | None) -> None:
        self._end(f"connection lost: {error or 'closed before the answer was complete'}")

    # -- httptools --------------------------------------------------------------------------------------------------
    def on_headers_complete(self) -> None:
        self.outcome.status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        if self.outcome.status != 200:
            self._rest += body
            return
        *events, self._rest = (self._rest + body).split(b"\n\n")
        for event in events:
            self._take(event.removeprefix(_EVENT))

    def on_message_complete(self) -> None:
        if self.outcome.status != 200:
            self._end(f"status {self.outcome.status}: {self._rest[:300].decode(errors='replace')}")
        else:
            self._end("the stream ended without [DONE]")

    # -- events -----------------------------------------------------------------------------------------------------
    def _take(self, event: bytes) -> None:
        if event == b"[DONE]":
            self._end(None)
        elif event.startswith(b'{"error"'):
            self._end(event.decode())
        elif b'"choices":[]' in event:
            self._count(event)
        else:
            self._token(event)

    def _token(self, event: bytes) -> None:
        outcome = self.outcome
        if not outcome.events and _is_opening(event):
            return
        outcome.events += 1
        if outcome.events == 1:
            outcome.first_s = self._now
        else:
            outcome.longest_gap_s = max(outcome.longest_gap_s, self._now - outcome.last_s)
        outcome.last_s = self._now
        if self.keep_events:
            outcome.kept.append(event)
        if self.keep_times:
            outcome.times_s += [self._now] * len(msgspec.json.decode(event)["choices"][0]["token_ids"])

    def _count(self, event: bytes) -> None:
        usage, outcome = msgspec.json.decode(event).get("usage") or {}, self.outcome
        outcome.tokens, outcome.prompt_tokens = usage.get("completion_tokens", 0), usage.get("prompt_tokens", 0)
        outcome.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")

    def _end(self, error: str | None) -> None:
        if not self.done.done():
            self.outcome.error = error
            self.outcome.tokens = self.outcome.tokens or self.outcome.events
            self.done.set_result(None)


def _is_opening(event: bytes) -> bool:
    """Of a chat: it names the role and holds no text."""
    delta = msgspec.json.decode(event)["choices"][0].get("delta")
    return delta is not None and "role" in delta and not delta.get("content")


class Client:
    """Asks one server. Every request has a connection of its own, as different users have.

    keep_times: of every token; the requests must ask for `return_token_ids`, since a server may join tokens.
    """

    def __init__(
        self,
        url: str,
        key: str | None = None,
        timeout_s: float = 600.0,
        keep_events: bool = False,
        keep_times: bool = False,
    ) -> None:
        parts = urlsplit(url if "//" in url else f"http://{url}")
        self.host, self.secure = parts.hostname or "127.0.0.1", parts.scheme == "https"
        self.port = parts.port or (443 if self.secure else 80)
        self.path = parts.path.rstrip("/").removesuffix("/v1")
        self.timeout_s, self.keep_events, self.keep_times = timeout_s, keep_events, keep_times
        self._tls = ssl.create_default_context() if self.secure else None
        self._key = f"Authorization: Bearer {key}\r\n" if key else ""

    async def stream(self, path: str, body: Mapping[str, Any], due_s: float) -> Outcome:
        """Send a request whose answer is streamed, and read all of it."""
        outcome = Outcome(due_s)
        outcome.late_s = time.monotonic() - due_s
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self.timeout_s):
                transport, protocol = await loop.create_connection(
                    lambda: Stream(outcome, self.keep_events, self.keep_times), self.host, self.port, ssl=self._tls
                )
                try:
                    transport.write(self._request(path, msgspec.json.encode(body)))
                    await protocol.done
                finally:
                    transport.close()
        except TimeoutError:
            outcome.error = f"not answered within {self.timeout_s:g} s"
        except OSError as error:
            outcome.error = f"cannot connect: {error}"
        return outcome

    def _request(self, path: str, body: bytes) -> bytes:
        head = (
            f"POST {self.path}{path} HTTP/1.1\r\nHost: {self.host}:{self.port}\r\n{self._key}"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        )
        return head.encode() + body


def run(coroutine: Coroutine[Any, Any, Result]) -> Result:
    """In the loop that uvicorn would take, which `LOOP` names."""
    if LOOP == "asyncio":
        return asyncio.run(coroutine)
    import uvloop

    return uvloop.run(coroutine)
