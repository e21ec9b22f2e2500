"""Traces from what SGLang's expert distribution recorder dumps, as .pt, or with the same keys as .json or .npz.

Shape legend: L layers of the dump (all of the model, or those with experts), E experts, P physical experts, T tokens,
K top-k.

    stat, stat_approx   logical_count [steps, L, E]: counts only; who was chosen together is not in it
    per_token           records of topk_ids_of_layer [L, T, K], physical ids, −1 for padding; input_ids, positions;
                        last_physical_to_logical_map [L, P]

Every forward pass of a rank stands for a sequence. Dumps of several ranks make one trace.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from soloist.errors import ConfigurationError
from soloist.placement.archive import Array, read_arrays
from soloist.placement.torch_file import read_torch_file
from soloist.placement.trace import RoutingTrace, Sample, TraceModel
from soloist.specs.model import ModelSpec


def read_sglang_dumps(spec: ModelSpec, paths: Sequence[str | Path]) -> RoutingTrace:
    """One trace of the dumps of all ranks. Raises ConfigurationError for a dump of another form or model."""
    dumps = [_read(Path(path)) for path in paths]
    try:
        if all("logical_count" in dump for dump in dumps):
            return _from_counts(spec, [np.asarray(dump["logical_count"]) for dump in dumps])
        return _from_records(spec, dumps)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        why = error if isinstance(error, ValueError) else repr(error)
        remedy = f"is no dump of {spec.name} in mode stat, stat_approx or per_token: {why}"
        raise ConfigurationError.of("dump", ", ".join(map(str, paths)), remedy) from error


def _read(path: Path) -> dict[str, Any]:
    if path.suffix == ".pt":
        return read_torch_file(path)
    try:
        if path.suffix == ".npz":
            return dict[str, Any](read_arrays(path))
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except OSError as error:
        raise ConfigurationError.of("dump", str(path), f"cannot be read: {error.strerror or error}") from error
    except (ValueError, msgspec.DecodeError) as error:
        raise ConfigurationError.of("dump", str(path), f"is neither .pt, .npz nor .json: {error}") from error


def _from_counts(spec: ModelSpec, counts: list[Array]) -> RoutingTrace:
    model = TraceModel.of(spec)
    counts_LE = sum(_moe_rows(spec, count.reshape(-1, *count.shape[-2:]).sum(axis=0)) for count in counts)
    if np.shape(counts_LE) != (model.moe_layers, model.experts):
        raise ValueError(f"counts of shape {np.shape(counts_LE)}, but the model is {model}")
    counts_LE = np.asarray(counts_LE, np.int64)
    together_LEE = counts_LE[:, :, None] * np.eye(model.experts, dtype=np.int64)
    return RoutingTrace(model, int(counts_LE[0].sum()) // model.top_k, counts_LE, together_LEE)


def _from_records(spec: ModelSpec, dumps: list[dict[str, Any]]) -> RoutingTrace:
    if not any(dump["records"] for dump in dumps):
        raise ValueError("it holds no records; was anything asked of the server between start and dump?")
    if not all("topk_ids_of_layer" in record for dump in dumps for record in dump["records"]):
        raise ValueError("its records have no choices, as mode per_pass has none; take per_token, or stat for counts")
    parts: list[Sample] = []
    for dump in dumps:
        logical_LP = _moe_rows(spec, np.asarray(dump["last_physical_to_logical_map"]))
        for record in dump["records"]:
            parts.append(_sample(spec, record, logical_LP, len(parts)))
    return RoutingTrace.of_sample(TraceModel.of(spec), Sample.joined(parts))


def _sample(spec: ModelSpec, record: dict[str, Any], logical_LP: Array, number: int) -> Sample:
    physical_LTK = _moe_rows(spec, np.asarray(record["topk_ids_of_layer"]))[:, :, : spec.router.top_k]
    real_T = np.asarray((physical_LTK >= 0).all(axis=(0, 2)))
    ids_LTK = np.take_along_axis(logical_LP[:, None, :], physical_LTK[:, real_T], axis=2)
    if ids_LTK.max(initial=0) >= spec.experts:
        raise ValueError(f"expert {ids_LTK.max()}, but the model has {spec.experts}")
    tokens = ids_LTK.shape[1]
    return Sample(
        ids_LTK=ids_LTK,
        token_T=np.asarray(record["input_ids"])[: len(real_T)][real_T],
        sequence_T=np.full(tokens, number),
        position_T=np.asarray(record["positions"])[: len(real_T)][real_T],
        source_T=np.full(tokens, int(record["rank"])),
        index_T=np.arange(tokens),
    )


def _moe_rows(spec: ModelSpec, rows: Array) -> Array:
    """The MoE layers of a dump that has these or all layers."""
    return rows[list(spec.moe_layers)] if len(rows) == spec.layers else rows
