"""Records the routing of a model on a text: `soloist record`."""

from __future__ import annotations

import lzma
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from soloist.engine.llm import LLM
from soloist.errors import ConfigurationError
from soloist.placement.recording import merge
from soloist.placement.trace import RoutingTrace
from soloist.scheduling.request import SamplingParams
from soloist.specs.files import read_text


def record(
    model: str | Path, texts: Sequence[Path], tokens: int, window: int = 512, sample: int | None = None,
    mode: Literal["counts", "ids"] = "ids", layout: str = "ep1", **options: Any,
) -> RoutingTrace:  # fmt: skip
    """Run the first `tokens` tokens of the files through a model as prompts of `window` tokens and record its routing.

    sample: tokens whose choices are kept; None keeps all. options: fields of EngineOptions. Files may be .xz.
    """
    with LLM(model, layout, record=mode, prefix_caching=False, **options) as llm:
        return record_prompts(llm, windows(llm, texts, tokens, window)).keep(tokens if sample is None else sample)


def record_prompts(llm: LLM, prompts: Sequence[Sequence[int]]) -> RoutingTrace:
    """The routing of some prompts, each computed up to its first new token, by an LLM that records."""
    if llm.options.record is None:
        raise ConfigurationError.of("record", None, "must be ids or counts when the LLM is made")
    llm.figures()  # forget what came before
    outputs = llm.generate(list(prompts), SamplingParams(max_tokens=1))
    if failed := [output.error for output in outputs if output.error]:
        raise ConfigurationError.of("prompts", failed[0], "cannot be recorded")
    return merge(llm.spec, [figures.routing for figures in llm.figures().values()])


def windows(llm: LLM, texts: Sequence[Path], tokens: int, window: int) -> list[list[int]]:
    """The first `tokens` tokens of the files, cut into runs of `window`; a rest shorter than that is left out."""
    found: list[int] = []
    for path in texts:
        found += llm.tokens(_read(path))
        if len(found) >= tokens:
            break
    prompts = [found[start : start + window] for start in range(0, min(tokens, len(found)) - window + 1, window)]
    if not prompts:
        raise ConfigurationError.of("text", f"{len(found)} tokens", f"must fill at least one window of {window}")
    return prompts


def _read(path: Path) -> str:
    if path.suffix != ".xz":
        return read_text(path, "text")
    try:
        with lzma.open(path, "rt", encoding="utf-8") as file:
            return file.read()
    except (OSError, EOFError, UnicodeDecodeError, lzma.LZMAError) as error:
        raise ConfigurationError.of("text", str(path), f"cannot be read: {error}") from error


def run_record(
    model: str, texts: Sequence[Path], output: Path, tokens: int = 32768, window: int = 512, sample: int | None = None,
    mode: Literal["counts", "ids"] = "ids", layout: str = "ep1", **options: Any,
) -> None:  # fmt: skip
    """`record`, written to a file, with a line about it on stdout."""
    trace = record(model, texts, tokens, window, sample, mode, layout, **options)
    trace.save(output)
    kept = trace.sample.tokens if trace.sample else 0
    print(
        f"{output}: {trace.tokens} tokens of {trace.model}, the choices of {kept} kept, {output.stat().st_size} bytes"
    )
