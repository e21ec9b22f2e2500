"""The same requests through several layouts, in one run, the order alternated."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from soloist.bench.figures import Run, Series, Timing
from soloist.bench.plot import plot_compare
from soloist.engine.console import read_prompts
from soloist.engine.llm import LLM
from soloist.engine.model import Model
from soloist.engine.options import EngineOptions
from soloist.engine.outputs import RequestOutput
from soloist.errors import ConfigurationError, RequestError, SoloistError
from soloist.planner.plots import drawn
from soloist.scheduling.request import SamplingParams
from soloist.specs.layout import Layout

Prompts = Sequence[Sequence[int]]


def compare(
    model: str,
    layouts: Sequence[Layout],
    prompts: Prompts,
    params: SamplingParams,
    options: EngineOptions,
    repeats: int,
    console: Console,
) -> list[Series]:
    """Run all requests at once through each layout, `repeats` times, forwards and backwards in turn.

    Each run starts the ranks anew and warms them up with one request that does not count; loading is not timed.
    """
    series = {str(layout): Series(layout) for layout in layouts}
    options = msgspec.structs.replace(options, measure=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=repeats * len(layouts) * len(prompts))
        for repeat in range(repeats):
            for layout in layouts if repeat % 2 == 0 else reversed(layouts):
                progress.update(task, description=f"{layout}, run {repeat + 1} of {repeats}")
                run = run_layout(model, layout, prompts, params, options, lambda: progress.advance(task))
                series[str(layout)].runs.append(run)
    return list(series.values())


def prompts_for(
    model: str, options: EngineOptions, requests: int, tokens: int, file: Path | None, seed: int
) -> list[list[int]]:
    """`requests` prompts: the lines of `file` in turn, or random ids. Raises ConfigurationError."""
    if requests < 1:
        raise ConfigurationError.of("--requests", requests, "must be at least 1")
    found = Model.find(model, options.random_weights is not None)
    if file is None:
        draw = random.Random(seed)
        return [[draw.randrange(found.spec.vocab) for _ in range(tokens)] for _ in range(requests)]
    if found.tokenizer is None:
        raise ConfigurationError.of("--prompt-file", str(file), "this model has no tokenizer; use --prompt-tokens")
    encode = found.read_tokenizer().encode
    lines = [encode(str(text)).ids for text in read_prompts([], file, token_ids=False)]
    return [lines[i % len(lines)] for i in range(requests)]


def run_layout(
    model: str,
    layout: Layout,
    prompts: Prompts,
    params: SamplingParams,
    options: EngineOptions,
    on_done: Callable[[], None] | None = None,
) -> Run:
    """All requests once through one layout. Raises RequestError where one of them cannot be served."""
    with LLM(model, layout=layout, options=options, show_progress=False) as llm:
        llm.generate([list(prompts[0])], msgspec.structs.replace(params, max_tokens=2))
        llm.figures()
        start = time.perf_counter()
        outputs = llm.generate([list(prompt) for prompt in prompts], params, on_done=on_done)
        wall_s = time.perf_counter() - start
        figures = list(llm.figures().values())
    for output in outputs:
        if output.error:
            raise RequestError(output.error)
    completions = [completion for output in outputs for completion in output.outputs]
    return Run(
        layout=layout,
        gpus_per_node=options.gpus_per_node,
        wall_s=wall_s,
        prompt_tokens=sum(len(prompt) for prompt in prompts),
        timings=[timing for output in outputs for timing in timings(output)],
        figures=figures,
        outputs=[tuple(completion.tokens) for completion in completions],
        margin=min(completion.margin for completion in completions),
    )


def timings(output: RequestOutput) -> list[Timing]:
    """One for each continuation of a request."""
    return [Timing(c.first_token_s, c.last_token_s, len(c.tokens)) for c in output.outputs]


def check_greedy(series: Sequence[Series]) -> str:
    """One line that says whether every layout gave the first one's tokens. Raises SoloistError at a difference.

    In fp32 a row's last bits depend on how many rows it is multiplied with, so equality is claimed together with the
    smallest margin between the two best logits.
    """
    reference = series[0].runs[0]
    for other in series:
        for run in other.runs:
            for request, (found, expected) in enumerate(zip(run.outputs, reference.outputs, strict=True)):
                if found != expected:
                    at = next((i for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b), len(found))
                    raise SoloistError(
                        f"request {request}: {run.layout} and {reference.layout} differ from token {at} on; smallest "
                        f"margin between the two best logits: {min(run.margin, reference.margin):.2e}"
                    )
    margin = min(run.margin for one in series for run in one.runs)
    names = ", ".join(str(one.layout) for one in series)
    return (
        f"checked: equal greedy tokens from {names} ({reference.tokens} tokens each; smallest margin between the two "
        f"best logits {margin:.2e})"
    )


def write(series: Sequence[Series], folder: Path) -> list[Path]:
    """`compare.jsonl`, one record a layout, and, with matplotlib, `compare.png`. Returns what was written."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = folder / "compare.jsonl"
    lines.write_bytes(b"".join(msgspec.json.encode(one.record()) + b"\n" for one in series))
    return [lines, *drawn(partial(plot_compare, [one.record() for one in series]), folder / "compare.png")]
