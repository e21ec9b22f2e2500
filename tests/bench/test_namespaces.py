"""Nodes as network namespaces: they reach each other, at the rate asked for, and leave nothing behind."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from soloist.bench.namespaces import Counters, Network
from soloist.errors import ConfigurationError

needs_root = pytest.mark.skipif(os.geteuid() != 0 or shutil.which("ip") is None, reason="needs root and iproute2")

LISTEN = """
import socket
with socket.create_server(("", 7000)) as server:
    print("up", flush=True)
    connection = server.accept()[0]
    while connection.recv(65536):
        pass
"""
SEND = "import socket, sys; s = socket.create_connection((sys.argv[1], 7000)); s.sendall(bytes(int(sys.argv[2])))"


@pytest.fixture
def network():
    try:
        with Network(2, mbit=80) as found:
            yield found
    except ConfigurationError as error:
        pytest.skip(f"this machine cannot make namespaces: {error}")


@needs_root
def test_payload_is_counted_at_the_rate_of_the_link(network: Network) -> None:
    first, second = network.nodes
    size = 2_000_000
    with subprocess.Popen(second.command([sys.executable, "-c", LISTEN]), stdout=subprocess.PIPE) as listener:
        assert listener.stdout is not None
        listener.stdout.readline()
        before, start = network.counters(), time.monotonic()
        subprocess.run(first.command([sys.executable, "-c", SEND, second.address, str(size)]), check=True)
        listener.wait(200)
        seconds = time.monotonic() - start
    sent, answered = (now.since(then) for now, then in zip(network.counters(), before, strict=True))
    assert abs(sent.payload - size) < 0.01 * size
    assert answered.payload < 0.01 * size  # acknowledgements
    assert seconds > 0.8 * size / 10e6  # 80 Mbit/s are 10 MB/s


def left() -> str:
    return subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout


@needs_root
def test_nothing_is_left_behind() -> None:
    try:
        with Network(2) as network:
            sleeper = subprocess.Popen(network.nodes[0].command(["sleep", "600"]))
    except ConfigurationError as error:
        pytest.skip(f"this machine cannot make namespaces: {error}")
    assert sleeper.wait(200) != 0
    assert not [node for node in network.nodes if node.name in left()]


HOLD = """
import time
from soloist.bench.namespaces import Network
with Network(2) as network:
    print(network.prefix, flush=True)
    time.sleep(600)
"""


@needs_root
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 128 + signal.SIGTERM), (signal.SIGINT, -signal.SIGINT)])
def test_a_signal_leaves_nothing_behind(network: Network, number: signal.Signals, code: int) -> None:
    """`network` stands for: this machine can make namespaces."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as holder:
        assert holder.stdout is not None
        prefix = holder.stdout.readline().strip()
        assert f"{prefix}-switch" in left()
        holder.send_signal(number)
        assert holder.wait(200) == code
    assert prefix not in left()


def test_without_root_the_error_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(ConfigurationError, match="only root"):
        Network(2)


def test_payload_leaves_headers_out() -> None:
    assert Counters(1000 + 66 * 10, 10).since(Counters(66, 1)).payload == 1000


MEET = """
import sys, torch
from datetime import timedelta
from torch.distributed import TCPStore
from soloist.transport.connect import connect
rank, head, own = int(sys.argv[1]), sys.argv[2], sys.argv[3]
store = TCPStore(head, 7001, 2, rank == 0, timedelta(seconds=200))
transport = connect("gloo", rank, 2, store, "cpu", 200, own)
print(transport.all_reduce(torch.ones(1)).item())
"""


@needs_root
def test_gloo_ranks_of_two_namespaces_meet(network: Network) -> None:
    """gloo would take the address that the host's name resolves to, which here leads nowhere."""
    head = network.nodes[0].address
    ranks = [
        subprocess.Popen(
            node.command([sys.executable, "-c", MEET, str(rank), head, node.address]), stdout=subprocess.PIPE
        )
        for rank, node in enumerate(network.nodes)
    ]
    assert [rank.communicate(timeout=400)[0].strip() for rank in ranks] == [b"2.0", b"2.0"]
