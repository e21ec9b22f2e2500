"""Leaders without a model: each sends one message a step with the next token of all of its sequences.

The text of a token is its position in the continuation, so that a client can see whether one was lost, repeated or
reordered. Imports no torch.
"""

from __future__ import annotations

import time
from collections.abc import Iterable

from soloist.frontend.sockets import Spoke
from soloist.frontend.wire import Abort, Delta, Figures, Ready, Shutdown, Submit, Tell, Tokens, ToLeader
from soloist.scheduling.config import SchedulerConfig
from soloist.scheduling.scheduler import SchedulerStats

SIZES = SchedulerConfig(blocks=65_536, block_size=16, max_positions=65_536, max_sequences=4096)


class FakeLeader:
    """One leader; `step` is what it does in a step."""

    def __init__(self, address: str, rank: int, sizes: SchedulerConfig = SIZES) -> None:
        self.spoke: Spoke[ToLeader] = Spoke(address, rank, ToLeader)
        self.rank, self.sizes = rank, sizes
        self.sequences: dict[int, tuple[int, int]] = {}  # id → tokens sent, tokens wanted
        self.steps = self.sent = self.aborted = 0
        self.stopping = False
        self.spoke.send(Ready(sizes))

    def step(self) -> None:
        """Read the inbox, then give every sequence one token."""
        while message := self.spoke.receive(0):
            self._handle(message)
        if self.sequences:
            self.steps += 1
            deltas = tuple(self._next(sequence) for sequence in list(self.sequences))
            self.sent += len(deltas)
            self.spoke.send(Tokens(self.steps, deltas, self.stats))

    @property
    def stats(self) -> SchedulerStats:
        return SchedulerStats(0, len(self.sequences), 0, len(self.sequences), self.sizes.blocks, 0, 0, 0)

    def _next(self, sequence: int) -> Delta:
        sent, wanted = self.sequences[sequence]
        if sent + 1 == wanted:
            del self.sequences[sequence]
            return Delta(sequence, (sent,), f" {sent}", "length")
        self.sequences[sequence] = sent + 1, wanted
        return Delta(sequence, (sent,), f" {sent}")

    def _handle(self, message: ToLeader) -> None:
        match message:
            case Submit():
                self.sequences[message.sequence] = 0, message.params.max_tokens
            case Abort(sequence):
                self.aborted += self.sequences.pop(sequence, None) is not None
            case Tell():
                self.spoke.send(Figures(self.rank, {}, {}, {}, 0, 0, self.steps))
            case Shutdown():
                self.stopping = True


def lead(address: str, ranks: Iterable[int], step_s: float) -> None:
    """Be several leaders until the front end shuts down; all step together, every `step_s`."""
    leaders = [FakeLeader(address, rank) for rank in ranks]
    due = time.monotonic()
    while not any(leader.stopping for leader in leaders):
        for leader in leaders:
            leader.step()
        due = max(due + step_s, time.monotonic() - step_s)
        time.sleep(max(0.0, due - time.monotonic()))
    for leader in leaders:
        leader.spoke.close()
