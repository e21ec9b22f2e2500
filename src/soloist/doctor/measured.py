"""What GPUs and links do, beside what they should do; the slow one is named.

Shape legend: M ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import median

import torch

from soloist.doctor.finding import Finding, ok, warning
from soloist.probes.device import arithmetic_rate, streaming_rate
from soloist.probes.links import collective_seconds, exchange_rate, pair_rates
from soloist.specs.cluster import ClusterSpec, GpuSpec
from soloist.specs.model import Spec
from soloist.transport.base import Transport

MESSAGE_BYTES = {"cuda": 1 << 30, "cpu": 1 << 24}  # far above what latency and the host cost
SEVERAL = 16  # ranks, from which on the many pairs get smaller messages
ATTAINABLE = {
    "memory": 0.85,
    "arithmetic": 0.75,
    "link": 0.70,
}  # of the datasheet: a kernel, a product, NCCL's messages
SHORT = 0.85  # of the attainable rate, or of the median of its kind, is slow


class Measured(Spec, frozen=True, kw_only=True):
    """By rank; bytes/s and FLOP/s. `pairs[a][b]` from a to b; without other ranks the last three are empty or 0."""

    names: tuple[str, ...]
    memory: tuple[float, ...]
    arithmetic: tuple[float, ...]
    pairs: tuple[tuple[float, ...], ...] = ()
    exchange: float = 0.0  # that each rank sends while all do
    all_reduce: float = 0.0  # 2 (M − 1)/M of the tensor over its time


def measure(device: torch.device, name: str, transport: Transport | None = None) -> Measured:
    """Called by all ranks of the transport, at the same time, so that they load power and cooling together."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    own = torch.tensor([[streaming_rate(device), arithmetic_rate(device, dtype)]], dtype=torch.float64)
    if transport is None or transport.size == 1:
        return Measured(names=(name,), memory=(own[0, 0].item(),), arithmetic=(own[0, 1].item(),))
    rates_M2 = transport.all_gather_rows(own.to(transport.device), [1] * transport.size, "doctor, rates")
    size, share = transport.size, 2 * (transport.size - 1) / transport.size
    message = MESSAGE_BYTES[device.type]
    return Measured(
        names=tuple(f"{name.partition(' ')[0]} {rank}" for rank in transport.ranks),
        memory=tuple(rates_M2[:, 0].tolist()),
        arithmetic=tuple(rates_M2[:, 1].tolist()),
        pairs=tuple(map(tuple, pair_rates(transport, message if size <= SEVERAL else message >> 4))),
        exchange=exchange_rate(transport, message // size * size),
        all_reduce=share * message / collective_seconds(transport, "all_reduce", message),
    )


def check_measured(found: Measured, gpu: GpuSpec | None, cluster: ClusterSpec | None = None) -> Iterator[Finding]:
    """Against the datasheet where it is known, and every rank and pair against the others."""
    memory = gpu.bandwidth if gpu else None
    arithmetic = gpu.flops("bf16") if gpu else None
    product = "bf16" if found.names[0].startswith("GPU") else "fp32"
    yield from _rates("memory", found.names, found.memory, memory, "B/s", "a kernel that reads and writes")
    yield from _rates("arithmetic", found.names, found.arithmetic, arithmetic, "FLOP/s", f"a large {product} product")
    if found.pairs:
        yield from _links(found, gpu, cluster)


def _rates(
    what: str, names: Sequence[str], rates: Sequence[float], peak: float | None, unit: str, by: str = "one long message"
) -> Iterator[Finding]:
    kind = what.partition(" ")[0]
    usual, slow = median(rates), []
    for name, rate in zip(names, rates, strict=True):
        if rate < SHORT * usual or (peak and rate < SHORT * ATTAINABLE[kind] * peak):
            slow.append(name)
            than = f"usual here {_told(usual, unit)}" + (f", datasheet {_told(peak, unit)}" if peak else "")
            yield warning(
                f"measured {what}",
                f"{name} is slow: {_told(rate, unit)} ({than})",
                "all ranks wait for the slowest in every layer",
                REMEDIES[kind],
            )
    if not slow:
        of = f" of {_told(peak, unit)} in the datasheet ({usual / peak:.0%})" if peak else ""
        least = f", the least {_told(min(rates), unit)}" if len(rates) > 1 else ""
        yield ok(f"measured {what}", f"{by}: {_told(usual, unit)}{of}{least}")


def _told(rate: float, unit: str) -> str:
    return f"{rate / 1e12:.3g} T{unit}" if rate >= 1e12 else f"{rate / 1e9:.3g} G{unit}"


REMEDIES = {
    "memory": "look for another program on it, memory errors, and a lowered memory clock (nvidia-smi -q -d CLOCK,ECC)",
    "arithmetic": "look at its power limit, temperature and slowdowns (nvidia-smi -q -d POWER,TEMPERATURE,PERFORMANCE)",
    "link": "look at its NVLinks or NIC: nvidia-smi nvlink -s -e, ibstat, switch port, PCIe width",
}


def _links(found: Measured, gpu: GpuSpec | None, cluster: ClusterSpec | None) -> Iterator[Finding]:
    """Pairs inside a node and pairs across are measured against their own kind."""
    size = len(found.pairs)
    per_node = cluster.gpus_per_node if cluster else size
    inside = cluster.nvlink if cluster else 1e9 * gpu.nvlink_GBps if gpu else 0.0
    for what, peak, same in (("link", inside, True), ("link across nodes", cluster.nic if cluster else 0.0, False)):
        chosen = [
            (a, b) for a in range(size) for b in range(size) if a != b and (a // per_node == b // per_node) == same
        ]
        if chosen:
            names = [f"{found.names[a]} → {found.names[b]}" for a, b in chosen]
            yield from _rates(what, names, [found.pairs[a][b] for a, b in chosen], peak or None, "B/s")
    limit = f", a link gives {_told(inside, 'B/s')} one way" if inside else ""
    yield ok("measured exchange", f"all to all {_told(found.exchange, 'B/s')} a rank{limit}")
    yield ok("measured all-reduce", f"{_told(found.all_reduce, 'B/s')} on the bus{limit}")
