"""The choice of a step's tokens on the sampler's rank, from logits or from what a graph has chosen.

All ranks of an attention group choose the same from equal logits, so that each knows the next inputs on its own device;
the leader's answer goes to the scheduler.

Shape legend: C tokens whose logits are wanted, or chunks that sample, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from soloist.engine.answers import Answer, StepAnswer
from soloist.engine.feedback import Feedback
from soloist.engine.graphs import StaticStep
from soloist.engine.history import History
from soloist.engine.host_copy import HostCopy
from soloist.engine.sampler import Drawn, ScoredPrompt, draw, score_prompt, takes_plain_choice
from soloist.models.step import to_device
from soloist.scheduling.request import StepBatch


@dataclass(frozen=True)
class Choice:
    """On the last stage. `check` raises where a kernel gave up on a peer; `deadline_s` bounds waits for the device."""

    feedback: Feedback
    history: History
    device: torch.device
    is_heard: bool  # this rank's answer goes to the scheduler
    check: Callable[[], None]
    deadline_s: float

    def of_logits(self, batch: StepBatch, logits_CV: Tensor, places: np.ndarray) -> Answer | None:
        """Logits rows stand in the order of the chunks: all of a chunk that scores its prompt, else its last."""
        lengths = [len(c.tokens) if c.scores_prompt else int(c.samples) for c in batch.chunks]
        ends, sampling = np.cumsum(lengths), [row for row, c in enumerate(batch.chunks) if c.samples]
        (rows_C,) = to_device([ends[sampling] - 1 if sampling else np.zeros(0)], self.device)
        drawn = draw(logits_CV[rows_C.long()].float(), [batch.chunks[row] for row in sampling], self.history)
        self.feedback.store(drawn.token_C, places[sampling])
        scored = {
            chunk.sequence: score_prompt(logits_CV[end - length : end].float(), chunk)
            for chunk, end, length in zip(batch.chunks, ends.tolist(), lengths, strict=True)
            if chunk.scores_prompt
        }
        return self._given(batch, [drawn], scored)

    def of_graph(self, batch: StepBatch, static: StaticStep, places: np.ndarray) -> Answer | None:
        """The graph has chosen for every row; those with filters, penalties or log probabilities choose again."""
        chunks = batch.chunks
        special = [row for row, c in enumerate(chunks) if c.samples and c.params and not takes_plain_choice(c)]
        drawn = [Drawn(static.chosen[0], chunks, (), HostCopy([*static.chosen[:, : len(chunks)]]))]
        if special:
            (rows_C,) = to_device([np.array(special)], self.device)
            rows_C = rows_C.long()
            drawn.append(draw(static.out[rows_C].float(), [chunks[row] for row in special], self.history))
            self.feedback.store(drawn[1].token_C, places[special])
        scored = {
            chunk.sequence: score_prompt(static.out[row : row + 1].float(), chunk)
            for row, chunk in enumerate(chunks)
            if chunk.scores_prompt
        }
        return self._given(batch, drawn, scored)

    def _given(self, batch: StepBatch, drawn: list[Drawn], scored: dict[int, ScoredPrompt]) -> Answer | None:
        return StepAnswer(batch.chunks, drawn, scored, self.check, self.deadline_s) if self.is_heard else None
