"""What a plan file says to the engine: layout, placement, sizes. Imports no torch."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any

import msgspec

from soloist.engine.meeting import place_from
from soloist.errors import ConfigurationError
from soloist.planner.memory import KV_BLOCK
from soloist.planner.plan import Plan
from soloist.planner.precision import Precision
from soloist.specs.cluster import ClusterSpec
from soloist.specs.model import ModelSpec

IGNORED = ("name", "eos_ids")  # in which the spec of a preset may differ from that of a checkpoint


def planned_options(plan: Plan) -> dict[str, Any]:
    """Fields of `EngineOptions` as planned: the KV cache holds `batch` sequences at their longest.

    Raises ConfigurationError for a plan that counts on what this engine does not do.
    """
    _check_precision(plan)
    sequences = max(1, math.ceil(plan.batch))
    return {
        **_links(plan.cluster),
        "gpus_per_node": plan.cluster.gpus_per_node,
        "max_batch_tokens": max(plan.options.chunk_tokens, sequences),
        "max_sequences": sequences,
        "kv_tokens": sequences * _whole_blocks(plan.load.longest),
        "micro_batches": plan.options.micro_batches,
        "overlap": str(plan.overlap),
        "nvlink_sums": plan.options.nvlink_sums,
        "mixed_graphs": plan.options.mixed_graphs,
    }


def _links(cluster: ClusterSpec) -> dict[str, str]:
    """The cluster's rates, by which the exchange chooses between flat and by node, and its chunks."""
    if not cluster.nic or not cluster.nvlink:
        return {}
    return {
        "network_link": f"{cluster.nic / 1e6:g},{cluster.nic_latency_us:g}",
        "inside_link": f"{cluster.nvlink / 1e6:g},{cluster.nvlink_latency_us:g}",
    }


def check_planned(plan: Plan, spec: ModelSpec, device: str, environment: Mapping[str, str] = os.environ) -> None:
    """Raise ConfigurationError unless the plan is for this model, and there are as many GPUs as it was made for.

    Under a launcher the number of ranks is checked where they meet. `device` = "cpu" runs a process for each GPU.
    """
    for key in spec.__struct_fields__:
        planned, found = getattr(plan.model, key), getattr(spec, key)
        if key not in IGNORED and planned != found:
            key, planned, found = _first_difference(key, planned, found)
            remedy = f"{spec.name} has {found!r}: the plan is of another model, {plan.model.name}; make one for this"
            raise ConfigurationError.of(f"plan.model.{key}", planned, remedy)
    if device == "cpu" or place_from(environment) is not None:
        return
    needed, found = plan.layout.size, count_gpus(environment)
    if found < needed:
        remedy = (
            f"the plan is for {needed} GPUs, this host has {found}: plan for as many, start it with torchrun on more "
            f"hosts, or give --device cpu to run {needed} processes without GPUs"
        )
        raise ConfigurationError.of("plan.layout", str(plan.layout), remedy)


def count_gpus(environment: Mapping[str, str] = os.environ) -> int:
    """NVIDIA GPUs of this host that CUDA_VISIBLE_DEVICES leaves, without loading CUDA."""
    import pynvml

    try:
        pynvml.nvmlInit()
        count = int(pynvml.nvmlDeviceGetCount())
    except pynvml.NVMLError:
        return 0
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    return count if visible is None else min(count, len([name for name in visible.split(",") if name.strip()]))


def _check_precision(plan: Plan) -> None:
    own = Precision.of(plan.model)
    for key in own.__struct_fields__:
        if getattr(plan.precision, key) != getattr(own, key):
            remedy = f"the engine takes {getattr(own, key)} for it; plan without --precision"
            raise ConfigurationError.of(f"plan.precision.{key}", getattr(plan.precision, key), remedy)


def _first_difference(key: str, planned: Any, found: Any) -> tuple[str, Any, Any]:
    """Down to the field of a nested spec in which two differ."""
    if isinstance(planned, msgspec.Struct) and isinstance(found, type(planned)):
        for name in planned.__struct_fields__:
            if getattr(planned, name) != getattr(found, name):
                return _first_difference(f"{key}.{name}", getattr(planned, name), getattr(found, name))
    return key, planned, found


def _whole_blocks(tokens: int) -> int:
    return -(-tokens // KV_BLOCK) * KV_BLOCK
