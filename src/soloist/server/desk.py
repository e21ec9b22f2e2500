"""The front end inside an event loop: one callback takes in what ranks send and wakes the calls that gained something.

    submit ──► Call ──news──► whoever answers the client ──► release
                 ▲
    socket ──► _pump (front end's books)

Every call that is accepted ends in one of: all of its requests done, `cancel`, `fail` with the cause.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import zmq

from soloist.errors import SoloistError
from soloist.frontend.requests import Request
from soloist.frontend.wire import Delta
from soloist.scheduling.request import SamplingParams
from soloist.server.refusals import Refusal
from soloist.server.served import Served

log = logging.getLogger("soloist.server")
TICK_S = 0.1  # between looks at the health of the ranks
MOST_MESSAGES = 64  # taken in before others in the loop get their turn
LONGEST_RETRY_S = 60
News = tuple[int, int, Delta]  # index of the request, of the continuation, and what that gained


@dataclass(eq=False)
class Call:
    """One HTTP request and the front end's requests that it became, one for each prompt."""

    requests: list[Request]
    stream: bool
    news: asyncio.Event = field(default_factory=asyncio.Event)
    failure: Refusal | None = None
    cancelled: bool = False

    @property
    def done(self) -> bool:
        return self.failure is not None or self.cancelled or all(request.done for request in self.requests)

    @property
    def outcome(self) -> str:
        """How it ended: "complete", "cancelled", or the code of its error."""
        return self.failure.code if self.failure else "cancelled" if self.cancelled else "complete"

    @property
    def started(self) -> bool:
        """A first token has come."""
        return any(sequence.tokens for request in self.requests for sequence in request.sequences)

    @property
    def prompt_tokens(self) -> int:
        return sum(len(request.prompt) for request in self.requests)

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens whose KV was found: of each prompt's first continuation."""
        return sum(request.sequences[0].cached for request in self.requests)

    @property
    def generated(self) -> int:
        return sum(len(sequence.tokens) for request in self.requests for sequence in request.sequences)

    def take(self) -> Iterator[News]:
        """What came since the last look, what one continuation gained meanwhile joined."""
        for index, request in enumerate(self.requests):
            if len(request.news) == 1:
                yield index, *request.news.popleft()
                continue
            joined: dict[int, Delta] = {}
            while request.news:
                continuation, delta = request.news.popleft()
                joined[continuation] = _join(joined.get(continuation), delta)
            yield from ((index, continuation, delta) for continuation, delta in joined.items())


def _join(first: Delta | None, second: Delta) -> Delta:
    if first is None:
        return second
    return Delta(
        sequence=second.sequence,
        tokens=first.tokens + second.tokens,
        text=first.text + second.text,
        finish_reason=second.finish_reason,
        logprobs=first.logprobs + second.logprobs,
        error=second.error,
    )


