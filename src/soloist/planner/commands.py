"""`soloist plan` as the command line shows it: one function a form, tables by rich. Each returns the exit status."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Table

from soloist.errors import ConfigurationError
from soloist.placement.trace import RoutingTrace
from soloist.planner.explain import exchange_lines, headline, one_expert_per_gpu, ties, why
from soloist.planner.kernels import Kernels, library_of
from soloist.planner.plan import plan_of
from soloist.planner.precision import Precision
from soloist.planner.refit import load_calibration
from soloist.planner.runtime import Runtime, systems
from soloist.planner.score import Options, Score, Scorer
from soloist.planner.search import Found, at_best, deployed, search
from soloist.planner.traced import TracedCopies
from soloist.planner.translate import advise
from soloist.specs.cluster import cluster as cluster_named
from soloist.specs.layout import Layout
from soloist.specs.model import ModelSpec
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


def console() -> Console:
    """Standard output; wide enough for the tables where it is no terminal."""
    found = Console()
    return found if found.is_terminal else Console(width=160)
