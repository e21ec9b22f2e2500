"""What stands against each kind of claim: physical bound, prediction, and the reason in words.

Every function takes a case and returns measures in the claim's own unit, `higher` telling whether more is better. Sizes
follow from the shape alone, so that bound and prediction coincide.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from soloist.planner import bounds
from soloist.planner.layer import COMMUNICATION, Batch, expert_load
from soloist.planner.scenarios import Case
from soloist.planner.weights import PARTS, layer_weights

EXACT = 0.03  # band of numbers that follow from the shape alone


class Measure(NamedTuple):
    """What stands against a claim. `higher`: whether more is better."""

    claim: str
    bound: float
    predicted: float
    band: float
    unit: str
    higher: bool
    reason: str


def _tps(case: Case) -> list[Measure]:
    """A claim of tokens/s does not say which tokens: read as prompt tokens and as output tokens."""
    score, sequences = case.score, case.batch * case.groups
    flops = bounds.flops_per_token(case.deployment.model, case.load.prompt / 2) / 1e9
    best = sequences / case.tpot_bound
    return [
        Measure("TPS (prompt tokens)", case.prefill_bound, score.input_rate.value, score.input_rate.band, "tok/s", True,
                f"a prompt token costs {flops:.1f} GFLOP; {case.gpus} GPUs at peak give the bound"),
        Measure("TPS (output tokens)", best, case.decode_rate, score.decode.seconds.band, "tok/s", True,
                f"{sequences:.0f} sequences of {case.load.context:.0f} tokens: a step reads weights and KV cache, "
                f"{1e3 * case.tpot_bound:.1f} ms at best"),
    ]  # fmt: skip


def _tpot(case: Case) -> list[Measure]:
    score, rate = case.score, case.scenario.claims.get("tps", 0.0)
    says = f"; 1/TPS is {1e6 / rate:.2f} µs, so the claim is 1/TPS with its unit mistaken" if rate else ""
    return [
        Measure("TPOT", 1e3 * case.tpot_bound, 1e3 * score.decode.seconds.value, score.decode.seconds.band, "ms", False,
                f"a sequence's next token takes a whole step{says}"),
    ]  # fmt: skip


def _throughput_gain(case: Case) -> list[Measure]:
    if case.baseline is None:
        return []
    mine, other = case.score, case.baseline.score
    gain = mine.input_rate.value / other.input_rate.value
    per_gpu = case.gpus / case.baseline.gpus
    claimed = case.scenario.claims["throughput_gain"]
    reason = (
        f"{case.gpus} GPUs against {case.baseline.gpus}: claimed {claimed / per_gpu:.2f} x per GPU, "
        f"predicted {gain / per_gpu:.2f} x per GPU (prompt tokens), "
        f"{case.decode_rate / case.baseline.decode_rate / per_gpu:.2f} x (output tokens)"
    )
    best = case.prefill_bound / other.input_rate.value
    return [Measure("throughput gain", best, gain, mine.input_rate.band + other.input_rate.band, "x", True, reason)]


def _latency_gain(case: Case) -> list[Measure]:
    if case.baseline is None:
        return []
    mine, other = case.score.decode.seconds, case.baseline.score.decode.seconds
    best = other.value / case.tpot_bound
    reason = f"TPOT {1e3 * other.value:.1f} → {1e3 * mine.value:.1f} ms for {case.batch:g} sequences an attention group"
    return [Measure("latency gain", best, other.value / mine.value, mine.band + other.band, "x", True, reason)]


def _bytes(claim: str, size: float, reason: str, unit: str = "GB", scale: float = 1e9) -> list[Measure]:
    """Sizes that follow from the shape: claiming less is impossible."""
    return [Measure(claim, size / scale, size / scale, EXACT, unit, False, reason)]


def _expert_size(case: Case) -> list[Measure]:
    elements = max(layer.expert for layer in layer_weights(case.deployment.model))
    matrices = case.deployment.model.expert.matrices
    return _bytes(
        "one expert", 2 * elements, f"{matrices} matrices of {elements / matrices / 1e6:.1f} M elements", "MB", 1e6
    )


def _weights(case: Case) -> list[Measure]:
    size = sum(case.score.memory[part] for part in PARTS)
    experts = case.score.memory["experts"] / 1e9
    return _bytes("weights a GPU", size, f"{experts:.1f} GB of it are the experts")


def _memory(case: Case) -> list[Measure]:
    parts = case.score.memory
    kv = parts["KV cache"] / 1e9
    return _bytes("memory a GPU", sum(parts.values()), f"{kv:.1f} GB of it is KV cache, which the claim leaves out")


def _token_buffers(case: Case) -> list[Measure]:
    tokens = case.load.sequences * case.load.longest
    size = tokens * case.deployment.model.d_model * 2 / case.gpus
    return _bytes(
        "token buffers a GPU",
        size,
        f"{tokens / 1e6:.2f} M tokens of {case.deployment.model.d_model} x 2 bytes over all GPUs",
    )


def _exchange_buffers(case: Case) -> list[Measure]:
    return _bytes(
        "communication buffers a GPU", case.score.memory["exchange buffers"], "rows of one step, both ways, twice"
    )


def _room(case: Case) -> list[Measure]:
    size = sum(case.score.memory.values()) / 1e9
    return _bytes(
        "memory a GPU at most", size * 1e9, f"{'fits' if case.has_room else 'does not fit'}: {size:.0f} GB needed"
    )


def _network_utilization(case: Case) -> list[Measure]:
    used = network_utilization(case)
    return [
        Measure(
            "network utilisation",
            1.0,
            used,
            0.3,
            "",
            True,
            "bytes across nodes over what the NICs carry meanwhile, prefill",
        )
    ]


def network_utilization(case: Case) -> float:
    """Share of the NICs' line rate that prefill uses."""
    rate = case.score.input_rate.value / case.gpus * bounds.nic_bytes_per_token(case.deployment, case.kernels)
    return rate / case.cluster.nic if case.cluster.nic else 0.0


