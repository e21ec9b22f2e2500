"""Every accepted request and its tokens so far. Whatever happens to a rank, this is what can be asked for again."""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import ceil

import msgspec

from soloist.errors import RequestError
from soloist.frontend.prefixes import PrefixIndex, choose
from soloist.frontend.wire import Delta, Submit
from soloist.scheduling.request import FinishReason, SamplingParams, TokenLogprob

SEEDS = 2**31
TYPICAL_TOKENS = 256.0  # of a continuation, before any has ended
MEMORY = 64  # continuations over which the typical length is taken


@dataclass
class SequenceState:
    """One continuation of a request's prompt. Filled by the deltas of its leader."""

    submit: Submit  # what its leader was asked for
    leader: int
    fresh: int  # tokens of the prompt that its leader has to compute, as far as the front end knows
    expected: int  # tokens that it will probably get
    booked: int = 0  # what its leader's load counts for it
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    margin: float = float("inf")
    cached: int = 0  # tokens of the prompt that its leader found in its cache
    finish_reason: FinishReason | None = None
    error: str | None = None
    first_token_s: float = float("nan")  # on the clock of time.monotonic, as `Request.arrival_s`
    last_token_s: float = float("nan")

    def apply(self, delta: Delta) -> None:
        """Add what its leader sent; the last delta says why it ended."""
        if delta.tokens:
            self.last_token_s = time.monotonic()
            self.first_token_s = self.first_token_s if self.tokens else self.last_token_s
        self.tokens += delta.tokens
        self.text += delta.text
        if delta.logprobs or delta.prompt_logprobs:
            self.logprobs += delta.logprobs
            self.prompt_logprobs += delta.prompt_logprobs
        if delta.margin < self.margin:
            self.margin = delta.margin
        if delta.cached:
            self.cached = delta.cached
        self.finish_reason, self.error = delta.finish_reason, delta.error

    @property
    def cost(self) -> int:
        """Tokens that its leader has probably still to compute for it."""
        if self.finish_reason:
            return 0
        return (0 if self.tokens else self.fresh) + max(self.expected - len(self.tokens), 1)


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
    error: str | None = None  # why it could not be served; the first reason if there are several

    @property
    def done(self) -> bool:
        return all(sequence.finish_reason for sequence in self.sequences)


Observer = Callable[[Request, SequenceState, Delta, float], None]  # the float: when the token before came, or NaN


class Requests:
    """Accepts requests, chooses their leaders and keeps account of them until they end.

    `observe` is told every delta after it has been booked. `prefixes` remembers which leader has seen what; without it
    leaders are chosen by their load alone.
    """

    def __init__(self, leaders: Sequence[int], vocab: int) -> None:
        self.leaders, self.vocab = tuple(leaders), vocab
        self._waiting: dict[int, tuple[Request, int]] = {}  # sequence → request, index in it
        self._load = dict.fromkeys(self.leaders, 0)  # sum of the costs of a leader's waiting sequences
        self._next_sequence = 0
        self._typical = TYPICAL_TOKENS  # length of a continuation, lately
        self.observe: Observer | None = None
        self.prefixes: PrefixIndex | None = None

    def accept(self, prompt: Sequence[int], params: SamplingParams) -> Request:
        """Book a request. Raises RequestError for one that no rank needs to see to refuse it."""
        params.check()
        self._check_prompt(prompt)
        self._check_ids("stop_token_ids", params.stop_token_ids)
        self._check_ids("logit_bias", [token for token, _ in params.logit_bias])
        request = Request(tuple(prompt), params, [])
        for index, share in enumerate(_one_for_each(params)):
            submit = Submit(self._next_sequence, request.prompt, share)
            self._next_sequence += 1
            state = self._place(submit)
            self._book(state)
            self._waiting[submit.sequence] = request, index
            request.sequences.append(state)
        return request

    def _place(self, submit: Submit) -> SequenceState:
        """Choose a sequence's leader: the longest cached prefix, unless others have much less to do."""
        expected = min(submit.params.max_tokens, ceil(self._typical))
        digests, cached = [], {}
        if self.prefixes is not None:
            digests = self.prefixes.digests(submit.prompt)
            cached = self.prefixes.cached(digests)
        leader = choose(self._load, cached, len(submit.prompt) - max(cached.values(), default=0) + expected)
        if self.prefixes is not None:
            self.prefixes.add(leader, digests)
        return SequenceState(submit, leader, len(submit.prompt) - cached.get(leader, 0), expected)

    def apply(self, delta: Delta) -> Request | None:
        """Book what a sequence gained. None where the request was aborted meanwhile."""
        if delta.sequence not in self._waiting:
            return None
        request, index = self._waiting[delta.sequence]
        state = request.sequences[index]
        last_token_s = state.last_token_s
        state.apply(delta)
        if self.observe:
            self.observe(request, state, delta, last_token_s)
        self._book(state)
        request.news.append((index, delta))
        if delta.finish_reason:
            request.error = request.error or delta.error
            del self._waiting[delta.sequence]
            if delta.finish_reason in ("stop", "length"):
                self._learn(state)
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

    def _book(self, state: SequenceState) -> None:
        """Let a leader's load follow what is left to do for a sequence."""
        cost = state.cost
        self._load[state.leader] += cost - state.booked
        state.booked = cost

    def _learn(self, state: SequenceState) -> None:
        """From a complete continuation: how long they are, and that its leader has its KV for a prompt that goes on."""
        self._typical += (len(state.tokens) - self._typical) / MEMORY
        if self.prefixes is not None:
            self.prefixes.add(state.leader, self.prefixes.digests([*state.submit.prompt, *state.tokens]))

    def _check_prompt(self, prompt: Sequence[int]) -> None:
        if not prompt:
            raise RequestError("prompt = []: must hold at least one token")
        self._check_ids("prompt", (min(prompt), max(prompt)))

    def _check_ids(self, key: str, ids: Sequence[int]) -> None:
        if wrong := [token for token in ids if not 0 <= token < self.vocab]:
            raise RequestError(f"{key}: token {wrong[0]} must lie between 0 and {self.vocab - 1}")


def _one_for_each(params: SamplingParams) -> list[SamplingParams]:
    """The parameters of each continuation: consecutive seeds, prompt log probabilities only once."""
    seed = random.randrange(SEEDS) if params.seed is None else params.seed
    first = msgspec.structs.replace(params, n=1, seed=seed)
    others = (msgspec.structs.replace(first, seed=seed + i, prompt_logprobs=None) for i in range(1, params.n))
    return [first, *others]
