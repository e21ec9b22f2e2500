"""Tokens to text as they come: never half a character, never part of a stop string that may still complete."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from tokenizers import Tokenizer

from soloist.scheduling.request import FinishReason, SamplingParams

UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what decoders write for bytes that are no character, or not yet one
CONTEXT = 4  # tokens of the prompt that a decoder may need to space the first new one rightly


class Detokeniser:
    """The text of a growing continuation. The pieces joined are what it adds to the text of the whole."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], skip_special: bool = True) -> None:
        """skip_special: special tokens have no text."""
        self._tokenizer, self._skip_special = tokenizer, skip_special
        self._window = list(prompt[-CONTEXT:])  # the tokens of the last piece, for context, and those held back
        if UNFINISHED in self._decode():
            self._window = []
        self._context = len(self._window)
        self._shown = len(self._decode())  # characters of the window's text that have been given out

    def push(self, tokens: Sequence[int]) -> str:
        """The text that is certain once these tokens are known."""
        return "".join(self._push(token) for token in tokens)

    def _push(self, token: int) -> str:
        self._window.append(token)
        text = self._decode()
        if text.endswith(UNFINISHED) or len(text) <= self._shown:
            return ""
        piece = text[self._shown :]
        del self._window[: self._context]
        self._context, self._shown = len(self._window), len(self._decode())
        return piece

    def flush(self) -> str:
        """The rest: what can no longer become a character."""
        text = self._decode()
        piece, self._shown = text[self._shown :], len(text)
        return piece

    def _decode(self) -> str:
        return self._tokenizer.decode(self._window, skip_special_tokens=self._skip_special)


class StopFinder:
    """Cuts a growing text at the first stop string to be complete; gives out earlier text as soon as it is safe."""

    def __init__(self, stops: Sequence[str], included: bool = False) -> None:
        """included: cut behind the stop string, not before it."""
        self._stops, self._included = stops, included
        self._held = ""  # may be the beginning of a stop string

    def push(self, text: str) -> tuple[str, bool]:
        """The text that is certain now, and whether a stop string was found; nothing may be pushed after that."""
        text = self._held + text
        found = [(start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0]
        if found:
            stop, start = min(found)
            return text[: stop if self._included else start], True
        keep = max((self._overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def flush(self) -> str:
        """What was held back for a stop string that did not come."""
        held, self._held = self._held, ""
        return held

    @staticmethod
    def _overlap(text: str, stop: str) -> int:
        """Length of the longest end of `text` that begins `stop`."""
        longest = min(len(stop) - 1, len(text))
        return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


@dataclass
class TextStream:
    """One sequence's way from tokens to text. Without a tokenizer the text stays empty."""

    tokenizer: Tokenizer | None
    prompt: Sequence[int]
    params: SamplingParams
    _detokeniser: Detokeniser | None = field(init=False)
    _finder: StopFinder = field(init=False)
    _tokens: int = 0

    def __post_init__(self) -> None:
        wish = self.params
        self._detokeniser = (
            Detokeniser(self.tokenizer, self.prompt, wish.skip_special_tokens) if self.tokenizer else None
        )
        self._finder = StopFinder(wish.stop, wish.include_stop_str_in_output)

    def push(self, tokens: Sequence[int], ending: FinishReason | None) -> tuple[str, bool]:
        """The text that is certain now, all of it where it is `ending`, and whether a stop string ends it.

        A token that ends it is among the tokens. Stop strings are looked for behind the first `min_tokens` of them.
        """
        if self._detokeniser is None:
            return "", False
        self._tokens += len(tokens)
        hides_last = ending == "stop" and not self.params.include_stop_str_in_output
        new = self._detokeniser.push(tokens[:-1] if hides_last else tokens)
        new += self._detokeniser.flush() if ending else ""
        if self._tokens <= self.params.min_tokens:
            return new, False
        text, stopped = self._finder.push(new)
        return text + (self._finder.flush() if ending and not stopped else ""), stopped
