"""Calibrated time of everything that a GPU or a link does, each as an `Estimate` for one cluster.

The formulas stand in `compute`, `exchange` and `collectives`; here they meet the cluster and the calibration, and get
their error band and origin. Where nothing was measured for a kind of exchange, physical priors apply (*bound*).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

from soloist.planner import collectives, compute, exchange
from soloist.planner.calibration import UNMEASURED, Calibration, Found
from soloist.planner.compute import DecodeAttention, ExpertWork
from soloist.planner.domains import (
    decode_coordinates,
    exchange_coordinates,
    expert_coordinates,
    matmul_coordinates,
    prefill_coordinates,
    small_coordinates,
)
from soloist.planner.estimate import ZERO, Estimate, Origin, total
from soloist.planner.exchange import ExchangeShape
from soloist.planner.memory import replicates_below
from soloist.specs.cluster import ClusterSpec

Parts = dict[str, Estimate]
PUBLISHED_LIBRARY, OWN_LIBRARY = "deepep-v1", "soloist"


def library_of(system: str, calibration: Calibration) -> str:
    """Whose exchange a serving system uses: its own where this machine's was measured, else the published one."""
    own = system == OWN_LIBRARY and any(calibration.has(f"dispatch/{mode}/{OWN_LIBRARY}") for mode in exchange.OURS)
    return OWN_LIBRARY if own else PUBLISHED_LIBRARY


