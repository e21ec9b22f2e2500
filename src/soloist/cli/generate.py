"""`soloist generate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from soloist.cli.options import (
    DeviceOption,
    DtypeOption,
    KvTokensOption,
    LayoutOption,
    Model,
    PlacementOption,
    PlanOption,
    RandomWeightsOption,
    SetOption,
    TransportOption,
    deployment,
    engine_options,
    read_plan,
)


def generate(
    model: Model,
    prompts: Annotated[list[str] | None, typer.Argument(help="Texts to continue.")] = None,
    layout: LayoutOption = None,
    placement: PlacementOption = None,
    plan: PlanOption = None,
    max_tokens: Annotated[int, typer.Option(help="Tokens of a continuation at most.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 takes the best token always.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="0: off.")] = 0,
    top_p: Annotated[float, typer.Option(help="1: off.")] = 1.0,
    min_p: Annotated[float, typer.Option(help="0: off.")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="1: off.")] = 1.0,
    presence_penalty: Annotated[float, typer.Option(help="0: off.")] = 0.0,
    frequency_penalty: Annotated[float, typer.Option(help="0: off.")] = 0.0,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same text.")] = None,
    n: Annotated[int, typer.Option("-n", help="Continuations of each prompt.")] = 1,
    stop: Annotated[list[str] | None, typer.Option(help="A text that ends a continuation.")] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on to --max-tokens.")] = False,
    prompt_file: Annotated[Path | None, typer.Option(help="File with a prompt in each line; - for stdin.")] = None,
    token_ids: Annotated[bool, typer.Option("--token-ids", help="Prompts are ids: 17,4,99.")] = False,
    chat: Annotated[bool, typer.Option("--chat", help="Prompts are messages to a chat model.")] = False,
    stream: Annotated[bool, typer.Option(help="Print text as it comes.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object for each prompt.")] = False,
    explain: Annotated[bool, typer.Option("--explain", help="Say how tokens crossed nodes, and why.")] = False,
    device: DeviceOption = "auto",
    dtype: DtypeOption = None,
    transport: TransportOption = "auto",
    kv_tokens: KvTokensOption = None,
    random_weights: RandomWeightsOption = None,
    settings: SetOption = None,
) -> None:
    """Continue prompts with a model on local ranks, or on those of torchrun, mpirun or srun."""
    from soloist.engine.console import check_prompts, print_answers, print_exchange, read_prompts
    from soloist.engine.llm import LLM
    from soloist.scheduling.request import SamplingParams

    params = SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        seed=seed,
        n=n,
        stop=tuple(stop or ()),
        ignore_eos=ignore_eos,
    )
    params.check()  # before anything is loaded
    wanted = read_prompts(prompts or [], prompt_file, token_ids)
    made = read_plan(plan, layout)
    options = engine_options(device, dtype, transport, kv_tokens, random_weights, settings, made)
    chosen = deployment(model, layout, placement, made, options)
    check_prompts(wanted, chosen[0], options.random_weights is not None)
    with LLM(*chosen, options) as llm:
        print_answers(llm, wanted, params, chat, "json" if as_json else "stream" if stream else "whole")
        if explain:
            print_exchange(llm)
