"""`soloist doctor`: facts, checks, measurements, and their report."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path

import msgspec
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from soloist.doctor.environment import check_environment
from soloist.doctor.finding import ORDER, Finding, error, exit_code
from soloist.doctor.gpus import check_gpus
from soloist.doctor.host import examine
from soloist.doctor.limits import check_limits
from soloist.doctor.links import check_links
from soloist.doctor.machine import Machine
from soloist.doctor.nccl_log import check_nccl_log
from soloist.doctor.planned import check_plan, preset_of
from soloist.engine.meeting import Meeting, Place, place_from
from soloist.errors import ConfigurationError, SoloistError
from soloist.planner.plan import Plan
from soloist.specs.cluster import preset_gpus

MASTER_PORT = 29500
START_S = 120.0
STYLES = {"ok": "green", "note": "cyan", "warning": "yellow", "error": "bold red"}


def run_doctor(
    plan_file: Path | None, nccl_log: Path | None, measuring: bool, port: int, as_json: bool, strict: bool
) -> int:
    """Print findings; the exit code. Under a launcher of ranks, rank 0 reports on all hosts."""
    plan = Plan.load_file(plan_file) if plan_file else None
    log = _read(nccl_log)
    place = place_from(os.environ)
    if place is None or place.size == 1:
        machine = examine((MASTER_PORT, port))
        findings = [*examine_host(machine, plan, log), *(_measured(machine, plan) if measuring else ())]
    else:
        found = _among(place, plan, log, measuring, port)
        if found is None:
            return 0
        findings = found
    report(findings, as_json)
    return exit_code(findings, strict)


def examine_host(machine: Machine, plan: Plan | None, log: str = "") -> list[Finding]:
    """All checks of one host's facts."""
    nodes = plan.cluster.nodes(plan.layout.size) if plan else 1
    checks: Iterable[Iterable[Finding]] = (
        check_gpus(machine),
        check_links(machine, nodes),
        check_environment(machine),
        check_limits(machine),
        check_plan(machine, plan) if plan else (),
        check_nccl_log(log, machine) if log else (),
    )
    return list(chain.from_iterable(checks))


def _among(place: Place, plan: Plan | None, log: str, measuring: bool, port: int) -> list[Finding] | None:
    """Findings about all hosts at rank 0, None at the others."""
    from soloist.doctor.among import check_among, gather, hosts_of
    from soloist.doctor.measured import check_measured
    from soloist.doctor.measuring import measure_among

    meeting = Meeting.at_master(place, START_S)
    visits = gather(meeting, examine((port,) if place.rank == 0 else ()), START_S)
    measured = measure_among(meeting) if measuring else None
    if place.rank:
        return None
    hosts = hosts_of(visits)
    findings = list(check_among(visits))
    for machine in hosts:
        findings += [
            msgspec.structs.replace(finding, host=machine.host) for finding in examine_host(machine, plan, log)
        ]
    if measured:
        findings += check_measured(measured, *_expected(hosts[0], plan))
    return findings


def _measured(machine: Machine, plan: Plan | None) -> list[Finding]:
    """A measurement that fails is a finding, too."""
    if "torch" not in machine.versions:
        return []
    from soloist.doctor.measured import check_measured
    from soloist.doctor.measuring import measure_here

    try:
        return list(check_measured(measure_here(), *_expected(machine, plan)))
    except (SoloistError, RuntimeError) as failure:
        what = str(failure).splitlines()[0]
        return [error("measuring", what, "what cannot be measured will hardly run", "mend the findings above first")]


def _expected(machine: Machine, plan: Plan | None):
    """The GPU and the cluster whose rates are expected."""
    if plan and machine.gpus:
        return plan.cluster.gpu, plan.cluster
    name = preset_of(machine.gpus[0].name) if machine.gpus else ""
    return preset_gpus().get(name), None


def report(findings: Sequence[Finding], as_json: bool) -> None:
    """A table with the worst last, or a JSON list."""
    if as_json:
        print(
            msgspec.json.format(msgspec.json.encode([msgspec.structs.asdict(f) for f in findings]), indent=1).decode()
        )
        return
    console, table = Console(), Table(box=None, pad_edge=False, show_header=False)
    several = any(finding.host for finding in findings)
    for finding in sorted(findings, key=lambda f: ORDER.index(f.severity)):
        text = escape(finding.what)
        text += "" if finding.severity == "ok" else f"\n[dim]why:[/] {escape(finding.why)}"
        text += f"\n[dim]do:[/]  {escape(finding.remedy)}" if finding.remedy else ""
        style = STYLES[finding.severity]
        table.add_row(f"[{style}]{finding.severity}[/]", *([finding.host] if several else []), finding.check, text)
    console.print(table)
    counts = {severity: sum(f.severity == severity for f in findings) for severity in reversed(ORDER)}
    console.print(", ".join(_counted(severity, count) for severity, count in counts.items() if count), style="bold")


def _counted(severity: str, count: int) -> str:
    return f"{count} {severity}" + "s" * (count != 1 and severity != "ok")


def _read(file: Path | None) -> str:
    try:
        return file.read_text(errors="replace") if file else ""
    except OSError as failure:
        raise ConfigurationError.of("--nccl-log", str(file), f"cannot be read: {failure.strerror}") from failure
