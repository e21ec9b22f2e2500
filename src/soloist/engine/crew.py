"""The ranks that work on one attention group's sequences: their leader sends them the steps, the sampler answers."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

from soloist.engine.answers import Answer
from soloist.engine.meeting import Meeting
from soloist.errors import CommunicationError
from soloist.frontend.sockets import Hub, Spoke
from soloist.frontend.wire import (
    Allocate,
    Figures,
    FromPeer,
    Hello,
    Ready,
    Result,
    Shutdown,
    Starting,
    Step,
    Tell,
    ToPeer,
)
from soloist.scheduling.request import Sampled, StepBatch
from soloist.specs.layout import Seat

_POLL_S = 50e-6
CACHE = "KV cache and graphs"  # the last part of a start


class Executor(Protocol):
    """What a rank does in a step (engine/runner.py, or a fake in tests)."""

    kv_blocks: int

    def allocate(self, blocks: int) -> None: ...

    def run(self, batch: StepBatch) -> Answer | None: ...

    def figures(self) -> Figures: ...


class Crew:
    """The leader's side. Without peers it does nothing."""

    def __init__(self, seat: Seat, meeting: Meeting, deadline_s: float) -> None:
        self.seat, self.deadline_s = seat, deadline_s
        self.peers = tuple(rank for rank in seat.sequence_peers if rank != seat.rank)
        self._hub: Hub[FromPeer] | None = None
        if self.peers:
            self._hub = Hub(meeting.address(_name(seat.rank)), FromPeer)
            meeting.announce(_name(seat.rank), self._hub.address)

    def agree_on_blocks(self, own: int, start_deadline_s: float) -> int:
        """The KV blocks that fit on every rank of the crew, which all of them then allocate."""
        found, end = {self.seat.rank: own}, time.monotonic() + start_deadline_s
        while missing := [peer for peer in self.peers if peer not in found]:
            rank, hello = self._receive(end - time.monotonic(), missing[0], "loading")
            assert isinstance(hello, Hello)
            found[rank] = hello.kv_blocks
        blocks = min(found.values())
        self._send(Allocate(blocks))
        return blocks

    def start(self, batch: StepBatch) -> None:
        """Send everybody the next step."""
        self._send(Step(batch))

    def result(self, step: int) -> list[Sampled]:
        """What the sampler chose in a step; steps are answered in order."""
        _, result = self._receive(self.deadline_s, self.seat.sampler, f"step {step}")
        assert isinstance(result, Result)
        assert result.step == step
        return list(result.sampled)

    def tell(self) -> None:
        """Everybody sends the front end its figures."""
        self._send(Tell())

    def close(self) -> None:
        """Everybody may go, however it ended."""
        self._send(Shutdown())
        if self._hub:
            self._hub.close()

    def _send(self, message: ToPeer) -> None:
        if self._hub:
            self._hub.send(self.peers, message)

    def _receive(self, timeout_s: float, missed: int, where: str) -> tuple[int, FromPeer]:
        assert self._hub is not None
        received = self._hub.receive(max(timeout_s, 0))
        if received is None:
            raise CommunicationError(self.seat.rank, missed, where, f"did not answer within {timeout_s:.0f} s")
        return received


def follow(runner: Executor, seat: Seat, meeting: Meeting, say: Callable[[Starting | Ready | Figures], None]) -> None:
    """The peers' side: run each step that the leader sends, until it sends none any more. `say` reaches the front end.

    Waiting for the next step is not bounded: the leader may be asleep. Whoever started this process ends it when the
    leader is lost.
    """
    leader: Spoke[ToPeer] = Spoke(meeting.find(_name(seat.leader)), seat.rank, ToPeer)
    answers: deque[tuple[int, Answer]] = deque()  # of steps whose results the leader waits for
    try:
        leader.send(Hello(runner.kv_blocks))
        while True:
            match _next(leader, answers):
                case Step(batch):
                    if answer := runner.run(batch):
                        answers.append((batch.step, answer))
                case Allocate(blocks):
                    say(Starting(CACHE))
                    runner.allocate(blocks)
                    say(Ready())
                case Tell():
                    say(runner.figures())
                case Shutdown():
                    return
    finally:
        leader.close()


def _next(leader: Spoke[ToPeer], answers: deque[tuple[int, Answer]]) -> ToPeer | None:
    """The leader's next message. Answers go out as soon as they are there, so that no step waits behind another."""
    while answers:
        step, answer = answers[0]
        if answer.is_here:
            answers.popleft()
            leader.send(Result(step, tuple(answer.wait())))
        elif message := leader.receive(0):
            return message
        else:
            time.sleep(_POLL_S)
    return leader.receive(None)


def _name(leader: int) -> str:
    return f"leader {leader}"
