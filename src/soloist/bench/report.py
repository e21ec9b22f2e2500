"""Measured points: a line of JSON for machines, a row of a table for people, the physical ceiling beside both."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from rich.console import Console
from rich.table import Table

from soloist.probes.records import commit as commit


@dataclass(frozen=True)
class Ceilings:
    """What a GPU can do at best, as measured by copies and large products: an H100 (docs/benchmarks.md)."""

    flops: float = 770e12
    memory: float = 3.0e12  # bytes/s, read + write
    link: float = 390e9  # bytes/s, one direction of NVLink

    @classmethod
    def of(cls, gpu: str) -> Ceilings:
        """By its name. An H200 is an H100 with faster memory; any other is taken for an H100."""
        return cls(memory=4.3e12) if "H200" in gpu else cls()


@dataclass(frozen=True)
class Point:
    """One measurement. `bound_by` says what `ceiling_s` is made of."""

    what: str
    variant: str
    shape: Mapping[str, object]
    seconds: float
    ceiling_s: float
    bound_by: str
    machine: str = ""
    commit: str = ""

    @property
    def fraction(self) -> float:
        """Of the ceiling; 1 cannot be reached."""
        return self.ceiling_s / self.seconds


def write_lines(points: Iterable[Point], file: IO[str]) -> None:
    """One JSON object a line, each with its fraction of the ceiling."""
    for point in points:
        file.write(json.dumps(asdict(point) | {"fraction": round(point.fraction, 4)}) + "\n")


def report(points: Iterable[Point], path: Path | None, explain: bool) -> None:
    """A line for each point as it comes, to a file where one is named; the table at the end, also after a failure."""
    came: list[Point] = []
    try:
        for point in points:
            came.append(point)
            if path is None:
                write_lines([point], sys.stdout)
            else:
                with path.open("a") as file:
                    write_lines([point], file)
    finally:
        if came:
            print_table(came, explain)


def print_table(points: Iterable[Point], explain: bool = False) -> None:
    """µs and fraction of the ceiling; `explain` adds what bounds each point."""
    table = Table("what", "variant", "shape", "µs", "ceiling µs", "fraction", *(["bound by"] if explain else []))
    for point in points:
        shape = " ".join(f"{key}={value}" for key, value in point.shape.items())
        figures = f"{point.seconds * 1e6:.1f}", f"{point.ceiling_s * 1e6:.1f}", f"{point.fraction:.1%}"
        table.add_row(point.what, point.variant, shape, *figures, *([point.bound_by] if explain else []))
    Console(width=200).print(table)
