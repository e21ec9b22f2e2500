"""The report on the reference deployments: tables in the terminal, and one HTML file that needs nothing else."""

from __future__ import annotations

import io
from html import escape
from pathlib import Path

from soloist.planner.claims import Finding
from soloist.planner.plots import pyplot
from soloist.planner.scenarios import Case, Scenario
from soloist.planner.sweep import SweepPoint
from soloist.specs.files import write_file

COLOURS = {"impossible": "#d1495b", "weak": "#c77d0a", "plausible": "#2e7d5b", "beaten": "#2f6db5"}
STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem; color: #1c2430; }
table { border-collapse: collapse; width: 100%; margin: .6rem 0 1.6rem; font-size: 13px; }
th, td { text-align: left; padding: .28rem .5rem; border-bottom: 1px solid #e3e7ee; vertical-align: top; }
@media (max-width: 50rem) { td:last-child { min-width: 14rem; } }  /* reasons, on a phone */
.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.v { color: white; border-radius: .3rem; padding: .05rem .4rem; font-size: 12px; }
h2 { margin-top: 2.2rem; } svg { max-width: 100%; height: auto; }
@media (prefers-color-scheme: dark) {
  body { background: #14181f; color: #dde3ec; } th, td { border-color: #2b323d; } figure { background: white; }
}
"""
CASE_COLUMNS = (
    "reading",
    "GPUs",
    "prompt tok/s",
    "a GPU",
    "output tok/s",
    "a GPU",
    "TPOT ms",
    "GB a GPU",
    "bottleneck",
)
READING = "A reading is one way to take a claim that leaves something open: a shape of the model, cut by a layout."
CLAIM_COLUMNS = ("reading", "claim", "claimed", "bound", "predicted", "verdict", "why")
WORDS = ("reading", "claim", "verdict", "why", "bottleneck")  # columns that hold no numbers


def number(value: float, unit: str = "") -> str:
    """Four digits, thousands grouped."""
    text = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{text} {unit}".strip()


def case_row(case: Case) -> list[str]:
    """What a reading was predicted to do, totals and per GPU side by side, and the real TPOT."""
    score, out = case.score, case.decode_rate
    room = "" if case.has_room else " (does not fit)"
    return [
        f"{case.model_name} {case.layout_text}", str(case.gpus), number(score.input_rate.value),
        number(score.input_rate.value / case.gpus), number(out), number(out / case.gpus),
        f"{1e3 * score.decode.seconds.value:.1f} ± {score.decode.seconds.band:.0%}",
        f"{sum(score.memory.values()) / 1e9:.1f}{room}", score.decode.bottleneck,
    ]  # fmt: skip


def claim_row(finding: Finding) -> list[str]:
    """Claim, bound and prediction side by side."""
    predicted = f"{number(finding.predicted, finding.unit)} ± {finding.band:.0%}"
    return [
        finding.case, finding.claim, number(finding.claimed, finding.unit), number(finding.bound, finding.unit),
        predicted, finding.verdict, finding.reason,
    ]  # fmt: skip


def write_html(
    path: str | Path,
    scenarios: list[Scenario],
    cases: dict[str, list[Case]],
    found: dict[str, list[Finding]],
    sweeps: dict[str, list[SweepPoint]],
) -> None:
    """Everything in one file; the plots need the `plot` extra."""
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>Reference deployments</title><style>{STYLE}</style>"
    ]
    parts.append("<h1>Reference deployments: claims, bounds, predictions</h1>")
    parts.append(f"<p>{READING}</p><p>{_legend()}</p>")
    for scenario in scenarios:
        parts.append(f"<h2>{escape(scenario.name)}</h2><p>{escape(scenario.about)}</p>")
        parts.append(_table(CASE_COLUMNS, [case_row(case) for case in cases[scenario.name]]))
        parts.append(_table(CLAIM_COLUMNS, [claim_row(finding) for finding in found[scenario.name]]))
    for name, points in sweeps.items():
        parts.append(f"<h2>EP from 16 to 1024: {escape(name)}</h2><figure>{sweep_svg(points)}</figure>")
        parts.append(_table(SweepPoint._fields, [[number(float(value)) for value in point] for point in points]))
    write_file(path, "\n".join(parts) + "</html>\n")


def sweep_svg(points: list[SweepPoint]) -> str:
    """Six small plots over EP."""
    plt = pyplot()
    panels = (
        ("output_rate", "output tok/s"), ("tpot_ms", "TPOT, ms"), ("network", "NIC utilisation, prefill"),
        ("efficiency", "prefill per GPU, against EP 16"), ("imbalance", "fullest / mean group"),
        ("lost", "throughput lost to imbalance"),
    )  # fmt: skip
    figure, axes = plt.subplots(2, 3, figsize=(11, 5.6))
    degrees = [point.ep for point in points]
    for axis, (field, title) in zip(axes.flat, panels, strict=True):
        axis.plot(degrees, [getattr(point, field) for point in points], marker="o", color="#2f6db5")
        axis.set_xscale("log", base=2)
        axis.set_yscale("log" if field == "output_rate" else "linear")
        axis.set(title=title, xlabel="EP")
        axis.grid(alpha=0.3)
    figure.tight_layout()
    drawing = io.StringIO()
    figure.savefig(drawing, format="svg")
    plt.close(figure)
    return drawing.getvalue().split("?>", 1)[-1].split('.dtd">', 1)[-1]


def _legend() -> str:
    meanings = {
        "impossible": "better than the hardware allows, or against arithmetic",
        "weak": "better than predicted, or won by more GPUs alone",
        "plausible": "within the prediction's band",
        "beaten": "the prediction is better",
    }
    return " · ".join(f"{_verdict(word)} {text}" for word, text in meanings.items())


def _verdict(word: str) -> str:
    return f'<span class=v style="background:{COLOURS[word]}">{word}</span>'


def _table(columns: tuple[str, ...], rows: list[list[str]]) -> str:
    kinds = ["" if column in WORDS else " class=n" for column in columns]
    head = "".join(f"<th{kind}>{escape(column)}" for kind, column in zip(kinds, columns, strict=True))
    body = ("<tr>" + "".join(f"<td{kind}>{_cell(text)}" for kind, text in zip(kinds, row, strict=True)) for row in rows)
    return f"<table><tr>{head}{''.join(body)}</table>"


def _cell(text: str) -> str:
    return _verdict(text) if text in COLOURS else escape(text)
