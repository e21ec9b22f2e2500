"""What the launches of kernels have to know of a GPU, asked for once: the question costs more than a launch should."""

from __future__ import annotations

from functools import cache

import torch


@cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; 1 of anything else, where the interpreter runs programs one by one."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@cache
def generation(device: torch.device) -> int:
    """Major compute capability, 9 for Hopper; 0 of what is no CUDA device."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0
