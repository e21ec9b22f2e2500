"""An executor whose KV cache remembers what was written: any lost, doubled or altered token shows in the next one."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from zlib import crc32

from soloist.scheduling.request import UNKNOWN, Chunk, Sampled, SamplingParams, StepBatch, TokenLogprob

VOCAB = 50
EOS = 0


def digest(tokens: Sequence[int]) -> int:
    return crc32(repr(tuple(tokens)).encode())


def next_token(tokens: Sequence[int], forbidden: Collection[int] = ()) -> int:
    """The "model": a function of all tokens before."""
    token = digest(tokens) % VOCAB
    while token in forbidden:
        token = (token + 1) % VOCAB
    return token


def alone(prompt: Sequence[int], params: SamplingParams, max_positions: int) -> tuple[list[int], str]:
    """What a request gets when nothing else is there, and why it ends."""
    tokens = list(prompt)
    ends = {*params.stop_token_ids} | (set() if params.ignore_eos else {EOS})
    while True:
        tokens.append(next_token(tokens, ends if len(tokens) - len(prompt) < params.min_tokens else ()))
        output = tokens[len(prompt) :]
        if tokens[-1] in ends:
            return output, "stop"
        if len(output) == params.max_tokens or len(tokens) == max_positions:
            return output, "length"


class FakeExecutor:
    """Writes (position, token, digest of all tokens before) into KV slots, and answers from what it reads back."""

    def __init__(self, blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self.kv: list[list[tuple[int, int] | None]] = [[None] * block_size for _ in range(blocks)]
        self.last: dict[int, int] = {}  # what was chosen last for each sequence

    def run(self, batch: StepBatch) -> list[Sampled]:
        written = [slot for chunk in batch.chunks for slot in self.slots(chunk)[chunk.start :]]
        assert len(set(written)) == len(written), "two sequences write to one slot"
        answers: list[Sampled] = []
        for chunk in batch.chunks:
            if answer := self._run(chunk):
                answers.append(answer)
        return answers

    def slots(self, chunk: Chunk) -> list[tuple[int, int]]:
        """Block and offset of each position up to the chunk's end."""
        assert len(chunk.blocks) >= -(-chunk.stop // self.block_size)
        return [(chunk.blocks[p // self.block_size], p % self.block_size) for p in range(chunk.stop)]

    def _run(self, chunk: Chunk) -> Sampled | None:
        slots = self.slots(chunk)
        tokens = self._read(slots[: chunk.start])
        known = UNKNOWN not in chunk.tokens
        assert known or len(chunk.tokens) == 1
        new = chunk.tokens if known else (self.last[chunk.sequence],)
        for token, (block, offset) in zip(new, slots[chunk.start :], strict=True):
            self.kv[block][offset] = (token, digest(tokens))
            tokens.append(token)
        assert bool(chunk.params) == (chunk.samples or chunk.scores_prompt)
        assert 0 < chunk.prompt <= len(tokens) or not chunk.samples
        if not chunk.params:
            return None
        if chunk.samples:
            self.last[chunk.sequence] = next_token(tokens, chunk.forbidden)
        targets = [*tokens[chunk.start + 1 :], *([chunk.following] if chunk.following >= 0 else [])]
        return Sampled(
            chunk.sequence,
            next_token(tokens, chunk.forbidden) if chunk.samples else None,
            prompt_logprobs=tuple(
                TokenLogprob(token, -float(digest(tokens[: chunk.start + 1 + i]))) for i, token in enumerate(targets)
            )
            if chunk.scores_prompt
            else (),
        )

    def _read(self, slots: Sequence[tuple[int, int]]) -> list[int]:
        """The tokens in these slots, each of which must have been written after exactly these tokens."""
        tokens: list[int] = []
        for block, offset in slots:
            held = self.kv[block][offset]
            assert held is not None, "KV read before it was written"
            token, before = held
            assert before == digest(tokens), "KV of another sequence"
            tokens.append(token)
        return tokens
