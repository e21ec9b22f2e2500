"""GPUs and clusters as data: what a planner has to know about the machine.

Rates are one way and per GPU. A *rail* is the set of NICs with one index in every node, joined by one leaf switch; a
message between rails crosses a spine switch more. Presets lie in `data/clusters.yaml`; an own YAML file has the same
two tables and may refer to the preset GPUs.
"""

from __future__ import annotations

from functools import cache
from math import inf
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from soloist.errors import ConfigurationError
from soloist.specs.files import read_text, read_yaml
from soloist.specs.model import Spec

Tables = dict[str, dict[str, Any]]
_PRESETS = Path(__file__).parent / "data" / "clusters.yaml"


class GpuSpec(Spec, frozen=True, kw_only=True):
    """One GPU. `mfu` and `memory_utilization`, where stated, take the place of calibrated efficiencies."""

    name: str = ""
    tflops: dict[str, float]  # dense peak by data type: bf16, fp16, fp8, fp4, fp32
    memory_GB: float
    memory_TBps: float
    nvlink_GBps: float = 0.0
    sms: int = 100
    l2_MB: float = 40.0
    mfu: float | None = None
    memory_utilization: float | None = None
    source: str = ""

    def __post_init__(self) -> None:
        _positive("gpu", self, ("memory_GB", "memory_TBps", "sms", "l2_MB"))
        _not_negative("gpu", self, ("nvlink_GBps",))
        for key in ("mfu", "memory_utilization"):
            value = getattr(self, key)
            if value is not None and not 0 < value <= 1:
                raise ConfigurationError.of(f"gpu.{key}", value, "is a share; it must lie in (0, 1]")
        for dtype, rate in self.tflops.items():
            if not 0 < rate < inf:
                raise ConfigurationError.of(f"gpu.tflops.{dtype}", rate, "must be positive and finite")
        if not self.tflops.keys() & {"bf16", "fp16"}:
            raise ConfigurationError.of("gpu.tflops", sorted(self.tflops), "must state bf16 or fp16")

    def flops(self, dtype: str) -> float:
        """Dense peak in FLOP/s. A GPU without fp8 or fp4 units computes in bf16 what is stored in them."""
        table = self.tflops
        return 1e12 * (table.get(dtype) or table.get("bf16") or table["fp16"])

    @property
    def bandwidth(self) -> float:
        """Peak of the device memory in bytes/s."""
        return self.memory_TBps * 1e12


