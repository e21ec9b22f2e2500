"""A small storm (tests/server/storm.py) over the shipped model."""

from __future__ import annotations

import asyncio

import pytest

from soloist.engine.llm import LLM
from tests.server.live import NOVELS, live
from tests.server.storm import check, storm, wishes


@pytest.mark.slow
def test_a_storm_loses_nothing(novels):
    plan = wishes(requests=150, malformed=60, distinct=40, seed=1)
    with live(novels) as server:
        report = asyncio.run(storm(server.url, plan))
        with LLM(NOVELS, device="cpu", show_progress=False) as reference:
            found = check(server, report, plan, reference)
    assert found["compared"] > 100
