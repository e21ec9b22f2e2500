"""The step loop of a leader: one attention group's scheduler, in lockstep with the other leaders of its replica.

Leaders agree on every step before it runs, so that all ranks of a stage take part in its collectives, some of them
with an empty batch. When nobody has had work for some steps, all go to sleep at the same step and with no collective
pending, each waiting for its own inbox. Sleeps are numbered. A leader that gets work in its sleep asks the front end,
which wakes all leaders from that number once. One that has not got that far yet remembers the number and does not
begin that sleep.
"""

from __future__ import annotations

from collections import deque
from enum import IntEnum

import msgspec
import torch
from tokenizers import Tokenizer

from soloist.engine.answers import Answer
from soloist.engine.crew import Crew, Executor
from soloist.engine.detokenise import TextStream
from soloist.errors import RequestError
from soloist.frontend.sockets import Spoke
from soloist.frontend.wire import Abort, Delta, Shutdown, Submit, Tell, Tokens, ToLeader, Wake, WakeMe
from soloist.scheduling.request import Output, StepBatch
from soloist.scheduling.scheduler import Scheduler
from soloist.transport.base import Transport

IDLE_STEPS = 3  # without any work before all go to sleep


class State(IntEnum):
    """What a leader wants to do next. The highest of all leaders' wishes is done by all of them."""

    IDLE = 0
    LAND = 1  # nothing can start before a batch under way is back
    RUN = 2
    STOP = 3


class Leader:
    """Turns the requests of its inbox into steps of its crew, and their results into messages to the front end."""

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Executor,
        crew: Crew,
        inbox: Spoke[ToLeader],
        control: Transport | None,
        tokenizer: Tokenizer | None,
    ) -> None:
        self.scheduler, self.runner, self.crew, self.inbox = scheduler, runner, crew, inbox
        self.control, self.tokenizer = control, tokenizer
        self.texts: dict[int, TextStream] = {}  # of the sequences that are not finished
        self.flying: deque[tuple[StepBatch, Answer | None]] = deque()  # as long for every leader
        self.told = scheduler.stats  # what the front end knows
        self.idle_steps = 0
        self.sleeps = self.woken = 0  # number of the last sleep begun, and of the last that the front end ended
        self.stopping = False

    def serve(self) -> None:
        """Until the front end shuts everything down. Begins asleep: others may still be loading."""
        self.sleep()
        while True:
            self.read_inbox()
            batch = self.scheduler.schedule()
            state, peak, decodes = self.agree(batch)
            if state == State.STOP:
                break
            if state == State.IDLE:
                self.rest()
                continue
            self.idle_steps = 0
            if state == State.RUN:
                self.launch(msgspec.structs.replace(batch, peak=peak, decodes=decodes))
            if state == State.LAND or len(self.flying) == self.scheduler.config.places:
                self.land()

    # -- a step -----------------------------------------------------------------------------------------------------
    def agree(self, batch: StepBatch) -> tuple[State, int, bool]:
        """What all leaders do next, the most tokens that any of them has for it, and whether all of them only decode.

        The step before is still running on the ranks' devices meanwhile, where it is scheduled ahead.
        """
        wish = State.RUN if batch.chunks else State.LAND if self.flying else State.IDLE
        if self.stopping:
            wish = State.STOP
        if self.control is None or self.control.size == 1:
            return wish, batch.tokens, batch.is_decode
        mine = torch.tensor([[wish, batch.tokens, not batch.is_decode]], dtype=torch.int64)
        everyone = self.control.all_gather_rows(mine, [1] * self.control.size, f"agreement on step {batch.step}")
        state, peak, prefills = everyone.max(dim=0).values.tolist()
        return State(state), peak, not prefills

    def launch(self, batch: StepBatch) -> None:
        self.crew.start(batch)
        self.flying.append((batch, self.runner.run(batch)))

    def land(self) -> None:
        """Take the result of the oldest batch under way."""
        batch, answer = self.flying.popleft()
        sampled = answer.wait() if answer else self.crew.result(batch.step)
        if batch.chunks:
            self.report(batch.step, [self.delta(output) for output in self.scheduler.update(batch, sampled)])

    def delta(self, output: Output) -> Delta:
        """An output with its text. A stop string may end the sequence before the scheduler would."""
        reason = output.finish_reason
        text, stopped = self.texts[output.sequence].push(output.tokens, reason)
        if stopped:
            reason = "stop"
            self.scheduler.finish(output.sequence, reason)
        if reason:
            del self.texts[output.sequence]
        error = "no token could be chosen: the logits were not finite" if reason == "error" else None
        return Delta(
            output.sequence, output.tokens, text, reason, output.logprobs, output.prompt_logprobs, output.margin, error,
            output.cached,
        )  # fmt: skip

    def report(self, step: int, deltas: list[Delta]) -> None:
        self.told = self.scheduler.stats
        self.inbox.send(Tokens(step, tuple(deltas), self.told))

    # -- sleep ------------------------------------------------------------------------------------------------------
    def rest(self) -> None:
        self.idle_steps += 1
        if self.idle_steps == IDLE_STEPS:
            self.idle_steps = 0
            self.sleep()

    def sleep(self) -> None:
        """Until the front end wakes everybody from this sleep, or shuts everything down."""
        self.sleeps += 1
        asked = False
        while self.woken < self.sleeps and not self.stopping:
            if self.scheduler.has_work and not asked:
                self.inbox.send(WakeMe(self.sleeps))
                asked = True
            if message := self.inbox.receive(None):
                self.handle(message)

    # -- inbox ------------------------------------------------------------------------------------------------------
    def read_inbox(self) -> None:
        while message := self.inbox.receive(0):
            self.handle(message)
        if not self.scheduler.has_work and self.scheduler.stats != self.told:
            self.report(0, [])  # the last sequences were aborted: no step comes that would tell of their blocks

    def handle(self, message: ToLeader) -> None:
        match message:
            case Submit():
                self.submit(message)
            case Abort(sequence):
                self.scheduler.abort(sequence)
                self.texts.pop(sequence, None)
            case Wake(_, generation):
                self.woken = max(self.woken, generation)
            case Tell():
                self.crew.tell()
                self.inbox.send(self.runner.figures())
            case Shutdown():
                self.stopping = True

    def submit(self, message: Submit) -> None:
        """A request that cannot be served is answered at once and harms no other."""
        try:
            if message.params.stop and self.tokenizer is None:
                raise RequestError(f"stop = {message.params.stop}: this model has no tokenizer; use stop_token_ids")
            self.scheduler.add(message.sequence, message.prompt, message.params)
        except RequestError as error:
            self.report(0, [Delta(message.sequence, finish_reason="error", error=str(error))])
        else:
            self.texts[message.sequence] = TextStream(self.tokenizer, message.prompt, message.params)