def _tflops(case: Case) -> list[Measure]:
    each = bounds.flops_per_token(case.deployment.model, case.load.prompt / 2) / case.gpus / 1e12
    rate, peak = case.score.input_rate, case.cluster.gpu.flops(case.deployment.precision.experts) / 1e12
    reason = "useful arithmetic of prefill; exchange, attention and imbalance take the rest"
    return [
        Measure(
            "sustained TFLOP/s a GPU",
            min(peak, case.prefill_bound * each),
            rate.value * each,
            rate.band,
            "TFLOP/s",
            True,
            reason,
        )
    ]


def _utilization(case: Case) -> list[Measure]:
    found = _tflops(case)[0]
    peak = case.cluster.gpu.flops(case.deployment.precision.experts) / 1e12
    return [
        Measure(
            "GPU utilisation",
            found.bound / peak,
            found.predicted / peak,
            found.band,
            "",
            True,
            "useful arithmetic over peak, prefill",
        )
    ]


def _exposed(case: Case) -> list[Measure]:
    share = exposed_communication(case)
    return [
        Measure(
            "communication overhead",
            0.0,
            share,
            case.score.prefill.seconds.band,
            "",
            False,
            "exposed exchange in a prefill step, after overlap",
        )
    ]


def exposed_communication(case: Case) -> float:
    """Share of a prefill step that waits for communication."""
    parts = case.score.prefill.parts
    return sum(part.value for name, part in parts.items() if name in COMMUNICATION) / case.score.prefill.seconds.value


def _busy(case: Case) -> list[Measure]:
    share = 1 - exposed_communication(case)
    return [
        Measure(
            "GPU busy",
            1.0,
            share,
            case.score.prefill.seconds.band,
            "",
            True,
            "share of a prefill step not waiting for communication",
        )
    ]


