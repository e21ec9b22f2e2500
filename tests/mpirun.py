"""Ranks that mpirun starts, for tests: the MPICH that `pip install soloist[test]` brings."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

MPIRUN = Path(sys.executable).parent / "mpirun"
needs_mpirun = pytest.mark.skipif(not MPIRUN.exists(), reason="needs the mpirun of the wheel mpich")


def mpirun(ranks: int, *command: str, timeout_s: float = 120.0, **environment: str) -> subprocess.CompletedProcess[str]:
    """`python *command` on so many ranks of this machine."""
    given = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_PORT": str(free_port()), **environment}
    started = [str(MPIRUN), "-n", str(ranks), sys.executable, *command]
    return subprocess.run(started, capture_output=True, text=True, timeout=timeout_s, env=given, check=False)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
