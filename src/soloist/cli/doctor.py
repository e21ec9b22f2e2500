"""`soloist doctor`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def doctor(
    plan: Annotated[Path | None, typer.Argument(help="Plan file that this machine is to serve.")] = None,
    measure: Annotated[bool, typer.Option(help="Also measure memory, arithmetic and links.")] = True,
    nccl_log: Annotated[Path | None, typer.Option(help="What NCCL wrote with NCCL_DEBUG=INFO.")] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="The server's, which has to be free.")] = 8000,
    strict: Annotated[bool, typer.Option("--strict", help="Fail on warnings, too.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Is this machine fit for the plan? Under torchrun, mpirun or srun: are all of them?"""
    from soloist.doctor.examination import run_doctor

    raise typer.Exit(run_doctor(plan, nccl_log, measure, port, as_json, strict))
