"""Chosen tokens stay on the device: the next step reads them there, long before the host does.

Shape legend: T tokens of a step, U those of them that the host does not know yet, C chunks that sample.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from soloist.models.step import to_device
from soloist.scheduling.request import UNKNOWN, StepBatch


class Feedback:
    """The tokens of the last steps, and where each sequence's lies among them."""

    def __init__(self, steps: int, rows: int, device: torch.device) -> None:
        """`steps`: batches under way at once, and one; `rows`: sequences of a batch."""
        self.rows = rows
        self.ids = torch.zeros(steps * rows + 1, dtype=torch.int64, device=device)
        self.nowhere = steps * rows  # where what nobody wants is written
        self._rows_of: list[dict[int, int]] = [{} for _ in range(steps)]  # by sequence, oldest step first
        self._turn = 0

    def begin(self, batch: StepBatch) -> np.ndarray:
        """Places for a batch's tokens, one for each chunk: `nowhere` where it does not sample. Call after `sources`."""
        first = self._turn * self.rows
        places = np.full(len(batch.chunks), self.nowhere)
        found: dict[int, int] = {}
        for row, chunk in enumerate(batch.chunks):
            if chunk.samples:
                places[row] = found[chunk.sequence] = first + row
        self._rows_of = [*self._rows_of[1:], found]
        self._turn = (self._turn + 1) % len(self._rows_of)
        return places

    def sources(self, batch: StepBatch) -> np.ndarray:
        """Where the token of each chunk lies whose only token is not known; -1 for the others."""
        return np.array([self._source(c.sequence) if c.tokens[0] == UNKNOWN else -1 for c in batch.chunks], np.int64)

    def _source(self, sequence: int) -> int:
        return next(rows[sequence] for rows in reversed(self._rows_of) if sequence in rows)

    def fill(self, ids_T: Tensor, batch: StepBatch, sources: np.ndarray) -> Tensor:
        """`ids_T` with the tokens that the host does not know."""
        starts = np.cumsum([0, *(len(c.tokens) for c in batch.chunks)])[:-1]
        is_unknown = sources >= 0
        if not is_unknown.any():
            return ids_T
        rows_U, sources_U = to_device([starts[is_unknown], sources[is_unknown]], ids_T.device)
        return ids_T.index_copy(0, rows_U.long(), self.ids[sources_U.long()])

    def store(self, token_C: Tensor, places_C: np.ndarray) -> None:
        """Tokens that were chosen outside of a captured step."""
        if len(places_C):
            (places,) = to_device([places_C], token_C.device)
            self.ids.index_copy_(0, places.long(), token_C)
