"""Ranks that somebody else started, one of which vanishes while nothing tells of it: the others end and name it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.mpirun import free_port

DEADLINE_S, LONG_S = 10, 300  # they also meet within it
SCRIPT = f"""
import os, sys
sys.path[:0] = [{str(Path(__file__).parent)!r}]
from test_launch import LONG, SPEC, FakeExecutor, FrontEnd, job
from soloist.engine.launch import launch
layout, deadline_s = sys.argv[1], float(sys.argv[2])
wanted = job(layout, deadline_s=deadline_s)
ranks = launch(wanted, FakeExecutor)                       # ranks but 0 serve in here
front = FrontEnd(wanted.layout, SPEC.vocab, ranks.hub, deadline_s, ranks.ended)
front.wait_ready(200, lambda ranks: None)
print("ready", flush=True)
requests = [front.submit([1, 2, 3], LONG) for _ in range(int(sys.stdin.readline()))]
while not front.failure:
    front.pump()
print("failed:", front.failure, flush=True)
print([request.error for request in requests])
sys.stdout.flush()
os._exit(1)
"""


@contextmanager
def world(layout: str, size: int, deadline_s: float) -> Iterator[list[subprocess.Popen[str]]]:
    """Ranks that are ready. Rank 0 reads how many requests it is to hand in."""
    port = free_port()
    ranks = [start(rank, size, port, [layout, str(deadline_s)]) for rank in range(size)]
    try:
        assert ranks[0].stdout.readline() == "ready\n"
        yield ranks
    finally:
        for process in ranks:
            process.kill()
            process.wait()


def start(rank: int, size: int, port: int, words: list[str]) -> subprocess.Popen[str]:
    place = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
    environment = os.environ | {key: str(value) for key, value in place.items()} | {"MASTER_ADDR": "127.0.0.1"}
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT), *words]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    return subprocess.Popen(command, env=environment, text=True, **pipes)


@pytest.mark.parametrize("culprit", [0, 1])
def test_a_rank_that_falls_silent_while_all_are_idle(culprit):
    with world("ep2", 2, DEADLINE_S) as ranks:
        ranks[culprit].send_signal(signal.SIGSTOP)  # as if its node had vanished: no connection breaks
        output, errors = ranks[1 - culprit].communicate("0\n", timeout=100)
    assert ranks[1 - culprit].returncode == 1
    if culprit:
        assert f"failed: rank 1 has not been heard of for {DEADLINE_S} s" in output
    else:
        assert f"rank 1: rank 0: its store has not answered for {DEADLINE_S} s" in errors


def test_a_later_stage_that_is_killed_long_before_the_deadline():
    """No transport tells rank 0, which waits for the answer of the last stage."""
    with world("pp3", 3, LONG_S) as ranks:
        ranks[2].send_signal(signal.SIGSTOP)  # whatever it is asked for now is not answered
        ranks[0].stdin.write("2\n")
        ranks[0].stdin.flush()
        ranks[2].kill()
        output, _ = ranks[0].communicate(timeout=200)
    assert "failed: rank 2 has ended without a word" in output
    assert output.count("'rank 2 has ended without a word'") == 2
