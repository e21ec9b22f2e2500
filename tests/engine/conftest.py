"""Fakes beside the tests can be imported, by forked ranks too."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def threads_end() -> Iterator[None]:
    """One that is still inside a store when the interpreter ends would abort the process."""
    before = set(threading.enumerate())
    yield
    for thread in set(threading.enumerate()) - before:
        thread.join(30)
