"""What the command line shows of the planner: one function a command, tables by rich. Each returns the exit status."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Table

from soloist.errors import ConfigurationError
from soloist.placement.trace import RoutingTrace
from soloist.planner import crossovers
from soloist.planner.calibration import Calibration
from soloist.planner.claims import Finding, findings
from soloist.planner.explain import exchange_lines, headline, one_expert_per_gpu, ties, why
from soloist.planner.kernels import Kernels, library_of
from soloist.planner.plan import plan_of
from soloist.planner.plots import plot_validation
from soloist.planner.precision import Precision
from soloist.planner.refit import calibrate_from, load_calibration, published_rows, record, refit
from soloist.planner.report import CASE_COLUMNS, CLAIM_COLUMNS, case_row, claim_row, write_html
from soloist.planner.runtime import Runtime, systems
from soloist.planner.scenarios import Case, Scenario, cases, load_scenarios
from soloist.planner.score import Options, Score, Scorer
from soloist.planner.search import Found, at_best, deployed, search
from soloist.planner.sweep import SweepPoint, sweep
from soloist.planner.tables import PUBLISHED
from soloist.planner.traced import TracedCopies
from soloist.planner.translate import advise
from soloist.planner.validate import Report, validate
from soloist.specs.cluster import cluster as cluster_named
from soloist.specs.layout import Layout
from soloist.specs.model import ModelSpec
from soloist.specs.presets import preset
from soloist.specs.workload import Load

SHOWN = 12


def run_plan(
    model: ModelSpec, cluster: str, gpus: int, load: str = "prompt=1000,output=200", precision: str = "",
    baseline: str = "", calibration: str | Path | None = None, system: str = "soloist",
    out: str | Path | None = None, options: Options | None = None, rejected: bool = False,
    explain: bool = False, routing: str | Path | None = None,
) -> int:  # fmt: skip
    """Search all layouts, print the Pareto front and why the winner wins, write the plan file to `out`.

    `rejected` prints every layout that was turned down, `explain` how tokens cross nodes. `system` is whose fixed costs
    and overlap are assumed. `routing` is a trace of the model, from which copies of tokens are counted.
    """
    spec, wanted = cluster_named(cluster), Load.parse(load)
    used = load_calibration(calibration)
    if system not in (known := systems(used)):
        raise ConfigurationError.of("engine", system, f"nothing is known of it; there is {', '.join(known)}")
    dtypes = Precision.named(precision) if precision else Precision.of(model)
    options = options or Options()
    kernels = Kernels(spec, used, library_of(system, used), options.nvlink_sums)
    scorer = Scorer(kernels, Runtime.named(system, used), wanted)
    other = _baseline_layout(baseline, gpus) if baseline else None
    copies = _copies(routing, model)
    found = search(model, spec, gpus, wanted, scorer, dtypes, options, copies)
    show = console()
    _print_front(found, show)
    for line in _conclusions(found, _baseline(other, found.best, scorer, copies), wanted):
        show.print(line, highlight=False)
    for line in exchange_lines(found.best, spec) if explain else []:
        show.print(line, highlight=False)
    _print_rejections(found, show, everything=rejected)
    if out:
        plan_of(found.best, spec, wanted, used.name, system, scorer.halves(found.best)).save(out)
        show.print(f"Plan written to {out}")
    return 0


def _copies(routing: str | Path | None, model: ModelSpec) -> TracedCopies | None:
    if routing is None:
        return None
    trace = RoutingTrace.load(routing)
    trace.check(model)
    return TracedCopies(trace)


def run_advise(
    command: str, cluster: str, load: str = "prompt=1000,output=200", model: ModelSpec | None = None,
    calibration: str | Path | None = None,
) -> int:  # fmt: skip
    """`plan --from`: another engine's deployment as it is, and the change of its flags that would gain most."""
    found = advise(command, cluster_named(cluster), Load.parse(load), load_calibration(calibration), model)
    show = console()
    show.print(f"As it is: {headline(found.current)}", highlight=False)
    if found.best is None:
        show.print(f"No other layout that {found.command.engine} can express is expected to be faster.")
    else:
        show.print(f"Best change: {headline(found.best)}", highlight=False)
        show.print(f"Expected gain: {found.gain:+.0%} tokens per GPU, with these flags: {found.flags}", highlight=False)
    for note in found.notes:
        show.print(f"- {note}", highlight=False)
    return 0


