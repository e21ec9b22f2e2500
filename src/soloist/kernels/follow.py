"""Programmatic dependent launch: a kernel comes to the SMs while the one ahead of it in the stream still works.

On Hopper and later (CUDA Programming Guide, "Programmatic Dependent Launch and Synchronization"). A kernel launched
with the options of `early` may start once all programs of the one ahead have called `release_next` or ended, and calls
`await_previous` before it touches anything that an earlier kernel reads or writes. The weights of a norm, which no
kernel writes, are read before. So the stream's order holds, and decode does not pay for the start of each of its many
small kernels.

Kernels whose programs are cut to fill the SMs evenly (grouped GEMM, attention) do not come early: their programs could
go where the one ahead leaves room first, two to an SM beside an empty one. That is a supposition; with grouped GEMMs
that came early layers were up to a third slower (docs/exchange.md). They release the next one all the same.

A kernel that waits for peers releases the next one only after that: programs that wait could otherwise take the place
that another stream needs to send what the peers wait for.
"""

from __future__ import annotations

import torch

from soloist.kernels.device import generation
from soloist.kernels.language import AVAILABLE, INTERPRETED, tl, triton


def early(device: torch.device) -> dict[str, bool]:
    """Options for the launch of a kernel that calls `await_previous`."""
    return {"launch_pdl": True} if generation(device) >= 9 else {}


if AVAILABLE:
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
    from triton.language.target_info import cuda_capability_geq

COMPILED = tl.constexpr(not INTERPRETED)  # the interpreter runs one kernel after the other


@triton.jit
def await_previous():
    """Returns when all earlier kernels of the stream have ended and what they wrote is seen."""
    if COMPILED and cuda_capability_geq(9, 0):
        gdc_wait()


@triton.jit
def release_next():
    """Lets the next kernel come to the SMs as soon as every program has called this or ended."""
    if COMPILED and cuda_capability_geq(9, 0):
        gdc_launch_dependents()


@triton.jit
def follow():
    """Both, for a kernel that waits for nobody else."""
    release_next()
    await_previous()
