"""The records that scheduler, ranks and front end share. They travel between processes as msgpack."""

from __future__ import annotations

from typing import Literal

import msgspec

from soloist.errors import RequestError

FinishReason = Literal["stop", "length", "abort", "error"]
MAX_STOPS = 16
MAX_LOGPROBS = 20
MAX_BIASES = 1024
UNKNOWN = -1  # stands for the token that the batch before chose for the same sequence, where that is not back yet


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How to continue a prompt. `temperature = 0` is greedy; `top_k = 0` and `top_p = 1` switch those filters off."""

    max_tokens: int = 16
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    repetition_penalty: float = 1.0  # of tokens of prompt and continuation: their logits are divided by it
    presence_penalty: float = 0.0  # of tokens of the continuation: subtracted once
    frequency_penalty: float = 0.0  # and as often as they stand there
    logit_bias: tuple[tuple[int, float], ...] = ()  # ids, each once, and what is added to their logits
    min_tokens: int = 0  # of a continuation, before which nothing ends it
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False  # the text or token that ended it is shown
    skip_special_tokens: bool = True  # in the text
    ignore_eos: bool = False
    logprobs: int | None = None  # the log probabilities of that many best tokens beside each chosen one
    prompt_logprobs: int | None = None
    n: int = 1

    def check(self) -> None:
        """Raise RequestError naming the key, the value and the remedy."""
        for key, good, remedy in (
            ("max_tokens", self.max_tokens >= 1, "must be at least 1"),
            ("temperature", 0 <= self.temperature < float("inf"), "must be 0 (greedy) or a positive number"),
            ("top_k", self.top_k >= 0, "must be 0 (off) or a positive number of tokens"),
            ("top_p", 0 < self.top_p <= 1, "must lie in (0, 1]"),
            ("min_p", 0 <= self.min_p <= 1, "must lie in [0, 1]"),
            ("repetition_penalty", 0 < self.repetition_penalty < float("inf"), "must be positive; 1 switches it off"),
            ("presence_penalty", -2 <= self.presence_penalty <= 2, "must lie in [-2, 2]; 0 switches it off"),
            ("frequency_penalty", -2 <= self.frequency_penalty <= 2, "must lie in [-2, 2]; 0 switches it off"),
            ("min_tokens", 0 <= self.min_tokens <= self.max_tokens, f"must lie in [0, max_tokens = {self.max_tokens}]"),
            ("stop", len(self.stop) <= MAX_STOPS and all(self.stop), f"give at most {MAX_STOPS} texts, none empty"),
            ("stop_token_ids", len(self.stop_token_ids) <= MAX_STOPS, f"give at most {MAX_STOPS} ids"),
            ("n", 1 <= self.n <= 128, "must lie between 1 and 128"),
        ):
            if not good:
                raise RequestError(f"{key} = {getattr(self, key)!r}: {remedy}")
        if len(self.logit_bias) > MAX_BIASES:
            raise RequestError(f"logit_bias: {len(self.logit_bias)} tokens, at most {MAX_BIASES} are taken")
        if wrong := [(token, bias) for token, bias in self.logit_bias if not -100 <= bias <= 100]:
            raise RequestError(f"logit_bias = {dict(wrong)}: must lie between -100 and 100")
        for key in ("logprobs", "prompt_logprobs"):
            value = getattr(self, key)
            if value is not None and not 0 <= value <= MAX_LOGPROBS:
                raise RequestError(f"{key} = {value}: must lie between 0 and {MAX_LOGPROBS}")


class Chunk(msgspec.Struct, frozen=True, array_like=True):
    """A run of one sequence's tokens to compute in a step. Filled by the scheduler, read by every rank of its group."""

    sequence: int  # unique within the leader
    tokens: tuple[int, ...]  # ids; the first has position `start`; a single one may be UNKNOWN
    start: int
    blocks: tuple[int, ...]  # block table: position p lies in blocks[p // block_size]
    samples: bool  # the last token's logits choose the next token
    params: SamplingParams | None = None  # for the sampler; set where `samples` or prompt logprobs are wanted
    prompt: int = 0  # tokens of the sequence that are its prompt's
    forbidden: tuple[int, ...] = ()  # ids that must not be chosen
    scores_prompt: bool = False  # the logits of all its tokens are wanted, for prompt log probabilities
    following: int = -1  # the prompt's token after such a chunk; -1: none

    @property
    def stop(self) -> int:
        """Length of the sequence after this step."""
        return self.start + len(self.tokens)


class StepBatch(msgspec.Struct, frozen=True, array_like=True):
    """One step of one attention group: what the leader sends its peers. Holds no scheduler state. May be empty."""

    step: int
    chunks: tuple[Chunk, ...] = ()
    peak: int = 0  # the most tokens of any group in this step, agreed by the leaders: all groups take the same form
    decodes: bool = False  # also agreed: no group has more than one token of a sequence

    @property
    def tokens(self) -> int:
        return sum(len(chunk.tokens) for chunk in self.chunks)

    @property
    def is_decode(self) -> bool:
        """No sequence has more than one token in it."""
        return self.tokens == len(self.chunks)


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    """Natural-log probability of a token and of the best ones at its position, best first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class Sampled(msgspec.Struct, frozen=True, array_like=True):
    """What the sampler chose for a chunk. Filled by the last stage, read by the scheduler."""

    sequence: int
    token: int | None  # None: the chunk does not sample, or its logits are not finite
    logprob: TokenLogprob | None = None
    prompt_logprobs: tuple[TokenLogprob, ...] = ()  # of the chunk's second token to its `following`
    margin: float = float("inf")  # between the two best logits; of a drawn token, with temperature and noise applied


class Output(msgspec.Struct, frozen=True, array_like=True):
    """What a step gave one sequence. Filled by the scheduler, read by the front end."""

    sequence: int
    tokens: tuple[int, ...]  # the new ones; a token that ends the sequence is among them
    logprobs: tuple[TokenLogprob, ...] = ()  # one for each new token, where asked for
    prompt_logprobs: tuple[TokenLogprob, ...] = ()  # of the prompt's tokens after the first; with the first new token
    finish_reason: FinishReason | None = None  # the scheduler knows the sequence no longer
    margin: float = float("inf")  # of the new token, see `Sampled`
    cached: int = 0  # tokens of the prompt that were found in the cache; with the first new token
