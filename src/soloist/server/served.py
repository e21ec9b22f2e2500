"""What is served: a name, the front end of its ranks, and the way from texts and chats to tokens."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from soloist.engine.chat import ChatTemplate
from soloist.engine.llm import LLM
from soloist.errors import RequestError
from soloist.frontend.frontend import FrontEnd
from soloist.server.slo import Slo

if TYPE_CHECKING:
    from soloist.planner.plan import Plan  # brings the planner, which serving does without

LONG_TEXT = 4096  # characters from which a thread encodes it, lest streams wait


@dataclass(frozen=True)
class Served:
    """A model behind a front end. Without a tokenizer prompts are token ids."""

    name: str
    front: FrontEnd
    tokenizer: Any = None
    template: ChatTemplate | None = None
    gpus_per_node: int = 8
    slo: Slo = Slo()
    plan: Plan | None = None  # what the deployment was planned to do
    created: int = field(default_factory=lambda: int(time.time()))

    @classmethod
    def of(cls, llm: LLM, name: str, slo: Slo = Slo(), plan: Plan | None = None) -> Served:  # noqa: B008
        return cls(name, llm.front, llm.tokenizer, llm.template, llm.options.gpus_per_node, slo, plan)

    async def encode(self, prompt: str | Sequence[int], special: bool = True) -> Sequence[int]:
        """A prompt as tokens; `special` ones added as the tokenizer does."""
        return await self._encode(prompt, special) if isinstance(prompt, str) else prompt

    async def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], wishes: Mapping[str, Any] | None = None, answers: bool = True
    ) -> Sequence[int]:
        """A conversation up to where the model answers; see `ChatTemplate.render`."""
        if self.template is None:
            raise RequestError("messages: this model has no chat template; use /v1/completions, or --chat-template")
        return await self._encode(self.template.render(messages, wishes, answers), False)

    async def _encode(self, text: str, special: bool) -> Sequence[int]:
        if self.tokenizer is None:
            raise RequestError("prompt: this model has no tokenizer; give token ids")
        if len(text) < LONG_TEXT:
            return self.tokenizer.encode(text, add_special_tokens=special).ids
        return (await asyncio.to_thread(self.tokenizer.encode, text, add_special_tokens=special)).ids

    def decode(self, tokens: Sequence[int]) -> str:
        """Tokens as text, special ones shown. Raises RequestError."""
        if self.tokenizer is None:
            raise RequestError("tokens: this model has no tokenizer")
        vocab = self.front.requests.vocab
        if any(not 0 <= token < vocab for token in tokens):
            raise RequestError(f"tokens: must lie between 0 and {vocab - 1}")
        return self.tokenizer.decode(tokens, skip_special_tokens=False)

    def text_of(self, token: int) -> str:
        """One token as text; a part of a character is shown as the replacement character."""
        return self.tokenizer.decode([token], skip_special_tokens=False) if self.tokenizer else f"token_id:{token}"
