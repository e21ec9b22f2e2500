"""Many calls of the exchange with changing routing and poisoned buffers, compared on the GPU with NCCL's.

Shape legend: T tokens of a rank, D model width, K top-k, E experts, R rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from soloist.bench.dispatchers import in_process, one_sided, padded, ragged
from soloist.bench.load import Load, sum_of
from soloist.dispatch.base import Dispatcher, SlotChoice
from soloist.dispatch.forms import COPY, LATENCY, PUSH, Form
from soloist.dispatch.one_sided import OneSidedDispatcher
from soloist.probes.gpus import Bench, OneGpu, captured
from soloist.transport.base import Transport

LOAD = Load(64, 256, 8, 64)
FORMS = {"latency": LATENCY, "push": PUSH, "copy": COPY, "copy, copied home": Form("copy", pull=False)}
EAGER_EVERY = 10


@dataclass
class Soak:
    """Static inputs of a rank, so that a graph can be replayed on new contents, and a count of wrong values."""

    bench: OneGpu
    load: Load
    dispatcher: OneSidedDispatcher
    eager: Dispatcher | None = None  # what calls outside the graph are compared with, beside the definition
    in_graph: Dispatcher | None = None
    wrong: Tensor = field(init=False)
    replay: Callable[[], None] = field(init=False)

    def __post_init__(self) -> None:
        bench, load = self.bench, self.load
        self.generator = torch.Generator(bench.device).manual_seed(5 + bench.rank)
        self.x_TD = torch.zeros(load.tokens, load.d_model, dtype=load.dtype, device=bench.device)
        shape = (load.tokens, load.top_k)
        self.group_TK = torch.zeros(shape, dtype=torch.int64, device=bench.device)
        self.slot_TK = torch.zeros(shape, dtype=torch.int64, device=bench.device)
        self.weight_TK = torch.ones(shape, device=bench.device)
        self.wrong = torch.zeros((), dtype=torch.int64, device=bench.device)

    def draw(self, call: int) -> None:
        """New tokens; routing uniform, skewed, everything to one rank, or some tokens nowhere at all."""
        load, slots = self.load, self.load.experts // self.bench.size
        self.x_TD.normal_(generator=self.generator)
        shape = (load.tokens, load.experts)
        liked_TE = torch.randn(shape, generator=self.generator, device=self.bench.device)
        if call % 5 == 1:
            liked_TE[:, :slots] += 2.0
        if call % 5 in (2, 3):
            crowded = call // 5 % self.bench.size
            liked_TE[:, crowded * slots : (crowded + 1) * slots] += 100.0
        ids_TK = liked_TE.topk(load.top_k).indices
        self.group_TK.copy_(ids_TK // slots)
        self.slot_TK.copy_(ids_TK % slots)
        if call % 5 == 4:  # on one rank all of them
            nowhere = slice(0, None) if call // 5 % self.bench.size == self.bench.rank else slice(0, None, 3)
            self.group_TK[nowhere] = -1
            self.slot_TK[nowhere] = -1

    def call(self, yardstick: Dispatcher | None) -> None:
        """One exchange between poisoned buffers, and the same one over NCCL. Group g's experts answer x / 2 + g."""
        dispatcher, shape, bench = self.dispatcher, self.dispatcher.shape, self.bench
        lane = dispatcher.lanes[0]
        bench.barrier()
        for poisoned in (lane.rows_RD(shape), lane.home_RD(shape), lane.y_RD(shape)):
            poisoned.fill_(float("nan"))
        bench.barrier()
        mine_TD = self._through(dispatcher)
        if yardstick is not None:
            self.wrong += (mine_TD != self._through(yardstick)).sum()
        wanted_TD = sum_of([self.x_TD * 0.5 + group for group in range(bench.size)], self.group_TK)
        self.wrong += (mine_TD != wanted_TD).sum()

    def _through(self, dispatcher: Dispatcher) -> Tensor:
        batch = dispatcher.dispatch(self.x_TD, SlotChoice(self.group_TK, self.slot_TK, self.weight_TK))
        return dispatcher.combine(batch.rows_RD * 0.5 + self.bench.rank, batch)

    def prepare(self, settle: Callable[[], None] = lambda: None) -> None:
        """Whatever first calls compile, load and allocate; and the graph. `settle` runs after each of them."""
        for call in range(5):
            self.draw(call)
        for yardstick in (self.eager, self.in_graph):
            self.call(yardstick)
            settle()
        self.replay = captured(lambda: self.call(self.in_graph), warm_up=0)
        self.replay()
        settle()

    def step(self, number: int) -> None:
        """One call on the current stream, one in EAGER_EVERY outside the graph."""
        self.draw(number)
        if number % EAGER_EVERY == 0:
            self.call(self.eager)
        else:
            self.replay()

    def result(self) -> int:
        """Wrong values in all calls so far."""
        torch.cuda.synchronize()
        self.dispatcher.watch.check()
        self.bench.watch.check()
        return int(self.wrong)


def soak(bench: Bench, transport: Transport, calls: int) -> None:
    """`calls` calls in each form; raises AssertionError where a value differs. Called by every rank."""
    for name, form in FORMS.items():
        dispatcher = one_sided(bench, LOAD.shape(bench.size), form, lanes=1)
        rank = Soak(bench, LOAD, dispatcher, ragged(transport, LOAD), padded(transport, LOAD, rounds=2))
        rank.prepare()
        for number in range(calls):
            rank.step(number)
        _tell(name, calls, [rank], "NCCL's and the definition")


def soak_alone(ranks: int, calls: int) -> None:
    """The same on one GPU, each of `ranks` on a stream of its own, compared with the definition alone."""
    for name, form in FORMS.items():
        benches = OneGpu.together(ranks)
        dispatchers = in_process(benches[0], LOAD.shape(ranks), form)
        soaks = [Soak(bench, LOAD, one) for bench, one in zip(benches, dispatchers, strict=True)]
        streams = [torch.cuda.Stream() for _ in soaks]
        _prepare_in_turn(soaks, streams)
        for number in range(calls):
            for rank, stream in zip(soaks, streams, strict=True):
                with torch.cuda.stream(stream):
                    rank.step(number)
        _tell(name, calls, soaks, "the definition")


def _prepare_in_turn(soaks: list[Soak], streams: list[torch.cuda.Stream]) -> None:
    """A kernel is loaded once no kernel runs, so ranks of one GPU may not wait for each other meanwhile.

    Therefore all waits give up at once, and what they report is forgotten.
    """
    watches = [watch for rank in soaks for watch in (rank.bench.watch, rank.dispatcher.watch)]

    def settle() -> None:
        torch.cuda.synchronize()
        for watch in watches:
            watch.report.zero_()

    for watch in watches:
        watch.failed.fill_(1)
    settle()
    for rank, stream in zip(soaks, streams, strict=True):
        with torch.cuda.stream(stream):
            rank.prepare(settle)
    for watch in watches:
        watch.failed.zero_()
    for rank in soaks:
        rank.wrong.zero_()
    torch.cuda.synchronize()


def _tell(name: str, calls: int, ranks: list[Soak], yardstick: str) -> None:
    for rank in ranks:
        wrong = rank.result()
        assert not wrong, f"rank {rank.bench.rank}, {name}: {wrong} values differ in {calls} calls"
    if ranks[0].bench.rank == 0:
        print(f"{name}: {calls} calls equal to {yardstick}", flush=True)