class Kernels:
    """Times on one cluster. `library` names whose exchange kernels are meant (`library_of`); `nvlink_sums`: our own
    engine sums small things by its own kernels (engine/options.py)."""

    def __init__(
        self, cluster: ClusterSpec, calibration: Calibration, library: str = PUBLISHED_LIBRARY, nvlink_sums: bool = True
    ) -> None:
        self.cluster, self.calibration, self.library, self.nvlink_sums = cluster, calibration, library, nvlink_sums
        self._known: dict[object, Parts] = {}
        self._constants: dict[tuple[str, str], Found | None] = {}

    def once(self, key: object, make: Callable[[], Parts]) -> Parts:
        """What several layouts have in common, computed once."""
        if key not in self._known:
            self._known[key] = make()
        return self._known[key]

    @cached_property
    def _experts(self) -> Found:
        return self.calibration.find("experts", "gemm")

    @cached_property
    def _dense(self) -> Found:
        """A machine's own matrix multiplications; the experts' constants where they were not measured apart."""
        return self.calibration.find("matmul", "dense") if self.calibration.has("matmul/dense") else self._experts

    @cached_property
    def _stream(self) -> Found:
        return self.calibration.find("stream", "copy") if self.calibration.has("stream/copy") else self._experts

    def _attention(self, phase: str, kind: str) -> Found:
        return self.calibration.find("attention", phase, kind)

    def _collective(self, kind: str) -> Found:
        return self.calibration.find("collectives", "nccl", kind)

    @cached_property
    def _known_gpu(self) -> Origin:
        """Published kernels were measured on Hopper only; elsewhere their efficiencies are carried over."""
        name = self.cluster.gpu.name
        if name in self.calibration.gpus:
            return "measured"
        return "interpolated" if name.startswith("H") else "extrapolated"

    def matmul(self, m: float, n: float, k: float, dtype: str) -> Estimate:
        """`[m, k] × [k, n]`."""
        seconds = compute.matmul_seconds(m, n, k, dtype, self.cluster.gpu, self._dense.constants)
        if self._dense is self._experts:
            return Estimate(seconds, self._dense.fitted.band, "interpolated").worse(self._known_gpu)
        return self._dense.estimate(seconds, matmul_coordinates(m, n, k)).worse(self._known_gpu)

    def experts(self, work: ExpertWork) -> Estimate:
        """All experts of a rank in one layer."""
        seconds = compute.experts_seconds(work, self.cluster.gpu, self._experts.constants)
        at = expert_coordinates(work.pairs, work.active, work.hidden, work.width)
        found = self._experts.estimate(seconds, at).worse(self._known_gpu)
        return _unmeasured(found) if work.fused and work.dtype != "bf16" else found  # of our kernels those of bf16 are

    def decode_attention(self, work: DecodeAttention) -> Estimate:
        """One token of each sequence against its context."""
        found = self._attention("decode", work.kind)
        seconds = compute.decode_attention_seconds(work, self.cluster.gpu, found.constants)
        return found.estimate(seconds, decode_coordinates(work)).worse(self._known_gpu)

    def prefill_attention(
        self, kind: str, tokens: float, context: float, heads: int, width: float, kv_heads: int
    ) -> Estimate:
        """Causal attention of `tokens` that see `context` tokens on average."""
        found = self._attention("prefill", kind)
        seconds = compute.prefill_attention_seconds(tokens, context, heads, width, self.cluster.gpu, found.constants)
        return found.estimate(seconds, prefill_coordinates(tokens, context, heads, kv_heads)).worse(self._known_gpu)

    def small(self, tokens: float, hidden: float, columns: float, experts: float) -> Estimate:
        """A layer's small kernels in our own engine."""
        if not self.calibration.has("small/layer"):
            guess = {name: prior.guess for name, prior in compute.SMALL.items()}
            seconds = compute.small_seconds(tokens, hidden, columns, experts, self.cluster.gpu, guess)
            return Estimate(seconds, UNMEASURED, "bound")
        found = self.calibration.find("small", "layer")
        seconds = compute.small_seconds(tokens, hidden, columns, experts, self.cluster.gpu, found.constants)
        return found.estimate(seconds, small_coordinates(tokens, hidden, columns, experts)).worse(self._known_gpu)

    @cached_property
    def launch(self) -> Estimate:
        """Of one kernel on the host: Triton's and CUDA's part."""
        if not self.calibration.has("host/launch"):
            return Estimate(1e-6 * compute.LAUNCH["launch_us"].guess, UNMEASURED, "extrapolated")
        found = self.calibration.find("host", "launch")
        return found.estimate(1e-6 * found.constants["launch_us"], {"launches": 1.0})

    def stream(self, moved: float) -> Estimate:
        """Element-wise work on `moved` bytes."""
        seconds = compute.stream_seconds(moved, self.cluster.gpu, self._stream.constants)
        return Estimate(seconds, self._stream.fitted.band, "interpolated").worse(self._known_gpu)

    def collective(self, kind: str, gpus: int, size: float) -> Estimate:
        """All-reduce, all-gather or reduce-scatter over neighbouring GPUs.

        Small all-reduces go directly, in our own engine with `nvlink_sums`, elsewhere always.
        """
        if gpus <= 1 or size <= 0:
            return ZERO
        is_own = self.library == OWN_LIBRARY
        by_kernel = kind == "all_reduce" and self._sums_directly(gpus, size)
        if is_own and by_kernel and self.calibration.has(f"collectives/{OWN_LIBRARY}/all_reduce"):
            known = self.calibration.find("collectives", OWN_LIBRARY, kind)
            seconds = collectives.direct_seconds(gpus, size, self.cluster, known.constants)
            return known.estimate(seconds, {"gpus": gpus, "bytes": size}).worse(self._known_gpu)
        known = self._collective(kind)
        seconds = collectives.collective_seconds(
            kind, gpus, size, self.cluster, known.constants, by_kernel or not is_own
        )
        found = known.estimate(seconds, {"gpus": gpus, "bytes": size}).worse(self._known_gpu)
        return found if gpus <= self.cluster.gpus_per_node else _unmeasured(found)

    def gather(self, gpus: int, size: float) -> Estimate:
        """Columns of logits side by side, `size` bytes of each GPU: few by our own kernel where it was measured,
        many by NCCL and a copy."""
        if gpus <= 1:
            return ZERO
        is_small = self.nvlink_sums and (gpus - 1) * size <= collectives.OWN_GATHER_BYTES
        if not (is_small and self.calibration.has(f"collectives/{OWN_LIBRARY}/gather")):
            return total((self.collective("all_gather", gpus, gpus * size), self.stream(2 * gpus * size)))
        known = self.calibration.find("collectives", OWN_LIBRARY, "gather")
        seconds = collectives.gather_seconds(gpus, size, self.cluster, known.constants)
        return known.estimate(seconds, {"gpus": gpus, "bytes": size}).worse(self._known_gpu)

    def _sums_directly(self, gpus: int, size: float) -> bool:
        fits = gpus <= self.cluster.gpus_per_node and (gpus - 1) * size <= collectives.OWN_SUM_BYTES
        return self.nvlink_sums and fits

    def replicates_below(self, attention_ranks: int) -> int:
        """Tokens of a step below which all ranks of one of our attention groups have all of them."""
        is_gpu = self.cluster.gpu.name != "cpu"
        return replicates_below(is_gpu, self.nvlink_sums, self.cluster.gpus_per_node, attention_ranks)

    def send(self, size: float, same_node: bool) -> Estimate:
        """One message to the next pipeline stage."""
        known = self._collective("send_recv")
        seconds = collectives.point_to_point_seconds(size, same_node, self.cluster, known.constants)
        if known.exact and same_node:
            return known.estimate(seconds, {"gpus": 2, "bytes": size})
        return Estimate(seconds, UNMEASURED, "extrapolated")

    def exchange(self, shape: ExchangeShape, phase: str, skew: float = 1.0) -> Estimate:
        """Dispatch or combine of one layer."""
        return self.once((shape, phase, skew), lambda: {phase: self._exchange_time(shape, phase, skew)})[phase]

    def _exchange_time(self, shape: ExchangeShape, phase: str, skew: float) -> Estimate:
        found = self._found(shape.mode, phase)
        constants = found.constants if found else self._priors(shape.mode)
        seconds = exchange.exchange_seconds(shape, self.cluster, constants, skew)
        if found is None:
            return Estimate(seconds, UNMEASURED, "bound")
        return found.estimate(seconds, exchange_coordinates(shape))

    def _found(self, mode: str, phase: str) -> Found | None:
        """Constants for this mode, of this library and GPU if there are any."""
        if (phase, mode) not in self._constants:
            fitted = self.calibration.fitted
            gpu = self.cluster.gpu.name
            names = (key.split("/")[-1] for key in fitted if key.startswith(f"{phase}/{mode}/{self.library}/"))
            fabric = next((n for n in names if gpu.split("-")[0] in n and exchange.gpu_in(n) in ("", gpu)), "")
            known = f"{phase}/{mode}" in fitted
            self._constants[phase, mode] = self.calibration.find(phase, mode, self.library, fabric) if known else None
        return self._constants[phase, mode]

    def _priors(self, mode: str) -> dict[str, float]:
        return {name: prior.guess for name, prior in exchange.PRIORS[mode].items()}


def _unmeasured(found: Estimate) -> Estimate:
    return Estimate(found.value, max(found.band, UNMEASURED), "extrapolated")
