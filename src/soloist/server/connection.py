"""Bounds of what comes before a request is known: uvicorn alone takes headers of any size and waits for them for ever.

httptools parses where it is installed, h11 otherwise, as uvicorn chooses by itself.
"""

from __future__ import annotations

import asyncio
from typing import Any

try:
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol as HttpProtocol
except ImportError:
    from uvicorn.protocols.http.h11_impl import H11Protocol as HttpProtocol

MOST_HEAD_BYTES = 64 * 2**10  # of request line and headers; what one read brings may lie above
HEAD_S = 30.0  # for a client to send them


class BoundedProtocol(HttpProtocol):  # type: ignore[misc]
    """One connection. It is closed where a head is too large or too slow; an answer under way is finished first."""

    _head_bytes = 0
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._start_timer()

    def data_received(self, data: bytes) -> None:
        before = self.cycle
        is_head = before is None or not before.more_body
        super().data_received(data)
        if self.cycle is not before:
            self._head_bytes = 0
            self._stop_timer()
        elif is_head:
            self._head_bytes += len(data)
            self._check_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def _check_head(self) -> None:
        if self._head_bytes > MOST_HEAD_BYTES and not self.transport.is_closing():
            if self._is_answering:
                self.transport.close()
            else:
                self.send_400_response(f"Headers are larger than {MOST_HEAD_BYTES} bytes.")
        elif self._timer is None:
            self._start_timer()

    @property
    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _start_timer(self) -> None:
        self._timer = self.loop.call_later(HEAD_S, self._too_slow)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _too_slow(self) -> None:
        """Some clients send an empty line after a body: that is no reason to cut an answer."""
        if self._is_answering:
            self._start_timer()
        else:
            self.transport.close()
