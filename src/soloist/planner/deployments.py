"""Published whole deployments: what a row of the `end_to_end` table ran, and what the cost model says of it."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import NamedTuple

import msgspec

from soloist.errors import ConfigurationError
from soloist.planner.calibration import Calibration
from soloist.planner.domains import Domain, Hardware
from soloist.planner.fitting import Constants
from soloist.planner.host import buckets_of
from soloist.planner.kernels import Kernels, library_of
from soloist.planner.layer import Deployment
from soloist.planner.precision import Precision
from soloist.planner.runtime import OWN, SYSTEM, Runtime
from soloist.planner.step import StepModel
from soloist.planner.tables import DeploymentRow, RunRow
from soloist.specs.cluster import ClusterSpec, preset_clusters
from soloist.specs.layout import Layout
from soloist.specs.presets import preset, released

CHUNK_TOKENS = 8192  # of a prefill step where a row does not say
TYPICAL_TPOT_S = 1 / 21  # of a served deployment whose batch is not published: 20-22 tokens/s and user
PHASES = ("prefill", "decode")
TIME_UNITS = {"s": 1.0, "ms": 1e3, "us": 1e6}
METRICS = {"itl": "tpot", "inter-token latency": "tpot"}


class Setting(NamedTuple):
    """A row in the planner's words."""

    deployment: Deployment
    cluster: ClusterSpec
    groups: int  # attention groups in all


@lru_cache(maxsize=1024)
def setting(row: DeploymentRow) -> Setting:
    """Raises ConfigurationError where the row's model, GPU or layout is unknown."""
    name = re.sub(r"\s*\(.*\)", "", row.model).lower()
    model = preset(name) if name.startswith("ref-") else released(name)
    layout, slots = _layout(row.layout, row.gpus)
    precision = Precision.named(row.precision)
    deployment = Deployment(model=model, layout=layout, precision=precision, slots=slots)
    return Setting(deployment, _cluster(row.gpu, row.gpus), layout.dp * layout.attention_groups)


