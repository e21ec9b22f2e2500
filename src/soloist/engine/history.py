"""The tokens of every sequence on the device, for what depends on tokens that came before.

They lie as their keys and values do, one in each slot of the paged KV cache. So whoever shares, keeps or computes a
block again has its tokens with it: a prefix found in the cache, the prompt of `n` continuations, a sequence that was
preempted, tokens that a step scheduled ahead has chosen and the host does not know yet.

Shape legend: T tokens of a step, R sequences, M blocks of the longest of them, S slots of a block, L = M · S
positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from soloist.models.step import tables, to_device
from soloist.scheduling.request import Chunk


class History:
    """Of one rank that samples."""

    def __init__(self, blocks: int, block_size: int, device: torch.device) -> None:
        self._token_BS = torch.zeros(blocks, block_size, dtype=torch.int64, device=device)

    def write(self, slots_T: Tensor, ids_T: Tensor) -> None:
        """A step's tokens (int64) where their keys and values lie. May be captured."""
        self._token_BS.view(-1).index_copy_(0, slots_T, ids_T)

    def counts(self, chunks: Sequence[Chunk], vocab: int, with_prompt: bool) -> Tensor:
        """count_RV (fp32): how often each token stands in a chunk's sequence up to its end, or in its continuation."""
        firsts = np.array([0 if with_prompt else chunk.prompt for chunk in chunks])
        stops = np.array([chunk.stop for chunk in chunks])
        tables_RM, first_R, stop_R = to_device([tables(chunks), firsts, stops], self._token_BS.device)
        token_RL = self._token_BS[tables_RM.long()].flatten(1)
        position_L = torch.arange(token_RL.shape[1], device=token_RL.device)
        counts_RL = (position_L >= first_R[:, None]) & (position_L < stop_R[:, None])
        count_RV = torch.zeros(len(chunks), vocab, device=token_RL.device)
        return count_RV.scatter_add_(1, token_RL, counts_RL.float())
