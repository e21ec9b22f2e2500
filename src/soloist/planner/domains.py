"""The kinds of measurement that calibrate the cost model, each with its rows, constants and prediction.

A domain's constants are fitted at every level of its rows' path, wide to narrow (mode, then library, then fabric), each
level starting from the one above. What was never measured falls back to the next wider level.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from soloist.errors import ConfigurationError
from soloist.planner import collectives, compute, exchange
from soloist.planner.fitting import Constants, Prior
from soloist.planner.tables import AttentionRow, CollectiveRow, ExchangeRow, ExpertRow, Row
from soloist.specs.cluster import GpuSpec, preset_gpus


class Domain(NamedTuple):
    """`predict` and `measured` in microseconds; `coordinates` say where a row lies among the calibrated points."""

    name: str
    rows: type[Row]
    path: Callable[[Any], tuple[str, ...]]
    priors: Callable[[tuple[str, ...]], Mapping[str, Prior]]
    predict: Callable[[Constants, Any], float]
    measured: Callable[[Any], float | None]
    coordinates: Callable[[Any], dict[str, float]]


def gpu_named(name: str) -> GpuSpec:
    """A preset GPU by its name in tables (`H100` for `H100-80GB`). Raises ConfigurationError for an unknown one."""
    for key, spec in preset_gpus().items():
        if name in (key, key.split("-")[0]):
            return spec
    raise ConfigurationError.of("gpu", name, f"is no preset GPU; known are {', '.join(preset_gpus())}")


def _exchange(phase: str) -> Domain:
    def predict(constants: Constants, row: ExchangeRow) -> float:
        shape = exchange.shape_of(row, phase)
        return 1e6 * exchange.exchange_seconds(shape, exchange.fabric(row.fabric, row.gpus_per_node), constants)

    def coordinates(row: ExchangeRow) -> dict[str, float]:
        return exchange_coordinates(exchange.shape_of(row, phase))

    return Domain(
        name=phase,
        rows=ExchangeRow,
        path=lambda row: (exchange.shape_of(row, phase).mode, row.library, row.fabric),
        priors=lambda path: exchange.PRIORS[path[0]],
        predict=predict,
        measured=lambda row: getattr(row, f"{phase}_us"),
        coordinates=coordinates,
    )


def _predict_collective(constants: Constants, row: CollectiveRow) -> float:
    cluster = exchange.fabric(row.fabric, min(row.gpus, _node_of(row)))
    direct = "custom" in row.library
    kind = COLLECTIVE_SPELLINGS.get(row.collective.replace("_", "").lower(), row.collective)
    return 1e6 * collectives.collective_seconds(kind, row.gpus, row.bytes, cluster, constants, direct)


COLLECTIVE_SPELLINGS = {
    "allreduce": "all_reduce", "allgather": "all_gather", "reducescatter": "reduce_scatter", "alltoall": "all_to_all",
}  # fmt: skip


def _node_of(row: CollectiveRow) -> int:
    return 72 if "NVL72" in row.fabric else 8


def exchange_coordinates(shape: exchange.ExchangeShape) -> dict[str, float]:
    """Where an exchange lies among the calibrated ones."""
    return {"ranks": shape.ranks, "bytes": shape.tokens * shape.row_bytes}


def expert_coordinates(pairs: float, active: float, hidden: int) -> dict[str, float]:
    """Where the experts of a rank lie among the calibrated ones."""
    return {"rows an expert": pairs / max(active, 1e-9), "active": active, "hidden": hidden}


def _expert_row_coordinates(row: ExpertRow) -> dict[str, float]:
    return expert_coordinates(row.group_tokens * row.top_k / row.ep, row.experts / row.ep, row.hidden)


DISPATCH, COMBINE = _exchange("dispatch"), _exchange("combine")
COLLECTIVES = Domain(
    name="collectives",
    rows=CollectiveRow,
    path=lambda row: ("nccl",),
    priors=lambda path: {**collectives.NCCL, **collectives.DIRECT},
    predict=_predict_collective,
    measured=lambda row: row.us,
    coordinates=lambda row: {"gpus": row.gpus, "bytes": row.bytes},
)
EXPERTS = Domain(
    name="experts",
    rows=ExpertRow,
    path=lambda row: ("gemm",),
    priors=lambda path: compute.GEMM,
    predict=lambda constants, row: 1e6 * compute.predict_experts(row, gpu_named(row.gpu), constants),
    measured=lambda row: row.us,
    coordinates=_expert_row_coordinates,
)
ATTENTION = Domain(
    name="attention",
    rows=AttentionRow,
    path=lambda row: ("flash",),
    priors=lambda path: compute.ATTENTION,
    predict=lambda constants, row: 1e6 * compute.predict_attention(row, gpu_named(row.gpu), constants),
    measured=lambda row: row.us,
    coordinates=lambda row: {"keys": row.batch * row.context},
)
KERNELS = (DISPATCH, COMBINE, COLLECTIVES, EXPERTS, ATTENTION)
