"""`soloist bench …`: measurements."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from soloist.cli.options import (
    DeviceOption,
    DtypeOption,
    KvTokensOption,
    Model,
    RandomWeightsOption,
    SetOption,
    TransportOption,
    engine_options,
)
from soloist.errors import ConfigurationError

app = typer.Typer(help="Measure: layouts, the exchange, the expert layer.", no_args_is_help=True)


@app.command()
def compare(
    model: Model,
    layouts: Annotated[list[str], typer.Option("--layout", help="Give it once for each layout to compare.")],
    requests: Annotated[int, typer.Option(help="Requests, all sent at once.")] = 8,
    prompt_tokens: Annotated[int, typer.Option(help="Random token ids of each prompt.")] = 32,
    prompt_file: Annotated[Path | None, typer.Option(help="Instead: a file with a prompt in each line.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Output tokens of each request.")] = 32,
    temperature: Annotated[float, typer.Option(help="0 takes the best token always.")] = 0.0,
    runs: Annotated[int, typer.Option(help="Runs of each layout, the order alternating; figures are medians.")] = 2,
    gpus_per_node: Annotated[int, typer.Option(help="Ranks of a node, for the bytes inside and across.")] = 8,
    check_greedy: Annotated[bool, typer.Option("--check-greedy", help="Fail unless all give the same tokens.")] = False,
    out: Annotated[Path, typer.Option(help="Folder for compare.jsonl and compare.png.")] = Path("out/compare"),
    seed: Annotated[int, typer.Option(help="Of the random prompts and of sampling.")] = 0,
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
    console = Console()
    series = bench.compare(model, [Layout.parse(text) for text in layouts], prompts, params, options, runs, console)
    console.print(comparison(series, f"{len(prompts)} requests of {max_tokens} tokens; medians of {runs} run(s)"))
    if check_greedy:
        console.print(bench.check_greedy(series), style="green", highlight=False)
    for path in bench.write(series, out):
        console.print(f"wrote {path}", style="dim", highlight=False)
