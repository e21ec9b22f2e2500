"""Errors as OpenAI's clients understand them: a status code and `{"error": {message, type, param, code}}`."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import msgspec
from starlette.responses import Response

from soloist.errors import RequestError, SoloistError

TYPES = {400: "invalid_request_error", 401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


@dataclass(eq=False)
class Refusal(Exception):
    """Why a request gets no answer. `code` is for programs, `message` for people."""

    status: int
    message: str
    code: str
    param: str | None = None
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def body(self) -> bytes:
        kind = TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return msgspec.json.encode({"error": error})

    @property
    def event(self) -> bytes:
        """As the last event of a stream that has begun."""
        return b"data: %b\n\n" % self.body

    @property
    def response(self) -> Response:
        return Response(self.body, self.status, self.headers, "application/json")

    @classmethod
    def of(cls, error: SoloistError) -> Refusal:
        """For a request that cannot be served, or an engine that serves no more."""
        if isinstance(error, RequestError):
            named = re.match(r"([\w.\[\]]+)( = .*?)?: ", str(error))
            return cls(400, str(error), "invalid_value", named[1] if named else None)
        return cls(503, f"the engine has failed: {error}", "engine_failed")
