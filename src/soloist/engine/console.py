"""`soloist generate`: prompts from a command line, answers to a terminal or as JSON lines."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import msgspec
from rich.console import Console

from soloist.engine.llm import LLM, Prompt
from soloist.engine.model import Model
from soloist.engine.outputs import RequestOutput
from soloist.errors import ConfigurationError, RequestError
from soloist.scheduling.request import SamplingParams
from soloist.specs.files import read_text

Form = Literal["stream", "whole", "json"]


def read_prompts(given: Sequence[str], file: Path | None, token_ids: bool) -> list[Prompt]:
    """The prompts of the command line and of the lines of `file` (`-`: stdin), as texts or as token ids."""
    texts = list(given)
    if file is not None:
        texts += _lines(file)
    if not texts:
        raise ConfigurationError.of("prompt", texts, "give at least one, or --prompt-file")
    return [_ids(text) for text in texts] if token_ids else list(texts)


def check_prompts(prompts: Sequence[Prompt], model: str | Path, random_weights: bool) -> None:
    """Raise RequestError for texts to a model without a tokenizer, before its weights are made or read."""
    if any(isinstance(prompt, str) for prompt in prompts) and Model.find(model, random_weights).tokenizer is None:
        raise RequestError(f"prompt: {model} has no tokenizer; give token ids (--token-ids 17,4,99)")


def print_answers(llm: LLM, prompts: Sequence[Prompt], params: SamplingParams, chat: bool, form: Form) -> None:
    """Answer all prompts on stdout; what it took goes to stderr. Raises RequestError if one could not be answered."""
    if chat:
        prompts = [llm.chat_tokens([{"role": "user", "content": prompt}]) for prompt in prompts]
    start = time.perf_counter()
    if form == "stream" and len(prompts) == params.n == 1:
        tokens = _stream(llm, prompts[0], params, echo=not chat)
        errors = []
    else:
        outputs = llm.generate(list(prompts), params)
        for prompt, output in zip(prompts, outputs, strict=True):
            print(_json(output) if form == "json" else _plain(prompt, output, echo=not chat), flush=True)
        tokens = sum(len(c.tokens) for output in outputs for c in output.outputs)
        errors = [output.error for output in outputs if output.error]
    seconds = time.perf_counter() - start
    summary = f"{llm.spec.name} on {llm.layout}: {tokens} tokens in {seconds:.2f} s, {tokens / seconds:.1f} tokens/s"
    Console(stderr=True).print(summary, style="dim", highlight=False)
    if errors:
        raise RequestError(f"{len(errors)} of {len(prompts)} prompts were not answered; the first: {errors[0]}")


def print_exchange(llm: LLM) -> None:
    """How tokens crossed nodes, and why so, on stderr."""
    for line in llm.figures()[0].exchange:
        Console(stderr=True).print(line, style="dim", highlight=False, soft_wrap=True)


def _stream(llm: LLM, prompt: Prompt, params: SamplingParams, echo: bool) -> int:
    """Print the prompt, and the continuation as it comes; returns the number of tokens."""
    count, head = 0, _shown(prompt) if echo else ""
    for part in llm.stream(prompt, params):
        count += len(part.tokens)
        text = part.text if llm.tokenizer else "".join(f" {token}" for token in part.tokens)
        print(head + text, end="", flush=True)
        head = ""
    print()
    return count


def _plain(prompt: Prompt, output: RequestOutput, echo: bool) -> str:
    head = _shown(prompt) if echo else ""
    if output.error:
        return f"{head} [{output.error}]"
    return "\n".join(head + (c.text or "".join(f" {token}" for token in c.tokens)) for c in output.outputs)


def _shown(prompt: Prompt) -> str:
    return prompt if isinstance(prompt, str) else " ".join(map(str, prompt))


def _json(output: RequestOutput) -> str:
    return msgspec.json.encode(output).decode()


def _lines(file: Path) -> list[str]:
    text = sys.stdin.read() if str(file) == "-" else read_text(file, "--prompt-file")
    return [line for line in text.splitlines() if line.strip()]


def _ids(text: str) -> list[int]:
    try:
        return [int(part) for part in text.replace(",", " ").split()]
    except ValueError:
        raise ConfigurationError.of("prompt", text, "with --token-ids a prompt is a list of numbers") from None
