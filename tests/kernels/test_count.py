"""The counters' kernel in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from soloist.kernels.language import AVAILABLE, INTERPRETED
from tests.kernels import small_cases


@pytest.mark.skipif(not (AVAILABLE and INTERPRETED), reason="needs Triton and TRITON_INTERPRET=1")
def test_choices_and_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(small_cases, "DEVICE", torch.device("cpu"))
    small_cases.counters()
