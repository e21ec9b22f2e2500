"""What `LLM` gives back."""

from __future__ import annotations

from dataclasses import dataclass

from soloist.errors import RequestError
from soloist.frontend.requests import Request, SequenceState
from soloist.frontend.wire import Delta
from soloist.scheduling.request import FinishReason, TokenLogprob


@dataclass(frozen=True)
class Completion:
    """One continuation. `margin` is the smallest distance between the two best logits of any of its tokens."""

    text: str
    tokens: list[int]
    finish_reason: FinishReason | None
    logprobs: list[TokenLogprob]
    margin: float
    first_token_s: float  # after the request's arrival; NaN without a token
    last_token_s: float

    @classmethod
    def of(cls, sequence: SequenceState, arrival_s: float) -> Completion:
        """From the front end's account of a finished sequence."""
        return cls(
            text=sequence.text,
            tokens=sequence.tokens,
            finish_reason=sequence.finish_reason,
            logprobs=sequence.logprobs,
            margin=sequence.margin,
            first_token_s=sequence.first_token_s - arrival_s,
            last_token_s=sequence.last_token_s - arrival_s,
        )


@dataclass(frozen=True)
class RequestOutput:
    """A prompt with its `n` continuations; `error` says why there are none."""

    prompt_tokens: list[int]
    outputs: list[Completion]
    prompt_logprobs: list[TokenLogprob]  # of the prompt's tokens from the second on, where they were asked for
    error: str | None = None

    @classmethod
    def of(cls, request: Request | RequestError) -> RequestOutput:
        """From the front end's account of a finished request, or from its reason to refuse it."""
        if isinstance(request, RequestError):
            return cls([], [], [], str(request))
        outputs = [Completion.of(sequence, request.arrival_s) for sequence in request.sequences if not request.error]
        return cls(list(request.prompt), outputs, request.sequences[0].prompt_logprobs, request.error)


@dataclass(frozen=True)
class StreamPart:
    """What one continuation gained. Text may lag behind the tokens; it is complete with the `finish_reason`."""

    prompt: int  # index among the prompts
    index: int  # of the continuation
    text: str
    tokens: tuple[int, ...]
    finish_reason: FinishReason | None
    error: str | None

    @classmethod
    def of(cls, prompt: int, index: int, delta: Delta) -> StreamPart:
        return cls(prompt, index, delta.text, delta.tokens, delta.finish_reason, delta.error)
