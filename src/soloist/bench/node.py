"""All that one host with several GPUs can show, in one call with a limit: `python -m soloist.bench.node`.

Composes other commands, each in a process of its own with a limit of its own; goes on after one that fails, and says
what it left out. Their records are gathered in `node.jsonl`; predictions made beforehand are printed beside them. When
it is interrupted (SIGINT, SIGTERM) it ends the command under way and reports what it has.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from soloist.bench import expected
from soloist.bench.node_report import exchange_table, layout_table, misses, ratios
from soloist.specs.layout import Layout
from soloist.specs.presets import preset

MODEL = "ref-16l"
SEQUENCES = (1, 64, 256)  # a GPU, in decode
PROMPTS, PROMPT_TOKENS = 8, 9_999  # a GPU, in prefill; with the answer they are all that the model serves
CONTEXT, TOKENS = 128, 128  # of the sequences whose decoding is timed
CHUNK = 8192  # tokens of a prefill step and attention group
REDUCED_S = 240.0  # budget below which each layout does less
PATIENCE_S = 5.0  # for a command that was told to end
TESTS = ("tests/transport", "tests/dispatch", "tests/engine")  # those of several GPUs, the quick ones first
PREDICTIONS = Path("docs/predictions-nodes.jsonl")
HOSTS = (2, 4, 8)  # GPUs, for which there are predictions


@dataclass(frozen=True)
class Part:
    """One command. It is started while `least_s` are left, and ended after `limit_s`."""

    name: str
    command: Sequence[str]  # after `python -m`
    least_s: float
    limit_s: float

    @property
    def slug(self) -> str:
        """For names of files."""
        return self.name.replace(", ", "-").replace(" ", "-")


@dataclass(frozen=True)
class Node:
    """What is to be run on so many GPUs, most important first. `out`: folder for what the commands write."""

    gpus: int
    out: Path
    reduced: bool = False

    @property
    def layouts(self) -> list[Layout]:
        """Experts whole, experts cut, the classic baseline, and the mixture; equal ones once."""
        n = self.gpus
        names = (f"ep{n}", f"tp{n}", f"tp{n // 2}pp2", f"ep{n // 2}tp2") if n > 1 else ("ep1",)
        return list(dict.fromkeys(Layout.parse(name) for name in names))

    @property
    def environment(self) -> dict[str, str]:
        """Of the commands: they see no more GPUs than are to be used."""
        visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
        names = visible or [str(index) for index in range(self.gpus)]
        return {**os.environ, "CUDA_VISIBLE_DEVICES": ",".join(names[: self.gpus])}

    @property
    def prefill(self) -> tuple[int, int]:
        """Prompts and their tokens."""
        return (self.gpus * PROMPTS // (4 if self.reduced else 1), PROMPT_TOKENS)

    @property
    def sequences(self) -> list[int]:
        return [self.gpus * each for each in (SEQUENCES[1:2] if self.reduced else SEQUENCES)]

    def parts(self) -> list[Part]:
        """In the order in which they are run. A single GPU has nothing to exchange."""
        alone = [
            Part("phases and memory", self._phases(), 40, 150),
            Part("calibration", ("soloist", "calibrate", "--out", str(self.out / "calibration.lines")), 30, 90),
        ]
        if self.gpus == 1:
            return [self._offline("ep1", "ep1"), *alone]
        shape = ("--d-model", "7168", "--top-k", "8", "--experts", "256", "--explain")
        wide = (*shape, "--width", "2048")
        nodes = ("--set", f"gpus_per_node={max(1, self.gpus // 2)}")
        ep, *others = self.layouts
        return [
            self._bench("exchange, decode", "--tokens", "128", *shape),
            self._offline(str(ep), str(ep)),
            *(self._offline(str(layout), str(layout)) for layout in others),
            self._bench("exchange, prefill", "--tokens", "4096", *shape),
            self._bench("layer, decode", "--tokens", "128", *wide),
            self._bench("layer, prefill", "--tokens", "4096", *wide),
            Part("multi-GPU tests", ("pytest", "-v", "-m", "multigpu", *TESTS), 30, 120),
            self._offline("two nodes, hierarchical", str(ep), *nodes, "--set", "exchange=hierarchical"),
            self._offline("two nodes, flat", str(ep), *nodes, "--set", "exchange=flat"),
            *alone,
        ]

    def _lines(self, name: str) -> tuple[str, str]:
        return "--lines", str(self.out / f"{Part(name, (), 0, 0).slug}.jsonl")

    def _bench(self, name: str, *options: str) -> Part:
        return Part(name, ("soloist", "bench", name.split(",")[0], *options, *self._lines(name)), 15, 60)

    def _offline(self, name: str, layout: str, *options: str) -> Part:
        count, tokens = self.prefill
        decodes = [word for sequences in self.sequences for word in ("--decode", str(sequences))]
        command = ("soloist", "bench", "offline", MODEL, "--random-weights", "0", "--layout", layout, *options)
        command += ("--prefill", f"{count}x{tokens}", *decodes, "--context", str(CONTEXT), "--tokens", str(TOKENS))
        command += ("--set", f"max_batch_tokens={CHUNK}", "--runs", "1", "--repeats", "1")
        return Part(name, (*command, *self._lines(name)), 20, 100)

    def _phases(self) -> tuple[str, ...]:
        """Where the time of uncaptured steps goes, exposed exchange among it, and what lies in memory."""
        layouts = [word for layout in self.layouts[:3] for word in ("--layout", str(layout))]
        load = ("--requests", str(8 * self.gpus), "--prompt-tokens", "1000", "--max-tokens", "16", "--runs", "1")
        command = ("soloist", "bench", "compare", MODEL, "--random-weights", "0", *layouts, *load)
        return (*command, "--out", str(self.out / "phases"))


def predictions(gpus: int, gpu: str) -> list[dict[str, Any]]:
    """The planner's word on every layout and point of such a host, those of a reduced run included."""
    spec, found = preset(MODEL), []
    whole, reduced = (Node(gpus, Path(), reduced) for reduced in (False, True))
    for layout in whole.layouts:
        found += [expected.prefill(spec, layout, *node.prefill, CHUNK, gpu) for node in (whole, reduced)]
        found += [expected.decode(spec, layout, n, CONTEXT + TOKENS / 2, gpu) for n in whole.sequences]
    return [record | {"gpus": gpus} for record in found]


