"""Ranks that mpirun starts, for tests: the MPICH that `pip install soloist[test]` brings."""

from __future__ import annotations

import os
import random
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

MPIRUN = Path(sys.executable).parent / "mpirun"
needs_mpirun = pytest.mark.skipif(not MPIRUN.exists(), reason="needs the mpirun of the wheel mpich")


def mpirun(ranks: int, *command: str, timeout_s: float = 280.0, **environment: str) -> subprocess.CompletedProcess[str]:
    """`python *command` on so many ranks of this machine."""
    given = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_PORT": str(free_port()), **environment}
    started = [str(MPIRUN), "-n", str(ranks), sys.executable, *command]
    return subprocess.run(started, capture_output=True, text=True, timeout=timeout_s, env=given, check=False)


def free_port() -> int:
    """One that is free and stays so: the kernel gives ports of this range to those alone who ask for them."""
    while True:
        port = random.SystemRandom().randrange(10_000, 32_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
