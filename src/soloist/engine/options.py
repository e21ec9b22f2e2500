"""How a model is to be run: everything that is neither the model nor the layout. Torch-free, travels to every rank."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, Literal, get_args, get_origin, get_type_hints

import msgspec

from soloist.errors import ConfigurationError
from soloist.placement.replicas import Closeness
from soloist.planner.batching import Link
from soloist.planner.halves import Halves
from soloist.planner.memory import KV_BLOCK, replicates_below
from soloist.specs.layout import Layout
from soloist.specs.model import Dtype, ModelSpec, Spec
from soloist.transport.mpi_options import MpiOptions

_BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256)


class EngineOptions(Spec, frozen=True, kw_only=True):
    """Options of an engine. Sizes in tokens unless the name says otherwise."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Dtype | None = None  # None: the model's own on a GPU, float32 on a CPU
    transport: Literal["auto", "local", "shared_memory", "gloo", "nccl", "mpi"] = "auto"
    mpi: MpiOptions = MpiOptions()  # of transport = mpi
    gpus_per_node: int = 8  # ranks of a declared node
    replicas: str = "nearest"  # that tokens take: nearest, or weights of own group, own node and others: 4,2,1
    replicas_every: int = 0  # steps after which their turns follow the load that was measured meanwhile; 0: never
    exchange: Literal["auto", "flat", "hierarchical"] = "auto"  # of tokens across nodes (engine/crossing.py)
    exchange_chunks: int | None = None  # of a hierarchical call; None: by the links
    exchange_buffer_MB: float = 64.0  # of a chunk under way, on a rank
    exchange_captured: bool = False  # decoding steps across nodes of GPUs in graphs (dispatch/railed.py); untried there
    exchange_sms: int = 0  # SMs that kernels take which move tokens between GPUs; 0: no limit
    network_link: str | None = None  # "MB/s,µs" of a rank's exchange across nodes; None: measured at the start
    inside_link: str | None = None  # the same inside a node
    keep_fp8: bool = True  # experts of an fp8 checkpoint stay in fp8 where a GPU's kernels serve them
    block_size: int = 0  # tokens of a KV block; 0: 64 on a GPU, 16 on a CPU
    kv_tokens: int | None = None  # KV cache of each attention group; None: what memory allows, on a CPU 32 k at most
    gpu_memory_fraction: float = 0.9
    max_batch_tokens: int = 0  # tokens of a step and attention group; 0: 8192 on a GPU, 2048 on a CPU
    max_sequences: int = 256  # sequences of a step and attention group
    max_positions: int | None = None  # None: the model's own limit
    prefix_caching: bool = True
    replicate_below: int = -1  # tokens of a step under which an attention group replicates them; -1: by the device
    overlap: str = "off"  # steps that go as two halves which overlap: off, on, or prefill=4096,decode=512 tokens on
    nvlink_sums: bool = True  # small sums of an attention group in a node of GPUs by kernels, not NCCL
    micro_batches: int = 0  # batches in flight in a pipeline; 0: one for each stage
    rehearse: bool = False  # on a GPU run steps of all sizes at the start, so that no request waits for a compiler
    cuda_graphs: str = "auto"  # sequences of the decoding steps that are captured: auto, off, or like 1,8,64
    mixed_graphs: str = "auto"  # the same for tokens of the other steps: auto, off, or like 256,8192
    ahead: Literal["auto", "on", "off"] = "auto"  # make up a step before the last is back; auto: on GPUs, save pp > 1
    random_weights: int | None = None  # a seed: make weights up instead of reading them
    measure: bool = False  # time the phases of every step
    count_experts: bool = False  # count the tokens of every expert, for Figures.chosen
    record: Literal["counts", "ids"] | None = None  # keep what routers choose, for Figures.routing
    deadline_s: float = 60.0  # bound of every wait for a peer
    start_deadline_s: float = 300.0  # bound of the start, loading included

    def __post_init__(self) -> None:
        for key in ("gpus_per_node", "max_sequences", "exchange_buffer_MB", "deadline_s", "start_deadline_s"):
            if getattr(self, key) <= 0:
                raise ConfigurationError.of(key, getattr(self, key), "must be positive")
        if self.replicas_every < 0:
            raise ConfigurationError.of("replicas_every", self.replicas_every, "must be positive, or 0 for never")
        for key in ("block_size", "max_batch_tokens", "micro_batches"):
            if getattr(self, key) < 0:
                raise ConfigurationError.of(key, getattr(self, key), "must be positive, or 0 for what suits the device")
        if self.exchange_sms < 0:
            raise ConfigurationError.of("exchange_sms", self.exchange_sms, "must be positive, or 0 for no limit")
        for key in ("exchange_chunks", "kv_tokens"):
            if (number := getattr(self, key)) is not None and number < 1:
                raise ConfigurationError.of(key, number, "must be 1 or more")
        Closeness.parse(self.replicas)
        for key in ("network_link", "inside_link"):
            if text := getattr(self, key):
                Link.parse(text, key)
        if not 0 < self.gpu_memory_fraction <= 1:
            raise ConfigurationError.of("gpu_memory_fraction", self.gpu_memory_fraction, "must lie in (0, 1]")
        if self.ahead == "on" and self.record:
            raise ConfigurationError.of("ahead", "on", "a record needs every token on the host; leave one of them out")
        Halves.parse(self.overlap)
        self.graph_buckets(is_gpu=True)
        self.mixed_buckets()

    def on(self, device: str, stages: int = 1, attention_ranks: int = 1) -> EngineOptions:
        """With everything filled in that depends on the kind of device, the stages, and the attention groups."""
        is_gpu = device == "cuda"
        sums = self.nvlink_sums and self.transport == "auto"
        below = replicates_below(is_gpu, sums, self.gpus_per_node, attention_ranks)
        runs_beside = is_gpu and stages == 1 and not self.record
        if self.ahead == "on" and stages > 1:
            raise ConfigurationError.of("ahead", "on", "in a pipeline tokens come back over the host; leave it out")
        return msgspec.structs.replace(
            self,
            block_size=self.block_size or (KV_BLOCK if is_gpu else 16),
            max_batch_tokens=self.max_batch_tokens or (8192 if is_gpu else 2048),
            micro_batches=self.micro_batches or stages,
            replicate_below=below if self.replicate_below < 0 else self.replicate_below,
            ahead="on" if self.ahead == "on" or (self.ahead == "auto" and runs_beside) else "off",
        )

    def halves(self, layout: Layout) -> Halves:
        """The steps that go as two halves: not those whose tokens stay on their rank, are the same on all ranks of an
        attention group, or are recorded. Of options that `on` has filled in."""
        if layout.ep == 1 or self.record:
            return Halves()
        return Halves.parse(self.overlap).at_least(self.replicate_below if layout.attention_ranks > 1 else 0)

    def graph_buckets(self, is_gpu: bool) -> tuple[int, ...]:
        """Numbers of sequences that decoding steps are captured for, ascending. On a CPU only where asked for."""
        most = min(self.max_sequences, self.max_batch_tokens or self.max_sequences)
        if self.cuda_graphs == "off" or self.record or (self.cuda_graphs == "auto" and not is_gpu):
            return ()
        if self.cuda_graphs == "auto":
            return (*(rows for rows in (*_BUCKETS, *range(320, most, 64)) if rows < most), most)
        return _numbers("cuda_graphs", self.cuda_graphs, 1, most)

    def mixed_buckets(self) -> tuple[int, ...]:
        """The same for tokens of steps in which some sequences have several; none where that is left to the engine,
        which goes by model and layout (engine/buckets.py)."""
        if self.mixed_graphs in ("off", "auto") or self.record:
            return ()
        return _numbers("mixed_graphs", self.mixed_graphs, 2, self.max_batch_tokens or 8192)

    def longest(self, spec: ModelSpec) -> int:
        """Tokens that a sequence may reach."""
        return min(self.max_positions or spec.max_positions, spec.max_positions)

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
            raise ConfigurationError.of(key, fields.get(key), _choices(key) or reason) from None


def _choices(key: str) -> str:
    """Of a field that takes one of several texts; empty for others."""
    hint = get_type_hints(EngineOptions).get(key)
    found = [text for each in (hint, *get_args(hint)) if get_origin(each) is Literal for text in get_args(each)]
    return f"choose one of {', '.join(found)}" if found else ""


def _numbers(key: str, text: str, least: int, most: int) -> tuple[int, ...]:
    """Ascending numbers from a list of them, those above `most` left out."""
    try:
        found = sorted({int(number) for number in text.split(",")})
    except ValueError:
        found = [0]
    if found[0] < least:
        raise ConfigurationError.of(key, text, f"must be auto, off, or numbers like 8,64, at least {least}")
    return tuple(number for number in found if number <= most)
