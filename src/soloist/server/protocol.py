"""What clients may ask for: the requests of OpenAI's API as typed records.

Fields beyond OpenAI's own have the names that vLLM and SGLang gave them. One that this server does not support is
refused unless it has the value that changes nothing (server/neutral.py).
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, TypeVar

import msgspec

from soloist.errors import RequestError
from soloist.scheduling.request import SamplingParams
from soloist.server.neutral import without_neutral

Int = Annotated[int, msgspec.Meta(ge=-(2**31), le=2**31 - 1)]
Seed = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**62)]
Body = TypeVar("Body", bound="SharedFields | TokenizeRequest | DetokenizeRequest")

DEFAULT_MAX_TOKENS = 16  # of a completion, as OpenAI's; a chat goes on to the model's limit


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    """What a stream tells beside its text: the usage in a last event."""

    include_usage: bool = False


class SharedFields(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What completions and chats have in common. None stands for the default."""

    model: str
    max_tokens: Int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[Int, float] | None = None  # by token id
    n: Int | None = None
    seed: Seed | None = None
    min_tokens: Int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[Int] | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None
    user: str | None = None  # this and what follows: for the client's own books
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    metadata: dict[str, Any] | None = None

    def params(self, max_tokens: int) -> SamplingParams:
        """How to continue a prompt. Raises RequestError for what nobody could do."""
        stops = [self.stop] if isinstance(self.stop, str) else self.stop
        given = {key: value for key in _PLAIN if (value := getattr(self, key)) is not None}
        given |= {"stop": tuple(stops or ()), "stop_token_ids": tuple(self.stop_token_ids or ())}
        given["logit_bias"] = tuple((self.logit_bias or {}).items())
        if self.top_k == -1:  # vLLM's word for off
            given["top_k"] = 0
        given |= {"logprobs": self.wanted_logprobs, "prompt_logprobs": self.wanted_prompt_logprobs}
        params = SamplingParams(max_tokens=max_tokens, **given)
        params.check()
        return params

    @property
    def most_tokens(self) -> int | None:
        """Tokens of a continuation that were asked for; None: as many as fit."""
        return self.max_tokens

    @property
    def wanted_logprobs(self) -> int | None:
        return None

    @property
    def wanted_prompt_logprobs(self) -> int | None:
        return None

    @property
    def includes_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def check(self) -> None:
        """Raise RequestError for fields that do not go together."""
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options = {…}: is for stream = true only")


_PLAIN = (
    "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "n",
    "seed", "min_tokens", "include_stop_str_in_output", "skip_special_tokens", "ignore_eos",
)  # fmt: skip


class CompletionRequest(SharedFields, kw_only=True, forbid_unknown_fields=True):
    """POST /v1/completions. A prompt is a text or token ids; several prompts are answered in one response."""

    prompt: str | list[str | int | list[int]]
    add_special_tokens: bool | None = None  # to texts, as the tokenizer does
    logprobs: Int | None = None
    echo: bool | None = None  # the prompt, with its log probabilities if there are any, before its continuation
    best_of: Int | None = None  # n, or an error: no continuation is made to be thrown away

    @property
    def prompts(self) -> list[Any]:
        """Each a text or token ids."""
        several = isinstance(self.prompt, list) and not (self.prompt and isinstance(self.prompt[0], int))
        return list(self.prompt) if several else [self.prompt]

    @property
    def only_scores(self) -> bool:
        """No continuation is wanted: the prompt is echoed for its log probabilities."""
        return bool(self.echo) and self.max_tokens == 0

    @property
    def most_tokens(self) -> int | None:
        if self.only_scores:
            return 1  # to be dropped
        return DEFAULT_MAX_TOKENS if self.max_tokens is None else self.max_tokens

    @property
    def wanted_logprobs(self) -> int | None:
        return self.logprobs

    @property
    def wanted_prompt_logprobs(self) -> int | None:
        return self.logprobs if self.echo else None

    def check(self) -> None:
        SharedFields.check(self)
        if self.echo and self.stream and (self.logprobs is not None or self.only_scores):
            raise RequestError(
                "echo = true: the log probabilities of a prompt come with a whole answer; leave out stream"
            )
        if self.best_of not in (None, self.n or 1):
            raise RequestError(f"best_of = {self.best_of}: must equal n = {self.n or 1}; ask for n = {self.best_of}")
        if not self.prompt:
            raise RequestError(f"prompt = {self.prompt!r}: must not be empty")
        if isinstance(self.prompt, list) and len({type(entry) for entry in self.prompt}) > 1:
            raise RequestError("prompt: must be a text, token ids, a list of texts, or a list of lists of token ids")


