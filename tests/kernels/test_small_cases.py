"""Every kernel compiled on a GPU; under a memory checker see small_cases.py."""

from __future__ import annotations

import pytest

from tests.kernels.small_cases import CASES


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
def test_as_defined(case: str) -> None:
    CASES[case]()
