"""A hub that many ranks talk to, and their spokes: ZeroMQ ROUTER and DEALER with typed msgpack messages.

A socket belongs to one thread. Sending never blocks; receiving is bounded by the caller.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Generic, TypeVar

import msgspec
import zmq

from soloist.errors import ClusterError
from soloist.frontend.wire import Message

Incoming = TypeVar("Incoming", bound=Message)
LINGER_MS = 2000  # for the last words of a rank that failed


class Hub(Generic[Incoming]):
    """The side that binds. `address` is what the spokes connect to."""

    def __init__(self, address: str, incoming: Any) -> None:
        """`address` as ZeroMQ writes it; `tcp://HOST:*` takes any free port. Raises ClusterError where it is taken."""
        self.socket = zmq.Context.instance().socket(zmq.ROUTER)
        self.socket.setsockopt(zmq.LINGER, LINGER_MS)
        self.socket.setsockopt(zmq.SNDHWM, 0)
        self.socket.setsockopt(zmq.RCVHWM, 0)
        try:
            self.socket.bind(address)
        except zmq.ZMQError as error:
            self.socket.close(0)
            raise ClusterError(f"cannot listen on {address}: {error.strerror}") from error
        self.address = self.socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self._decoder = msgspec.msgpack.Decoder(incoming)

    def send(self, ranks: Iterable[int], message: Message) -> None:
        """To spokes that have sent something before; to others it is lost."""
        data = msgspec.msgpack.encode(message)
        for rank in ranks:
            self.socket.send_multipart((b"%d" % rank, data))

    def receive(self, timeout_s: float) -> tuple[int, Incoming] | None:
        """The next message and the rank that it came from, None if there is none in time."""
        if not self.socket.poll(int(timeout_s * 1000)):
            return None
        rank, data = self.socket.recv_multipart()
        return int(rank), self._decoder.decode(data)

    @property
    def closed(self) -> bool:
        return self.socket.closed

    def close(self) -> None:
        self.socket.close()


class Spoke(Generic[Incoming]):
    """The side of a rank. What is sent before the hub answers is kept."""

    def __init__(self, address: str, rank: int, incoming: Any) -> None:
        self.socket = zmq.Context.instance().socket(zmq.DEALER)
        self.socket.setsockopt(zmq.IDENTITY, b"%d" % rank)
        self.socket.setsockopt(zmq.LINGER, LINGER_MS)
        self.socket.setsockopt(zmq.SNDHWM, 0)
        self.socket.setsockopt(zmq.RCVHWM, 0)
        self.socket.connect(address)
        self._decoder = msgspec.msgpack.Decoder(incoming)

    def send(self, message: Message) -> None:
        self.socket.send(msgspec.msgpack.encode(message))

    def receive(self, timeout_s: float | None) -> Incoming | None:
        """The next message, None if there is none in time. With `None` it waits as long as it takes."""
        if not self.socket.poll(None if timeout_s is None else int(timeout_s * 1000)):
            return None
        return self._decoder.decode(self.socket.recv())

    def close(self) -> None:
        self.socket.close()


def let_last_words_out() -> None:
    """Close every socket of this process after what was sent has left, or after `LINGER_MS`."""
    zmq.Context.instance().destroy(LINGER_MS)