class TextPart(msgspec.Struct, forbid_unknown_fields=True):
    """Of a message whose content is a list."""

    type: Literal["text"]
    text: str


class ChatMessage(msgspec.Struct, forbid_unknown_fields=True):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None

    def plain(self) -> dict[str, str]:
        """As chat templates take it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": self.role, "content": text} | ({"name": self.name} if self.name else {})


class ChatRequest(SharedFields, kw_only=True, forbid_unknown_fields=True):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], msgspec.Meta(min_length=1)]
    chat_template_kwargs: dict[str, Any] | None = None  # what the template knows beyond the messages
    add_generation_prompt: bool | None = None
    max_completion_tokens: Int | None = None
    logprobs: bool | None = None
    top_logprobs: Int | None = None

    @property
    def most_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def wanted_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    def check(self) -> None:
        SharedFields.check(self)
        if self.top_logprobs is not None and not self.logprobs:
            raise RequestError("top_logprobs: needs logprobs = true")
        if None not in (self.max_tokens, self.max_completion_tokens):
            raise RequestError("max_tokens: is the older name of max_completion_tokens; give one of them")


class DetokenizeRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """POST /detokenize: tokens as text, special ones included."""

    model: str | None = None
    tokens: list[Int]

    def check(self) -> None:
        """Whether the model knows the tokens is seen where its vocabulary is known."""


class TokenizeRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """POST /tokenize: a text, or a chat as the model would get it."""

    model: str | None = None
    prompt: str | None = None
    add_special_tokens: bool | None = None
    messages: list[ChatMessage] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None

    def check(self) -> None:
        if (self.prompt is None) == (self.messages is None):
            raise RequestError("prompt: give either prompt or messages")


def parse(body: bytes, kind: type[Body]) -> Body:
    """A request's body. Raises RequestError that names the field where there is one."""
    try:
        fields = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RequestError(f"the body is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise RequestError("the body must be a JSON object")
    try:
        request = msgspec.convert(_asked(fields, kind), kind, str_keys=True)
    except (msgspec.ValidationError, OverflowError) as error:
        raise RequestError(_readable(str(error))) from error
    request.check()
    return request


def _asked(fields: dict[str, Any], kind: type[msgspec.Struct]) -> dict[str, Any]:
    """A request's fields but for those that ask for nothing, in its options and messages, too."""
    kept = without_neutral(fields, kind)
    for name, inner in (("stream_options", StreamOptions), ("messages", ChatMessage)):
        given = kept.get(name)
        if isinstance(given, dict):
            kept[name] = without_neutral(given, inner, f"{name}.")
        elif isinstance(given, list):
            kept[name] = [
                without_neutral(one, inner, f"{name}[{i}].") if isinstance(one, dict) else one
                for i, one in enumerate(given)
            ]
    return kept


def _readable(reason: str) -> str:
    """msgspec's reason with the field in front."""
    if unknown := re.match(r"Object contains unknown field `(.*?)`", reason):
        return f"{unknown[1]}: unknown field, or not supported by this server; leave it out"
    if missing := re.match(r"Object missing required field `(.*?)`( - at `\$\.?(.*?)`)?", reason):
        return f"{f'{missing[3]}.' if missing[3] else ''}{missing[1]}: is missing"
    reason, _, place = reason.partition(" - at ")
    named = re.search(r"\$\.?([^`]+)", place)
    return f"{named[1] if named else 'body'}: {reason[:1].lower()}{reason[1:]}"
