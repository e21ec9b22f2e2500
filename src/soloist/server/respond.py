"""Answering one call over HTTP: whole or streamed, until it is done, the client goes, or its time is over."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from soloist.server.answers import DONE, Form
from soloist.server.desk import Call, Desk

LAST_WORDS_S = 5.0  # for a client that does not read: to take the error after its time is over


class Answer(Response):
    """A response that waits for its call. Whoever leaves it, the call is released and its sequences are forgotten."""

    def __init__(self, desk: Desk, call: Call, form: Form) -> None:
        super().__init__(status_code=200, media_type="text/event-stream" if call.stream else "application/json")
        if call.stream:
            del self.headers["content-length"]
            self.headers["cache-control"] = "no-cache"
        self.desk, self.call, self.form = desk, call, form

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def reply(response: Response) -> None:
            await response(scope, receive, send)

        scope["state"]["call"] = self.call
        watch = asyncio.create_task(self._watch(receive))
        try:
            async with asyncio.timeout(self.desk.timeout_s + LAST_WORDS_S):
                await (self._stream(send, reply) if self.call.stream else self._whole(reply))
        except TimeoutError:
            self.call.cancelled = True  # it does not even read the error: the connection is closed
        finally:
            self.desk.release(self.call)
            watch.cancel()
            with suppress(asyncio.CancelledError):
                await watch

    async def _watch(self, receive: Receive) -> None:
        """The body has been read; what comes next is that the client goes."""
        while (await receive())["type"] != "http.disconnect":
            pass
        self.desk.cancel(self.call)

    async def _stream(self, send: Send, reply: Callable[[Response], Awaitable[None]]) -> None:
        """Headers go out with the first piece: what fails before that has a status of its own."""
        call, started, done = self.call, False, False
        while not done:
            await call.news.wait()
            call.news.clear()
            done = call.done
            if call.failure and not started:
                return await reply(call.failure.response)
            if data := b"".join([self.form.event(*one) for one in call.take()]) if not call.failure else b"":
                if not started:
                    await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                    started = True
                await send({"type": "http.response.body", "body": data, "more_body": True})
        if not call.cancelled:
            await send({"type": "http.response.body", "body": self._ending(), "more_body": False})
        return None

    def _ending(self) -> bytes:
        if self.call.failure:
            return self.call.failure.event
        return (self.form.usage_event(self.call) if self.form.with_usage else b"") + DONE

    async def _whole(self, reply: Callable[[Response], Awaitable[None]]) -> None:
        while not self.call.done:
            await self.call.news.wait()
            self.call.news.clear()
        if self.call.failure:
            await reply(self.call.failure.response)
        elif not self.call.cancelled:
            await reply(Response(self.form.whole(self.call), 200, media_type="application/json"))
