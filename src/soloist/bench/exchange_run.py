"""One load on the one-sided exchange of this rank: checked against the definition, and its times.

Shape legend: T tokens of a rank, D model width, R rows, X expanded rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from soloist.bench.load import Load, check_batch, check_home
from soloist.bench.trace import Trace
from soloist.dispatch.one_sided import OneSidedDispatcher, Ticket
from soloist.probes.gpus import Bench, captured


@dataclass
class ExchangeRun:
    """One load on one dispatcher."""

    bench: Bench
    load: Load
    dispatcher: OneSidedDispatcher
    seed: int = 0

    def __post_init__(self) -> None:
        bench, load = self.bench, self.load
        self.inputs = load.everybody(bench.size, self.seed, bench.device)
        self.x_TD, self.choice = self.inputs[bench.rank]
        self.shape = self.dispatcher.shape

    def answers(self, rank: int) -> Tensor:
        """y_RD that a rank gives."""
        generator = torch.Generator(self.bench.device).manual_seed(77 * self.seed + rank)
        return torch.randn(self.shape.rows, self.load.d_model, generator=generator, device=self.bench.device).to(
            self.load.dtype
        )

    def check(self) -> int:
        """One call with poisoned buffers, compared with the definition. Returns the expanded rows of this rank."""
        bench, dispatcher, shape = self.bench, self.dispatcher, self.shape
        bench.barrier()  # nobody reads any more
        for lane in dispatcher.lanes:
            lane.rows_RD(shape).view(torch.uint8).fill_(255)  # NaN in bf16, fp16 and fp8
            lane.home_RD(shape).fill_(float("nan"))
            lane.y_RD(shape).fill_(float("nan"))
        bench.barrier()
        batch = dispatcher.start_dispatch(self.x_TD, self.choice, "bench").wait()
        ticket = batch.ticket
        assert isinstance(ticket, Ticket)
        scale_R = ticket.lane.scale_R(shape) if shape.fp8 else None
        used = check_batch(batch, self.inputs, bench.rank, scale_R)
        answers = [self.answers(rank) for rank in range(bench.size)]
        out_TD = dispatcher.start_combine(answers[bench.rank], batch, "bench").wait()
        check_home(out_TD, answers, self.choice, shape.order(bench.rank) * shape.capacity)
        dispatcher.watch.check()
        return used

    def halves(self, trace: Trace, name: str) -> tuple[float, float]:
        """Seconds of a dispatch and of a combine from rows where the experts left them, each as a graph."""
        state = {}

        def dispatch() -> None:
            state["batch"] = self.dispatcher.start_dispatch(self.x_TD, self.choice).wait()

        def combine() -> None:
            batch = state["batch"]
            self.dispatcher.start_combine(self.dispatcher.room(batch), batch).wait()

        self.bench.barrier()
        for lane in self.dispatcher.lanes:
            lane.y_RD(self.shape).normal_()
        # Captured one after the other: eager calls of `captured` would dispatch again what nobody has combined.
        both = [captured(work, warm_up=0) for work in (dispatch, combine)]
        first, second = self.bench.seconds(*both)
        trace.shot(name, lambda: (self.bench.enter(), [half() for half in both]))
        return first, second

    def round_trip(self, expand: bool = True, calls: int = 10) -> float:
        """Seconds from x to rows ready for a GEMM and from its output to x, without the GEMM: `calls` in a graph."""
        shape = self.shape
        y_XD = torch.randn(shape.rows * shape.most, shape.d_model, device=self.bench.device).to(shape.dtype)

        def call() -> None:
            arriving = self.dispatcher.start_dispatch(self.x_TD, self.choice)
            batch = arriving.wait_expanded()[0] if expand else arriving.wait()
            self.dispatcher.start_combine_expanded(y_XD, batch).wait()

        def many() -> None:
            for _ in range(calls):
                call()

        call()
        call()
        (seconds,) = self.bench.seconds(captured(many, warm_up=0))
        return seconds / calls
