"""Imported once by the process that ranks are forked from. Imports only.

Were a torch operation to run on several threads here, every forked rank that computes on several would hang.
"""

import torch

import soloist.engine.rank  # noqa: F401

torch.set_num_threads(1)
