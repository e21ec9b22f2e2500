"""The engine's scheduler, able to skip over rounds in which the same sequences decode and nothing else happens.

A *round* of a batch under way is: it comes back with one token for each sequence, and the same sequences are scheduled
again. Rounds of a group whose batches do not change need not be taken one by one. `steady_rounds` says how many that
certainly are, `advance` takes them at once and leaves the same state as taking them singly.
"""

from __future__ import annotations

from math import ceil

import msgspec

from soloist.scheduling.blocks import BlockPool
from soloist.scheduling.config import SchedulerConfig
from soloist.scheduling.request import Chunk, StepBatch
from soloist.scheduling.scheduler import Scheduler
from soloist.scheduling.sequence import SequenceState

TOKEN = 0  # what every simulated sequence is continued with


class GrowingPool(BlockPool):
    """A pool that knows only those of its blocks that were ever used: thousands of groups have large caches."""

    def __init__(self, total: int) -> None:
        super().__init__(0)
        self.total = total

    @property
    def available(self) -> int:
        return super().available + self.total - len(self._references)

    def _take(self) -> int:
        if not self._free and len(self._references) < self.total:
            self._free.append(len(self._references))
            self._references.append(0)
        return super()._take()


class SteadyScheduler(Scheduler):
    """A scheduler whose every answer is `TOKEN`, so that batches to come are known as long as nothing happens."""

    def __init__(self, config: SchedulerConfig) -> None:
        super().__init__(msgspec.structs.replace(config, blocks=1))
        self.config, self._pool = config, GrowingPool(config.blocks)

    def steady_rounds(self) -> int:
        """Rounds that every batch under way can take unchanged if nobody arrives; 0 where that is not certain.

        A round in which a sequence gets its first token or its last one is not among them: that is news.
        """
        batches = list(self._flying.values())
        if self._ready or not batches or not self._keeps_shape([len(states) for states in batches]):
            return 0
        if self._waiting_count and not self._shuts_out():
            return 0
        states = [state for states in batches for state in states]
        if any(_has_news(state) for state in states):
            return 0
        blocks = self._pool.available // len(states) * self.config.block_size
        longest = self.config.max_positions
        return min(blocks, *(state.longest(longest) - 1 - len(state.tokens) for state in states))

    def advance(self, batch: StepBatch, rounds: int) -> StepBatch:
        """Take `rounds` rounds of a batch under way, at most `steady_rounds`. Returns the batch that is then under way.

        Equals `rounds` times `update` with `TOKEN` and `schedule`, up to the numbers of steps and blocks.
        """
        if not rounds:
            return batch
        states = self._flying[batch.step]
        chunks = tuple(self._advanced(state, rounds) for state in states)
        return msgspec.structs.replace(batch, chunks=chunks)

    def unfinished(self) -> dict[int, int]:
        """Tokens that each sequence has been given so far, by its id."""
        return {id: len(state.tokens) - state.prompt_length for id, state in self._sequences.items()}

    def _advanced(self, state: SequenceState, rounds: int) -> Chunk:
        length = len(state.tokens) + rounds
        state.tokens += [TOKEN] * rounds
        state.blocks += self._pool.take(self.config.blocks_for(length) - len(state.blocks))
        self._computed(state, length - 1)
        return state.chunk(1)

    def _keeps_shape(self, sizes: list[int]) -> bool:
        """A batch that comes back is scheduled whole: it would not be split, see `_share`."""
        if max(sizes) == 1:
            return True
        even = ceil(len(self._running) / self.config.in_flight)
        return len(sizes) == self.config.in_flight and max(sizes) <= even

    def _shuts_out(self) -> bool:
        """The oldest waiting sequence cannot be admitted before one that runs ends: blocks only become fewer."""
        if len(self._running) >= self.config.max_running:
            return True
        if self.config.prefix_caching or self._waiting[0].finish_reason:
            return False
        return self.config.blocks_for(self._waiting[0].pending) > self._spare_blocks()


def _has_news(state: SequenceState) -> bool:
    """The batch under way is not just a decode of a sequence that goes on."""
    return state.pending != 1 or len(state.tokens) == state.prompt_length or state.finish_reason is not None
