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
from soloist.planner.tables import (
    AttentionRow,
    CollectiveRow,
    ExchangeRow,
    ExpertRow,
    LaunchRow,
    MatmulRow,
    Row,
    SmallRow,
    StreamRow,
)
from soloist.specs.cluster import ClusterSpec, GpuSpec, preset_gpus


class Domain(NamedTuple):
    """`predict` and `measured` in microseconds; `coordinates` say where a row lies among the calibrated points."""

    name: str
    rows: type[Row]
    path: Callable[[Any], tuple[str, ...]]
    priors: Callable[[tuple[str, ...]], Mapping[str, Prior]]
    predict: Callable[[Constants, Any], float]
    measured: Callable[[Any], float | None]
    coordinates: Callable[[Any], dict[str, float]]


class Hardware:
    """What tables call GPUs and fabrics; `machine` is the one at hand, beside the presets."""

    def __init__(self, machine: ClusterSpec | None = None) -> None:
        self.machine = machine

    def gpu(self, name: str) -> GpuSpec:
        """A GPU by its name in tables (`H100` for `H100-80GB`). Raises ConfigurationError for an unknown one."""
        if self.machine and name == self.machine.gpu.name:
            return self.machine.gpu
        for key, spec in preset_gpus().items():
            if name in (key, key.split("-")[0]):
                return spec
        raise ConfigurationError.of("gpu", name, f"is no preset GPU; known are {', '.join(preset_gpus())}")

    def fabric(self, name: str, gpus_per_node: int) -> ClusterSpec:
        """A cluster by how tables name it."""
        if self.machine and name == self.machine.name:
            return self.machine
        return exchange.fabric(name, gpus_per_node)


def domains(machine: ClusterSpec | None = None) -> dict[str, tuple[Domain, ...]]:
    """The domains of kernels by the table that holds their rows; tables may name `machine` and its GPU."""
    known = Hardware(machine)
    return {
        "all_to_all": (_exchange("dispatch", known), _exchange("combine", known)),
        "collectives": (_collectives(known),),
        "moe_gemm": (_experts(known),),
        "matmul": (_matmul(known),),
        "attention": (_attention(known),),
        "stream": (_stream(known),),
        "small": (_small(known),),
        "host": (_host(),),
    }


def kernels(machine: ClusterSpec | None = None) -> tuple[Domain, ...]:
    """All of them."""
    return tuple(domain for found in domains(machine).values() for domain in found)


# -- exchange and collectives -----------------------------------------------------------------------------------------
def exchange_coordinates(shape: exchange.ExchangeShape) -> dict[str, float]:
    """Where an exchange lies among the calibrated ones."""
    found = {"ranks": shape.ranks, "bytes": shape.tokens * shape.row_bytes}
    return {**found, "top-k": shape.top_k} if shape.mode in exchange.OURS else found


def _exchange(phase: str, known: Hardware) -> Domain:
    def predict(constants: Constants, row: ExchangeRow) -> float:
        fabric = known.fabric(row.fabric, row.joined)
        return 1e6 * exchange.exchange_seconds(exchange.shape_of(row, phase), fabric, constants)

    return Domain(
        name=phase,
        rows=ExchangeRow,
        path=lambda row: (exchange.shape_of(row, phase).mode, row.library, row.fabric),
        priors=lambda path: exchange.PRIORS[path[0]],
        predict=predict,
        measured=lambda row: getattr(row, f"{phase}_us"),
        coordinates=lambda row: exchange_coordinates(exchange.shape_of(row, phase)),
    )


OWN = "soloist"  # sums by our own kernels, below the size from which NCCL's are faster
COLLECTIVE_SPELLINGS = {
    "allreduce": "all_reduce", "allgather": "all_gather", "reducescatter": "reduce_scatter", "alltoall": "all_to_all",
    "sendrecv": "send_recv", "gather": "gather",
}  # fmt: skip


def _kind(row: CollectiveRow) -> str:
    name = row.collective.replace("_", "").replace("-", "").lower()
    return COLLECTIVE_SPELLINGS.get(name, row.collective)


def _collectives(known: Hardware) -> Domain:
    def predict(constants: Constants, row: CollectiveRow) -> float:
        cluster = known.fabric(row.fabric, min(row.gpus, 72 if "NVL72" in row.fabric else 8))
        kind = _kind(row)
        if kind not in (kinds := sorted(set(COLLECTIVE_SPELLINGS.values()))):
            raise ConfigurationError.of("collective", row.collective, f"unknown; known are {', '.join(kinds)}")
        if kind == "send_recv":
            return 1e6 * collectives.point_to_point_seconds(row.bytes, True, cluster, constants)
        if row.library == OWN and kind == "gather":
            return 1e6 * collectives.gather_seconds(row.gpus, row.bytes, cluster, constants)
        if row.library == OWN:
            return 1e6 * collectives.direct_seconds(row.gpus, row.bytes, cluster, constants)
        direct = "custom" in row.library
        return 1e6 * collectives.collective_seconds(kind, row.gpus, row.bytes, cluster, constants, direct)

    return Domain(
        name="collectives",
        rows=CollectiveRow,
        path=lambda row: (OWN if row.library == OWN else "nccl", _kind(row)),
        priors=lambda path: {**collectives.NCCL, **collectives.DIRECT},
        predict=predict,
        measured=lambda row: row.us,
        coordinates=lambda row: {"gpus": row.gpus, "bytes": row.bytes},
    )


