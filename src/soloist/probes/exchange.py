"""What calibrates the exchange: dispatch and combine of one layer, by the dispatcher that the engine would use.

Shape legend: T tokens of this rank, D model width, K top-k, X expanded rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from soloist.dispatch.base import Dispatcher, SlotChoice, Topology
from soloist.dispatch.lane import ExchangeShape, Lane, WindowPlan
from soloist.dispatch.local import LocalDispatcher, LocalIndex
from soloist.dispatch.one_sided import OneSidedDispatcher
from soloist.dispatch.ragged import RaggedDispatcher
from soloist.kernels.experts import choose_tiles
from soloist.kernels.language import AVAILABLE
from soloist.planner.compute import PADDED_TOKENS
from soloist.probes.device import seconds
from soloist.probes.gpus import Bench, captured
from soloist.probes.links import slowest
from soloist.probes.records import NAMES, Record
from soloist.timing import HostClock
from soloist.transport.base import Transport
from soloist.transport.symmetric import Watch

CALLS = 10  # of both halves in one graph
REPEATS = 12


@dataclass(frozen=True)
class Routed:
    """Experts over all groups of `tp` ranks, equally many on each; every token chooses `top_k` of them uniformly."""

    d_model: int
    top_k: int
    experts: int
    tp: int = 1


SHAPES = {
    "cuda": [Routed(4096, 2, 16), Routed(2048, 8, 128), Routed(7168, 8, 64)],
    "cpu": [Routed(256, 2, 16), Routed(256, 4, 32)],
}
TOKENS = {"cuda": [1, 16, 64, 128, 256, 512, 1024, 4096, 8192], "cpu": [1, 8, 64, 256]}


def choice_of(tokens: int, routed: Routed, groups: int, seed: int, device: torch.device) -> SlotChoice:
    """Slots of neighbouring experts."""
    generator = torch.Generator().manual_seed(1009 * seed + tokens)
    ids_TK = torch.rand(tokens, routed.experts, generator=generator).topk(routed.top_k).indices.to(device)
    slots = routed.experts // groups
    weights_TK = torch.full(ids_TK.shape, 1.0 / routed.top_k, device=device)
    return SlotChoice(ids_TK // slots, ids_TK % slots, weights_TK)


def _columns(routed: Routed, tokens: int, ranks: int, mode: str, fabric: str, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "library": "soloist", "mode": mode, "fabric": fabric, "ep": ranks // routed.tp, "tp": routed.tp,
        "gpus_per_node": ranks, "tokens": tokens, "hidden": routed.d_model, "top_k": routed.top_k,
        "experts": routed.experts, "dispatch_dtype": NAMES[dtype], "combine_dtype": NAMES[dtype],
    }  # fmt: skip


# -- on GPUs of one NVLink domain -------------------------------------------------------------------------------------
def one_sided(bench: Bench, fabric: str, dtype: torch.dtype) -> Iterator[Record]:
    """Both halves as CUDA graphs: rows ready for the experts, and the weighted sum of what they give, back home."""
    cut = [Routed(4096, 2, 16, tp=bench.size), Routed(2048, 8, 128, tp=bench.size)]
    for routed in [*SHAPES["cuda"], *cut]:
        if routed.experts % (bench.size // routed.tp):
            continue
        slots, most = routed.experts // (bench.size // routed.tp), max(TOKENS["cuda"])
        shape = ExchangeShape(bench.size, routed.tp, slots, routed.top_k, routed.d_model, most, dtype)
        watch = Watch(bench.rank, tuple(range(bench.size)), bench.device, deadline_s=20.0)
        lane = Lane(bench.group.window(WindowPlan(shape).size), shape)
        whole = OneSidedDispatcher.of(shape, (lane,), watch)
        for tokens in TOKENS["cuda"]:
            mode = "pushed" if tokens <= PADDED_TOKENS else "ragged"  # as the planner calls them
            columns = _columns(routed, tokens, bench.size, mode, fabric, dtype)
            for phase, taken in _halves(bench, whole.fit(tokens), tokens, routed, dtype).items():
                yield Record("all_to_all", {**columns, "phase": phase}, taken)
        torch.cuda.synchronize()
        watch.check()
        del whole, lane
        torch.cuda.empty_cache()


def _halves(
    bench: Bench, dispatcher: OneSidedDispatcher, tokens: int, routed: Routed, dtype: torch.dtype
) -> dict[str, float]:
    """Seconds of dispatch and of combine, captured one after the other on the one lane."""
    x_TD = torch.randn(tokens, routed.d_model, device=bench.device, dtype=dtype)
    choice = choice_of(tokens, routed, bench.size // routed.tp, bench.rank, bench.device)
    shape, expand = dispatcher.shape, tokens > PADDED_TOKENS
    y_XD = torch.randn(shape.rows * shape.most, routed.d_model, device=bench.device, dtype=dtype)
    state: dict[str, Any] = {}

    def dispatch() -> None:
        arriving = dispatcher.start_dispatch(x_TD, choice)
        state["batch"] = arriving.wait_expanded()[0] if expand else arriving.wait()

    def combine() -> None:
        dispatcher.start_combine_expanded(y_XD, state["batch"]).wait()

    if not expand:  # so short that a replay would count: many of both, and of the first half beside them
        return _short_halves(bench, dispatch, combine)
    dispatch()
    combine()
    bench.barrier()
    first, second = bench.seconds(captured(dispatch, 0), captured(combine, 0), repeats=REPEATS, warm_up=2)
    return {"dispatch": first, "combine": second}


def _short_halves(bench: Bench, dispatch: Callable[[], None], combine: Callable[[], None]) -> dict[str, float]:
    """The two halves' graphs give their shares, many round trips in one graph the sum."""

    def both() -> None:
        for _ in range(CALLS):
            dispatch()
            combine()

    dispatch()
    combine()
    bench.barrier()
    first, second = bench.seconds(captured(dispatch, 0), captured(combine, 0), repeats=REPEATS, warm_up=2)
    (there_and_back,) = bench.seconds(captured(both, 0), repeats=REPEATS, warm_up=2)
    share = there_and_back / CALLS / (first + second)
    return {"dispatch": share * first, "combine": share * second}


