"""What clients get: OpenAI's response objects, whole or as server-sent events formatted around each piece of text."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec

from soloist.frontend.requests import Request, SequenceState
from soloist.frontend.wire import Delta
from soloist.scheduling.request import TokenLogprob
from soloist.server.desk import Call

DONE = b"data: [DONE]\n\n"
_encode = msgspec.json.Encoder().encode
TextOf = Callable[[int], str]


@dataclass
class Form:
    """How one response is written. `text_of` shows single tokens, for log probabilities."""

    model: str
    text_of: TextOf
    with_usage: bool = False
    with_ids: bool = False
    n: int = 1  # continuations of each prompt
    echoed: Sequence[str] = ()  # the prompts, where they stand before their continuations
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))
    _heads: dict[int, bytes] = field(default_factory=dict)
    _lengths: dict[int, int] = field(default_factory=dict)  # characters so far, for text offsets

    prefix, kind, chunk_kind = "cmpl-", "text_completion", "text_completion"
    before_text, after_text = b'"text":', b""

    # -- events -----------------------------------------------------------------------------------------------------
    def event(self, prompt: int, continuation: int, delta: Delta) -> bytes:
        """What a continuation gained; nothing where its text is still held back."""
        index = prompt * self.n + continuation
        if not (delta.text or delta.finish_reason or delta.logprobs or (self.with_ids and delta.tokens)):
            return b""
        if index not in self._heads:
            self._heads[index] = self._head(index)
            return self.opening(index) + self._piece(index, delta)
        return self._piece(index, delta)

    def opening(self, index: int) -> bytes:
        """What comes before a continuation's first piece."""
        return self._piece(index, Delta(0, text=self.echoed[index // self.n])) if self.echoed else b""

    def usage_event(self, call: Call) -> bytes:
        return b"data: %b\n\n" % _encode(self._envelope(self.chunk_kind, []) | {"usage": self.usage(call)})

    def _head(self, index: int) -> bytes:
        """All of an event up to the text, which is the same for every piece of a continuation."""
        envelope = _encode(self._envelope(self.chunk_kind, []))
        if self.with_usage:
            envelope = envelope[:-1] + b',"usage":null}'
        before, after = envelope.split(b'"choices":[]')
        self._tail = after + b"\n\n"
        return b'data: %b"choices":[{"index":%d,%b' % (before, index, self.before_text)

    def _piece(self, index: int, delta: Delta) -> bytes:
        reason = b'"%b"' % delta.finish_reason.encode() if delta.finish_reason else b"null"
        logprobs = _encode(self.logprobs(index, delta.text, delta.logprobs)) if delta.logprobs else b"null"
        ids = b',"token_ids":%b' % _encode(delta.tokens) if self.with_ids else b""
        return b'%b%b%b,"logprobs":%b,"finish_reason":%b%b}]%b' % (
            self._heads[index], _encode(delta.text), self.after_text, logprobs, reason, ids, self._tail,
        )  # fmt: skip

    # -- the whole --------------------------------------------------------------------------------------------------
    def whole(self, call: Call) -> bytes:
        """The response to a call that is done."""
        choices = [self._choice(index, *each) for index, each in continuations(call)]
        return _encode(self._envelope(self.kind, choices) | {"usage": self.usage(call)})

    def _choice(self, index: int, request: Request, sequence: SequenceState) -> dict[str, Any]:
        text, logprobs = sequence.text, None
        if self.echoed:
            text = self.echoed[index // self.n] + text
        if sequence.logprobs and self.echoed:
            logprobs = self._from_the_prompt_on(index, request, sequence)
        elif sequence.logprobs:
            logprobs = self.logprobs(index, text, sequence.logprobs)
        ids = {"token_ids": sequence.tokens} if self.with_ids else {}
        rest = {"logprobs": logprobs, "finish_reason": sequence.finish_reason} | ids
        return {"index": index} | self.content(text) | rest

    def content(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def usage(self, call: Call) -> dict[str, Any]:
        return usage(call.prompt_tokens, call.generated, call.cached_tokens)

    def _envelope(self, kind: str, choices: list[Any]) -> dict[str, Any]:
        named = {"id": self.prefix + self.id, "object": kind, "created": self.created, "model": self.model}
        return named | {"choices": choices}

    # -- log probabilities ------------------------------------------------------------------------------------------
    def logprobs(self, index: int, text: str, entries: Sequence[TokenLogprob]) -> dict[str, Any]:
        """In the form of completions: parallel lists; offsets count characters of the continuation."""
        tokens, offsets, offset = [self.text_of(entry.token) for entry in entries], [], self._lengths.get(index, 0)
        for token in tokens:
            offsets.append(offset)
            offset += len(token)
        self._lengths[index] = offset
        return {
            "tokens": tokens,
            "token_logprobs": [entry.logprob for entry in entries],
            "top_logprobs": [self._best(entry) for entry in entries],
            "text_offset": offsets,
        }

    def _best(self, entry: TokenLogprob) -> dict[str, float]:
        """With the token itself, as OpenAI has it, though it be none of the best."""
        found = {self.text_of(token): value for token, value in entry.top}
        found.setdefault(self.text_of(entry.token), entry.logprob)
        return found

    def _from_the_prompt_on(self, index: int, request: Request, sequence: SequenceState) -> dict[str, Any]:
        """Nothing comes before a prompt's first token that could make it probable."""
        first = self.text_of(request.prompt[0])
        self._lengths[index] = len(first)
        entries = [*request.sequences[0].prompt_logprobs, *sequence.logprobs]
        begin = {"tokens": first, "token_logprobs": None, "top_logprobs": None, "text_offset": 0}
        return {key: [begin[key], *values] for key, values in self.logprobs(index, "", entries).items()}


class EchoOnly(Form):
    """A completion of no tokens: the prompt, and what the model makes of it. The ranks' one token is dropped."""

    def _choice(self, index: int, request: Request, sequence: SequenceState) -> dict[str, Any]:
        choice = super()._choice(index, request, replace(sequence, tokens=[], text="", finish_reason="length"))
        if choice["logprobs"]:
            choice["logprobs"] = {key: values[:-1] for key, values in choice["logprobs"].items()}
        return choice

    def usage(self, call: Call) -> dict[str, Any]:
        return usage(call.prompt_tokens, 0, call.cached_tokens)


class ChatForm(Form):
    """A chat's response differs in where the text stands."""

    prefix, kind, chunk_kind = "chatcmpl-", "chat.completion", "chat.completion.chunk"
    before_text, after_text = b'"delta":{"content":', b"}"

    def opening(self, index: int) -> bytes:
        choice = {"index": index, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
        envelope = self._envelope(self.chunk_kind, [choice])
        return b"data: %b\n\n" % _encode(envelope | ({"usage": None} if self.with_usage else {}))

    def content(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def logprobs(self, index: int, text: str, entries: Sequence[TokenLogprob]) -> dict[str, Any]:
        """In the form of chats: one record for each token."""
        return {"content": [self._token(e.token, e.logprob) | {"top_logprobs": self._top(e.top)} for e in entries]}

    def _top(self, best: Iterable[tuple[int, float]]) -> list[dict[str, Any]]:
        return [self._token(token, logprob) for token, logprob in best]

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        text = self.text_of(token)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}


def usage(prompt: int, generated: int, cached: int) -> dict[str, Any]:
    """Tokens as OpenAI counts them."""
    return {
        "prompt_tokens": prompt,
        "completion_tokens": generated,
        "total_tokens": prompt + generated,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def continuations(call: Call) -> Iterator[tuple[int, tuple[Request, SequenceState]]]:
    """All continuations with the index of their choice: those of the first prompt, then of the second, …"""
    flat = ((request, sequence) for request in call.requests for sequence in request.sequences)
    return enumerate(flat)
