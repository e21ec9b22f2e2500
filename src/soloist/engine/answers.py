"""What a step chose, to be asked for when it is needed: the device may still be at it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from soloist.engine.sampler import Drawn, ScoredPrompt
from soloist.scheduling.request import Chunk, Sampled


class Answer(Protocol):
    """Of one step. `wait` is called once."""

    @property
    def is_here(self) -> bool:
        """`wait` would return at once."""
        ...

    def wait(self) -> list[Sampled]: ...


@dataclass
class StepAnswer:
    """One `Sampled` for each chunk that samples or scores its prompt, in their order."""

    chunks: Sequence[Chunk]
    drawn: Sequence[Drawn]  # each of some of the chunks
    scored: dict[int, ScoredPrompt]  # by sequence
    check: Callable[[], None]  # raises where a kernel gave up on a peer
    deadline_s: float
    _answers: dict[int, Sampled] = field(default_factory=dict)

    @property
    def is_here(self) -> bool:
        copies = [part.numbers for part in (*self.drawn, *self.scored.values())]
        return all(copy.is_here for copy in copies)

    def wait(self) -> list[Sampled]:
        """What was chosen, in order of the chunks. Waits `deadline_s` at most; raises what `check` raises."""
        chosen = {answer.sequence: answer for drawn in self.drawn for answer in drawn.sampled(self.deadline_s)}
        scored = {sequence: scores.logprobs(self.deadline_s) for sequence, scores in self.scored.items()}
        self.check()
        return [
            _with_prompt(chosen.get(chunk.sequence) or Sampled(chunk.sequence, None), scored.get(chunk.sequence, ()))
            for chunk in self.chunks
            if chunk.samples or chunk.scores_prompt
        ]


def _with_prompt(answer: Sampled, logprobs: tuple) -> Sampled:
    if not logprobs:
        return answer
    return Sampled(answer.sequence, answer.token, answer.logprob, logprobs, answer.margin)