class Desk:
    """Takes calls and sees to it that they end. Lives in one event loop; `close` leaves the front end as it is."""

    def __init__(self, served: Served, max_waiting: int, timeout_s: float) -> None:
        """max_waiting: calls without a first token from which new ones are refused. timeout_s: bound of each call."""
        self.served, self.front = served, served.front
        self.max_waiting, self.timeout_s = max_waiting, timeout_s
        self.draining = self._is_told = False
        self.last_wait_s = 0.0  # for a first token
        self.accepted = self.refused = 0
        self.ended: Counter[str] = Counter()  # calls by outcome
        self._calls: dict[Call, asyncio.TimerHandle] = {}
        self._call_of: dict[int, Call] = {}  # by the id of the front end's request
        self._waiting: set[Call] = set()

    def open(self) -> None:
        """Begin to listen to the ranks. Called in the event loop."""
        self._loop = asyncio.get_running_loop()
        self._descriptor = self.front.hub.socket.getsockopt(zmq.FD)
        self._loop.add_reader(self._descriptor, self._pump)
        self._tick()

    def close(self) -> None:
        self._loop.remove_reader(self._descriptor)
        self._ticking.cancel()

    # -- calls ------------------------------------------------------------------------------------------------------
    @property
    def calls(self) -> int:
        """Accepted, and not yet released by whoever answers them."""
        return len(self._calls)

    @property
    def waiting(self) -> int:
        """Calls without a first token."""
        return len(self._waiting)

    def submit(self, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams], stream: bool) -> Call:
        """Accept a call, all of its prompts or none. Raises Refusal."""
        self.check_open()
        call = Call([], stream)
        try:
            for prompt, wish in zip(prompts, params, strict=True):
                call.requests.append(self.front.submit(prompt, wish))
        except SoloistError as error:
            for request in call.requests:
                self.front.abort(request)
            raise Refusal.of(error) from error
        self._calls[call] = self._loop.call_later(self.timeout_s, self._expire, call)
        self._call_of |= {id(request): call for request in call.requests}
        self._waiting.add(call)
        self.accepted += 1
        self._loop.call_soon(self._pump)  # sending may have used up the socket's signal of something to read
        return call

    def check_open(self) -> None:
        """Raise Refusal where no call can be taken now."""
        if self.draining:
            raise Refusal(503, "the server is shutting down", "shutting_down", headers={"Retry-After": "5"})
        if self.front.failure:
            raise Refusal.of(self.front.failure)
        if self.waiting >= self.max_waiting:
            self.refused += 1
            seconds = min(LONGEST_RETRY_S, max(1, math.ceil(self.last_wait_s)))
            message = f"{self.waiting} requests are waiting, which is the limit; try again in {seconds} s"
            raise Refusal(429, message, "queue_full", headers={"Retry-After": str(seconds)})

    def cancel(self, call: Call) -> None:
        """The client has gone."""
        if not call.done:
            call.cancelled = True
            self._abort(call)

    def fail(self, call: Call, cause: Refusal) -> None:
        """End a call with an error. Nothing happens to one that has ended."""
        if not call.done:
            self._end(call, cause)

    def fail_all(self, cause: Refusal) -> None:
        for call in list(self._calls):
            self.fail(call, cause)

    def release(self, call: Call) -> None:
        """The call has been answered as far as it can be."""
        self.cancel(call)
        self.ended[call.outcome] += 1
        self._calls.pop(call).cancel()
        self._waiting.discard(call)
        for request in call.requests:
            del self._call_of[id(request)]

    def _end(self, call: Call, cause: Refusal) -> None:
        call.failure = call.failure or cause
        self._abort(call)

    def _abort(self, call: Call) -> None:
        for request in call.requests:
            self.front.abort(request)
        self._waiting.discard(call)
        call.news.set()
        self._loop.call_soon(self._pump)

    def _expire(self, call: Call) -> None:
        self.fail(call, Refusal(504, f"not answered within the limit of {self.timeout_s:g} s", "timeout"))

    # -- news -------------------------------------------------------------------------------------------------------
    def _pump(self) -> None:
        """Edge-triggered: the socket signals once, whatever there is to read, so read until nothing is left."""
        if self.front.hub.closed:
            return
        touched = self.front.pump(0, MOST_MESSAGES)
        for request in touched:
            if call := self._call_of.get(id(request)):
                self._tell(call, request)
        if touched:
            self._loop.call_soon(self._pump)

    def _tell(self, call: Call, request: Request) -> None:
        if call in self._waiting and call.started:
            self._waiting.discard(call)
            self.last_wait_s = min(_first_token_s(request), LONGEST_RETRY_S)
        if request.error and not call.cancelled:
            cause = self.front.failure
            self._end(call, Refusal.of(cause) if cause else Refusal(500, request.error, "not_answered"))
        if call.stream or call.done:
            call.news.set()

    def _tick(self) -> None:
        self._pump()
        if self.front.failure and not self._is_told:
            self._is_told = True
            log.error("engine failed", extra={"fields": {"cause": str(self.front.failure)}})
        self._ticking = self._loop.call_later(TICK_S, self._tick)


def _first_token_s(request: Request) -> float:
    firsts = [s.first_token_s for s in request.sequences if s.tokens]
    return min(firsts, default=request.arrival_s) - request.arrival_s