# -- one GPU ----------------------------------------------------------------------------------------------------------
def expert_coordinates(pairs: float, active: float, hidden: int, width: float) -> dict[str, float]:
    """Where the experts of a rank lie among the calibrated ones."""
    return {"rows an expert": pairs / max(active, 1e-9), "active": active, "hidden": hidden, "width": width}


def _experts(known: Hardware) -> Domain:
    def coordinates(row: ExpertRow) -> dict[str, float]:
        pairs = row.group_tokens * row.top_k / row.ep
        return expert_coordinates(pairs, compute.active_experts(row), row.hidden, row.ffn)

    return Domain(
        name="experts",
        rows=ExpertRow,
        path=lambda row: ("gemm",),
        priors=lambda path: compute.GEMM,
        predict=lambda constants, row: 1e6 * compute.predict_experts(row, known.gpu(row.gpu), constants),
        measured=lambda row: row.us,
        coordinates=coordinates,
    )


def matmul_coordinates(m: float, n: float, k: float) -> dict[str, float]:
    """Where a matrix multiplication lies among the calibrated ones."""
    return {"m": m, "n": n, "k": k}


def _matmul(known: Hardware) -> Domain:
    def predict(constants: Constants, row: MatmulRow) -> float:
        dtype = compute.dtype_named(row.dtype)
        return 1e6 * compute.matmul_seconds(row.m, row.n, row.k, dtype, known.gpu(row.gpu), constants)

    return Domain(
        name="matmul",
        rows=MatmulRow,
        path=lambda row: ("dense",),
        priors=lambda path: {key: prior for key, prior in compute.GEMM.items() if key in compute.DENSE},
        predict=predict,
        measured=lambda row: row.us,
        coordinates=lambda row: matmul_coordinates(row.m, row.n, row.k),
    )


def decode_coordinates(work: compute.DecodeAttention) -> dict[str, float]:
    """Where attention in decode lies among the calibrated points."""
    return {"keys": work.sequences * work.context, "context": work.context, "read": work.read}


def prefill_coordinates(tokens: float, context: float, heads: int, kv_heads: int = 0) -> dict[str, float]:
    """Where attention in prefill lies; `context` is what a token sees on average. `kv_heads`: 0 if as many as heads."""
    found = {"tokens": tokens, "context": context, "heads": heads}
    return {**found, "kv heads": kv_heads} if kv_heads else found


def _kv_heads(row: AttentionRow) -> int:
    """Of grouped-query attention; in prefill MLA has as many as heads."""
    return row.kv_heads if row.kind == "gqa" else 0


def _attention(known: Hardware) -> Domain:
    def coordinates(row: AttentionRow) -> dict[str, float]:
        if row.phase == "decode":
            return decode_coordinates(compute.decode_work(row))
        return prefill_coordinates(row.batch * row.new, row.context - row.new / 2, row.heads, _kv_heads(row))

    return Domain(
        name="attention",
        rows=AttentionRow,
        path=lambda row: (row.phase, row.kind),
        priors=lambda path: compute.ATTENTION[path[0]],
        predict=lambda constants, row: 1e6 * compute.predict_attention(row, known.gpu(row.gpu), constants),
        measured=lambda row: row.us,
        coordinates=coordinates,
    )


def small_coordinates(tokens: float, hidden: float, columns: float, experts: float) -> dict[str, float]:
    """Where a layer's small kernels lie among the calibrated ones."""
    return {"tokens": tokens, "hidden": hidden, "columns": columns, "experts": experts}


def _small(known: Hardware) -> Domain:
    def predict(constants: Constants, row: SmallRow) -> float:
        gpu = known.gpu(row.gpu)
        return 1e6 * compute.small_seconds(row.tokens, row.hidden, row.columns, row.experts, gpu, constants)

    return Domain(
        name="small",
        rows=SmallRow,
        path=lambda row: ("layer",),
        priors=lambda path: compute.SMALL,
        predict=predict,
        measured=lambda row: row.us,
        coordinates=lambda row: small_coordinates(row.tokens, row.hidden, row.columns, row.experts),
    )


def _host() -> Domain:
    return Domain(
        name="host",
        rows=LaunchRow,
        path=lambda row: ("launch",),
        priors=lambda path: compute.LAUNCH,
        predict=lambda constants, row: constants["launch_us"],
        measured=lambda row: row.us,
        coordinates=lambda row: {"launches": 1.0},
    )


def _stream(known: Hardware) -> Domain:
    def predict(constants: Constants, row: StreamRow) -> float:
        return constants["copy_us"] + 1e6 * compute.stream_seconds(2.0 * row.bytes, known.gpu(row.gpu), constants)

    return Domain(
        name="stream",
        rows=StreamRow,
        path=lambda row: ("copy",),
        priors=lambda path: compute.STREAM,
        predict=predict,
        measured=lambda row: row.us,
        coordinates=lambda row: {"bytes": row.bytes},
    )
