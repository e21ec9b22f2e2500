"""Promises to clients, and how many may wait."""

from __future__ import annotations

import pytest

from soloist.errors import ConfigurationError
from soloist.server.slo import Slo, admitted
from tests.engine.test_planned import plan


def test_both_limits_hold_or_it_is_not_met():
    slo = Slo.parse("ttft=500ms,tpot=20ms")
    assert slo == Slo(0.5, 0.02)
    assert slo.is_met(0.5, 0.02)
    assert not slo.is_met(0.6, 0.01)
    assert not slo.is_met(0.1, 0.03)
    assert Slo().is_met(100.0, 100.0)


@pytest.mark.parametrize("text", ["tput=1", "rate=5", "ttft", "ttft=soon"])
def test_what_is_no_slo(text):
    with pytest.raises(ConfigurationError):
        Slo.parse(text)


def test_as_many_wait_as_the_planned_prefill_takes_in_time():
    made = plan()
    most = admitted(made, Slo.of(made.load))
    last_s = most * 50 / made.predicted["prefill"].value  # half of the prompt is found in the cache
    assert 1.9 < last_s <= 2.0
    assert admitted(made, Slo(tpot_s=10.0)) is None


def test_a_promise_that_the_plan_does_not_keep():
    with pytest.raises(ConfigurationError, match=r"slo.tpot = '0.001 ms': the plan predicts .* with 10.5 sequences"):
        admitted(plan(), Slo(tpot_s=1e-6))