def foreseen(gpus: int, gpu: str) -> list[dict[str, Any]]:
    """What was predicted beforehand; where that is not at hand, what the planner says now."""
    lines = PREDICTIONS.read_text().splitlines() if PREDICTIONS.exists() else []
    known = [record for record in map(json.loads, lines) if (record["gpus"], record["gpu"]) == (gpus, gpu)]
    return known or predictions(gpus, gpu)


def run(node: Node, parts: Sequence[Part], budget_s: float, show: Console) -> dict[str, str]:
    """Every part for which there is time; what became of each, by name. Their output goes to files of their names."""
    end, fates = time.monotonic() + budget_s, {}
    for part in parts:
        left_s = end - time.monotonic()
        try:
            fates[part.name] = "left out" if left_s < part.least_s else _run(node, part, min(left_s, part.limit_s))
        except KeyboardInterrupt:
            fates[part.name], end = "interrupted", time.monotonic()
        show.print(f"{part.name}: {fates[part.name]}", highlight=False)
    return fates


def _run(node: Node, part: Part, limit_s: float) -> str:
    begin, log = time.monotonic(), node.out / f"{part.slug}.log"
    with log.open("wb") as file:
        command = [sys.executable, "-m", *part.command]
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True, env=node.environment
        )
        try:
            code = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            return f"ended after its limit of {limit_s:.0f} s, see {log}"
        finally:
            _end(process)
    return f"done in {time.monotonic() - begin:.0f} s" if code == 0 else f"failed with exit code {code}, see {log}"


def _end(process: subprocess.Popen[bytes]) -> None:
    """A command, politely if it still runs, and whatever it has started: a rank left behind would hold its GPU."""
    with suppress(ProcessLookupError, subprocess.TimeoutExpired):
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGINT)
            process.wait(PATIENCE_S)
    with suppress(ProcessLookupError, subprocess.TimeoutExpired):
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(PATIENCE_S)


def gathered(node: Node) -> list[dict[str, Any]]:
    """What the parts have written so far, each record with the name of its part."""
    files = {part.name: node.out / f"{part.slug}.jsonl" for part in node.parts()}
    files |= {"phases and memory": node.out / "phases" / "compare.jsonl"}
    return [
        {"part": name} | json.loads(line)
        for name, file in files.items() if file.exists()
        for line in file.read_text().splitlines()
    ]  # fmt: skip


def main(
    gpus: Annotated[int, typer.Option(help="GPUs of this host to use; 0: all.")] = 0,
    budget: Annotated[float, typer.Option(help="Seconds for everything.")] = 570.0,
    only: Annotated[str, typer.Option(help="Parts whose names begin with one of these, separated by semicolons.")] = "",
    out: Annotated[Path, typer.Option(help="Folder for node.jsonl and the logs.")] = Path("out/node"),
    predict: Annotated[
        bool, typer.Option("--predict", help="Print predictions as JSON lines and end: of --gpus, or of 2, 4 and 8.")
    ] = False,
    show_parts: Annotated[bool, typer.Option("--list", help="Print the commands and end.")] = False,
) -> None:
    """Measure what this host can show; see docs/benchmarks.md."""
    if predict:
        for host in (gpus,) if gpus else HOSTS:
            for gpu in expected.MACHINES:
                typer.echo("\n".join(json.dumps(record) for record in predictions(host, gpu)))
        return
    from soloist.engine.planned import count_gpus

    node = Node(gpus or count_gpus() or 1, out, reduced=budget < REDUCED_S)
    if node.gpus > 1 and node.gpus % 2:
        raise typer.BadParameter(f"{node.gpus} GPUs: must be an even number, or 1", param_hint="--gpus")
    parts = [part for part in node.parts() if not only or part.name.startswith(tuple(only.split(";")))]
    if show_parts:
        typer.echo("\n".join(f"{part.name}: python -m {' '.join(part.command)}" for part in parts))
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    out.mkdir(parents=True, exist_ok=True)
    for old in out.rglob("*.jsonl"):
        old.unlink()
    show = Console(width=160)
    fates = run(node, parts, budget, show)
    _report(node, show)
    typer.echo(json.dumps({"what": "node", "gpus": node.gpus, "parts": fates}))


def _report(node: Node, show: Console) -> None:
    """Of whatever was measured."""
    from soloist.bench.offline import gpu

    records, name = gathered(node), next((name for name in expected.MACHINES if name in gpu()), None)
    guesses = foreseen(node.gpus, name) if name else []  # nothing was predicted for other GPUs
    (node.out / "node.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    show.print(exchange_table(records), layout_table(records, guesses))
    for line in (*ratios(records, guesses, str(node.layouts[0])), *misses(records, guesses)):
        show.print(line, highlight=False)


if __name__ == "__main__":
    typer.run(main)
