"""The paged KV cache of one rank: how many blocks there are, and the tensors that hold them."""

from __future__ import annotations

import torch

from soloist.engine.host import host_bytes
from soloist.engine.options import EngineOptions
from soloist.errors import CapacityError
from soloist.models.attention import Heads, LayerCache
from soloist.specs.model import ModelSpec

CPU_TOKENS = 32_768  # of a CPU rank where nothing else is asked for


def blocks_that_fit(
    spec: ModelSpec, heads: list[Heads], options: EngineOptions, device: torch.device, itemsize: int
) -> int:
    """KV blocks of this rank's layers, one `Heads` each: as asked for, or what `gpu_memory_fraction` leaves.

    Raises CapacityError where not even one block fits, or fewer than were asked for.
    """
    size = options.block_size
    per_block = sum(LayerCache.bytes_per_token(spec, h, itemsize) for h in heads) * size
    if options.kv_tokens is not None:
        blocks = max(1, -(-options.kv_tokens // size))
        there = torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else host_bytes()
        if blocks * per_block > there:
            raise CapacityError(
                f"kv_tokens = {options.kv_tokens}: they take {blocks * per_block / 1e9:,.0f} GB on a rank, "
                f"which has {there / 1e9:.0f} GB: ask for fewer"
            )
        return blocks
    longest = options.max_positions or spec.max_positions
    if device.type == "cpu":
        return max(1, min(CPU_TOKENS, longest * options.max_sequences) // size)
    free, total = torch.cuda.mem_get_info(device)
    blocks = int(free - (1 - options.gpu_memory_fraction) * total) // max(per_block, 1)
    if blocks < 1:
        raise CapacityError(
            f"gpu_memory_fraction = {options.gpu_memory_fraction}: {free / 1e9:.1f} of {total / 1e9:.1f} GB are free "
            f"after loading, which leaves no KV block of {per_block / 1e6:.1f} MB: use more GPUs or a larger fraction"
        )
    return min(blocks, longest * options.max_sequences // size)


def allocate(
    spec: ModelSpec, heads: list[Heads], blocks: int, block_size: int, device: torch.device, dtype: torch.dtype
) -> list[LayerCache]:
    """One cache a layer, all of `blocks` blocks."""
    return [LayerCache.allocate(spec, h, blocks * block_size, device, dtype) for h in heads]
