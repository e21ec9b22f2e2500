"""A step under way: what each attention group computes in it. G attention groups."""

from __future__ import annotations

import numpy as np

from soloist.scheduling.request import StepBatch
from soloist.simulator.cost import StepWork


class Flight:
    """The batches of one step. `batches` of sleeping groups lag behind: the arrays tell what has become of them."""

    def __init__(self, groups: int) -> None:
        self.batches: dict[int, StepBatch] = {}
        self.decodes = np.zeros(groups, np.int64)
        self.decode_context = np.zeros(groups, np.int64)
        self.prefills = np.zeros(groups, np.int64)
        self.prefill_context = np.zeros(groups, np.int64)
        self.rounds = np.zeros(groups, np.int64)  # that the batch of a sleeping group still takes unchanged
        self.start_s = self.end_s = 0.0

    def __bool__(self) -> bool:
        return bool(self.batches)

    def put(self, group: int, batch: StepBatch) -> None:
        """Take a group's new batch."""
        self.batches[group] = batch
        for chunk in batch.chunks:
            if len(chunk.tokens) == 1:
                self.decodes[group] += 1
                self.decode_context[group] += chunk.stop
            else:
                count = len(chunk.tokens)
                self.prefills[group] += count
                self.prefill_context[group] += count * (chunk.start + chunk.stop + 1) // 2

    def clear(self, group: int) -> None:
        """Forget what a group has in here."""
        self.batches.pop(group, None)
        for array in (self.decodes, self.decode_context, self.prefills, self.prefill_context, self.rounds):
            array[group] = 0

    def repeat(self) -> None:
        """One round: every decode goes on with the next token."""
        self.decode_context += self.decodes
        self.rounds -= 1

    def rounds_since(self, group: int) -> int:
        """Rounds that a sleeping group's batch has taken since it was scheduled."""
        chunks = self.batches[group].chunks
        return int(self.decode_context[group] - sum(chunk.stop for chunk in chunks)) // len(chunks)

    def work(self, alive: int, imbalance: float) -> StepWork:
        return StepWork(self.decodes, self.decode_context, self.prefills, self.prefill_context, alive, imbalance)
