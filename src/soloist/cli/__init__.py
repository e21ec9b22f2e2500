"""The command line: one short function for each command. Heavy imports stand inside the commands."""

from __future__ import annotations

import errno
import sys
import traceback
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

import soloist
from soloist.cli import bench, placement
from soloist.cli.doctor import doctor
from soloist.cli.generate import generate
from soloist.cli.launch import launch
from soloist.cli.planning import calibrate, cluster, crossovers, export, plan, scenarios, simulate, validate
from soloist.cli.serve import serve, top
from soloist.errors import ConfigurationError, RequestError, SoloistError

USER_ERROR, FAILURE = 2, 1  # exit codes
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)  # writing fails, and Python does not say where
EXTRAS = {  # what a plain installation, which plans and simulates, does not have
    "run": ("torch", "safetensors", "tokenizers", "huggingface_hub", "jinja2", "zmq"),
    "serve": ("fastapi", "uvicorn", "httptools", "prometheus_client"),
    "plot": ("matplotlib",),
}


class Commands(TyperGroup):
    """Prints an error as one red line, with its traceback only where that was asked for (-v)."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except SoloistError as error:
            _print_error(error, str(error), ctx.params["verbose"])
            raise typer.Exit(USER_ERROR if isinstance(error, ConfigurationError | RequestError) else FAILURE) from error
        except OSError as error:
            if error.filename is None and error.errno not in DISK:
                raise
            _print_error(error, f"{error.filename or 'a file'}: {error.strerror}", ctx.params["verbose"])
            raise typer.Exit(FAILURE if error.errno in DISK else USER_ERROR) from error
        except ModuleNotFoundError as error:
            package = (error.name or "").partition(".")[0]
            extra = next((extra for extra, packages in EXTRAS.items() if package in packages), None)
            if extra is None:
                raise
            text = f"this command needs {package}; in a checkout: pip install '.[{extra}]'"
            _print_error(error, text, ctx.params["verbose"])
            raise typer.Exit(USER_ERROR) from error


app = typer.Typer(cls=Commands, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(soloist.__version__)
        raise typer.Exit


VersionOption = Annotated[
    bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
]


@app.callback()
def soloist_(
    version: VersionOption = False,
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="Show tracebacks.")] = False,
) -> None:
    """Plan, run and serve Mixture-of-Experts language models with large expert parallelism."""


for command in (plan, simulate, scenarios, validate, crossovers, calibrate, cluster, export, generate):
    app.command()(command)
app.command()(serve)
app.command()(top)
app.command()(launch)
app.command()(doctor)
app.add_typer(bench.app, name="bench")
app.add_typer(placement.app, name="placement")
app.command()(placement.record)


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
