"""What a rank's memory holds, by the parts of the planner's table: bytes of tensors, not of the process."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from soloist.engine.dispatchers import Dispatchers
from soloist.models.attention import LayerCache
from soloist.models.decoder import Decoder


def settle(device: torch.device) -> int:
    """Bytes allocated once everything that stays is there; peaks count from here. 0 on a CPU, which does not count."""
    if device.type != "cuda":
        return 0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def release(device: torch.device) -> None:
    """Give back what PyTorch keeps unused: graphs have a pool of their own, so that steps which ran to prepare them
    would hold their memory twice."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def device_bytes(device: torch.device) -> tuple[int, int]:
    """Of a GPU: used by whomever, and in all. (0, 0) on a CPU."""
    if device.type != "cuda":
        return 0, 0
    free, total = torch.cuda.mem_get_info(device)
    return total - free, total


def held(
    decoder: Decoder, caches: Sequence[LayerCache], dispatchers: Dispatchers, settled: int
) -> dict[str, int]:  # fmt: skip
    """Weights by part, KV cache, exchange buffers; on a GPU also the activations of the largest step so far and what
    PyTorch has reserved, which is all of these but the exchange's windows, and what it could not fill."""
    found = decoder.weight_parts()
    found["KV cache"] = sum(cache.nbytes for cache in caches)
    found["exchange buffers"] = dispatchers.nbytes
    if dispatchers.device.type == "cuda":
        found["activations"] = torch.cuda.max_memory_allocated(dispatchers.device) - settled
        found["reserved"] = torch.cuda.memory_reserved(dispatchers.device)
    return found
