"""A connection from every rank that somebody else started to rank 0: it breaks where a process ends without a word.

Transports notice a broken connection to whom they exchange something with. A leader that waits for the answer of a
later stage of the pipeline exchanges nothing with it, and nobody does who rests: without a lifeline the loss of a
killed process would be found when the deadline is over. A host that vanishes breaks no connection: see the pulse.

A rank says its number and, before it ends in order or with an error that the front end has been told, `BYE`.
"""

from __future__ import annotations

import re
import selectors
import socket
import threading
from collections.abc import Callable
from typing import cast

from soloist.engine.meeting import Meeting
from soloist.errors import ClusterError

NAME = "lifelines"  # under which rank 0's address is announced
BYE = b"bye"
LOST = "has ended without a word"
MOST_BYTES = 64  # that a rank has to say
CONNECT_S = 30.0


class Lifelines:
    """Rank 0's ends. `on_loss` is called in a thread with each rank that is lost, and how."""

    def __init__(self, meeting: Meeting, on_loss: Callable[[int, str], None]) -> None:
        self._size, self._on_loss = meeting.place.size, on_loss
        self._listener = socket.create_server((meeting.host, 0), backlog=max(128, self._size))
        host, port = self._listener.getsockname()
        meeting.announce(NAME, f"{host}:{port}")
        self._said: dict[socket.socket, bytes] = {}
        self._own, end = socket.socketpair()  # closed on this side, it ends the thread
        self._thread = threading.Thread(target=self._watch, args=(end,), name="lifelines", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Whoever ends from now on is not missed. Idempotent."""
        self._own.close()

    def _watch(self, end: socket.socket) -> None:
        with selectors.DefaultSelector() as selector, self._listener, end:
            selector.register(self._listener, selectors.EVENT_READ)
            selector.register(end, selectors.EVENT_READ)
            while end not in (ready := [cast(socket.socket, key.fileobj) for key, _ in selector.select()]):
                for line in ready:
                    if line is self._listener:
                        line, _ = self._listener.accept()
                        self._said[line] = b""
                        selector.register(line, selectors.EVENT_READ)
                    elif not self._hear(line):
                        selector.unregister(line)
                        self._part(line)
        for line in self._said:
            line.close()

    def _hear(self, line: socket.socket) -> bool:
        """Whether a line still holds."""
        try:
            data = line.recv(MOST_BYTES)
        except OSError:
            return False
        self._said[line] += data
        return bool(data) and len(self._said[line]) <= MOST_BYTES

    def _part(self, line: socket.socket) -> None:
        """A line that broke: its rank is lost unless it has taken its leave. Strangers are not missed."""
        line.close()
        named = re.fullmatch(rb"(\d+)\n", self._said.pop(line))
        if named and 0 < (rank := int(named[1])) < self._size:
            self._on_loss(rank, LOST)


class Lifeline:
    """Another rank's end. Raises ClusterError where rank 0 cannot be reached."""

    def __init__(self, meeting: Meeting) -> None:
        rank, address = meeting.place.rank, meeting.find(NAME)
        host, port = address.rsplit(":", 1)
        try:
            self._line = socket.create_connection((host, int(port)), CONNECT_S)
            self._line.sendall(b"%d\n" % rank)
        except OSError as error:
            raise ClusterError(f"rank {rank}: cannot reach rank 0 at {address}: {error}") from error

    def close(self) -> None:
        """Take leave: this rank ends in order, or has told the front end why it ends."""
        with self._line:
            try:
                self._line.sendall(BYE)
            except OSError:  # rank 0 is gone already
                return
