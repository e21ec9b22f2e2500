"""What each rank recorded of its part of the routing, on its way to one trace.

Shape legend: L MoE layers of the rank's stage, E experts, T tokens that the rank sent, K top-k.

A rank's recording is a NumPy archive as bytes. It knows the layers of one pipeline stage and the tokens that its rank
sent to experts; a token is recorded by exactly one rank of each stage, more often only if it was computed again.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np

from soloist.errors import ClusterError, ConfigurationError
from soloist.placement.trace import Array, RoutingTrace, Sample, TraceModel
from soloist.specs.model import ModelSpec

TOKEN_FIELDS = ("token_T", "sequence_T", "position_T", "source_T", "index_T")


def pack(arrays: dict[str, Array]) -> bytes:
    """A rank's recording as bytes: `layers` with either `ids_LTK` and the token fields, or counts and `tokens`."""
    content = io.BytesIO()
    np.savez(content, **arrays)  # pyright: ignore[reportArgumentType]
    return content.getvalue()


def merge(spec: ModelSpec, recordings: Sequence[bytes]) -> RoutingTrace:
    """One trace of what all ranks recorded. Raises ConfigurationError if that is nothing, ClusterError if a stage knows
    tokens that another one does not."""
    parts = [dict(np.load(io.BytesIO(content), allow_pickle=False)) for content in recordings if content]
    if not any(len(part["layers"]) and _tokens(part) for part in parts):
        raise ConfigurationError.of("record", "no tokens", "start the engine with record = ids or counts, then run it")
    return _merge_ids(spec, parts) if "ids_LTK" in parts[0] else _merge_counts(spec, parts)


def _tokens(part: dict[str, Array]) -> int:
    return len(part["token_T"]) if "token_T" in part else int(part["tokens"])


def _merge_counts(spec: ModelSpec, parts: list[dict[str, Array]]) -> RoutingTrace:
    model = TraceModel.of(spec)
    together_LEE = np.zeros((model.moe_layers, model.experts, model.experts), np.int64)
    for part in parts:
        together_LEE[_rows(spec, part)] += part["together_LEE"]
    counts_LE = np.diagonal(together_LEE, axis1=1, axis2=2).copy()
    return RoutingTrace(model, int(counts_LE[0].sum()) // model.top_k, counts_LE, together_LEE)


def _merge_ids(spec: ModelSpec, parts: list[dict[str, Array]]) -> RoutingTrace:
    """Tokens in order of sequence and position; of those computed twice, the first."""
    key_parts = [part["sequence_T"].astype(np.int64) << 32 | part["position_T"].astype(np.int64) for part in parts]
    keys = np.unique(np.concatenate(key_parts))
    ids_LTK = np.full((len(spec.moe_layers), len(keys), spec.router.top_k), -1, np.int64)
    fields = {name: np.zeros(len(keys), np.int64) for name in TOKEN_FIELDS}
    for part, part_keys in zip(reversed(parts), reversed(key_parts), strict=True):
        _, first = np.unique(part_keys, return_index=True)
        rows = np.searchsorted(keys, part_keys[first])
        ids_LTK[_rows(spec, part)[:, None], rows] = part["ids_LTK"][:, first]
        for name, array in fields.items():
            array[rows] = part[name][first]
    if ids_LTK.min() < 0:
        raise ClusterError(
            "some ranks recorded tokens that those of other stages did not, as when one is lost: record again"
        )
    return RoutingTrace.of_sample(TraceModel.of(spec), Sample(ids_LTK=ids_LTK, **fields))


def _rows(spec: ModelSpec, part: dict[str, Array]) -> Array:
    return np.searchsorted(spec.moe_layers, part["layers"])