def _bandwidth(case: Case) -> list[Measure]:
    nic = case.cluster.nic / 1e12
    reason = f"the NIC carries {nic:.3f} TB/s; {case.cluster.gpu.memory_TBps} TB/s is the memory's rate"
    return [Measure("network bandwidth a GPU", nic, nic * 0.94, 0.05, "TB/s", True, reason)]


def _transfer(case: Case) -> list[Measure]:
    parts, layers = case.score.decode.parts, len(case.deployment.model.moe_layers)
    moved = [parts[name] for name in ("dispatch", "combine", "expert exchange") if name in parts]
    seconds = sum(part.value for part in moved) / layers
    band = max((part.band for part in moved), default=0.3)
    reason = f"dispatch and combine of one layer in decode, {case.batch:g} tokens a GPU"
    return [
        Measure("token transfer", 2e6 * case.cluster.nic_latency_us * 1e-6, 1e6 * seconds, band, "µs", False, reason)
    ]


def _efficiency(case: Case) -> list[Measure]:
    """Prompt tokens/s a GPU against the narrowest layout that fits into memory."""
    others = [Case(case.scenario, case.model_name, text, case.calibration) for text in case.scenario.layouts]
    first = next((other for other in others if other.has_room), case)
    ratio = case.score.input_rate.value / case.gpus / (first.score.input_rate.value / first.gpus)
    reason = f"prompt tokens/s and GPU against {first.layout_text}, the narrowest that fits"
    return [Measure("parallel efficiency", 1.0, min(1.0, ratio), 0.1, "", True, reason)]


def _memory_share(case: Case) -> list[Measure]:
    share = sum(case.score.memory.values()) / 1e9 / case.cluster.gpu.memory_GB
    return [Measure("memory utilisation", share, share, 0.1, "", False, "of the fullest GPU, KV cache included")]


def _overlap(case: Case) -> list[Measure]:
    hidden = case.runtime["overlap_prefill"]
    return [
        Measure(
            "overlap",
            1.0,
            hidden,
            0.3,
            "",
            True,
            "share of the shorter of compute and exchange that serving systems were seen to hide",
        )
    ]


def _all_reduce(case: Case) -> list[Measure]:
    size = 2 * case.deployment.model.d_model * case.score.options.chunk_tokens
    found = case.kernels.collective("all_reduce", case.deployment.layout.tp, size)
    least = 1e3 * size / case.cluster.nvlink if case.cluster.nvlink else 0.0
    reason = f"{size / 1e6:.0f} MB over the {case.deployment.layout.tp} GPUs of an expert, a layer's prefill chunk"
    return [Measure("all-reduce", least, 1e3 * found.value, found.band, "ms", False, reason)]


def _variance(case: Case) -> list[Measure]:
    load = expert_load(case.deployment, Batch("prefill", case.score.options.chunk_tokens, 1.0))
    reason = (
        "fullest over mean group minus one, from chance alone under uniform routing; real routing is far more skewed"
    )
    return [Measure("expert load variance", 0.0, load.fullest - 1, 0.3, "", False, reason)]


MEASURES: dict[str, Callable[[Case], list[Measure]]] = {
    "tps": _tps, "tpot_ms": _tpot, "throughput_gain": _throughput_gain, "latency_gain": _latency_gain,
    "weights_GB": _weights, "expert_MB": _expert_size, "token_buffers_GB": _token_buffers,
    "communication_buffers_GB": _exchange_buffers, "memory_GB": _memory, "memory_at_most_GB": _room,
    "network_utilization": _network_utilization, "sustained_tflops": _tflops, "gpu_utilization": _utilization,
    "communication_overhead": _exposed, "gpu_busy": _busy, "effective_bandwidth_TBps": _bandwidth,
    "token_transfer_us": _transfer, "parallel_efficiency": _efficiency, "memory_utilization": _memory_share,
    "overlap": _overlap, "all_reduce_ms": _all_reduce, "expert_load_variance": _variance,
}  # fmt: skip