def _baseline_layout(text: str, gpus: int) -> Layout:
    """A layout that the user names; `dp` fills the GPUs that it leaves."""
    layout = Layout.parse(text)
    if layout.size == gpus:
        return layout
    times, rest = divmod(gpus, layout.size)
    if rest or layout.dp > 1:
        raise ConfigurationError.of("baseline", text, f"has {layout.size} GPUs, which do not fill {gpus}")
    return msgspec.structs.replace(layout, dp=times)


def _baseline(layout: Layout | None, best: Score, scorer: Scorer, copies: TracedCopies | None) -> Score | None:
    """That layout at its best batch."""
    if layout is None:
        return None
    d = best.deployment
    other = deployed(d.model, scorer.kernels.cluster, layout, d.precision, d.skew, copies)
    if scorer.most_sequences(other, best.options) < 1:
        raise ConfigurationError.of("baseline", str(layout), "does not fit into memory")
    return at_best(other, best.options, scorer)


def _conclusions(found: Found, baseline: Score | None, load: Load) -> list[str]:
    """What the search says, in sentences."""
    best, rivals = found.best, [s for s in found.scores if s.deployment.layout != found.best.deployment.layout]
    lines = ["", f"Best: {headline(best)}"]
    lines += [f"Why: {why(best, rivals[0])}"] if rivals else []
    lines += [one_expert_per_gpu(best, found.single), *ties(found.scores, load)]
    if baseline:
        total, per_gpu = best.rate.value / baseline.rate.value, best.rate_per_gpu / baseline.rate_per_gpu
        lines += [
            f"Baseline {headline(baseline)}" + _beyond(baseline, load),
            f"Against the baseline: {total:.2f} x in all, {per_gpu:.2f} x per GPU.",
        ]
    memory = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in best.memory.items() if size >= 5e7)
    return [*lines, f"Memory of the fullest GPU, GB: {memory}; {sum(best.memory.values()) / 1e9:.1f} in all."]


def _beyond(score: Score, load: Load) -> str:
    """What of the SLO a score misses."""
    slow = load.tpot_s and score.tpot.value > load.tpot_s
    late = load.ttft_s and score.ttft.value > load.ttft_s
    return "; misses the SLO at every batch" if slow or late else ""


def _print_front(found: Found, show: Console) -> None:
    what = "" if found.best.decodes else ", prefill alone: tokens of prompts"
    table = Table(title=f"Pareto front of {found.considered} layouts{what}", title_justify="left")
    for name in (
        "layout",
        "batch",
        "TPOT ms",
        "TTFT ms",
        "tok/s",
        "tok/s/GPU",
        "GB",
        "overlap",
        "bottleneck",
        "origin",
    ):
        table.add_column(name, justify="left" if name in ("layout", "bottleneck", "origin") else "right", no_wrap=True)
    step = max(1, len(found.front) // SHOWN)
    for score in found.front[::step]:
        tpot, ttft = f"{1e3 * score.tpot.value:.1f}", f"{1e3 * score.ttft.value:.0f}"
        band = f" ± {score.latency.band:.0%}"
        times = (tpot + band, ttft) if score.decodes else ("–", ttft + band)
        table.add_row(
            score.deployment.name, f"{score.batch:g}", *times, f"{score.rate.value:,.0f}",
            f"{score.rate_per_gpu:,.1f}", f"{sum(score.memory.values()) / 1e9:.1f}",
            _overlapped(score), score.work.bottleneck, score.latency.origin,
        )  # fmt: skip
    show.print(table)


def _overlapped(score: Score) -> str:
    """Which steps go as two halves."""
    names = [name for name in ("prefill", "decode") if getattr(score, name).is_overlapped]
    return "both" if len(names) == 2 else (names or ["no"])[0]


def _print_rejections(found: Found, show: Console, everything: bool) -> None:
    counts: dict[str, list[str]] = {}
    for rejection in found.rejections:
        kind = rejection.layout if everything else re.sub(r"[\d.,]+", "N", rejection.reason)
        counts.setdefault(kind, []).append(f"{rejection.layout}: {rejection.reason}")
    show.print(f"Rejected {len(found.rejections)}:" if found.rejections else "None rejected.")
    for lines in counts.values():
        more = f" (and {len(lines) - 1} like it)" if len(lines) > 1 else ""
        show.print(f"  {lines[0]}{more}", highlight=False)


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


def console() -> Console:
    """Standard output; wide enough for the tables where it is no terminal."""
    found = Console()
    return found if found.is_terminal else Console(width=160)


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
