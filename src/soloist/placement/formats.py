"""Placements as files of other engines, there and back.

    sglang      JSON for --init-expert-location: {"physical_to_logical_map": [[expert of each slot] of each layer]}
    tensorrt    YAML of moe_config.load_balancer: initial_global_assignments {layer: [expert of each slot]}, num_slots
    eplb        NumPy archive with DeepSeek's maps phy2log, log2phy, logcnt

All of them give every rank the same number of neighbouring slots and know no group of several ranks; a dense layer has
no row in TensorRT-LLM's file and in EPLB's, and some row in SGLang's. What they cannot express is an error on export
and a notice on import. vLLM has no released form (0.33): several proposals are open, each with another file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from shlex import quote
from typing import Any

import msgspec
import numpy as np
import yaml

from soloist.errors import ConfigurationError
from soloist.placement.archive import Array, read_arrays
from soloist.placement.eplb import EplbMaps, physical_map
from soloist.placement.placement import LayerSlots, Placement
from soloist.specs.files import write_file
from soloist.specs.layout import Layout
from soloist.specs.model import ModelSpec

Notices = list[str]


def export_placement(placement: Placement, spec: ModelSpec, form: str, path: str | Path) -> Notices:
    """Write another engine's file; returns what a user of it has to know. Raises ConfigurationError."""
    if form not in _EXPORTS:
        raise _unknown(form)
    placement.check(spec, Layout(ep=placement.groups))
    return _EXPORTS[form](physical_map(placement), placement, spec, Path(path))


def import_placement(spec: ModelSpec, groups: int, form: str, path: str | Path) -> tuple[Placement, Notices]:
    """Read another engine's file for `groups` ranks. Raises ConfigurationError for one that does not fit the model."""
    if form not in _IMPORTS:
        raise _unknown(form)
    try:
        physical_LR = np.array(_IMPORTS[form](spec, Path(path)), np.int64)
    except OSError as error:
        raise ConfigurationError.of("placement", str(path), f"cannot be read: {error.strerror or error}") from error
    except (KeyError, TypeError, ValueError, msgspec.DecodeError, yaml.YAMLError) as error:
        remedy = f"is not {form}'s file for {spec.name}: {error!r}"
        raise ConfigurationError.of("placement", str(path), remedy) from error
    return from_physical(physical_LR, spec, groups, str(path))


def from_physical(physical_LR: Array, spec: ModelSpec, groups: int, name: str) -> tuple[Placement, Notices]:
    """Slots from rows of experts; a second replica in a group is left out, and said."""
    layers, slots = len(spec.moe_layers), physical_LR.shape[-1]
    if physical_LR.shape != (layers, slots) or slots % groups:
        remedy = f"must have {layers} rows, the MoE layers, of a multiple of {groups} slots"
        raise ConfigurationError.of("placement", f"{name}: {physical_LR.shape}", remedy)
    rows: list[LayerSlots] = []
    twins = 0
    for row in physical_LR.reshape(layers, groups, slots // groups).tolist():
        rows.append(tuple(tuple(dict.fromkeys(group)) for group in row))
        twins += slots - sum(map(len, rows[-1]))
    said = f"{twins} slots held an expert that their group holds already; they are left out, since they serve nothing"
    return Placement(experts=spec.experts, slots=tuple(rows)), [said] * (twins > 0)


def _export_sglang(physical_LR: Array, placement: Placement, spec: ModelSpec, path: Path) -> Notices:
    slots = physical_LR.shape[1]
    rows = np.tile(np.arange(slots) % spec.experts, (spec.layers, 1))
    rows[list(spec.moe_layers)] = physical_LR
    write_file(path, msgspec.json.encode({"physical_to_logical_map": rows.tolist()}))
    flags = f"--init-expert-location {quote(str(path))} --ep-size {placement.groups}"
    if slots > spec.experts:
        flags += f" --ep-num-redundant-experts {slots - spec.experts}"
    notices = [f"start SGLang with {flags}"]
    if spec.dense_layers:
        notices.append(f"layers {_listed(spec.dense_layers)} are dense; their rows, which must be there, are fillers")
    return notices


def _export_tensorrt(physical_LR: Array, placement: Placement, spec: ModelSpec, path: Path) -> Notices:
    rows = dict(zip(spec.moe_layers, physical_LR.tolist(), strict=True))
    content = {
        "initial_global_assignments": rows,
        "num_slots": physical_LR.shape[1],
        "layer_updates_per_iter": 0,
    }
    write_file(path, yaml.safe_dump(content, default_flow_style=None, width=1 << 20, sort_keys=False))
    return [
        f"name it as load_balancer in moe_config, with --ep_size {placement.groups}",
        "layer_updates_per_iter is 0: the placement stays as it is; more lets TensorRT-LLM rebalance while it runs",
    ]


def _export_eplb(physical_LR: Array, placement: Placement, spec: ModelSpec, path: Path) -> Notices:
    maps = EplbMaps.of(physical_LR, spec.experts)
    with path.open("wb") as file:
        np.savez_compressed(file, phy2log=maps.physical_LR, log2phy=maps.logical_LEM, logcnt=maps.count_LE)
    each = physical_LR.shape[1] // placement.groups
    return [f"the maps are of {placement.groups} GPUs with {each} slots each, and of MoE layers only"]


def _import_sglang(spec: ModelSpec, path: Path) -> Iterable[Any]:
    content = msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    rows = content["physical_to_logical_map"]
    if len(rows) == spec.layers:
        return [rows[layer] for layer in spec.moe_layers]
    raise ValueError(f"{len(rows)} rows, but the model has {spec.layers} layers")


def _import_tensorrt(spec: ModelSpec, path: Path) -> Iterable[Any]:
    content = yaml.safe_load(path.read_text())
    rows, slots = content["initial_global_assignments"], content["num_slots"]
    found = [rows[layer] for layer in spec.moe_layers]
    if len(rows) != len(found) or any(len(row) != slots for row in found):
        raise ValueError(f"rows for layers {_listed(rows)} of {slots} slots, but MoE layers are {spec.moe_layers}")
    return found


def _import_eplb(spec: ModelSpec, path: Path) -> Iterable[Any]:
    return read_arrays(path)["phy2log"]


def _unknown(form: str) -> ConfigurationError:
    if form == "vllm":
        remedy = "vLLM has no released form of a placement (0.33); its open proposals differ from one another"
        return ConfigurationError.of("format", form, remedy)
    return ConfigurationError.of("format", form, f"is none of {_listed(_EXPORTS)}")


def _listed(items: Iterable[object]) -> str:
    return ", ".join(map(str, items))


_EXPORTS: dict[str, Callable[[Array, Placement, ModelSpec, Path], Notices]] = {
    "sglang": _export_sglang,
    "tensorrt": _export_tensorrt,
    "eplb": _export_eplb,
}
_IMPORTS: dict[str, Callable[[ModelSpec, Path], Iterable[Any]]] = {
    "sglang": _import_sglang,
    "tensorrt": _import_tensorrt,
    "eplb": _import_eplb,
}
