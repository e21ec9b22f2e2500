"""`soloist launch`: the script or manifest for a plan, to stdout or a file."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from soloist.errors import ConfigurationError
from soloist.launchers.kubernetes import PLAN_FILE, manifest
from soloist.launchers.scripts import WRITERS
from soloist.launchers.start import start_of
from soloist.planner.plan import Plan
from soloist.specs.files import write_file


def run_launch(plan_file: Path, target: str, model: str | None, arguments: Sequence[str], out: Path | None) -> int:
    """Raises ConfigurationError for an unknown target, or a plan whose ranks do not fill equal nodes."""
    plan = Plan.load_file(plan_file)
    if target == "k8s":
        start = start_of(plan, PLAN_FILE, model, arguments)
        text = manifest(start, plan_file.read_text())
    elif target in WRITERS:
        text = WRITERS[target](start_of(plan, str(plan_file.resolve()), model, arguments, mpi=target == "mpi"))
    else:
        raise ConfigurationError.of("--for", target, f"choose one of {', '.join((*WRITERS, 'k8s'))}")
    if out is None:
        sys.stdout.write(text)
        return 0
    write_file(out, text)
    print(f"Written to {out}", file=sys.stderr)
    return 0
