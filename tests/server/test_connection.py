"""What comes before a request is known is bounded, and an answer under way is not cut for it."""

from __future__ import annotations

import json
import socket
import time
from contextlib import suppress

import pytest

from soloist.server import connection
from tests.server.live import live

HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: here\r\n"
QUICK_S, NEVER_S = 0.2, 600.0


def connected(server) -> socket.socket:
    return socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])), timeout=30)


def rest(client: socket.socket) -> bytes:
    """All that comes until the server closes the connection."""
    found = b""
    try:
        while data := client.recv(65536):
            found += data
    except ConnectionError:
        pass  # it was closed before all that was sent had been read
    return found


@pytest.mark.parametrize("begun", [b"", b"POST", HEAD])
def test_a_head_that_does_not_come_ends_the_connection(fake, monkeypatch, begun):
    monkeypatch.setattr(connection, "HEAD_S", QUICK_S)
    with live(fake.served) as server, connected(server) as client:
        client.sendall(begun)
        assert rest(client) == b""


def test_a_head_without_end_is_refused(fake, monkeypatch):
    monkeypatch.setattr(connection, "HEAD_S", NEVER_S)
    with live(fake.served) as server, connected(server) as client:
        with suppress(ConnectionError):  # it may be closed before all has been sent
            client.sendall(HEAD + b"".join(b"X-%d: %s\r\n" % (number, b"a" * 1000) for number in range(100)))
        answer = rest(client)  # nothing where the connection was reset before it could be read
        assert not answer or b"larger than 65536 bytes" in answer
    with live(fake.served) as server, connected(server) as client:
        client.sendall(HEAD + b"X: %s\r\nConnection: close\r\nContent-Length: 2\r\n\r\n{}" % (b"a" * 10_000))
        assert b"model: is missing" in rest(client)


def test_an_answer_is_not_cut_for_what_follows_its_request(fake, monkeypatch):
    monkeypatch.setattr(connection, "HEAD_S", NEVER_S)
    body = json.dumps({"model": "fake", "prompt": [1], "max_tokens": 5, "stream": True}).encode()
    fake.paused = True
    with live(fake.served) as server, connected(server) as client:
        client.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        server.wait(lambda: server.desk.calls)
        monkeypatch.setattr(connection, "HEAD_S", QUICK_S)  # from here on: the request itself had all the time it took
        client.sendall(b"\r\n")
        time.sleep(3 * QUICK_S)
        fake.paused = False
        assert b"data: [DONE]" in rest(client)
