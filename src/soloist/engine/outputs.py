"""What `LLM` gives back."""

from __future__ import annotations

from dataclasses import dataclass

from soloist.frontend.requests import Request
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


@dataclass(frozen=True)
class RequestOutput:
    """A prompt with its `n` continuations; `error` says why there are none."""

    prompt_tokens: list[int]
    outputs: list[Completion]
    prompt_logprobs: list[TokenLogprob]  # of the prompt's tokens from the second on, where they were asked for
    error: str | None = None

    @classmethod
    def of(cls, request: Request) -> RequestOutput:
        """From the front end's account of a finished request."""
        first = request.sequences[0]
        outputs = [Completion(s.text, s.tokens, s.finish_reason, s.logprobs, s.margin) for s in request.sequences]
        error = request.error
        return cls(list(request.prompt), [] if error else outputs, first.prompt_logprobs, error)


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
