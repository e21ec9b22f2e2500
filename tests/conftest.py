"""Fixtures that every part's tests share."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available():  # read when Triton is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

from tests.ranks import RankPool  # noqa: E402

DEVICES_NEEDED = {"gpu": 1, "multigpu": 2}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests for GPUs are skipped where there are too few."""
    found = torch.cuda.device_count()
    for item in items:
        for marker, needed in DEVICES_NEEDED.items():
            if item.get_closest_marker(marker) and found < needed:
                item.add_marker(pytest.mark.skip(reason=f"needs {needed} CUDA devices, found {found}"))


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """Ranks for tests, as threads or as processes: see tests/ranks.py."""
    pool = RankPool()
    yield pool
    pool.close()
