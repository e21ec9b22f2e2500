"""`soloist cluster`: what the planner knows of a machine, and how others' descriptions of one are read.

`nvidia-smi topo -m` and NCCL's topology XML become a cluster file; logs of nccl-tests become a calibration.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
import yaml
from rich.table import Table

from soloist.planner.domains import COLLECTIVE_SPELLINGS
from soloist.specs.cluster import ClusterSpec, preset_clusters, preset_gpus
from soloist.specs.files import read_text, write_file
from soloist.specs.nccl_tests import parse_nccl_tests

SHOWN = 16  # GPUs of a matrix
MODELLED = set(COLLECTIVE_SPELLINGS.values())


def presets() -> Table:
    """The clusters that come with Soloist."""
    table = Table("cluster", "GPU", "a node", "NVLink GB/s", "NIC GB/s", "source")
    for name, spec in preset_clusters().items():
        rates = f"{spec.nvlink / 1e9:g}", f"{spec.nic_GBps:g}"
        table.add_row(name, spec.gpu.name, str(spec.gpus_per_node), *rates, spec.source)
    return table


def matrices(spec: ClusterSpec, gpus: int) -> list[Table]:
    """Bandwidth (GB/s) and latency (µs) from GPU to GPU; of many GPUs those of the first ones."""
    shown = min(gpus, SHOWN)
    found = []
    for title, values in (
        ("GB/s", spec.bandwidth_matrix(gpus) / 1e9), ("µs", spec.latency_matrix(gpus) * 1e6)
    ):  # fmt: skip
        table = Table(title, *map(str, range(shown)), title=f"{title} from row to column, {gpus} GPUs")
        for index, row in enumerate(values[:shown, :shown]):
            table.add_row(str(index), *("–" if i == index else f"{value:g}" for i, value in enumerate(row)))
        found.append(table)
    return found


def description(spec: ClusterSpec, gpus: int) -> list[str]:
    """One line for each thing that the planner uses."""
    gpu, rails = spec.gpu, len(np.unique(spec.rails(gpus)))
    rates = ", ".join(f"{rate:g} {name}" for name, rate in gpu.tflops.items())
    network = f"{spec.nic_GBps:g} GB/s a GPU by {spec.nics_per_node} NICs a node" if spec.nic_GBps else "none"
    return [
        f"{spec.name}: {gpus} GPUs in {spec.nodes(gpus)} node(s) of {spec.gpus_per_node} × {gpu.name}, {rails} rail(s)",
        f"GPU: {rates} TFLOP/s, {gpu.memory_GB:g} GB at {gpu.memory_TBps:g} TB/s, {gpu.sms} SMs",
        f"inside a node: {spec.nvlink / 1e9:g} GB/s a GPU, {spec.nvlink_latency_us:g} µs",
        f"network: {network}, {spec.nic_latency_us:g} µs and {spec.spine_latency_us:g} more between rails",
        *([f"source: {spec.source}"] if spec.source else []),
    ]


def save_cluster(spec: ClusterSpec, path: str | Path) -> None:
    """As a cluster file. A preset GPU is named, another one written out."""
    fields = {key: value for key, value in msgspec.to_builtins(spec).items() if value not in (None, "", (), [])}
    name, gpu = fields.pop("name", "mine"), fields.pop("gpu")
    is_preset = preset_gpus().get(spec.gpu.name) == spec.gpu
    tables = {} if is_preset else {"gpus": {spec.gpu.name: {k: v for k, v in gpu.items() if k != "name" and v}}}
    tables["clusters"] = {name: {"gpu": spec.gpu.name, **fields}}
    write_file(path, yaml.safe_dump(tables, sort_keys=False, default_flow_style=None, width=120))


def calibration_of_logs(logs: Sequence[Path], spec: ClusterSpec, out: Path) -> list[str]:
    """Write the results of nccl-tests as measurements of this cluster; notes on what was left out.

    Raises ConfigurationError for a log that cannot be read or holds nothing of use.
    """
    machine = {"what": "machine", "cluster": msgspec.to_builtins(spec), "source": "nccl-tests"}
    lines, notes = [msgspec.json.encode(machine)], []
    for log in logs:
        rows = parse_nccl_tests(read_text(log, "nccl-tests log"), fabric=spec.name, path=str(log))
        for row in rows:
            spec.nodes(int(str(row["gpus"])))
        kinds = {str(row["collective"]) for row in rows}
        notes += [f"{log}: {kind} is not modelled and was left out" for kind in sorted(kinds - MODELLED)]
        lines += [_measurement(row) for row in rows if row["collective"] in MODELLED]
    write_file(out, b"\n".join(lines) + b"\n")
    return notes


def _measurement(row: dict[str, object]) -> bytes:
    shape = {key: row[key] for key in ("library", "fabric", "gpus", "collective", "bytes")}
    return msgspec.json.encode({"what": "collectives", "shape": shape, "us": row["us"], "source": "nccl-tests"})
