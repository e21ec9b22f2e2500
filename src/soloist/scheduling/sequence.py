"""What a scheduler knows of one sequence: its tokens, how far its KV cache reaches, and the blocks that hold it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from soloist.scheduling.blocks import ROOT, chain
from soloist.scheduling.request import UNKNOWN, Chunk, FinishReason, SamplingParams, TokenLogprob


class SequenceState:
    """A prompt and its continuation so far. `tokens[:computed]` have KV in `blocks`; the others are `pending`.

    Decoding is the case of one pending token. A sequence that lost its blocks is one whose tokens are all pending
    again, so a continuation resumes as a longer prompt does.
    """

    __slots__ = (
        "id",
        "arrival",
        "params",
        "ends",
        "tokens",
        "prompt_length",
        "computed",
        "expected",
        "flying",
        "scheduled",
        "blocks",
        "cached",
        "found",
        "digests",
        "prompt_logprobs",
        "finish_reason",
    )

    def __init__(
        self, id: int, arrival: int, prompt: Sequence[int], params: SamplingParams, eos_ids: Iterable[int] = ()
    ) -> None:
        self.id = id
        self.arrival = arrival
        self.params = params
        self.ends = frozenset(params.stop_token_ids) | frozenset(() if params.ignore_eos else eos_ids)
        self.tokens = list(prompt)
        self.prompt_length = len(prompt)
        self.computed = 0
        self.expected = False  # a batch under way chooses one more token, which is already counted as pending
        self.flying = 0  # batches under way that it is in
        self.scheduled = 0  # how far the last of them computes it
        self.blocks: tuple[int, ...] = ()
        self.cached = 0  # leading blocks that the pool knows by their content
        self.found = 0  # tokens whose KV was found when it was last admitted
        self.digests: list[bytes] = []
        self.prompt_logprobs: list[TokenLogprob] = []  # of the prompt's tokens 1, 2, …
        self.finish_reason: FinishReason | None = None

    def __lt__(self, other: SequenceState) -> bool:
        return self.arrival < other.arrival

    @property
    def pending(self) -> int:
        """Tokens still to be computed before the next one can be chosen."""
        return len(self.tokens) + self.expected - self.computed

    @property
    def lacks_prompt_logprobs(self) -> bool:
        """Logits of prompt positions are still wanted, so none of them may come from the cache."""
        return self.params.prompt_logprobs is not None and len(self.prompt_logprobs) < self.prompt_length - 1

    def full_digests(self, block_size: int, count: int) -> list[bytes]:
        """Digests of the first `count` blocks, all full. Each is computed once."""
        for index in range(len(self.digests), count):
            parent = self.digests[-1] if self.digests else ROOT
            self.digests.append(chain(parent, self.tokens[index * block_size : (index + 1) * block_size]))
        return self.digests[:count]

    def chunk(self, count: int) -> Chunk:
        """The next `count` pending tokens as the ranks see them."""
        stop = self.computed + count
        samples = count == self.pending
        before_last = self.computed < self.prompt_length - 1
        scores_prompt = self.lacks_prompt_logprobs and before_last and stop > len(self.prompt_logprobs)
        return Chunk(
            sequence=self.id,
            tokens=(UNKNOWN,) if self.computed == len(self.tokens) else tuple(self.tokens[self.computed : stop]),
            start=self.computed,
            blocks=self.blocks,
            samples=samples,
            params=self.params if samples or scores_prompt else None,
            prompt=self.prompt_length,
            forbidden=tuple(self.ends) if samples and stop - self.prompt_length < self.params.min_tokens else (),
            scores_prompt=scores_prompt,
            following=self.tokens[stop] if scores_prompt and stop < self.prompt_length else -1,
        )

    def take_prompt_logprobs(self, start: int, logprobs: Sequence[TokenLogprob]) -> None:
        """Keep what is new in the answer to a chunk from `start`: after a preemption, parts are computed again."""
        self.prompt_logprobs += logprobs[len(self.prompt_logprobs) - start : self.prompt_length - 1 - start]

    def ends_with_next(self, max_positions: int) -> bool:
        """The next token will be the last one, whatever it is."""
        return len(self.tokens) + 1 >= self.longest(max_positions)

    def stop_reason(self, max_positions: int) -> FinishReason | None:
        """Why the last token ends the sequence, if it does."""
        if self.tokens[-1] in self.ends:
            return "stop"
        return "length" if len(self.tokens) >= self.longest(max_positions) else None

    def longest(self, max_positions: int) -> int:
        """Tokens with which it ends, if no token ends it before."""
        return min(self.prompt_length + self.params.max_tokens, max_positions)
