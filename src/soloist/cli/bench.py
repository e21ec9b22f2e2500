"""`soloist bench …`: measurements."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from soloist.cli import bench_gpus
from soloist.cli.options import (
    DeviceOption,
    DtypeOption,
    KvTokensOption,
    Model,
    RandomWeightsOption,
    SetOption,
    TransportOption,
    engine_options,
    to_fill,
    to_write,
)
from soloist.errors import ConfigurationError

if TYPE_CHECKING:
    from rich.console import Console

app = typer.Typer(help="Measure: layouts, the exchange, the expert layer, a server.", no_args_is_help=True)


def _console() -> Console:
    from soloist.planner.commands import console

    return console()


@app.command()
def compare(
    model: Model,
    layouts: Annotated[list[str], typer.Option("--layout", help="Give it once for each layout to compare.")],
    requests: Annotated[int, typer.Option(min=1, help="Requests, all sent at once.")] = 8,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Random token ids of each prompt.")] = 32,
    prompt_file: Annotated[Path | None, typer.Option(help="Instead: a file with a prompt in each line.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Output tokens of each request.")] = 32,
    temperature: Annotated[float, typer.Option(help="0 takes the best token always.")] = 0.0,
    runs: Annotated[
        int, typer.Option(min=1, help="Runs of each layout, the order alternating; figures are medians.")
    ] = 2,
    gpus_per_node: Annotated[int, typer.Option(help="Ranks of a node, for the bytes inside and across.")] = 8,
    check_greedy: Annotated[bool, typer.Option("--check-greedy", help="Fail unless all give the same tokens.")] = False,
    out: Annotated[Path, typer.Option(callback=to_fill, help="Folder for compare.jsonl and compare.png.")] = Path(
        "out/compare"
    ),
    seed: Annotated[int, typer.Option(min=0, help="Of the random prompts and of sampling.")] = 0,
    device: DeviceOption = "auto",
    dtype: DtypeOption = None,
    transport: TransportOption = "auto",
    kv_tokens: KvTokensOption = None,
    random_weights: RandomWeightsOption = None,
    settings: SetOption = None,
) -> None:
    """The same requests through several layouts, in one run."""
    from soloist.bench import compare as bench
    from soloist.bench.table import comparison
    from soloist.scheduling.request import SamplingParams
    from soloist.specs.layout import Layout

    settings = [f"gpus_per_node={gpus_per_node}", *(settings or [])]
    if check_greedy and temperature:
        raise ConfigurationError.of("--temperature", temperature, "--check-greedy needs 0")
    options = engine_options(device, dtype, transport, kv_tokens, random_weights, settings)
    prompts = bench.prompts_for(model, options, requests, prompt_tokens, prompt_file, seed)
    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=seed, ignore_eos=True)
    console = _console()
    series = bench.compare(model, [Layout.parse(text) for text in layouts], prompts, params, options, runs, console)
    console.print(comparison(series, f"{len(prompts)} requests of {max_tokens} tokens; medians of {runs} run(s)"))
    if check_greedy:
        console.print(bench.check_greedy(series), style="green", highlight=False)
    for path in bench.write(series, out):
        console.print(f"wrote {path}", style="dim", highlight=False)


@app.command()
def overhead(
    model: Model,
    layout: Annotated[str, typer.Option("--layout", help="One layout.")] = "ep1",
    streams: Annotated[int, typer.Option(min=1, help="Requests at once.")] = 256,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of each prompt.")] = 128,
    tokens: Annotated[int, typer.Option(min=1, help="Output tokens of each request.")] = 128,
    runs: Annotated[int, typer.Option(min=1, help="Of each way, in ABBA order; figures are medians.")] = 2,
    lines: Annotated[Path | None, typer.Option(callback=to_write, help="Append the JSON line to this file.")] = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = None,
    transport: TransportOption = "auto",
    random_weights: RandomWeightsOption = None,
    settings: SetOption = None,
) -> None:
    """What the server costs: time per output token through HTTP against the same ranks without a server."""
    import json

    from soloist.bench.overhead import measure

    options = engine_options(device, dtype, transport, None, random_weights, settings)
    record = measure(model, layout, options, streams, prompt, tokens, runs, partial(typer.echo, err=True))
    typer.echo(json.dumps(record))
    if lines:
        with lines.open("a") as file:
            file.write(json.dumps(record) + "\n")


@app.command("serve")
def serve_(
    url: Annotated[str, typer.Argument(help="Of any OpenAI-compatible server: http://127.0.0.1:8000.")],
    model: Annotated[str, typer.Option("--model", help="What the server calls the model.")],
    load: Annotated[
        str,
        typer.Option(
            help="prompt=100,output=50,rate=20,spread=0.5,prefix=0.5,ttft=2s,arrival=poisson (bursts, uniform)"
        ),
    ] = "prompt=100,output=50,rate=10",
    requests: Annotated[int, typer.Option(min=1, help="How many.")] = 100,
    dataset: Annotated[Path | None, typer.Option(help="ShareGPT-style JSON; instead of random token ids.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Prompts of --dataset are messages to a chat model.")] = False,
    prefixes: Annotated[
        int, typer.Option(min=1, help="Different common parts that prompts have, with prefix=SHARE.")
    ] = 1,
    vocab: Annotated[int, typer.Option(min=1, help="Random token ids are drawn below this.")] = 1000,
    api_key: Annotated[str | None, typer.Option(envvar="OPENAI_API_KEY", help="Key to send.")] = None,
    timeout: Annotated[float, typer.Option(min=0.001, help="Seconds for an answer.")] = 600.0,
    out: Annotated[
        Path, typer.Option(callback=to_fill, help="Folder for requests.jsonl, serve.jsonl, serve.png.")
    ] = Path("out/serve"),
    seed: Annotated[int, typer.Option(min=0, help="Of lengths, arrivals and prompts.")] = 0,
) -> None:
    """Send requests to a server when they are due, whatever it answers, and measure what users would see."""
    import json

    from soloist.bench import serve as bench
    from soloist.bench.sse import Client, run
    from soloist.specs.workload import Load

    wanted = Load.parse(load)
    if chat and dataset is None:
        raise ConfigurationError.of("--chat", chat, "messages are texts: give --dataset, too")
    planned = (
        bench.plan_file(wanted, dataset, requests, model, seed, chat)
        if dataset
        else bench.plan_random(wanted, requests, model, seed, vocab, prefixes)
    )
    path = "/v1/chat/completions" if chat else "/v1/completions"
    outcomes = run(bench.send(Client(url, api_key, timeout), planned, path))
    summary = bench.summarise(outcomes, wanted, dataset)
    console = _console()
    console.print(bench.table(summary))
    for path in bench.write(outcomes, summary, out):
        console.print(f"wrote {path}", style="dim", highlight=False)
    for error, times in summary["errors"].items():
        console.print(f"{times} × {error}", style="red", highlight=False, markup=False)
    typer.echo(json.dumps(summary))
    if not summary["answered"]:
        raise typer.Exit(1)


@app.command("front-end")
def front_end(
    streams: Annotated[int, typer.Option(min=1, help="Requests at once.")] = 256,
    tokens: Annotated[int, typer.Option(min=1, help="Of each request.")] = 400,
    leaders: Annotated[int, typer.Option(min=1, help="That send one message a step.")] = 4,
    step_ms: Annotated[
        float, typer.Option(min=0.1, help="Time of a step; the tokens asked for are streams / step.")
    ] = 10.0,
) -> None:
    """Tokens a second that the server streams when the ranks are no limit."""
    import json

    from soloist.bench.front_end import measure

    typer.echo(json.dumps(measure(streams, tokens, leaders, step_ms / 1e3)))


@app.command()
def offline(
    model: Model,
    layouts: Annotated[list[str], typer.Option("--layout", help="Give it once for each layout to compare.")],
    prefills: Annotated[list[str] | None, typer.Option("--prefill", help="Prompts × tokens, as 8x8000.")] = None,
    decodes: Annotated[list[int] | None, typer.Option("--decode", help="Sequences that decode together.")] = None,
    context: Annotated[int, typer.Option(min=1, help="Tokens of a prompt whose continuation is timed.")] = 128,
    tokens: Annotated[int, typer.Option(min=1, help="Of the continuation.")] = 128,
    runs: Annotated[
        int, typer.Option(min=0, help="Starts of each layout, the order alternating; figures are medians.")
    ] = 2,
    repeats: Annotated[int, typer.Option(min=1, help="Of each point within a start.")] = 2,
    routing: Annotated[bool, typer.Option("--routing", help="Count the experts in a start that is not timed.")] = False,
    lines: Annotated[
        Path | None, typer.Option(callback=to_write, help="Append a JSON line for each point to this file.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the random prompts.")] = 0,
    device: DeviceOption = "auto",
    dtype: DtypeOption = None,
    transport: TransportOption = "auto",
    kv_tokens: KvTokensOption = None,
    random_weights: RandomWeightsOption = None,
    settings: SetOption = None,
) -> None:
    """Prefill throughput and time of a decoding step of several layouts, in one run, beside the machine's limit."""
    from soloist.bench import offline as bench
    from soloist.bench.table import offline as table
    from soloist.engine.model import Model as Found
    from soloist.specs.layout import Layout

    options = engine_options(device, dtype, transport, kv_tokens, random_weights, settings)
    wanted = [bench.Prefill.parse(text) for text in prefills or []]
    load = bench.Load(wanted, decodes or ([] if wanted else [1]), context, tokens, repeats)
    chosen = [Layout.parse(text) for text in layouts]

    def told(point: dict[str, Any]) -> None:
        shown = ", ".join(f"{1e3 * each:,.2f} ms" for each in point["times_s"])
        typer.echo(f"{point['at_s']:6.1f} s  {point['layout']}, {point['what']}, {point['shape']}: {shown}", err=True)
        if lines:
            bench.write([point], lines)

    starts = list(bench.compare(model, chosen, load, options, runs, seed, told))
    machine = bench.gpu() if options.device != "cpu" else ""
    written = bench.records(Found.find(model, random_weights is not None).spec, load, starts, options, machine)
    if routing:
        written.append(bench.routing(model, chosen[0], load, options, seed))
    _console().print(table(written))
    bench.write(written, lines)


