"""One-sided dispatch and combine in Triton's interpreter, against `ragged` over `local`. The ranks run in turn.

Shape legend: T tokens of a rank, D model width, K top-k, R rows, X expanded rows.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the kernels run in Triton's interpreter: pip install triton")

from soloist.dispatch.base import SlotChoice, Topology
from soloist.dispatch.lane import ExchangeShape, Lane, WindowPlan
from soloist.dispatch.one_sided import COPY, LATENCY, PUSH, Form, OneSidedDispatcher
from soloist.dispatch.ragged import RaggedDispatcher
from soloist.errors import CapacityError, CommunicationError
from soloist.kernels.language import INTERPRETED
from soloist.transport.symmetric import Watch, windows_in_process
from tests.ranks import run_threads
