"""What the command line shows of predictions beside what is known: scenarios' claims, published tables, crossovers, the
points of a machine of one's own. One function a command; each returns the exit status."""

from __future__ import annotations

from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Table

from soloist.planner import crossovers
from soloist.planner.calibration import Calibration
from soloist.planner.claims import Finding, findings
from soloist.planner.commands import console
from soloist.planner.plots import plot_validation
from soloist.planner.precision import Precision
from soloist.planner.refit import calibrate_from, load_calibration, published_rows, record, refit
from soloist.planner.report import CASE_COLUMNS, CLAIM_COLUMNS, case_row, claim_row, write_html
from soloist.planner.scenarios import Case, Scenario, cases, load_scenarios
from soloist.planner.sweep import SweepPoint, sweep
from soloist.planner.tables import PUBLISHED
from soloist.planner.validate import Report, validate
from soloist.specs.presets import preset
from soloist.specs.workload import Load


def run_scenarios(
    html: str | Path | None = None, as_json: bool = False, scenarios: str | Path | None = None,
    calibration: str | Path | None = None,
) -> int:  # fmt: skip
    """Claims of the reference deployments against bounds and predictions; `html` writes the report with EP sweeps."""
    used, listed = load_calibration(calibration), load_scenarios(scenarios)
    every = {scenario.name: list(cases([scenario], used)) for scenario in listed}
    found = {name: [finding for case in group for finding in findings(case)] for name, group in every.items()}
    if as_json:
        rows = [finding._asdict() for group in found.values() for finding in group]
        print(msgspec.json.encode({"findings": rows}).decode())
    else:
        _print_scenarios(listed, every, found, console())
    if html:
        write_html(html, listed, every, found, _sweeps(used))
    return 0


def _sweeps(calibration: Calibration) -> dict[str, list[SweepPoint]]:
    """The reference model and DeepSeek-V3 on H100 nodes, routing skewed as unbalanced traffic was found to be."""
    load = Load.parse("prompt=2000,output=500,skew=0.8")
    wanted = {"ref-16l": "bf16", "deepseek-v3": "fp8"}
    return {
        f"{name}, {dtype}, h100-ib, 32 sequences a GPU": sweep(
            preset(name), "h100-ib", Precision.named(dtype), load, 32, calibration
        )
        for name, dtype in wanted.items()
    }


def _print_scenarios(
    listed: list[Scenario], every: dict[str, list[Case]], found: dict[str, list[Finding]], show: Console
) -> None:
    for scenario in listed:
        show.rule(scenario.name, align="left")
        show.print(scenario.about)
        show.print(_grid(CASE_COLUMNS, [case_row(case) for case in every[scenario.name]]))
        show.print(_grid(CLAIM_COLUMNS, [claim_row(finding) for finding in found[scenario.name]]))


def _grid(columns: tuple[str, ...], rows: list[list[str]]) -> Table:
    table = Table()
    for name in columns:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def run_validate(
    data: str | Path | None = None, as_json: bool = False, cross: bool = False, plot: str | Path | None = None,
    calibration: str | Path | None = None,
) -> int:  # fmt: skip
    """Predictions against published (or `data`'s) tables. Status 1 where a table misses its bar on `check` rows."""
    report = validate(data, load_calibration(calibration), cross)
    if plot:
        plot_validation(report, plot)
    if as_json:
        print(report.json().decode())
    else:
        _print_validation(report, console())
    return int(any(table.bar is not None and table.mape > table.bar for table in report.tables))