# -- on one GPU -------------------------------------------------------------------------------------------------------
def local(device: torch.device, fabric: str, dtype: torch.dtype) -> Iterator[Record]:
    """Where nothing travels: the index with the rows laid out where the experts want it, and the weighted sum."""
    if not AVAILABLE or device.type != "cuda":
        return
    for routed in SHAPES["cuda"]:
        index = LocalIndex.of(max(TOKENS["cuda"]), routed.top_k, routed.experts, device)
        dispatcher = LocalDispatcher(routed.experts, index)
        for tokens in TOKENS["cuda"]:
            columns = _columns(routed, tokens, 1, "local", fabric, dtype)
            for phase, taken in _local_halves(dispatcher, tokens, routed, device, dtype).items():
                yield Record("all_to_all", {**columns, "phase": phase}, taken)


def _local_halves(
    dispatcher: LocalDispatcher, tokens: int, routed: Routed, device: torch.device, dtype: torch.dtype
) -> dict[str, float]:
    x_TD = torch.randn(tokens, routed.d_model, device=device, dtype=dtype)
    choice = choice_of(tokens, routed, 1, 0, device)
    gathers = choose_tiles(tokens * routed.top_k / routed.experts, routed.d_model).gather
    batch = dispatcher.start_dispatch(x_TD, choice).wait()
    y_XD = torch.randn(tokens * routed.top_k, routed.d_model, device=device, dtype=dtype)

    def dispatch() -> None:
        arriving = dispatcher.start_dispatch(x_TD, choice)
        arriving.wait() if gathers else arriving.wait_expanded()

    def combine() -> None:
        dispatcher.start_combine_expanded(y_XD, batch).wait()

    return {"dispatch": seconds(dispatch, device), "combine": seconds(combine, device)}


# -- over any transport -----------------------------------------------------------------------------------------------
def over_transport(transport: Transport, fabric: str, dtype: torch.dtype) -> Iterator[Record]:
    """Dispatch and combine by `ragged`, which runs everywhere."""
    size, kind = transport.size, transport.device.type
    for routed in SHAPES[kind]:
        if routed.experts % size:
            continue
        slots = routed.experts // size
        dispatcher = RaggedDispatcher(transport, Topology.of(size, 1, size), slots)
        for tokens in TOKENS[kind]:
            columns = _columns(routed, tokens, size, "ragged", fabric, dtype)
            for phase, taken in _timed_halves(transport, dispatcher, tokens, routed, dtype).items():
                yield Record("all_to_all", {**columns, "phase": phase}, taken)


def _timed_halves(
    transport: Transport, dispatcher: Dispatcher, tokens: int, routed: Routed, dtype: torch.dtype
) -> dict[str, float]:
    x_TD = torch.randn(tokens, routed.d_model, device=transport.device, dtype=dtype)
    choice = choice_of(tokens, routed, transport.size, transport.rank, transport.device)
    clock, spans = HostClock(), []
    for _ in range(3 + REPEATS):
        start = clock.mark()
        batch = dispatcher.dispatch(x_TD, choice, "probe")
        middle = clock.mark()
        y_RD: Tensor = batch.rows_RD
        dispatcher.combine(y_RD, batch, "probe")
        spans.append((middle - start, clock.mark() - middle))
    first, second = ([span[half] for span in spans[3:]] for half in (0, 1))
    return {"dispatch": slowest(transport, first), "combine": slowest(transport, second)}
