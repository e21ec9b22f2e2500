"""Imported once by the process that ranks are forked from. Imports only.

Were a torch operation to run on several threads here, every forked rank that computes on several would hang.
"""

import os

# OpenMP threads that spin while they wait slow a busy machine down tenfold; read when torch loads the library.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch  # noqa: E402

import soloist.engine.rank  # noqa: E402, F401

torch.set_num_threads(1)
