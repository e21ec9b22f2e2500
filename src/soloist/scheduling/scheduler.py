"""Continuous batching over a paged KV cache: which sequences compute which of their tokens in the next step.

    add ──► waiting ──admit──► running: ready ──schedule──► in flight ──update──► ready … ──► finished
               ▲                          │
               └──────── preempt ─────────┘   blocks freed, all tokens pending again

With `ahead`, the oldest batch under way is taken for back before it is: its sequences go on, each with a token that is
not known yet and that the ranks pass on themselves. One that turns out to have ended is in one batch more than it
needs; what that batch chooses for it is dropped, and its blocks are kept until then. Batches must run in order.

Order is order of arrival everywhere: the oldest waiting sequence is admitted first, and nobody overtakes it; when
blocks run out, the youngest ready sequence gives way to an older one. So the oldest sequence can always be served
once no batch is in flight, and every sequence becomes the oldest in time: none starves, none is lost.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from math import ceil

import msgspec

from soloist.scheduling.blocks import BlockPool
from soloist.scheduling.config import SchedulerConfig
from soloist.scheduling.request import Chunk, FinishReason, Output, Sampled, SamplingParams, StepBatch
from soloist.scheduling.sequence import SequenceState


class SchedulerStats(msgspec.Struct, frozen=True, array_like=True):
    """A scheduler's state at one moment; the last three count from the start."""

    waiting: int  # sequences without blocks, preempted ones included
    running: int  # sequences with blocks
    in_flight: int  # batches
    blocks_used: int
    blocks_total: int
    preemptions: int
    prefix_hits: int  # tokens whose KV was found
    prefix_queries: int  # tokens of all sequences admitted


