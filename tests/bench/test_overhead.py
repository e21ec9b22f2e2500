"""The server's cost beside the ranks' own time: what is compared, and over which window."""

from __future__ import annotations

import pytest

from soloist.bench.overhead import measure, steady_tpot_s
from soloist.engine.options import EngineOptions
from soloist.errors import ConfigurationError
from tests.server.live import NOVELS


def test_the_window_is_that_in_which_all_decode():
    early, late = [0.0, 1.0, 2.0, 3.0, 4.0], [2.0, 2.5, 3.0, 9.0]
    assert steady_tpot_s([early, late]) == pytest.approx((1.0 + 0.5) / 2)  # from 2.0 to 4.0
    with pytest.raises(ConfigurationError, match="tokens = 2: the last of 2 sequences began 1.00 s after"):
        steady_tpot_s([[0.0, 1.0], [2.0, 3.0]])


def test_both_ways_give_every_token_its_time():
    # Two seconds of work, so that both streams are at it together even where one begins late.
    record = measure(str(NOVELS), "ep1", EngineOptions(device="cpu"), streams=2, prompt=8, tokens=400, runs=1)
    assert record["tpot_offline_s"] > 0
    assert record["tpot_http_s"] > 0
    assert record["overhead"] == pytest.approx(record["tpot_http_s"] / record["tpot_offline_s"] - 1)
