"""Another engine's deployment in our vocabulary: what it is predicted to do, and the change that would gain most."""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from soloist.errors import ConfigurationError
from soloist.planner.calibration import Calibration
from soloist.planner.engine_commands import Command, read_command
from soloist.planner.engines import (
    OVERLAP_FLAGS,
    TENSORRT_FILE,
    TENSORRT_SPELLING,
    cannot,
    cuts_heads,
    launch_flags,
)
from soloist.planner.explain import why
from soloist.planner.kernels import Kernels
from soloist.planner.layer import Deployment
from soloist.planner.precision import Precision
from soloist.planner.runtime import Runtime
from soloist.planner.score import Options, Score, Scorer
from soloist.planner.search import at_best, search
from soloist.specs.cluster import ClusterSpec
from soloist.specs.model import ModelSpec
from soloist.specs.presets import released
from soloist.specs.workload import Load


class Advice(NamedTuple):
    """`best` and `flags` are those of the best change that the engine can express; None where none gains."""

    command: Command
    current: Score
    best: Score | None
    flags: str
    gain: float  # tokens/s and GPU of the best over the current, minus one
    notes: list[str]


def advise(
    text: str, cluster: ClusterSpec, load: Load, calibration: Calibration, model: ModelSpec | None = None
) -> Advice:
    """Both at the load's sequences, or the command's limit of them; without either, each at its own best batch.

    Raises ConfigurationError for a command, model or layout that cannot be read, or that does not fit.
    """
    command = read_command(text)
    if command.sequences and not load.sequences and not load.rate:
        load = msgspec.structs.replace(load, sequences=command.sequences)
    if command.phase == "decode":  # the last token of a prompt is computed here
        load = msgspec.structs.replace(load, prefix=1 - 1 / load.prompt)
    if command.phase == "prefill":  # the first token of an answer is made here
        load = msgspec.structs.replace(load, output=1, tpot_s=0.0)
    spec = model or released(command.model)
    precision = _precision(command, spec)
    scorer = Scorer(Kernels(cluster, calibration), Runtime.named(command.engine, calibration), load)
    current, notes = _current(command, spec, precision, scorer), [*command.notes]
    if cuts_heads(current.deployment):
        notes.append(f"{command.engine} does not start like this: {cannot(command.engine, current.deployment)}")
    if load.sequences > current.sequences + 1:
        notes.append(f"Of {load.sequences} sequences only {current.sequences:.0f} fit at once as it is.")
    found = search(spec, cluster, command.layout.size, load, scorer, precision)
    able = [s for s in found.scores if launch_flags(command.engine, s.deployment, s.decode.is_overlapped)]
    if found.best not in able:
        notes.append(f"The best of all, {found.best.deployment.name}: {cannot(command.engine, found.best.deployment)}.")
    best = able[0] if able and able[0].rate_per_gpu > current.rate_per_gpu else None
    if best is None:
        return Advice(command, current, None, "", 0.0, notes)
    flags = launch_flags(command.engine, best.deployment, best.decode.is_overlapped) or ""
    gain = best.rate_per_gpu / current.rate_per_gpu - 1
    if gain < current.rate.band:
        notes.append(f"The gain is within the prediction's band of {current.rate.band:.0%}: measure before you change.")
    parts = [score.deployment.layout.attention_groups > 1 for score in (current, best)]
    if command.engine == "tensorrt" and any(parts):
        notes.append(f"{TENSORRT_FILE} says enable_attention_dp: {str(parts[1]).lower()} ({TENSORRT_SPELLING}).")
    if command.is_overlapped and not best.decode.is_overlapped:
        notes.append(f"Leave out {OVERLAP_FLAGS[command.engine]}.")
    return Advice(command, current, best, flags, gain, [*notes, why(best, current)])


def _precision(command: Command, spec: ModelSpec) -> Precision:
    """As the command says, else as its checkpoint's name does, else as the model is released."""
    short = command.model.rsplit("/", 1)[-1].lower()
    named = next((dtype for dtype in ("fp8", "fp4") if dtype in short), "")
    if dtype := command.precision or named or ("fp8" if spec.name.startswith("deepseek-v3") else ""):
        found = Precision.named(dtype)
    else:
        found = Precision.of(spec)
        if spec.name.startswith("gpt-oss"):
            found = msgspec.structs.replace(found, experts="fp4")
    return msgspec.structs.replace(found, kv=command.kv) if command.kv else found


def _current(command: Command, spec: ModelSpec, precision: Precision, scorer: Scorer) -> Score:
    """The deployment as it stands, at the load's batch, or the one that serves it best."""
    layout, experts = command.layout, spec.experts
    slots = -(-(experts + command.redundant) // layout.ep) if command.redundant else 0
    deployment = Deployment(model=spec, layout=layout, precision=precision, slots=slots, skew=scorer.load.skew)
    options = Options(overlap="on" if command.is_overlapped else "off")
    if scorer.most_sequences(deployment, options) < 1:
        size = sum(scorer.memory(deployment, options, 1).values()) / 1e9
        most = scorer.kernels.cluster.gpu.memory_GB
        remedy = (
            f"{spec.name} takes {size:.0f} GB of each GPU's {most:g} with one sequence; use more GPUs or fewer bits"
        )
        raise ConfigurationError.of("from", str(layout), remedy)
    return at_best(deployment, options, scorer)