class Scheduler:
    """Turns requests into batches and the tokens chosen for them into outputs. One for each attention group.

    Each batch that has chunks is answered by `update` once, in any order; in their order where `ahead` is set. A
    sequence is in one batch at a time, save in one more that was scheduled ahead.
    """

    def __init__(self, config: SchedulerConfig, eos_ids: Sequence[int] = ()) -> None:
        self.config = config
        self._eos_ids = frozenset(eos_ids)
        self._pool = BlockPool(config.blocks)
        self._sequences: dict[int, SequenceState] = {}  # waiting and running
        self._running: dict[int, SequenceState] = {}  # ready and in flight
        self._ready: dict[int, SequenceState] = {}
        self._waiting: list[SequenceState] = []  # a heap, oldest first; finished ones are dropped when they surface
        self._flying: dict[int, list[SequenceState]] = {}  # by step, in the order of the batch's chunks
        self._foreseen: dict[int, list[SequenceState]] = {}  # one batch at most, still under way but taken for back
        self._stalled = False  # nothing could be scheduled, and nothing has happened since
        self._step = self._arrivals = 0
        self._preemptions = self._prefix_hits = self._prefix_queries = 0

    # ---------------------------------------------------------------------------------------------- requests

    def add(self, sequence: int, prompt: Sequence[int], params: SamplingParams) -> None:
        """Accept a sequence under an id not in use. Raises RequestError where it could never be finished."""
        assert sequence not in self._sequences
        params.check()
        self.config.check_lengths(len(prompt), params.max_tokens)
        state = SequenceState(sequence, self._arrivals, prompt, params, self._eos_ids)
        self._arrivals += 1
        self._sequences[sequence] = state
        heapq.heappush(self._waiting, state)
        self._stalled = False

    def abort(self, sequence: int) -> None:
        """Forget a sequence, wherever it is; no output follows. Unknown ids are ignored."""
        self.finish(sequence, "abort")

    def finish(self, sequence: int, reason: FinishReason) -> None:
        """End a sequence for a reason found outside, such as a stop string. Otherwise as `abort`."""
        state = self._sequences.get(sequence)
        if state is not None:
            self._end(state, reason)
            self._stalled = False

    # --------------------------------------------------------------------------------------------- each step

    def schedule(self) -> StepBatch:
        """The next batch: decodes, then prefills under way, then new sequences, each by arrival; at times empty.

        With several batches in flight each takes an even share of the sequences, so that all stages have work.
        """
        self._step += 1
        if self._can_foresee:
            self._foresee()
        draft = _Draft(self.config.max_batch_tokens)
        running_share, whole_share = self._share(0), self._share(self._waiting_count)
        for state in sorted(self._ready.values(), key=_turn):
            if draft.is_full(running_share):
                break
            if state.id in self._ready:  # an older one has not taken its blocks meanwhile
                self._launch(state, draft)
        while not draft.is_full(whole_share) and (state := self._admit()):
            self._launch(state, draft)
        if draft.chunks:
            self._flying[self._step] = draft.states
        self._stalled = not draft.chunks
        return StepBatch(self._step, tuple(draft.chunks))

    def update(self, batch: StepBatch, sampled: Sequence[Sampled]) -> list[Output]:
        """Take the answers to a batch, one for each chunk with `params`. Sequences that go on become ready again."""
        answers = {answer.sequence: answer for answer in sampled}
        outputs: list[Output] = []
        foreseen = self._foreseen.pop(batch.step, None)
        states = self._flying.pop(batch.step, ()) if foreseen is None else foreseen
        for state, chunk in zip(states, batch.chunks, strict=True):
            state.flying -= 1
            if state.finish_reason is not None:  # while it was in flight
                self._release(state)
                continue
            state.expected = False
            if foreseen is None:
                self._ready[state.id] = state
                self._computed(state, chunk.stop)
            if chunk.params is not None and (output := self._answered(state, chunk, answers[state.id])):
                outputs.append(output)
        self._stalled = False
        return outputs

    @property
    def has_work(self) -> bool:
        """Something is waiting, running or in flight."""
        return bool(self._sequences or self._flying or self._foreseen)

    @property
    def can_schedule(self) -> bool:
        """`schedule` may find something; False: it will not before something else happens."""
        has_place = len(self._flying) < self.config.in_flight and (bool(self._ready) or self._waiting_count > 0)
        return not self._stalled and (has_place or self._can_foresee)

    @property
    def stats(self) -> SchedulerStats:
        """How full it is now; preemptions and prefix tokens since the start."""
        return SchedulerStats(
            waiting=self._waiting_count,
            running=len(self._running),
            in_flight=len(self._flying) + len(self._foreseen),
            blocks_used=self._pool.used,
            blocks_total=self._pool.total,
            preemptions=self._preemptions,
            prefix_hits=self._prefix_hits,
            prefix_queries=self._prefix_queries,
        )

    # ------------------------------------------------------------------------------------- parts of schedule

    @property
    def _can_foresee(self) -> bool:
        return self.config.ahead and not self._foreseen and len(self._flying) == self.config.in_flight

    def _foresee(self) -> None:
        """Take the oldest batch under way for back: what it computes is there when the next one runs."""
        step = next(iter(self._flying))
        states = self._foreseen[step] = self._flying.pop(step)
        for state in states:
            if state.finish_reason is not None:
                continue
            samples = state.scheduled == len(state.tokens)
            self._computed(state, state.scheduled)
            state.expected = samples
            if not (samples and state.ends_with_next(self.config.max_positions)):
                self._ready[state.id] = state

    @property
    def _waiting_count(self) -> int:
        return len(self._sequences) - len(self._running)

    def _share(self, waiting: int) -> int:
        """How many sequences this batch may have, so that those in flight together are about equal.

        It takes its part of what is left for the free places, and no more than its part of the whole.
        """
        places = self.config.in_flight - len(self._flying)
        if not places:
            return 0
        left, whole = len(self._ready) + waiting, len(self._running) + waiting
        return min(ceil(left / places), ceil(whole / self.config.in_flight), self.config.max_sequences)

    def _launch(self, state: SequenceState, draft: _Draft) -> None:
        """Put a ready sequence's next tokens into the batch, unless blocks for them cannot be had."""
        count = min(state.pending, draft.budget)
        if self._make_room(state, count, draft):
            del self._ready[state.id]
            draft.add(state, count)
            state.scheduled, state.flying = state.computed + count, state.flying + 1

    def _make_room(self, state: SequenceState, count: int, draft: _Draft) -> bool:
        """Give a ready sequence the blocks for its next tokens, taking them from younger ready ones where needed.

        One that is in a batch under way keeps them until that is back; meanwhile nobody younger may go first.
        """
        lacking = self.config.blocks_for(state.computed + count) - len(state.blocks)
        while lacking > self._pool.available:
            youngest = max(self._ready.values())
            if youngest is state:
                return False
            if youngest.flying:
                draft.close()
                return False
            self._preempt(youngest)
        if lacking:
            state.blocks += self._pool.take(lacking)
        return True

    def _preempt(self, state: SequenceState) -> None:
        del self._ready[state.id], self._running[state.id]
        self._pool.release(state.blocks)
        state.computed, state.blocks = 0, ()
        heapq.heappush(self._waiting, state)
        self._preemptions += 1

    def _admit(self) -> SequenceState | None:
        """Start the oldest waiting sequence, if its turn has come and the cache has room for all of its tokens.

        Nobody is admitted while a running sequence had to stay behind.
        """
        while self._waiting and self._waiting[0].finish_reason is not None:
            heapq.heappop(self._waiting)
        if not self._waiting or self._ready or len(self._running) >= self.config.max_running:
            return None
        state = self._waiting[0]
        found = self._find_prefix(state)
        needed = self.config.blocks_for(state.pending) - len(found) + self._pool.idle_among(found)
        if needed > self._spare_blocks():
            return None
        heapq.heappop(self._waiting)
        self._pool.hold(found)
        state.blocks, state.cached, state.computed = found, len(found), len(found) * self.config.block_size
        state.found = state.computed
        self._prefix_hits += state.found
        self._prefix_queries += len(state.tokens)
        self._running[state.id] = self._ready[state.id] = state
        return state

    def _spare_blocks(self) -> int:
        """Blocks that a new sequence may count on, lest it be preempted at once.

        Each running sequence is left one to grow into, and those for what is missing of its prompt.
        """
        prefills = (state for state in self._running.values() if state.pending > 1)
        missing = sum(self.config.blocks_for(len(state.tokens)) - len(state.blocks) for state in prefills)
        return self._pool.available - len(self._running) - missing

    def _find_prefix(self, state: SequenceState) -> tuple[int, ...]:
        """Cached blocks that the sequence can start from. Its last token is always computed: its logits are wanted."""
        if not self.config.prefix_caching or state.lacks_prompt_logprobs:
            return ()
        full = (len(state.tokens) - 1) // self.config.block_size
        return self._pool.find(state.full_digests(self.config.block_size, full))

    # --------------------------------------------------------------------------------------- parts of update

    def _computed(self, state: SequenceState, stop: int) -> None:
        """The KV of a chunk that ends at `stop` is there: offer the blocks that it filled to others."""
        state.computed = stop
        full = stop // self.config.block_size
        if self.config.prefix_caching and full > state.cached:
            digests = state.full_digests(self.config.block_size, full)
            for index in range(state.cached, full):
                self._pool.cache(state.blocks[index], digests[index])
            state.cached = full

    def _answered(self, state: SequenceState, chunk: Chunk, answer: Sampled) -> Output | None:
        """Take a chunk's answer; an output where it has the next token."""
        if answer.prompt_logprobs:
            state.take_prompt_logprobs(chunk.start, answer.prompt_logprobs)
        if not chunk.samples:
            return None
        if answer.token is None:
            self._end(state, "error")
            return Output(state.id, (), finish_reason="error")
        is_first = len(state.tokens) == state.prompt_length
        state.tokens.append(answer.token)
        reason = state.stop_reason(self.config.max_positions)
        if reason:
            self._end(state, reason)
        return Output(
            sequence=state.id,
            tokens=(answer.token,),
            logprobs=(answer.logprob,) if answer.logprob else (),
            prompt_logprobs=tuple(state.prompt_logprobs) if is_first else (),
            finish_reason=reason,
            margin=answer.margin,
            cached=state.found if is_first else 0,
        )

    def _end(self, state: SequenceState, reason: FinishReason) -> None:
        state.finish_reason = reason
        del self._sequences[state.id]
        self._running.pop(state.id, None)
        self._ready.pop(state.id, None)
        self._release(state)

    def _release(self, state: SequenceState) -> None:
        """Of a sequence that has ended: its blocks, unless a batch under way writes to them. `update` does it then."""
        if not state.flying:
            self._pool.release(state.blocks)


class _Draft:
    """A batch in the making."""

    def __init__(self, budget: int) -> None:
        self.budget = budget  # tokens that may still be added
        self.chunks: list[Chunk] = []
        self.states: list[SequenceState] = []

    def is_full(self, share: int) -> bool:
        """No budget is left, or `share` sequences are in."""
        return not self.budget or len(self.chunks) >= share

    def close(self) -> None:
        """Nobody is added any more."""
        self.budget = 0

    def add(self, state: SequenceState, count: int) -> None:
        self.chunks.append(state.chunk(count))
        self.states.append(state)
        self.budget -= count


def _turn(state: SequenceState) -> tuple[bool, int]:
    """Decodes before prefills, each by arrival."""
    return state.pending > 1, state.arrival
