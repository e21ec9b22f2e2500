"""Nodes as network namespaces of this machine: real TCP between them, at a rate that the kernel keeps.

    node 0 ── veth ──┐
    node 1 ── veth ──┤ switch (a namespace with a bridge): nothing of the host's own network is touched
    node 2 ── veth ──┘

Each node's link has a token bucket (`tc … tbf`) on both ends, so it sends and receives at the given rate, whatever the
other links do. A delay is added where the kernel has netem. Needs root and iproute2.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NamedTuple

from soloist.errors import ConfigurationError

HEADER_BYTES = 66  # of a packet: Ethernet 14, IPv4 20, TCP 20 and its timestamps 12
BURST_S = 0.004  # what a token bucket may save up: a tick of the kernel's clock
QUEUE_BYTES = 64 << 20  # before it: large enough that nothing is dropped, and so sent twice


class Counters(NamedTuple):
    """What left a node since its link exists. A packet that the kernel has not yet cut up counts as one."""

    bytes: int
    packets: int

    @property
    def payload(self) -> int:
        """Bytes without headers; acknowledgements carry none."""
        return self.bytes - HEADER_BYTES * self.packets

    def since(self, before: Counters) -> Counters:
        return Counters(self.bytes - before.bytes, self.packets - before.packets)


@dataclass(frozen=True)
class Node:
    """A namespace and its address, which is the same in every network: namespaces do not see each other's."""

    name: str
    address: str

    def command(self, words: Sequence[str]) -> list[str]:
        """The command that runs `words` in this node."""
        return ["ip", "netns", "exec", self.name, *words]


class Network:
    """`count` nodes on one switch, as a context: leaving it ends what still runs in them and removes them.

    SIGTERM and SIGHUP leave the context by SystemExit, as Ctrl-C does by KeyboardInterrupt.

    prefix: of the namespaces' names, for a process that joins the network of another one.
    mbit: rate of each node's link, each way; None: as fast as the machine copies. delay_ms: added to each packet.
    Raises ConfigurationError without root, without iproute2, or where the kernel lacks what is asked for.
    """

    def __init__(self, count: int, mbit: float | None = None, delay_ms: float = 0.0, prefix: str | None = None) -> None:
        if os.geteuid() != 0:
            raise ConfigurationError("network namespaces: only root may make them; run this with sudo")
        if missing := [tool for tool in ("ip", "tc") if shutil.which(tool) is None]:
            raise ConfigurationError(f"network namespaces: {' and '.join(missing)} not found; install iproute2")
        self.mbit, self.delay_ms, self.prefix = mbit, delay_ms, prefix or f"soloist-{os.getpid()}"
        self.switch = f"{self.prefix}-switch"
        self.nodes = [Node(f"{self.prefix}-{i}", f"10.0.0.{i + 1}") for i in range(count)]

    def __enter__(self) -> Network:
        with ExitStack() as leaving:
            leaving.enter_context(_heard(_leave, signal.SIGTERM, signal.SIGHUP))
            leaving.callback(self.close)
            self._add_namespace(self.switch)
            _run("ip", "-n", self.switch, "link", "add", "bridge", "type", "bridge")
            _run("ip", "-n", self.switch, "link", "set", "bridge", "up")
            for index, node in enumerate(self.nodes):
                self._add_node(index, node)
            self._leaving = leaving.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leaving.close()

    def close(self) -> None:
        """End the processes inside and remove the namespaces; no signal interrupts that. Idempotent."""
        with _heard(signal.SIG_IGN, signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            found = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=False).stdout
            existing = {line.split()[0] for line in found.splitlines() if line.strip()}
            for name in existing & {self.switch, *(node.name for node in self.nodes)}:
                inside = _run("ip", "netns", "pids", name).split()
                subprocess.run(["kill", "-9", *inside], capture_output=True, check=False) if inside else None
                _run("ip", "netns", "del", name)

    def counters(self) -> list[Counters]:
        """What each node has sent so far, counted at the switch."""
        links = {link["ifname"]: link for link in json.loads(_run("ip", "-n", self.switch, "-j", "-s", "link", "show"))}
        sent = (links[_port(index)]["stats64"]["rx"] for index in range(len(self.nodes)))
        return [Counters(found["bytes"], found["packets"]) for found in sent]

    # -- making them ------------------------------------------------------------------------------------------------
    def _add_namespace(self, name: str) -> None:
        _run("ip", "netns", "add", name)
        # Else the kernel's own IPv6 messages would be counted.
        _run("ip", "netns", "exec", name, "sh", "-c", "echo 1 > /proc/sys/net/ipv6/conf/all/disable_ipv6 || true")
        _run("ip", "netns", "exec", name, "sh", "-c", "echo 1 > /proc/sys/net/ipv6/conf/default/disable_ipv6 || true")
        _run("ip", "-n", name, "link", "set", "lo", "up")

    def _add_node(self, index: int, node: Node) -> None:
        port = _port(index)
        self._add_namespace(node.name)
        _run("ip", "-n", self.switch, "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", node.name)
        _run("ip", "-n", self.switch, "link", "set", port, "master", "bridge", "up")
        _run("ip", "-n", node.name, "addr", "add", f"{node.address}/24", "dev", "eth0")
        _run("ip", "-n", node.name, "link", "set", "eth0", "up")
        self._limit(node.name, "eth0")
        self._limit(self.switch, port)
        if self.delay_ms:
            parent = ["parent", "1:1"] if self.mbit else ["root"]
            _run("tc", "-n", node.name, "qdisc", "add", "dev", "eth0", *parent, "netem", "delay", f"{self.delay_ms}ms")

    def _limit(self, namespace: str, device: str) -> None:
        if self.mbit:
            burst = max(32 << 10, int(self.mbit * 1e6 / 8 * BURST_S))
            bucket = ["tbf", "rate", f"{self.mbit}mbit", "burst", f"{burst}b", "limit", f"{QUEUE_BYTES}b"]
            _run("tc", "-n", namespace, "qdisc", "add", "dev", device, "root", "handle", "1:", *bucket)


def _port(index: int) -> str:
    return f"port{index}"


@contextmanager
def _heard(listener: Any, *numbers: signal.Signals) -> Iterator[None]:
    """These signals go to `listener` within; in a thread other than the main one they stay as they are."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, listener) for number in numbers}
    try:
        yield
    finally:
        for number, listened in before.items():
            signal.signal(number, listened)


def _leave(number: int, _: object) -> None:
    sys.exit(128 + number)


def _run(*words: str) -> str:
    """The output of a command. Raises ConfigurationError with what it complained of."""
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ConfigurationError(f"network namespaces: `{' '.join(words)}` failed: {done.stderr.strip()}")
    return done.stdout
