"""Chrome's trace event format, which Perfetto (ui.perfetto.dev) and chrome://tracing show.

A process for each replica and stage, in it a row for each GPU that is traced; on it a slice for each step, named by
what the GPU's own group computes, with the parts of the step inside: those of the slowest group, whom all wait for.
Layers alternate between the parts; they are summed here. Counters show the queue and the load.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from soloist.simulator.replica import Launched
from soloist.specs.files import write_file
from soloist.specs.layout import Layout

MOST_STEPS = 2000
MOST_GPUS = 16

Event = dict[str, Any]


class Tracer:
    """An observer of a simulation. Keeps the first `steps` steps on the first `gpus` GPUs of each stage."""

    def __init__(self, layout: Layout, gpus: int = MOST_GPUS, steps: int = MOST_STEPS) -> None:
        self.layout, self.left = layout, steps
        self.gpus = min(gpus, layout.stage_ranks)
        self.events: list[Event] = [event for replica in range(layout.dp) for event in self._names(replica)]

    def __call__(self, replica: int, step: Launched) -> None:
        """Take a step that was started."""
        if not self.left:
            return
        self.left -= 1
        for stage, start_s in enumerate(step.stages_s):
            for gpu in range(self.gpus):
                self._slices(self._process(replica, stage), gpu, start_s, step)
        process = self._process(replica, 0)
        counts = {"running": step.running, "waiting": step.waiting}
        self.events += [
            {"name": "sequences", "ph": "C", "pid": process, "ts": 1e6 * step.start_s, "args": counts},
            {"name": "tokens", "ph": "C", "pid": process, "ts": 1e6 * step.start_s, "args": _tokens(step)},
        ]

    def save(self, path: str | Path) -> None:
        write_file(path, msgspec.json.encode({"traceEvents": self.events, "displayTimeUnit": "ms"}))

    def _process(self, replica: int, stage: int) -> int:
        return replica * self.layout.pp + stage

    def _names(self, replica: int) -> list[Event]:
        named: list[Event] = []
        for stage in range(self.layout.pp):
            process = self._process(replica, stage)
            title = {"name": f"replica {replica}, stage {stage}"}
            named.append({"name": "process_name", "ph": "M", "pid": process, "args": title})
            for gpu in range(self.gpus):
                rank = process * self.layout.stage_ranks + gpu
                named.append(
                    {"name": "thread_name", "ph": "M", "pid": process, "tid": gpu, "args": {"name": f"GPU {rank}"}}
                )
        return named

    def _slices(self, process: int, gpu: int, start_s: float, step: Launched) -> None:
        group = gpu // self.layout.attention_ranks
        own = {"decodes": int(step.work.decodes[group]), "prefills": int(step.work.prefills[group])}
        place = {"ph": "X", "pid": process, "tid": gpu}
        name = " + ".join(f"{count} {kind[:-1]}" for kind, count in own.items() if count) or "waits for the others"
        times = {"ts": 1e6 * start_s, "dur": 1e6 * step.time.stage_s}
        self.events.append({"name": name, "cat": "step", **place, **times, "args": {**own, **_tokens(step)}})
        at_s = start_s
        for part, seconds in step.time.parts.items():
            if part == "step":
                continue
            self.events.append({"name": part, "cat": "part", **place, "ts": 1e6 * at_s, "dur": 1e6 * seconds})
            at_s += seconds


def _tokens(step: Launched) -> dict[str, int]:
    return {"all decodes": int(step.work.decodes.sum()), "all prefills": int(step.work.prefills.sum())}
