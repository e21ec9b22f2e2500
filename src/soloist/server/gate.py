"""Around every HTTP request: its id, its key, and a line in the log when it is over."""

from __future__ import annotations

import hmac
import json
import logging
import re
import time
import uuid
from collections.abc import Sequence
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from soloist.server.desk import Call
from soloist.server.refusals import Refusal

OPEN = ("/", "/health", "/metrics", "/dashboard", "/docs", "/openapi.json")  # paths that need no key
QUIET = ("/health", "/metrics", "/details")  # paths that are asked for again and again
log = logging.getLogger("soloist.server")


class Gate:
    """Refuses requests without one of the keys, if there are any. Gives each an id, the client's own if it has one."""

    def __init__(self, app: ASGIApp, keys: Sequence[str] = ()) -> None:
        self.app, self.keys = app, [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        entry = _Entry(scope)

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                entry.status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", entry.id.encode())]
            await send(message)

        try:
            if self._admits(scope):
                await self.app(scope, receive, send_with_id)
            else:
                how = {"WWW-Authenticate": "Bearer"}
                refusal = Refusal(401, "give a valid key: Authorization: Bearer KEY", "invalid_api_key", headers=how)
                await refusal.response(scope, receive, send_with_id)
        finally:
            entry.write()

    def _admits(self, scope: Scope) -> bool:
        if not self.keys or scope["path"] in OPEN:
            return True
        scheme, _, given = Headers(scope=scope).get("authorization", "").partition(" ")
        token = given.strip().encode()
        return scheme.lower() == "bearer" and any([hmac.compare_digest(token, key) for key in self.keys])


class _Entry:
    """The log's line about one request."""

    def __init__(self, scope: Scope) -> None:
        self.scope, self.begin_s, self.status = scope, time.monotonic(), 0
        given = Headers(scope=scope).get("x-request-id", "")
        self.id = given if re.fullmatch(r"[\w.:-]{1,128}", given, re.ASCII) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = self.id

    def write(self) -> None:
        level = logging.DEBUG if self.scope["path"] in QUIET else logging.INFO
        if not log.isEnabledFor(level):
            return
        fields: dict[str, Any] = {
            "request_id": self.id,
            "method": self.scope["method"],
            "path": self.scope["path"],
            "status": self.status,
            "seconds": round(time.monotonic() - self.begin_s, 6),
        }
        call: Call | None = self.scope["state"].get("call")
        if call:
            fields |= {"outcome": call.outcome, "prompt_tokens": call.prompt_tokens, "tokens": call.generated}
        log.log(level, "request", extra={"fields": fields})


class JsonLines(logging.Formatter):
    """One JSON object a line: time (UTC), level, event, and the `fields` of the record."""

    def format(self, record: logging.LogRecord) -> str:
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line = {"time": f"{moment}.{int(record.msecs):03}Z", "level": record.levelname.lower()}
        line |= {"event": record.getMessage()} | getattr(record, "fields", {})
        if record.exc_info:
            line["trace"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)
