"""How a model is to be run: everything that is neither the model nor the layout. Torch-free, travels to every rank."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from soloist.errors import ConfigurationError
from soloist.specs.model import Dtype, Spec
from soloist.transport.mpi_options import MpiOptions


class EngineOptions(Spec, frozen=True, kw_only=True):
    """Options of an engine. Sizes in tokens unless the name says otherwise."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Dtype | None = None  # None: the model's own on a GPU, float32 on a CPU
    transport: Literal["auto", "local", "shared_memory", "gloo", "nccl", "mpi"] = "auto"
    mpi: MpiOptions = MpiOptions()  # of transport = mpi
    gpus_per_node: int = 8  # ranks of a declared node
    block_size: int = 16  # tokens of a KV block
    kv_tokens: int | None = None  # KV cache of each attention group; None: what memory allows, on a CPU 32 k at most
    gpu_memory_fraction: float = 0.9
    max_batch_tokens: int = 2048  # tokens of a step and attention group
    max_sequences: int = 256  # sequences of a step and attention group
    max_positions: int | None = None  # None: the model's own limit
    prefix_caching: bool = True
    replicate_below: int = 64  # tokens of a step under which an attention group replicates instead of sharding them
    micro_batches: int | None = None  # batches in flight in a pipeline; None: one for each stage
    random_weights: int | None = None  # a seed: make weights up instead of reading them
    measure: bool = False  # time the phases of every step
    count_experts: bool = False  # count the tokens of every expert, for Figures.chosen
    record: Literal["counts", "ids"] | None = None  # keep what routers choose, for Figures.routing
    deadline_s: float = 60.0  # bound of every wait for a peer
    start_deadline_s: float = 300.0  # bound of the start, loading included

    def __post_init__(self) -> None:
        sizes = ("gpus_per_node", "block_size", "max_batch_tokens", "max_sequences")
        for key in (*sizes, "deadline_s", "start_deadline_s"):
            if getattr(self, key) <= 0:
                raise ConfigurationError.of(key, getattr(self, key), "must be positive")
        if not 0 < self.gpu_memory_fraction <= 1:
            raise ConfigurationError.of("gpu_memory_fraction", self.gpu_memory_fraction, "must lie in (0, 1]")

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> EngineOptions:
        """From names and values; numbers may be texts. Raises ConfigurationError for an unknown or unfit one.

        `mpi.progress` names a field of the field `mpi`.
        """
        known = (*cls.__struct_fields__, *(f"mpi.{key}" for key in MpiOptions.__struct_fields__))
        if unknown := fields.keys() - set(known):
            key = min(unknown)
            near = difflib.get_close_matches(key, known, n=3) or known
            raise ConfigurationError.of(key, fields[key], f"is no engine option; there is {', '.join(near)}")
        nested = {key: value for key, value in fields.items() if "." not in key}
        if inner := {key.partition(".")[2]: value for key, value in fields.items() if "." in key}:
            nested["mpi"] = inner
        try:
            return msgspec.convert(nested, cls, strict=False)
        except msgspec.ValidationError as error:
            reason, _, place = str(error).partition(" - at ")
            key = place.strip("`").removeprefix("$.")
            raise ConfigurationError.of(key, fields.get(key), reason) from None
