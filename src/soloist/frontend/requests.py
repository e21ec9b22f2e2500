"""Every accepted request and its tokens so far. What happens to a rank, this is what can be asked for again."""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import msgspec

from soloist.errors import RequestError
from soloist.frontend.wire import Delta, Submit
from soloist.scheduling.request import FinishReason, SamplingParams, TokenLogprob

SEEDS = 2**31


@dataclass
class SequenceState:
    """One continuation of a request's prompt. Filled by the deltas of its leader."""

    submit: Submit  # what its leader was asked for
    leader: int
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    margin: float = float("inf")
    finish_reason: FinishReason | None = None
    error: str | None = None
    first_token_s: float = float("nan")  # on the clock of time.monotonic, as `Request.arrival_s`
    last_token_s: float = float("nan")

    def apply(self, delta: Delta) -> None:
        if delta.tokens:
            self.last_token_s = time.monotonic()
            self.first_token_s = self.first_token_s if self.tokens else self.last_token_s
        self.tokens += delta.tokens
        self.text += delta.text
        self.logprobs += delta.logprobs
        self.prompt_logprobs += delta.prompt_logprobs
        self.margin = min(self.margin, delta.margin)
        self.finish_reason, self.error = delta.finish_reason, delta.error

    @property
    def cost(self) -> int:
        """Tokens that the sequence may still occupy its leader with."""
        if self.finish_reason:
            return 0
        return len(self.submit.prompt) + self.submit.params.max_tokens - len(self.tokens)


@dataclass
class Request:
    """A prompt with `params.n` continuations. `news` holds (index, delta) until whoever streams takes them.

    `on_done` is called once, when the last continuation has ended.
    """

    prompt: tuple[int, ...]
    params: SamplingParams
    sequences: list[SequenceState]
    arrival_s: float = field(default_factory=time.monotonic)
    news: deque[tuple[int, Delta]] = field(default_factory=deque)
    on_done: Callable[[], None] | None = None

    @property
    def done(self) -> bool:
        return all(sequence.finish_reason for sequence in self.sequences)

    @property
    def error(self) -> str | None:
        """Why the request could not be served; the first reason if there are several."""
        return next((sequence.error for sequence in self.sequences if sequence.error), None)


Observer = Callable[[Request, SequenceState, Delta, float], None]  # the float: when the token before came, or NaN


class Requests:
    """Accepts requests, chooses their leaders and keeps account of them until they end.

    `observe` is told every delta after it has been booked.
    """

    def __init__(self, leaders: Sequence[int], vocab: int) -> None:
        self.leaders, self.vocab = tuple(leaders), vocab
        self._waiting: dict[int, tuple[Request, int]] = {}  # sequence → request, index in it
        self._load = dict.fromkeys(self.leaders, 0)  # sum of the costs of a leader's waiting sequences
        self._next_sequence = 0
        self.observe: Observer | None = None

    def accept(self, prompt: Sequence[int], params: SamplingParams) -> Request:
        """Book a request. Raises RequestError for one that no rank needs to see to refuse it."""
        params.check()
        self._check_prompt(prompt)
        request = Request(tuple(prompt), params, [])
        for index, share in enumerate(_one_for_each(params)):
            submit = Submit(self._next_sequence, request.prompt, share)
            self._next_sequence += 1
            state = SequenceState(submit, self.choose_leader(request.prompt))
            self._load[state.leader] += state.cost
            self._waiting[submit.sequence] = request, index
            request.sequences.append(state)
        return request

    def choose_leader(self, prompt: Sequence[int]) -> int:
        """The leader with the least to do. `prompt` is there for a choice by cached prefix."""
        return min(self.leaders, key=self._load.__getitem__)

    def apply(self, delta: Delta) -> Request | None:
        """Book what a sequence gained. None where the request was aborted meanwhile."""
        if delta.sequence not in self._waiting:
            return None
        request, index = self._waiting[delta.sequence]
        state = request.sequences[index]
        before, last_token_s = state.cost, state.last_token_s
        state.apply(delta)
        if self.observe:
            self.observe(request, state, delta, last_token_s)
        self._load[state.leader] += state.cost - before
        request.news.append((index, delta))
        if delta.finish_reason:
            del self._waiting[delta.sequence]
            if request.done and request.on_done:
                request.on_done()
        return request

    def abort(self, request: Request) -> list[SequenceState]:
        """End a request; returns the sequences that were still under way, for their leaders to forget."""
        cut = [sequence for sequence in request.sequences if not sequence.finish_reason]
        for sequence in cut:
            self.apply(Delta(sequence.submit.sequence, finish_reason="abort"))
        return cut

    def fail_all(self, error: str) -> list[Request]:
        """End every waiting request with the same error; returns them."""
        deltas = [Delta(sequence, finish_reason="error", error=error) for sequence in self._waiting]
        return [request for delta in deltas if (request := self.apply(delta))]

    def waiting_for(self) -> set[int]:
        """Leaders that have work."""
        return {leader for leader, load in self._load.items() if load > 0}

    def _check_prompt(self, prompt: Sequence[int]) -> None:
        if not prompt:
            raise RequestError("prompt = []: must hold at least one token")
        wrong = [token for token in prompt if not 0 <= token < self.vocab]
        if wrong:
            raise RequestError(f"prompt token {wrong[0]}: must lie between 0 and {self.vocab - 1}")


def _one_for_each(params: SamplingParams) -> list[SamplingParams]:
    """The parameters of each continuation: consecutive seeds, prompt log probabilities only once."""
    seed = random.randrange(SEEDS) if params.seed is None else params.seed
    first = msgspec.structs.replace(params, n=1, seed=seed)
    others = (msgspec.structs.replace(first, seed=seed + i, prompt_logprobs=None) for i in range(1, params.n))
    return [first, *others]
