"""Records which experts the tokens of a rank chose (placement/trace.py is what becomes of it).

Shape legend: T tokens that this rank sends to experts in a step, K top-k, E experts.

Recording stays on the device and waits for nothing until somebody takes it. Counts need a fixed amount of memory, the
choices themselves grow with every token; they cannot be recorded inside a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from soloist.placement.recording import TOKEN_FIELDS, pack
from soloist.placement.trace import Array
from soloist.scheduling.request import StepBatch

Mode = Literal["counts", "ids"]


class RoutingRecorder:
    """One rank's record. `begin` says which tokens the next pass routes, `record` what they choose."""

    def __init__(self, mode: Mode, rank: int, layers: Sequence[int], experts: int, top_k: int) -> None:
        """`layers` are the MoE layers of this rank's stage, counted among all layers."""
        self.mode, self.rank, self.layers, self.experts, self.top_k = mode, rank, tuple(layers), experts, top_k
        self._forget()

    def begin(self, batch: StepBatch, span: tuple[int, int] | None) -> None:
        """`span`: the tokens of the step that this rank sends; None where another rank sends the same ones."""
        self._listens = span is not None
        if span is None:
            return
        tokens = _tokens(batch)[:, span[0] : span[1]]
        count = tokens.shape[1]
        self._tokens.append(np.vstack([tokens, np.full(count, self.rank), np.arange(count)]))

    def record(self, layer: int, expert_ids_TK: Tensor) -> None:
        """A layer's choices for the tokens that `begin` named."""
        if not self._listens:
            return
        if self.mode == "ids":
            self._ids[layer].append(expert_ids_TK.to(torch.int16))
            return
        chosen_TE = torch.zeros(len(expert_ids_TK), self.experts, device=expert_ids_TK.device)
        chosen_TE.scatter_(1, expert_ids_TK, 1.0)
        if layer not in self._together:
            self._together[layer] = torch.zeros(self.experts, self.experts, device=chosen_TE.device, dtype=torch.int64)
        self._together[layer] += (chosen_TE.T @ chosen_TE).long()

    def take(self) -> bytes:
        """What was recorded since the last call."""
        tokens = np.concatenate([np.zeros((len(TOKEN_FIELDS), 0), np.int64), *self._tokens], axis=1)
        arrays: dict[str, Array] = {"layers": np.array(self.layers, np.int64)}
        if self.mode == "ids":
            arrays |= dict(zip(TOKEN_FIELDS, tokens, strict=True))
            arrays["ids_LTK"] = self._stacked([self._choices(layer) for layer in self.layers], tokens.shape[1])
        else:
            none_EE = torch.zeros(self.experts, self.experts, dtype=torch.int64)
            pairs = [self._together.get(layer, none_EE).cpu().numpy() for layer in self.layers]
            arrays |= {"tokens": np.array(tokens.shape[1]), "together_LEE": np.array(pairs)}
        self._forget()
        return pack(arrays)

    def _choices(self, layer: int) -> Array:
        passes = self._ids[layer] or [torch.zeros(0, self.top_k, dtype=torch.int16)]
        return torch.cat(passes).cpu().numpy()

    def _stacked(self, choices: list[Array], tokens: int) -> Array:
        return np.stack(choices) if choices else np.zeros((0, tokens, self.top_k), np.int16)

    def _forget(self) -> None:
        self._listens = False
        self._tokens: list[Array] = []
        self._ids: dict[int, list[Tensor]] = {layer: [] for layer in self.layers}
        self._together: dict[int, Tensor] = {}


def _tokens(batch: StepBatch) -> Array:
    """Ids, sequences and positions of a step's tokens: the first three of TOKEN_FIELDS."""
    columns = [
        np.stack([c.tokens, np.full(len(c.tokens), c.sequence), np.arange(c.start, c.stop)]) for c in batch.chunks
    ]
    return np.concatenate([np.zeros((3, 0), np.int64), *columns], axis=1)
