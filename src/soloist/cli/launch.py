"""`soloist launch`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from soloist.cli.options import to_write
from soloist.errors import ConfigurationError


def launch(
    context: typer.Context,
    plan: Annotated[Path, typer.Argument(help="Plan file.")],
    arguments: Annotated[
        list[str] | None, typer.Argument(help="After --: another command of soloist than serve, with its arguments.")
    ] = None,
    target: Annotated[str, typer.Option("--for", help="torchrun, slurm, mpi, k8s or local.")] = "torchrun",
    model: Annotated[str | None, typer.Option(help="Folder or hub id; by default the plan's model.")] = None,
    out: Annotated[Path | None, typer.Option(callback=to_write, help="Write it there instead of printing it.")] = None,
) -> None:
    """Write what starts the ranks of a plan: a script for each node, a batch job, a manifest."""
    from soloist.launchers.commands import run_launch

    known = getattr(context.find_root().command, "commands", {})
    if arguments and arguments[0] not in known:
        raise ConfigurationError.of("--", arguments[0], f"is no command of soloist; there is {', '.join(known)}")
    raise typer.Exit(run_launch(plan, target, model, arguments or (), out))
