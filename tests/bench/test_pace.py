"""Over which window the time between tokens is taken."""

from __future__ import annotations

import pytest

from soloist.bench.pace import steady_tpot_s
from soloist.errors import ConfigurationError


def test_the_window_is_that_in_which_all_decode():
    early, late = [0.0, 1.0, 2.0, 3.0, 4.0], [2.0, 2.5, 3.0, 9.0]
    assert steady_tpot_s([early, late]) == pytest.approx((1.0 + 0.5) / 2)  # from 2.0 to 4.0
    with pytest.raises(ConfigurationError, match="tokens = 2: the last of 2 sequences began 1.00 s after"):
        steady_tpot_s([[0.0, 1.0], [2.0, 3.0]])
