"""The numbered sleeps, step by step: an inbox that is a list, and no other leader."""

from __future__ import annotations

from collections import deque

from fake_executor import Here, continuation, next_token

from soloist.engine.leader import IDLE_STEPS, Leader, State
from soloist.frontend.wire import Abort, Shutdown, Submit, Wake, WakeMe
from soloist.scheduling.config import SchedulerConfig
from soloist.scheduling.request import Sampled, SamplingParams, StepBatch
from soloist.scheduling.scheduler import Scheduler


class Inbox:
    """Messages to come, and those sent. Waiting for a message that never comes is a mistake."""

    def __init__(self, *messages):
        self.messages, self.sent = deque(messages), []

    def receive(self, timeout_s):
        assert self.messages or timeout_s is not None, "sleeps for ever"
        return self.messages.popleft() if self.messages else None

    def send(self, message):
        self.sent.append(message)


class Executor:
    def __init__(self):
        self.tokens: dict[int, list[int]] = {}

    def run(self, batch: StepBatch) -> Here:
        for chunk in batch.chunks:
            self.tokens.setdefault(chunk.sequence, []).extend(chunk.tokens)
        return Here([Sampled(c.sequence, next_token(self.tokens[c.sequence])) for c in batch.chunks if c.samples])


class Crew:
    def start(self, batch):
        pass


def leader(*messages) -> Leader:
    scheduler = Scheduler(SchedulerConfig(blocks=32, max_positions=64))
    return Leader(scheduler, Executor(), Crew(), Inbox(*messages), None, None)


def submit(sequence: int = 0) -> Submit:
    return Submit(sequence, (1, 2), SamplingParams(max_tokens=3))


def test_work_in_a_sleep_asks_once_and_waits_for_the_answer():
    one = leader(submit(0), submit(1), Wake(0, 1))
    one.sleep()
    assert one.inbox.sent == [WakeMe(1)]
    assert one.scheduler.has_work


def test_a_sleep_that_the_others_were_woken_from_is_not_begun():
    """Leader B is still on its way to sleep 1 when A, asleep already, has got work."""
    late = leader(Wake(0, 1))
    late.read_inbox()
    late.sleep()
    assert late.sleeps == 1


def test_an_old_wake_does_not_end_a_later_sleep():
    one = leader(Wake(0, 1), submit(), Wake(0, 2))
    one.sleep()
    one.inbox.messages.appendleft(Wake(0, 1))
    one.sleep()
    assert one.inbox.sent == [WakeMe(2)]


def test_shutdown_ends_every_sleep():
    one = leader(Shutdown())
    one.sleep()
    assert one.agree(StepBatch(1))[0] == State.STOP


def test_sleep_begins_after_some_idle_steps_only():
    one = leader()
    for _ in range(IDLE_STEPS - 1):
        one.rest()
    assert one.sleeps == 0
    one.inbox.messages.append(Shutdown())
    one.rest()
    assert one.sleeps == 1


def test_serving_reports_once_a_step():
    one = leader(submit(4), submit(9), Wake(0, 1))
    listen = one.inbox.receive
    one.inbox.receive = lambda timeout_s: listen(timeout_s) if one.inbox.messages else end_when_done(one)
    one.serve()
    asked, *steps = one.inbox.sent
    assert asked == WakeMe(1)
    assert [[delta.sequence for delta in step.deltas] for step in steps] == [[4, 9]] * 3
    assert [step.deltas[0].tokens[0] for step in steps] == continuation([1, 2], 3, ignore_eos=True)
    assert steps[-1].deltas[0].finish_reason == "length"


def test_blocks_of_aborted_sequences_are_told_without_a_step():
    one = leader(submit(), Wake(0, 1))
    one.sleep()
    one.launch(one.scheduler.schedule())
    one.land()
    one.inbox.messages.append(Abort(0))
    one.read_inbox()
    one.read_inbox()
    assert [(told.step, told.stats.blocks_used) for told in one.inbox.sent[1:]] == [(1, 1), (0, 0)]


def end_when_done(one: Leader) -> Shutdown | None:
    return None if one.scheduler.has_work or one.stopping else Shutdown()
