"""Where BLAS is known to add up a row alike, however many rows stand beside it: see kernels/linear.py."""

from __future__ import annotations

import os

import pytest
import torch

MEASURED = torch.backends.cpu.get_cpu_capability() == "AVX2" and "MKL_CBWR" not in os.environ
# Elsewhere the tests run, too, and what they find says something of the machine and not of a change.
where_measured = pytest.mark.xfail(not MEASURED, reason="BLAS was not measured on such a CPU", strict=False)
