"""Imported once by the process that ranks are forked from. Imports only.

Were a torch operation to run on several threads here, every forked rank that computes on several would hang.
"""

import os
import signal

# Ctrl-C during the imports: end as the parent does, without a traceback. Afterwards the parent ends its ranks in order.
signal.signal(signal.SIGINT, lambda number, frame: os._exit(128 + number))

# OpenMP threads that spin while they wait slow a busy machine down tenfold; read when torch loads the library.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch  # noqa: E402

import soloist.engine.rank  # noqa: E402, F401

torch.set_num_threads(1)
