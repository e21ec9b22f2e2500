"""`soloist bench exchange` and `soloist bench layer`: each is started once, and starts itself once for each GPU.

Heavy imports stand inside, since the command line reads this file.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from soloist.bench.shapes import (
    PRESETS,
    ExpertsOption,
    ExpertWidthOption,
    ModelOption,
    RoutingOption,
    TokensOption,
    TopKOption,
    Wanted,
    WidthOption,
)
from soloist.cli.options import to_write
from soloist.errors import ConfigurationError

LinesOption = Annotated[
    Path | None, typer.Option("--lines", callback=to_write, help="Append a JSON line for each point to this file.")
]
ExplainOption = Annotated[bool, typer.Option("--explain", help="Say what bounds each point.")]
TraceOption = Annotated[
    Path | None,
    typer.Option("--trace", callback=to_write, help="Write FILE-CASE.json for Perfetto, a row a stream, of rank 0."),
]
PRESETS_HELP = "prefill, decode, wire, all of them, vdev (PyTorch's, part of all), forms (where they cross), or none."


def exchange(
    preset: Annotated[str, typer.Option(help=PRESETS_HELP)] = "all",
    model: ModelOption = None,
    tokens: TokensOption = None,
    d_model: WidthOption = None,
    experts: ExpertsOption = None,
    top_k: TopKOption = None,
    routing: RoutingOption = None,
    lines: LinesOption = None,
    explain: ExplainOption = False,
    trace: TraceOption = None,
    sms: Annotated[int, typer.Option(min=1, help="Of the forms that are limited to so many.")] = 32,
    calls: Annotated[int, typer.Option(min=0, help="Compare this many calls in each form with NCCL.")] = 0,
    alone: Annotated[
        int | None, typer.Option(min=2, help="Those calls on one GPU, so many ranks on streams of it.")
    ] = None,
) -> None:
    """Dispatch and combine between the GPUs of this host, beside NCCL and the link's limit."""
    asked = locals()
    wanted = Wanted(model, tokens, d_model, None, experts, top_k, routing)
    if preset not in PRESETS:
        raise ConfigurationError.of("--preset", preset, f"choose one of {', '.join(PRESETS)}")
    _check(wanted, alone)
    if alone is not None:
        _only_calls(wanted, calls, lines, trace)
        from soloist.bench.soak import soak_alone

        soak_alone(alone, calls)
        raise typer.Exit
    if "RANK" not in os.environ:
        code = _on_every_gpu("exchange", asked)
        if not code and preset in ("all", "prefill"):  # which chooses PyTorch's backend, so it has its own processes
            code = _on_every_gpu("exchange", asked | {"preset": "vdev", "trace": None, "calls": 0})
        raise typer.Exit(code)
    from soloist.bench.exchange import measure
    from soloist.bench.vdev import measure_vdev

    points = measure_vdev(wanted) if preset == "vdev" else measure(preset, wanted, trace, calls, sms)
    _report_once(points, lines, explain)


def layer(
    model: ModelOption = None,
    tokens: TokensOption = None,
    d_model: WidthOption = None,
    width: ExpertWidthOption = None,
    experts: ExpertsOption = None,
    top_k: TopKOption = None,
    routing: RoutingOption = None,
    chunks: Annotated[int, typer.Option(min=1, help="Parts of a prefill that travel and are computed in turn.")] = 1,
    pause_s: Annotated[float, typer.Option(min=0, help="Between repeats of prefill, so that clocks stay up.")] = 0.03,
    alone: Annotated[
        int | None, typer.Option(min=1, help="On one GPU what a rank of so many computes, nothing travelling.")
    ] = None,
    parts: Annotated[bool, typer.Option("--parts", help="Each kernel of the layer alone as well.")] = False,
    forms: Annotated[
        bool, typer.Option("--forms", help="Instead: each form of the exchange, for 512 to 4096 tokens of a rank.")
    ] = False,
    lines: LinesOption = None,
    explain: ExplainOption = False,
    trace: TraceOption = None,
) -> None:
    """A whole MoE layer on the GPUs of this host, beside its floor and the portable path."""
    asked = locals()
    wanted = Wanted(model, tokens, d_model, width, experts, top_k, routing)
    _check(wanted, alone, with_experts=True, chunks=chunks)
    if alone is not None:
        for option, value in {"--forms": forms, "--trace": trace, "--chunks": chunks if chunks > 1 else None}.items():
            if value:
                raise ConfigurationError.of(option, str(value), "needs an exchange; leave out --alone")
    if "RANK" not in os.environ and alone is None:
        raise typer.Exit(_on_every_gpu("layer", asked))
    from soloist.bench.layer import measure, measure_alone

    if alone is not None:
        points = measure_alone(wanted, alone, pause_s, parts)
    else:
        points = measure(wanted, chunks, pause_s, parts, forms, trace)
    _report_once(points, lines, explain)


def _only_calls(wanted: Wanted, calls: int, lines: Path | None, trace: Path | None) -> None:
    """Raises ConfigurationError where something else is asked of one GPU, or nothing."""
    if not calls:
        raise ConfigurationError.of("--calls", calls, "with --alone, say how many calls are compared")
    for option, value in {"a shape": " ".join(wanted.flags()), "--lines": lines, "--trace": trace}.items():
        if value:
            raise ConfigurationError.of(option, str(value), "--alone compares calls and measures nothing; leave it out")


def _check(wanted: Wanted, alone: int | None, with_experts: bool = False, chunks: int = 1) -> None:
    """Raises ConfigurationError for a shape that cannot be measured, before ranks are started."""
    if not wanted:
        return
    from soloist.probes.gpus import gpus_here

    sizes = wanted.sizes(alone or max(1, gpus_here()), with_experts)
    if sizes["tokens"] % chunks:
        raise ConfigurationError.of("--chunks", chunks, f"must divide the {sizes['tokens']} tokens of a rank")


def _report_once(points: Iterable[Any], lines: Path | None, explain: bool) -> None:
    """What all ranks measure, by the first one."""
    from soloist.bench.report import report

    if os.environ.get("RANK", "0") == "0":
        report(points, lines, explain)
    else:
        list(points)


def _on_every_gpu(name: str, options: Mapping[str, Any]) -> int:
    """The same command with the same options, once for each GPU; the worst exit code."""
    from soloist.probes.gpus import in_ranks

    words: list[str] = []
    for option, value in options.items():
        flag = "--" + option.replace("_", "-")
        if value is True:
            words.append(flag)
        elif value is not None and value is not False:
            words += [flag, str(value)]
    return in_ranks("soloist", ["bench", name, *words])
