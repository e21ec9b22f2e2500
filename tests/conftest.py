"""Fixtures that every part's tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.ranks import RankPool


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """Ranks for tests, as threads or as processes: see tests/ranks.py."""
    pool = RankPool()
    yield pool
    pool.close()