def _layout(text: str, gpus: int) -> tuple[Layout, int]:
    """`ep32 dp32`, `tp8`, `tp8 ep8`, `tp2+ep`, `pp2` and expert slots of a GPU; with EP, dp counts attention groups."""
    degrees = {kind: int(size) for kind, size in re.findall(r"(?<![a-z])(ep|tp|pp|dp)(\d+)", text.lower())}
    if re.search(r"\bep\b", text.lower()):
        degrees["ep"] = degrees.get("tp", 1)
    slots = re.search(r"\((\d+) routed", text)
    pp, ep, tp = degrees.get("pp", 1), degrees.get("ep", 1), degrees.get("tp", 1)
    if not degrees or 0 in degrees.values() or gpus % (pp * max(ep, tp)):
        raise ConfigurationError.of("layout", text, f"is no layout of {gpus} GPUs; write for instance ep32 or tp8pp2")
    stage = gpus // pp
    if ep == 1:
        return Layout(pp=pp, tp=tp, dp=stage // tp), 0
    attention = max(1, ep // degrees["dp"]) if "dp" in degrees else tp
    return Layout(pp=pp, attn_tp=attention, ep=ep, dp=stage // ep), int(slots[1]) if slots else 0


@lru_cache(maxsize=64)
def _cluster(gpu: str, gpus: int) -> ClusterSpec:
    known = [c for c in preset_clusters().values() if c.gpu.name.split("-")[0] == gpu.split("-")[0]]
    if not known:
        raise ConfigurationError.of("gpu", gpu, "is no preset GPU; describe it in a cluster file")
    base = next((c for c in known if c.max_gpus is None), known[0])
    return msgspec.structs.replace(base, max_gpus=None, gpus_per_node=min(gpus, base.gpus_per_node))


def predict(row: DeploymentRow, calibration: Calibration, runtime: Runtime) -> float:
    """The row's metric in its own unit. Raises ConfigurationError for a metric or unit that is not modelled."""
    found = setting(row)
    kernels = Kernels(found.cluster, calibration, library_of(row.system, calibration))
    model = StepModel(found.deployment, kernels, runtime)
    if row.phase not in PHASES:
        raise ConfigurationError.of("phase", row.phase, f"unknown; known are {', '.join(PHASES)}")
    unit = row.unit.lower()
    if METRICS.get(row.metric, row.metric) == "tpot" and unit in TIME_UNITS:
        return TIME_UNITS[unit] * _tpot(row, found, model)
    shares = {"tok/s": 1.0, "tok/s/gpu": row.gpus, "tok/s/node": row.gpus / found.cluster.gpus_per_node}
    if row.metric.endswith("throughput") and unit in shares:
        rate = _input_rate(row, found, model) if row.phase == "prefill" else _output_rate(row, found, model)
        return rate / shares[unit]
    raise ConfigurationError.of("metric", f"{row.metric} in {row.unit}", "is not modelled")


def _input_rate(row: DeploymentRow, found: Setting, model: StepModel) -> float:
    """Prompt tokens/s of all GPUs: chunks of whole prompts, each token seeing half its prompt."""
    prompt = row.input_tokens or row.context or 1024
    tokens = row.batch_per_gpu * row.gpus / found.groups if row.batch_per_gpu else CHUNK_TOKENS
    cost = model.prefill(tokens, min(prompt, row.context or prompt) / 2)
    return tokens * found.groups / cost.seconds.value


def _sequences(row: DeploymentRow, found: Setting) -> float:
    return (row.batch_per_gpu or 0.0) * row.gpus / found.groups


def _output_rate(row: DeploymentRow, found: Setting, model: StepModel) -> float:
    """Tokens/s of all GPUs; where the batch is not published, of the batch whose TPOT is typical."""
    sequences = _sequences(row, found)
    if not sequences:
        sequences = _typical_batch(row, model)
    return sequences * found.groups / model.decode(sequences, _context(row)).seconds.value


def _typical_batch(row: DeploymentRow, model: StepModel) -> float:
    low, high = 1.0, 4096.0
    for _ in range(14):
        middle = (low * high) ** 0.5
        slower = model.decode(middle, _context(row)).seconds.value > TYPICAL_TPOT_S
        low, high = (low, middle) if slower else (middle, high)
    return low


def _tpot(row: DeploymentRow, found: Setting, model: StepModel) -> float:
    """A step, and the prefill of the prompts that arrive meanwhile where requests are served continuously."""
    sequences = _sequences(row, found)
    step = model.decode(sequences, _context(row)).seconds.value
    if row.context or not row.input_tokens or not row.output_tokens:
        return step
    arriving = sequences * row.input_tokens / row.output_tokens  # prompt tokens a step
    cost = model.prefill(CHUNK_TOKENS, row.input_tokens / 2).seconds.value
    return step + arriving * cost / CHUNK_TOKENS


def _context(row: DeploymentRow) -> float:
    return row.context or (row.input_tokens or 0) + (row.output_tokens or 0) / 2


# -- our own engine on the machine at hand ----------------------------------------------------------------------------
def predict_run(row: RunRow, calibration: Calibration, runtime: Runtime) -> float:
    """Seconds of a run of `soloist bench offline`: all its prefill steps, or one decode step.

    Raises ConfigurationError where the calibration names no machine.
    """
    if calibration.machine is None:
        raise ConfigurationError.of("calibration", calibration.name, "names no machine; give what calibrate wrote")
    spec, layout = preset(row.model), Layout.parse(row.layout)
    cluster = calibration.machine
    if row.gpu:
        cluster = msgspec.structs.replace(cluster, gpu=Hardware().gpu(row.gpu), gpus_per_node=layout.size)
    kernels = Kernels(cluster, calibration, library_of(row.system, calibration), row.nvlink_sums)
    model = StepModel(
        Deployment(model=spec, layout=layout, precision=Precision.of(spec)),
        kernels,
        runtime,
        "off",
        buckets_of(row.mixed_graphs, spec, layout, CHUNK_TOKENS),
    )
    each = row.sequences / (layout.dp * layout.attention_groups)
    if row.phase == "decode":
        return model.decode(each, row.tokens).seconds.value
    busy = min(1.0, each)  # share of the groups that have prompts
    left = each / busy * row.tokens
    steps, whole = max(layout.pp, -(-left // CHUNK_TOKENS)), min(CHUNK_TOKENS, left)
    cost = model.prefill(whole, row.tokens / 2, int(steps), busy).seconds.value
    return cost * left / whole + 1e-6 * runtime["first_us"]


def own_runs(kernels: Calibration) -> Domain:
    """What our own engine adds to its kernels, told by its runs on the machine of the calibration."""

    def predicted(constants: Constants, row: RunRow) -> float:
        return predict_run(row, kernels, Runtime(name=row.system, constants=dict(constants)))

    return Domain(
        name="runs",
        rows=RunRow,
        path=lambda row: (row.system,),
        priors=lambda path: OWN,
        predict=predicted,
        measured=lambda row: row.seconds,
        coordinates=lambda row: {},
    )


def end_to_end(kernels: Calibration) -> Domain:
    """The domain whose constants are a serving system's, on top of calibrated kernels."""

    def predicted(constants: Constants, row: DeploymentRow) -> float:
        return predict(row, kernels, Runtime(name=row.system, constants=dict(constants)))

    return Domain(
        name="end_to_end",
        rows=DeploymentRow,
        path=lambda row: ("serving", row.system.split("-")[0]),
        priors=lambda path: SYSTEM,
        predict=predicted,
        measured=lambda row: row.value,
        coordinates=lambda row: {},
    )