class ClusterSpec(Spec, frozen=True, kw_only=True):
    """Equal nodes of `gpus_per_node` GPUs. `nvlink_GBps` and `links_GBps` override the GPU's own NVLink rate."""

    name: str = ""
    gpu: GpuSpec
    gpus_per_node: int
    nvlink_GBps: float | None = None
    nic_GBps: float = 0.0  # per GPU; 0: one node only
    nics_per_node: int = 0
    nvlink_latency_us: float = 1.0
    nic_latency_us: float = 4.0
    spine_latency_us: float = 1.0  # added between rails
    links_GBps: tuple[tuple[float, ...], ...] = ()  # between the GPUs of a node, where they differ
    max_gpus: int | None = None
    source: str = ""

    def __post_init__(self) -> None:
        _positive("cluster", self, ("gpus_per_node",))
        keys = ("nic_GBps", "nics_per_node", "nvlink_latency_us", "nic_latency_us", "spine_latency_us")
        _not_negative("cluster", self, keys)
        if self.nvlink_GBps is not None:
            _not_negative("cluster", self, ("nvlink_GBps",))
        n, links = self.gpus_per_node, self.links_GBps
        if links and (len(links) != n or any(len(row) != n for row in links)):
            raise ConfigurationError.of("cluster.links_GBps", f"{len(links)} rows", f"must be a {n} x {n} matrix")
        if not all(0 <= rate < inf for row in links for rate in row):
            raise ConfigurationError.of("cluster.links_GBps", links, "must hold finite rates, none negative")

    @property
    def nvlink(self) -> float:
        """Bytes/s that a GPU sends to the others of its node."""
        if self.links_GBps:
            rows = np.array(self.links_GBps, dtype=float)
            return 1e9 * float(rows[~np.eye(len(rows), dtype=bool)].mean()) if len(rows) > 1 else 0.0
        return 1e9 * (self.gpu.nvlink_GBps if self.nvlink_GBps is None else self.nvlink_GBps)

    @property
    def nic(self) -> float:
        """Bytes/s that a GPU sends to other nodes."""
        return 1e9 * self.nic_GBps

    def nodes(self, gpus: int) -> int:
        """Nodes that `gpus` GPUs fill, the last perhaps in part. Raises ConfigurationError if there are not as many."""
        if gpus < 1 or (self.max_gpus is not None and gpus > self.max_gpus):
            raise ConfigurationError.of("gpus", gpus, f"{self.name or 'the cluster'} has 1 to {self.max_gpus or 'any'}")
        count = -(-gpus // self.gpus_per_node)
        if count > 1 and not self.nic_GBps:
            remedy = f"a node has {self.gpus_per_node} and cluster.nic_GBps is 0; state the NIC's rate"
            raise ConfigurationError.of("gpus", gpus, remedy)
        return count

    def bandwidth_matrix(self, gpus: int) -> np.ndarray:
        """`[gpus, gpus]` bytes/s from GPU to GPU; infinite on the diagonal."""
        self.nodes(gpus)
        node, local = np.divmod(np.arange(gpus), self.gpus_per_node)
        matrix = np.full((gpus, gpus), self.nic)
        same = node[:, None] == node[None, :]
        inside = 1e9 * np.array(self.links_GBps)[local[:, None], local[None, :]] if self.links_GBps else self.nvlink
        matrix = np.where(same, inside, matrix)
        np.fill_diagonal(matrix, np.inf)
        return matrix

    def latency_matrix(self, gpus: int) -> np.ndarray:
        """`[gpus, gpus]` seconds from GPU to GPU; 0 on the diagonal, more between rails."""
        self.nodes(gpus)
        node = np.arange(gpus) // self.gpus_per_node
        rail = self.rails(gpus)
        across = self.nic_latency_us + self.spine_latency_us * (rail[:, None] != rail[None, :])
        matrix = 1e-6 * np.where(node[:, None] == node[None, :], self.nvlink_latency_us, across)
        np.fill_diagonal(matrix, 0.0)
        return matrix

    def rails(self, gpus: int) -> np.ndarray:
        """`[gpus]` rail of each GPU: its NIC's index within the node."""
        local = np.arange(gpus) % self.gpus_per_node
        nics = min(self.nics_per_node or 1, self.gpus_per_node)
        return local * nics // self.gpus_per_node


class _MachineRecord(msgspec.Struct):
    """What `soloist calibrate` writes of a machine, as far as it concerns this module."""

    cluster: ClusterSpec


def load_clusters(path: str | Path) -> dict[str, ClusterSpec]:
    """All clusters of a YAML file with tables `gpus` and `clusters`. Raises ConfigurationError, naming file and key."""
    tables = _read(Path(path))
    gpus = {**preset_gpus(), **_gpus(tables, path)}
    return {name: _cluster(name, entry, gpus, path) for name, entry in tables.get("clusters", {}).items()}


def cluster(name: str, gpu: str = "", nic_GBps: float | None = None) -> ClusterSpec:
    """A preset by name, or the only cluster of a YAML file by path (`file.yaml#name` where it has several).

    A file of `soloist calibrate` (`.jsonl`) stands for the machine that it was measured on. The output of `nvidia-smi
    topo -m` and NCCL's topology XML are read as a node of GPUs that they do not name: `topo.txt#H200`, or `gpu`;
    `nic_GBps` of a NIC, where they do not say it. Both are for topologies only.
    """
    path, _, wanted = name.partition("#")
    is_text = name not in preset_clusters() and Path(path).is_file() and not path.endswith(".jsonl")
    if is_text and (topology := _topology(path, gpu or wanted, nic_GBps)):
        return topology
    for key, value in (("gpu", gpu), ("nic", nic_GBps)):
        if value:
            raise ConfigurationError.of(f"--{key}", value, f"is for a topology, and {name} is none; leave it out")
    return _named(name)


def _named(name: str) -> ClusterSpec:
    if name in preset_clusters():
        return preset_clusters()[name]
    path, _, wanted = name.partition("#")
    if not Path(path).is_file():
        raise ConfigurationError.of(
            "cluster", name, f"is no file and no preset; presets: {', '.join(preset_clusters())}"
        )
    if path.endswith(".jsonl"):
        if machine := measured_cluster(path):
            return machine
        raise ConfigurationError.of("cluster", name, "holds no record of a machine; `soloist calibrate` writes one")
    found = load_clusters(path)
    if wanted in found:
        return found[wanted]
    if not found:
        raise ConfigurationError.of("cluster", name, "the file has no table clusters with a cluster in it")
    if wanted or len(found) != 1:
        raise ConfigurationError.of("cluster", name, f"choose one of {sorted(found)}: {path}#NAME")
    return next(iter(found.values()))


def _topology(path: str, gpu: str, nic_GBps: float | None) -> ClusterSpec | None:
    from soloist.specs.topology import NIC_GBPS, is_topology, read_topology  # made of the classes of this module

    if not is_topology(read_text(path, "cluster file")):
        return None
    return read_topology(path, gpu, NIC_GBPS if nic_GBps is None else nic_GBps)


def measured_cluster(path: str | Path) -> ClusterSpec | None:
    """The machine that a file of measurements (JSON lines) names, if it names one.

    Raises ConfigurationError for a file that cannot be read and for a machine that is none.
    """
    for line in read_text(path, "measurements").splitlines():
        if line.startswith('{"what":"machine"'):
            try:
                return msgspec.json.decode(line, type=_MachineRecord).cluster
            except msgspec.DecodeError as error:
                raise ConfigurationError.of("measurements", str(path), f"the record of its machine: {error}") from error
    return None


@cache
def preset_gpus() -> dict[str, GpuSpec]:
    """The GPUs that come with Soloist."""
    return _gpus(_presets(), _PRESETS)


@cache
def preset_clusters() -> dict[str, ClusterSpec]:
    """The clusters that come with Soloist."""
    gpus = preset_gpus()
    return {name: _cluster(name, entry, gpus, _PRESETS) for name, entry in _presets()["clusters"].items()}


def _gpus(tables: Tables, path: str | Path) -> dict[str, GpuSpec]:
    entries = tables.get("gpus", {})
    where = {name: f"{path}: gpus.{name}" for name in entries}
    fields = {name: _convert(dict[str, Any], entry, where[name]) for name, entry in entries.items()}
    return {name: _convert(GpuSpec, {"name": name, **fields[name]}, where[name]) for name in entries}


def _cluster(name: str, entry: Any, gpus: dict[str, GpuSpec], path: str | Path) -> ClusterSpec:
    where = f"{path}: clusters.{name}"
    fields: dict[str, Any] = _convert(dict[str, Any], entry, where)
    gpu = fields.get("gpu")
    if isinstance(gpu, str):
        if gpu not in gpus:
            raise ConfigurationError.of(f"{where}.gpu", gpu, f"unknown; known are {', '.join(sorted(gpus))}")
        fields["gpu"] = msgspec.to_builtins(gpus[gpu])
    return _convert(ClusterSpec, {"name": name, **fields}, where)


@cache
def _presets() -> Tables:
    return _read(_PRESETS)


def _read(path: Path) -> Tables:
    entries = read_yaml(path, "cluster file")
    tables: Tables = _convert(dict[str, dict[str, Any] | None], entries, str(path))
    if unknown := sorted(set(tables) - {"gpus", "clusters"}):
        raise ConfigurationError.of("cluster file", unknown, f"{path} may hold the tables gpus and clusters")
    return {key: value or {} for key, value in tables.items()}


def _convert(kind: Any, entry: Any, where: str) -> Any:
    try:
        return msgspec.convert(entry, kind)
    except msgspec.ValidationError as error:
        raise ConfigurationError(f"{where}: {error}; see docs/planner.md for the keys") from error


def _positive(where: str, spec: Spec, keys: tuple[str, ...]) -> None:
    for key in keys:
        if not 0 < getattr(spec, key) < inf:
            raise ConfigurationError.of(f"{where}.{key}", getattr(spec, key), "must be positive and finite")


def _not_negative(where: str, spec: Spec, keys: tuple[str, ...]) -> None:
    for key in keys:
        if not 0 <= getattr(spec, key) < inf:
            raise ConfigurationError.of(f"{where}.{key}", getattr(spec, key), "must not be negative, and finite")
