"""The command line: one short function for each command. Heavy imports stand inside the commands."""

from __future__ import annotations

import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

import soloist
from soloist.errors import ConfigurationError, RequestError, SoloistError

if TYPE_CHECKING:
    from soloist.engine.options import EngineOptions

USER_ERROR, FAILURE = 2, 1  # exit codes

Model = Annotated[str, typer.Argument(help="Folder of a checkpoint, hub id, or name of a preset.")]
LayoutOption = Annotated[str, typer.Option("--layout", help="How to cut the model: ep16, tp8pp2, ep64tp2, attn8ep8, …")]
PlacementOption = Annotated[Path | None, typer.Option("--placement", help="File that says which expert lies where.")]
DeviceOption = Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")]
DtypeOption = Annotated[str | None, typer.Option("--dtype", help="float32, bfloat16 or float16.")]
TransportOption = Annotated[str, typer.Option("--transport", help="auto, shared_memory, gloo or nccl.")]
KvTokensOption = Annotated[int | None, typer.Option("--kv-tokens", help="KV cache of an attention group.")]
RandomWeightsOption = Annotated[int | None, typer.Option("--random-weights", metavar="SEED", help="Make weights up.")]
SetOption = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any other engine option.")]


class Commands(TyperGroup):
    """Prints an error as one red line, with its traceback only where that was asked for (-v)."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except SoloistError as error:
            _print_error(error, str(error), ctx.params["verbose"])
            raise typer.Exit(USER_ERROR if isinstance(error, ConfigurationError | RequestError) else FAILURE) from error


app = typer.Typer(cls=Commands, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def soloist_(
    version: Annotated[bool, typer.Option("--version", is_eager=True, help="Print the version.")] = False,
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="Show tracebacks.")] = False,
) -> None:
    """Plan, run and serve Mixture-of-Experts language models with large expert parallelism."""
    if version:
        typer.echo(soloist.__version__)
        raise typer.Exit


@app.command()
def generate(
    model: Model,
    prompts: Annotated[list[str] | None, typer.Argument(help="Texts to continue.")] = None,
    layout: LayoutOption = "ep1",
    placement: PlacementOption = None,
    max_tokens: Annotated[int, typer.Option(help="Tokens of a continuation at most.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 takes the best token always.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="0: off.")] = 0,
    top_p: Annotated[float, typer.Option(help="1: off.")] = 1.0,
    min_p: Annotated[float, typer.Option(help="0: off.")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="1: off.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same text.")] = None,
    n: Annotated[int, typer.Option("-n", help="Continuations of each prompt.")] = 1,
    stop: Annotated[list[str] | None, typer.Option(help="A text that ends a continuation.")] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on to --max-tokens.")] = False,
    prompt_file: Annotated[Path | None, typer.Option(help="File with a prompt in each line; - for stdin.")] = None,
    token_ids: Annotated[bool, typer.Option("--token-ids", help="Prompts are ids: 17,4,99.")] = False,
    chat: Annotated[bool, typer.Option("--chat", help="Prompts are messages to a chat model.")] = False,
    stream: Annotated[bool, typer.Option(help="Print text as it comes.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object for each prompt.")] = False,
    device: DeviceOption = "auto",
    dtype: DtypeOption = None,
    transport: TransportOption = "auto",
    kv_tokens: KvTokensOption = None,
    random_weights: RandomWeightsOption = None,
    settings: SetOption = None,
) -> None:
    """Continue prompts with a model on local ranks, or on those of torchrun, mpirun or srun."""
    from soloist.engine.console import print_answers, read_prompts
    from soloist.engine.llm import LLM
    from soloist.scheduling.request import SamplingParams

    params = SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        n=n,
        stop=tuple(stop or ()),
        ignore_eos=ignore_eos,
    )
    wanted = read_prompts(prompts or [], prompt_file, token_ids)
    options = engine_options(device, dtype, transport, kv_tokens, random_weights, settings)
    with LLM(model, layout, placement, options) as llm:
        print_answers(llm, wanted, params, chat, "json" if as_json else "stream" if stream else "whole")


def engine_options(
    device: str,
    dtype: str | None,
    transport: str,
    kv_tokens: int | None,
    random_weights: int | None,
    settings: list[str] | None,
) -> EngineOptions:
    """The options that the commands running a model share. Raises ConfigurationError."""
    from soloist.engine.options import EngineOptions

    given: dict[str, Any] = {"device": device, "dtype": dtype, "transport": transport}
    given |= {"kv_tokens": kv_tokens, "random_weights": random_weights}
    for setting in settings or []:
        key, equals, value = setting.partition("=")
        if not equals:
            raise ConfigurationError.of("--set", setting, "write KEY=VALUE")
        given[key.replace("-", "_")] = value
    return EngineOptions.of(given)


def _print_error(error: Exception, text: str, verbose: bool) -> None:
    console = Console(stderr=True, soft_wrap=True)
    if verbose:
        console.print("".join(traceback.format_exception(error)), markup=False, highlight=False)
    console.print(text, style="bold red", markup=False, highlight=False)


def main() -> None:
    """The `soloist` command. What arrives here as an exception is a mistake of ours."""
    try:
        app()
    except Exception as error:
        text = f"internal error (soloist -v … shows where): {type(error).__name__}: {error}"
        _print_error(error, text, verbose=bool({"-v", "--verbose"} & set(sys.argv)))
        sys.exit(FAILURE)