@app.command()
def reading(
    folder: Annotated[Path, typer.Argument(help="Of a checkpoint.")],
    device: Annotated[str, typer.Option(help="cpu or cuda: where the weights go.")] = "cpu",
    repeats: Annotated[int, typer.Option(min=1, help="Figures are medians.")] = 3,
) -> None:
    """How fast a checkpoint is read, beside the disk itself; drops its files from the page cache."""
    from soloist.bench.reading import measure

    for name, rate in measure(folder, device, repeats).items():
        typer.echo(f"{name}: {rate:.2f} GB/s")


app.command()(bench_gpus.exchange)
app.command()(bench_gpus.layer)


@app.command()
def transport(
    kind: Annotated[str, typer.Option(help="shared_memory or gloo.")] = "shared_memory",
    ranks: Annotated[int, typer.Option(min=1, help="Processes on this machine.")] = 16,
    rows: Annotated[int, typer.Option(min=1, help="To every rank.")] = 8,
    width: Annotated[int, typer.Option(min=1, help="fp32 elements of a row.")] = 256,
) -> None:
    """Small messages between processes of this machine: what a decoding step pays on a CPU."""
    from soloist.bench.transport import time_transport

    for name, seconds in time_transport(kind, ranks, rows, width).items():
        typer.echo(f"{kind}, {ranks} ranks: {name}: {seconds * 1e6:,.0f} µs")


@app.command()
def memory(
    model: Model,
    layout: Annotated[str, typer.Option("--layout", help="ep16, tp8pp2, …")] = "ep1",
    step_tokens: Annotated[int, typer.Option(min=1, help="Tokens of the largest step of an attention group.")] = 2048,
    kv_tokens: Annotated[int, typer.Option(min=1, help="KV cache of an attention group.")] = 8192,
    device: DeviceOption = "auto",
    dtype: DtypeOption = None,
    random_weights: RandomWeightsOption = None,
    settings: SetOption = None,
) -> None:
    """What every rank holds, part by part, beside the planner's table."""
    from dataclasses import asdict
    from json import dumps

    from soloist.bench import memory as bench
    from soloist.specs.layout import Layout

    options = engine_options(device, dtype, "auto", kv_tokens, random_weights, settings)
    found = list(bench.check(model, Layout.parse(layout), options, step_tokens, kv_tokens))
    _console().print(bench.table(found))
    typer.echo(dumps({"what": "memory", "model": model, "layout": layout, "parts": [asdict(part) for part in found]}))
