"""The server's cost beside the ranks' own time: what is compared."""

from __future__ import annotations

import pytest

from soloist.bench.overhead import measure
from soloist.engine.options import EngineOptions
from tests.server.live import NOVELS


def test_both_ways_give_every_token_its_time():
    # Two seconds of work, so that both streams are at it together even where one begins late.
    record = measure(str(NOVELS), "ep1", EngineOptions(device="cpu"), streams=2, prompt=8, tokens=400, runs=1)
    assert record["tpot_offline_s"] > 0
    assert record["tpot_http_s"] > 0
    assert record["overhead"] == pytest.approx(record["tpot_http_s"] / record["tpot_offline_s"] - 1)
