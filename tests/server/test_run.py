"""`soloist serve` as a process: its start, its log, and how it drains."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner, Result

from soloist import cli
from soloist.planner.plan import Plan
from tests.mpirun import free_port
from tests.server.live import NOVELS, http

MANY = 1000  # tokens: some seconds of work


def run(*arguments: str) -> Result:
    """A command in this process."""
    return CliRunner().invoke(cli.app, list(arguments))


class Process:
    """The command on a free port; its log is read when it has ended."""

    def __init__(self, *options: str) -> None:
        port = str(free_port())
        command = [sys.executable, "-m", "soloist", "serve", str(NOVELS), "--device", "cpu", "--port", port]
        self.process = subprocess.Popen([*command, *options], stderr=subprocess.PIPE, text=True)
        self.url = f"http://127.0.0.1:{port}"

    def wait(self) -> None:
        end = time.monotonic() + 280
        while time.monotonic() < end:
            try:
                assert http.get(f"{self.url}/health").status_code == 200
            except httpx.TransportError:
                assert self.process.poll() is None, self.process.stderr.read()
                time.sleep(0.1)
            else:
                return
        raise AssertionError("was not ready in time")


def parent(pid: str) -> int:
    """Of a process; 0 where there is none."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (FileNotFoundError, ProcessLookupError):
        return 0


def below(process: subprocess.Popen[str]) -> list[int]:
    """The processes that it has started, and theirs."""
    parents = {int(path.name): parent(path.name) for path in Path("/proc").glob("[0-9]*")}
    found = [process.pid]
    for pid in found:
        found += [child for child, above in parents.items() if above == pid]
    return found[1:]


@contextmanager
def halted(ranks: list[int]) -> Iterator[None]:
    """While all processes below a server stand still, nothing that it has accepted ends."""
    for pid in ranks:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in ranks:
            os.kill(pid, signal.SIGCONT)


@pytest.fixture
def process():
    started = []

    def start(*options: str) -> Process:
        started.append(Process(*options))
        return started[-1]

    yield start
    for one in started:
        one.process.kill()
        one.process.communicate()


def test_sigterm_lets_accepted_requests_finish(process):
    server = process("--drain", "500")
    server.wait()
    ranks = below(server.process)
    body = {"model": NOVELS.name, "prompt": "The old", "max_tokens": MANY, "ignore_eos": True, "stream": True}
    with http.stream("POST", f"{server.url}/v1/completions", json=body) as response:
        lines = (line for line in response.iter_lines() if line)
        found = [next(lines)]
        with halted(ranks):
            server.process.send_signal(signal.SIGTERM)
            while http.get(f"{server.url}/health").status_code == 200:
                time.sleep(0.01)
            refused = http.post(f"{server.url}/v1/completions", json=body)
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "shutting_down"
        found += lines
    assert found[-1] == "data: [DONE]"
    assert json.loads(found[-2][6:])["choices"][0]["finish_reason"] == "length"
    assert server.process.wait(200) == 0
    log = [json.loads(line) for line in server.process.stderr.read().splitlines()]
    assert any(line["event"] == "draining" and line["calls"] == 1 for line in log)
    assert any(line["event"] == "serving" and line["dashboard"] == f"{server.url}/dashboard" for line in log)
    (answered,) = [line for line in log if line.get("outcome") == "complete"]
    assert answered["tokens"] == MANY
    assert answered["request_id"]


def test_what_does_not_finish_in_time_ends_with_the_cause(process):
    server = process("--drain", "0.3")
    server.wait()
    body = {"model": NOVELS.name, "prompt": "The", "max_tokens": 2000, "ignore_eos": True, "stream": True}
    with http.stream("POST", f"{server.url}/v1/completions", json=body) as response:
        lines = (line for line in response.iter_lines() if line)
        next(lines)
        server.process.send_signal(signal.SIGTERM)
        *_, last = lines
    assert json.loads(last[6:])["error"]["code"] == "shut_down"
    assert server.process.wait(200) == 0


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--tls-cert", "/no/file"), "certificate = '/no/file'"),
        (("--tls-client-ca", __file__), "give --tls-cert"),
        (("--chat-template", "/no/file"), "chat_template = '/no/file'"),
        (("--layout", "ep0"), "layout"),
        (("--api-key", ""), "would let everybody in"),
    ],
)
def test_mistakes_are_told_in_a_line(options, reason):
    result = run("serve", str(NOVELS), "--device", "cpu", "--port", str(free_port()), *options)
    assert result.exit_code == 2
    assert reason in result.stderr


def test_a_port_that_is_taken_is_told_before_anything_is_loaded(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        command = ("serve", "no-model", "--random-weights", "1", "--port", str(port))
        result = run(*command)
        for key, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "1")):
            monkeypatch.setenv(key, value)
        second = run(*command)  # only rank 0 listens
    assert result.exit_code == second.exit_code == 2
    assert f"port = '127.0.0.1:{port}': cannot be listened on: Address already in use" in result.stderr
    assert "no-model" in second.stderr


def test_a_plan_says_how_to_serve(process, tmp_path):
    plan = tmp_path / "plan.json"
    load = ("--load", "prompt=100,output=50,ttft=2s")
    assert run("plan", str(NOVELS), "--gpus", "2", "--out", str(plan), *load).exit_code == 0
    server = process("--plan", str(plan))
    server.wait()
    details = http.get(f"{server.url}/details").json()
    assert details["layout"] == str(Plan.load_file(plan).layout)
    assert details["planned"]["tpot"]["unit"] == "ms"
    assert details["slo_s"] == {"ttft": 2.0, "tpot": None}
