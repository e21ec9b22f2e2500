"""The dispatchers that the benchmarks compare, each on a transport or windows of its own."""

from __future__ import annotations

import torch.distributed as dist
from torch.distributed import PrefixStore

from soloist.bench.load import Load
from soloist.dispatch.base import Topology
from soloist.dispatch.forms import Form
from soloist.dispatch.lane import ExchangeShape, Lane, WindowPlan
from soloist.dispatch.one_sided import OneSidedDispatcher
from soloist.dispatch.padded import PaddedDispatcher
from soloist.dispatch.ragged import RaggedDispatcher
from soloist.probes.gpus import Bench, OneGpu
from soloist.transport.base import Transport
from soloist.transport.connect import connect
from soloist.transport.symmetric import Watch, windows_in_process

DEADLINE_S = 5.0  # for a peer's rows


def one_sided(bench: Bench, shape: ExchangeShape, form: Form, lanes: int = 2):
    """Over windows of its own; collective."""
    windows = [bench.group.window(WindowPlan(shape).size) for _ in range(lanes)]
    watch = Watch(bench.rank, tuple(range(bench.size)), bench.device, DEADLINE_S)
    return OneSidedDispatcher.of(shape, tuple(Lane(window, shape) for window in windows), watch, form)


def in_process(alone: OneGpu, shape: ExchangeShape, form: Form) -> list[OneSidedDispatcher]:
    """Of all ranks, on one GPU: whoever uses them lets everybody send before anybody receives."""
    ranks = range(shape.ranks)
    windows = windows_in_process(shape.ranks, WindowPlan(shape).size, alone.device)
    watches = [Watch(rank, tuple(ranks), alone.device, DEADLINE_S) for rank in ranks]
    return [OneSidedDispatcher.of(shape, (Lane(windows[rank], shape),), watches[rank], form) for rank in ranks]


def join_nccl(bench: Bench) -> Transport:
    """All ranks over NCCL; collective."""
    store = PrefixStore("portable", dist.distributed_c10d._get_default_store())
    return connect("nccl", bench.rank, bench.size, store, bench.device)


def ragged(transport: Transport, load: Load) -> RaggedDispatcher:
    """Exactly the rows that are needed; asks the device for their number."""
    return RaggedDispatcher(transport, _one_node(transport), load.experts // transport.size)


def padded(transport: Transport, load: Load, rounds: int = 1) -> PaddedDispatcher:
    """Equal splits, so it can be captured; `rounds` exchanges of as many rows as hold the worst case together."""
    capacity = -(-load.tokens // rounds)
    return PaddedDispatcher(transport, _one_node(transport), load.experts // transport.size, capacity, rounds)


def _one_node(transport: Transport) -> Topology:
    return Topology((0,) * transport.size)