def run_crossovers(as_json: bool = False) -> int:
    """Where one setting overtakes another: measured by others and predicted. Status 1 where they differ unexplained."""
    names = ("crossover", "what", "measured", "predicted", "agrees", "source", "known miss")
    rows = [
        (p.crossover, f"{p.first} / {p.second}, {p.at}", f"{p.measured:.2f} x", f"{p.predict():.2f} x", p)
        for p in crossovers.POINTS
    ] + [
        (c.crossover, f"crosses, {c.unit}", f"{c.low:g} to {c.high:g}", f"{c.predicted():.0f}", c)
        for c in crossovers.CROSSINGS
    ]
    texts = [[*texts, "yes" if found.agrees else "no", found.source, found.off] for *texts, found in rows]
    if as_json:
        print(msgspec.json.encode([dict(zip(names, text, strict=True)) for text in texts]).decode())
    else:
        console().print(_grid(names, texts))
    return int(any(text[4] == "no" and not text[6] for text in texts))


def run_fit(measurements: str | Path) -> int:
    """After the probes of `calibrate`: fit the constants, append them to the file, say how well the points agree."""
    path = Path(measurements)
    found = calibrate_from(path, path.stem)
    with path.open("ab") as file:
        file.write(record(found))
    show, machine = console(), found.machine
    if machine:
        gpu, rates = machine.gpu, ", ".join(f"{rate:g} {name}" for name, rate in machine.gpu.tflops.items())
        show.print(
            f"{machine.name}: {rates} TFLOP/s and {gpu.memory_TBps:g} TB/s at their peak, "
            f"{machine.nvlink / 1e9:.4g} GB/s between ranks, {gpu.memory_GB:g} GB",
            highlight=False,
        )
    table = _grid(("what was measured", "points", "typical error"), [
        [key, str(fitted.rows), f"{fitted.band / 1.5:.1%}"]
        for key, fitted in found.fitted.items()
        if not any(other.startswith(f"{key}/") for other in found.fitted)
    ])  # fmt: skip
    show.print(table)
    show.print(f"Use it: soloist plan MODEL --calibration {path} --cluster {path} …", highlight=False)
    return 0


def run_refit() -> int:
    """Write the calibration that comes with Soloist anew."""
    refit("published", published_rows()).save(PUBLISHED / "published.json")
    return 0


def _print_validation(report: Report, out: Console) -> None:
    rows = Table(title="Predicted against measured", title_justify="left")
    for name in ("table", "role", "row", "metric"):
        rows.add_column(name, overflow="fold", no_wrap=name == "table")
    for name in ("measured", "predicted", "error"):
        rows.add_column(name, justify="right")
    for row in report.rows:
        error = f"[{'green' if abs(row.error) < 0.1 else 'red'}]{row.error:+.1%}"
        rows.add_row(row.table, row.role, row.label, row.metric, f"{row.measured:g}", f"{row.predicted:.4g}", error)
    out.print(rows)
    summary = Table(title="Mean absolute percentage error", title_justify="left")
    for name in ("table", "role", "values", "MAPE", "median", "worst", "bar"):
        summary.add_column(name, justify="left" if name in ("table", "role") else "right")
    for table in report.tables:
        bar = "" if table.bar is None else f"≤ {table.bar:.0%} {'✓' if table.mape <= table.bar else '✗'}"
        shares = (f"{value:.1%}" for value in (table.mape, table.median, table.worst))
        summary.add_row(table.table, table.role, str(table.rows), *shares, bar)
    out.print(summary)
    if report.winners:
        out.print(_winners_table(report))
    if report.unknown_roles:
        out.print(f"Roles other than fit and check: {', '.join(report.unknown_roles)}")
    for line in report.skipped:
        out.print(f"Not modelled: {line}")
    for line in report.assumed:
        out.print(f"Assumed: {line}")


def _winners_table(report: Report) -> Table:
    columns = ("runs", "layouts", "fastest", "by", "predicted", "by", "verdict")
    rows = Table(title="Fastest layout, measured and predicted", title_justify="left")
    for name in columns:
        rows.add_column(name, justify="right" if name == "by" else "left")
    for one in report.winners:
        leads = f"{one.lead:.1%}", f"{one.predicted_lead:.1%}"
        rows.add_row(one.at, " ".join(one.layouts), one.measured, leads[0], one.predicted, leads[1], one.verdict)
    return rows
