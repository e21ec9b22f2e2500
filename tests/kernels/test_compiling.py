"""Triton's compiler takes every kernel that the package launches."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from soloist.kernels.language import AVAILABLE

ROOT = Path(__file__).parents[2]
LAUNCH = re.compile(r"(\w+_kernel)\[")


@pytest.mark.skipif(not AVAILABLE, reason="needs Triton")
def test_every_kernel_that_is_launched_compiles(tmp_path: Path) -> None:
    sources = [path.read_text() for path in (ROOT / "src" / "soloist").rglob("*.py")]
    launched = {name for source in sources for name in LAUNCH.findall(source)}
    assert len(launched) > 15
    command = [sys.executable, "-O", "-m", "tests.kernels.compiling"]
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=580)
    assert run.returncode == 0, run.stderr[-4000:]
    assert set(run.stdout.split()) == launched
