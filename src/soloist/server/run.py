"""Runs the application under uvicorn until it is told to stop; then lets accepted requests finish first."""

from __future__ import annotations

import asyncio
import logging
import re
import signal
import socket
import ssl
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import uvicorn
from fastapi import FastAPI

from soloist.errors import ConfigurationError
from soloist.server.app import Limits, make_app
from soloist.server.connection import BoundedProtocol
from soloist.server.desk import Desk
from soloist.server.gate import JsonLines
from soloist.server.refusals import Refusal
from soloist.server.served import Served

log = logging.getLogger("soloist.server")
BACKLOG = 4096  # connections that wait to be taken


@dataclass(frozen=True)
class Listening:
    """Where and how to listen. TLS where there is a certificate. `drain_s`: for accepted requests after SIGTERM."""

    host: str = "127.0.0.1"
    port: int = 8000
    keys: Sequence[str] = ()
    drain_s: float = 60.0
    certificate: Path | None = None
    private_key: Path | None = None
    client_authorities: Path | None = None  # clients must show a certificate signed by one of these
    origins: Sequence[str] = ()  # of pages elsewhere whose scripts browsers let call this server; * for all

    def __post_init__(self) -> None:
        if not all(key.strip() for key in self.keys):
            raise ConfigurationError.of("api_key", "", "would let everybody in; give a key, or leave it out")
        for origin in self.origins:
            if origin != "*" and not re.fullmatch(r"https?://[^/\s]+", origin):
                raise ConfigurationError.of("cors_origin", origin, "write * or an origin like https://chat.example.org")
        for key in ("certificate", "private_key", "client_authorities"):
            path: Path | None = getattr(self, key)
            if path is not None and not path.is_file():
                raise ConfigurationError.of(key, str(path), "there is no such file")
            if path is not None and self.certificate is None:
                raise ConfigurationError.of(key, str(path), "is for https: give --tls-cert, too")
        if self.certificate is not None:
            self._check_certificate(self.certificate)

    def _check_certificate(self, certificate: Path) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            context.load_cert_chain(certificate, self.private_key, password=_no_password)
            context.load_verify_locations(self.client_authorities or certificate)
        except OSError as error:
            remedy = f"cannot be used with its key and authorities: {error}"
            raise ConfigurationError.of("certificate", str(certificate), remedy) from error

    def bind(self) -> socket.socket:
        """The port, taken before anything slow is begun; nobody is answered yet. Raises ConfigurationError."""
        taken = socket.socket(socket.AF_INET6 if ":" in self.host else socket.AF_INET)
        try:
            taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            taken.bind((self.host, self.port))
        except OSError as error:
            taken.close()
            remedy = f"cannot be listened on: {error.strerror}"
            raise ConfigurationError.of("port", f"{self.host}:{self.port}", remedy) from error
        return taken


def _no_password() -> str:
    raise OSError("the key is encrypted; give one that is not")


def serve(served: Served, limits: Limits, listening: Listening, port: socket.socket, level: str = "info") -> None:
    """Answer requests at `port`, which `listening` has bound, until SIGTERM or SIGINT."""
    set_up_logging(level)
    app = make_app(served, limits, listening.keys, listening.origins)
    DrainingServer(configured(app, listening), app.state.desk, listening.drain_s).run([port])


def configured(app: FastAPI, listening: Listening) -> uvicorn.Config:
    """uvicorn's options."""
    return uvicorn.Config(
        app,
        host=listening.host,
        port=listening.port,
        backlog=BACKLOG,
        log_config=None,
        access_log=False,
        lifespan="on",
        timeout_graceful_shutdown=5,
        http=BoundedProtocol,
        ssl_certfile=listening.certificate,
        ssl_keyfile=listening.private_key,
        ssl_ca_certs=str(listening.client_authorities) if listening.client_authorities else None,
        ssl_cert_reqs=ssl.CERT_REQUIRED if listening.client_authorities else ssl.CERT_NONE,
    )


class DrainingServer(uvicorn.Server):
    """At the first signal it takes no more calls, and ends when those accepted have been answered; at the second, now.

    While it drains it goes on listening: /health says so to load balancers, and new calls are told to go elsewhere.
    """

    def __init__(self, config: uvicorn.Config, desk: Desk, drain_s: float) -> None:
        super().__init__(config)
        self.desk, self.drain_s = desk, drain_s
        self._end_s = float("inf")

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.desk.draining:
            self._end_s = 0.0
            return
        self.desk.draining = True
        self._end_s = time.monotonic() + self.drain_s
        fields = {"signal": signal.Signals(sig).name, "calls": self.desk.calls}
        log.info("draining", extra={"fields": fields})

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        taken = sockets[0].getsockname() if sockets else (self.config.host, self.config.port)
        host = f"[{taken[0]}]" if ":" in taken[0] else taken[0]
        url = f"{'https' if self.config.is_ssl else 'http'}://{host}:{taken[1]}"
        log.info("serving", extra={"fields": {"url": url, "dashboard": f"{url}/dashboard"}})

    async def on_tick(self, counter: int) -> bool:
        if self.desk.draining:
            if time.monotonic() > self._end_s:
                self.desk.fail_all(Refusal(503, "the server was shut down before the answer was complete", "shut_down"))
                await asyncio.sleep(0)
            self.should_exit = self.should_exit or not self.desk.calls
        return await super().on_tick(counter)


def set_up_logging(level: str) -> None:
    """JSON lines on stderr, uvicorn's among them."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    for name in ("soloist", "uvicorn"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level.upper())
