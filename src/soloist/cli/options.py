"""Options that several commands share, and the engine options made of them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from soloist.errors import ConfigurationError

if TYPE_CHECKING:
    from soloist.engine.options import EngineOptions
    from soloist.placement.placement import Placement
    from soloist.planner.plan import Plan
    from soloist.specs.layout import Layout

Model = Annotated[str, typer.Argument(help="Folder of a checkpoint, hub id, or name of a preset.")]
LayoutOption = Annotated[
    str | None, typer.Option("--layout", help="How to cut the model: ep1 (default), ep16, tp8pp2, ep64tp2, attn8ep8, …")
]
PlanOption = Annotated[Path | None, typer.Option("--plan", help="Plan file: layout, placement and sizes from there.")]
PlacementOption = Annotated[Path | None, typer.Option("--placement", help="File that says which expert lies where.")]
DeviceOption = Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")]
DtypeOption = Annotated[
    str | None,
    typer.Option("--dtype", help="float32, bfloat16 or float16; by default the model's own, on a CPU float32."),
]
TransportOption = Annotated[str, typer.Option("--transport", help="auto, shared_memory, gloo, nccl or mpi.")]
KvTokensOption = Annotated[
    int | None,
    typer.Option("--kv-tokens", help="Tokens that an attention group's KV cache holds; by default what fits."),
]
RandomWeightsOption = Annotated[int | None, typer.Option("--random-weights", metavar="SEED", help="Make weights up.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Any other engine option; a KEY that is none lists them all."),
]


def to_write(param: typer.CallbackParam, path: Path | None) -> Path | None:
    """The file of an option that is written at the end: refused before the work. Raises ConfigurationError."""
    if path is None:
        return None
    if path.is_dir():
        remedy = "is a folder; name a file in it"
    elif not path.parent.is_dir():
        remedy = f"there is no folder {str(path.parent)!r}; make it first"
    elif not os.access(path if path.exists() else path.parent, os.W_OK):
        remedy = "may not be written by this user"
    else:
        return path
    raise ConfigurationError.of(param.opts[0], str(path), remedy)


PICTURES = (".png", ".svg", ".pdf", ".jpg", ".webp")


def to_draw(param: typer.CallbackParam, path: Path | None) -> Path | None:
    """The file of a picture, as `to_write`; its ending is the format."""
    if to_write(param, path) and path and path.suffix.lower() not in PICTURES:
        raise ConfigurationError.of(param.opts[0], str(path), f"give it one of the endings {', '.join(PICTURES)}")
    return path


def to_fill(param: typer.CallbackParam, folder: Path) -> Path:
    """The folder of an option that is made and filled at the end, as `to_write`."""
    found = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if found.is_dir() and os.access(found, os.W_OK):
        return folder
    remedy = "may not be written by this user" if found.is_dir() else f"{str(found)!r} is a file; name a folder"
    raise ConfigurationError.of(param.opts[0], str(folder), remedy)


def only_with(context: typer.Context, option: str, used: set[str]) -> None:
    """Of a command that does something else with `option`: parameters beside `used` would have no effect.

    Raises ConfigurationError for one that was given.
    """
    for param in context.command.params:
        source = context.get_parameter_source(param.name or "")
        if param.name not in used and source is not None and source.name == "COMMANDLINE":
            value = context.params.get(param.name or "")
            shown = str(value) if isinstance(value, Path) else value
            raise ConfigurationError.of(param.opts[0], shown, f"has no effect with {option}; leave one of them out")


def engine_options(
    device: str,
    dtype: str | None,
    transport: str,
    kv_tokens: int | None,
    random_weights: int | None,
    settings: list[str] | None,
    plan: Plan | None = None,
) -> EngineOptions:
    """The options that commands running a model share, given ones before planned ones. Raises ConfigurationError."""
    from soloist.engine.options import EngineOptions

    wanted = {"device": device, "dtype": dtype, "transport": transport}
    wanted |= {"kv_tokens": kv_tokens, "random_weights": random_weights}
    given: dict[str, Any] = {}
    if plan:
        from soloist.engine.planned import planned_options

        given = planned_options(plan)
    given |= {key: value for key, value in wanted.items() if value is not None}
    for setting in settings or []:
        key, equals, value = setting.partition("=")
        if not equals:
            raise ConfigurationError.of("--set", setting, "write KEY=VALUE")
        given[key.replace("-", "_")] = value
    return EngineOptions.of(given)


def read_plan(file: Path | None, layout: str | None) -> Plan | None:
    """The plan of `--plan`, which takes the place of `--layout`."""
    if file is None:
        return None
    if layout:
        raise ConfigurationError.of("--layout", layout, f"{file} has a layout; give one of --layout and --plan")

    from soloist.planner.plan import Plan

    return Plan.load_file(file)


def deployment(
    model: str | None, layout: str | None, placement: Path | None, plan: Plan | None, options: EngineOptions
) -> tuple[str, str | Layout, Path | Placement | None]:
    """Model, layout and placement to run. A plan names them all; a model or a placement of its own may be given too."""
    if plan is None:
        if model is None:
            raise ConfigurationError.of("MODEL", None, "name one, or give --plan")
        return model, layout or "ep1", placement

    from soloist.engine.model import Model
    from soloist.engine.planned import check_planned

    name = model or plan.model.name
    try:
        found = Model.find(name, options.random_weights is not None)
    except ConfigurationError as error:
        hint = "" if model else " (the plan knows only this name: give its folder or hub id as MODEL)"
        raise ConfigurationError(f"{error}{hint}") from error
    check_planned(plan, found.spec, options.device)
    return name, plan.layout, placement or plan.placement
