"""Ranks that somebody else started, one of which vanishes while all are idle: the others end and name it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.mpirun import free_port

DEADLINE_S = 5
SCRIPT = f"""
import os, sys
sys.path[:0] = [{str(Path(__file__).parent)!r}]
from test_launch import SPEC, FakeExecutor, FrontEnd, job
from soloist.engine.launch import launch
wanted = job("ep2", deadline_s={DEADLINE_S})
ranks = launch(wanted, FakeExecutor)                       # rank 1 serves in here
front = FrontEnd(wanted.layout, SPEC.vocab, ranks.hub, {DEADLINE_S}, ranks.ended)
front.wait_ready(200, lambda ranks: None)
print("ready", flush=True)
while not front.failure:
    front.pump()
print("failed:", front.failure, flush=True)
os._exit(1)
"""


def start(rank: int, port: int) -> subprocess.Popen[str]:
    world = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    environment = os.environ | {key: str(value) for key, value in world.items()} | {"MASTER_ADDR": "127.0.0.1"}
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("culprit", [0, 1])
def test_a_rank_that_falls_silent_while_all_are_idle(culprit):
    port = free_port()
    ranks = [start(rank, port) for rank in range(2)]
    try:
        assert ranks[0].stdout.readline() == "ready\n"
        ranks[culprit].send_signal(signal.SIGSTOP)  # as if its node had vanished: no connection breaks
        output, errors = ranks[1 - culprit].communicate(timeout=100)
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    assert ranks[1 - culprit].returncode == 1
    if culprit:
        assert f"failed: rank 1 has not been heard of for {DEADLINE_S} s" in output
    else:
        assert f"rank 1: rank 0: its store has not answered for {DEADLINE_S} s" in errors
