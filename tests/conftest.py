"""Fixtures that every part's tests share."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported: two workers share the cores
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in engine/preload.py, for ranks that the tests fork first
os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1"  # whatever way leads out, servers of tests are here

import pytest
import torch

if not torch.cuda.is_available():  # read when Triton is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

from tests.ranks import RankPool  # noqa: E402

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's background job; the processes of tests inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)

WORKERS = 2
WORKER_BYTES = 5 << 30  # of memory: each has ranks of its own, up to 16 processes at once
if find_spec("hypothesis"):  # for tests on GPUs pytest and torch are enough
    from hypothesis import HealthCheck, settings

    # How long an example takes says how busy the machine is. By default the examples are the same in every run, so that
    # a run tells of the code and not of luck; `--hypothesis-profile search` looks for others.
    slow = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
    settings.register_profile("search", settings.default, derandomize=False, **slow)
    settings.register_profile("repeat", settings.default, derandomize=True, database=None, **slow)
    settings.load_profile("repeat")

DEVICES_NEEDED = {"gpu": 1, "multigpu": 2}


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """For `-n auto`. Where there are GPUs the tests come one by one: they measure, and fill the memory."""
    if torch.cuda.is_available():
        return 0
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(WORKERS, len(os.sched_getaffinity(0)), memory_bytes // WORKER_BYTES)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests for GPUs are skipped where there are too few."""
    found = torch.cuda.device_count()
    for item in items:
        for marker, needed in DEVICES_NEEDED.items():
            if item.get_closest_marker(marker) and found < needed:
                item.add_marker(pytest.mark.skip(reason=f"needs {needed} CUDA devices, found {found}"))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Numbers drawn without a generator do not depend on which tests came before in this process."""
    torch.manual_seed(0)


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A folder for sockets, whose addresses the kernel bounds to 107 characters; pytest's own has a longer name."""
    with tempfile.TemporaryDirectory(prefix="soloist-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """Ranks for tests, as threads or as processes: see tests/ranks.py."""
    pool = RankPool()
    yield pool
    pool.close()
