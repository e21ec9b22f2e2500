"""Many calls of the exchange with changing routing and poisoned buffers, compared on the GPU with the definition.

Shape legend: T tokens of a rank, D model width, K top-k, E experts, R rows.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from soloist.bench.exchange import one_sided
from soloist.bench.load import Load
from soloist.dispatch.base import SlotChoice
from soloist.dispatch.forms import Form
from soloist.probes.gpus import Bench, captured


@dataclass
class Soak:
    """Static inputs, so that a graph can be replayed on new contents, and a count of wrong values."""

    bench: Bench
    load: Load
    form: Form
    wrong: Tensor = field(init=False)

    def __post_init__(self) -> None:
        bench, load = self.bench, self.load
        self.dispatcher = one_sided(bench, load.shape(bench.size), self.form, lanes=1)
        self.generator = torch.Generator(bench.device).manual_seed(5 + bench.rank)
        self.x_TD = torch.zeros(load.tokens, load.d_model, dtype=load.dtype, device=bench.device)
        shape = (load.tokens, load.top_k)
        self.ids_TK = torch.zeros(shape, dtype=torch.int64, device=bench.device)
        self.weight_TK = torch.ones(shape, device=bench.device)
        self.wrong = torch.zeros((), dtype=torch.int64, device=bench.device)

    def draw(self, call: int) -> None:
        """New tokens; routing uniform, skewed, or everything to one rank."""
        load, slots = self.load, self.load.experts // self.bench.size
        self.x_TD.normal_(generator=self.generator)
        shape = (load.tokens, load.experts)
        liked_TE = torch.randn(shape, generator=self.generator, device=self.bench.device)
        if call % 4 == 1:
            liked_TE[:, :slots] += 2.0
        if call % 4 >= 2:
            crowded = call // 4 % self.bench.size
            liked_TE[:, crowded * slots : (crowded + 1) * slots] += 100.0
        self.ids_TK.copy_(liked_TE.topk(load.top_k).indices)

    def call(self) -> None:
        """One exchange between poisoned buffers. The experts of group g answer x / 2 + g."""
        dispatcher, shape, bench = self.dispatcher, self.dispatcher.shape, self.bench
        lane = dispatcher.lanes[0]
        bench.barrier()
        for poisoned in (lane.rows_RD(shape), lane.home_RD(shape), lane.y_RD(shape)):
            poisoned.fill_(float("nan"))
        bench.barrier()
        slots = self.load.experts // bench.size
        group_TK = self.ids_TK // slots
        batch = dispatcher.dispatch(self.x_TD, SlotChoice(group_TK, self.ids_TK % slots, self.weight_TK))
        out_TD = dispatcher.combine(batch.rows_RD * 0.5 + bench.rank, batch)
        wanted_TD = torch.zeros_like(out_TD, dtype=torch.float32)
        for group in range(bench.size):
            here_T1 = (group_TK == group).any(1, keepdim=True)
            wanted_TD += (self.x_TD * 0.5 + group).float().where(here_T1, 0.0)
        self.wrong += (out_TD != wanted_TD.to(out_TD.dtype)).sum()

    def run(self, calls: int, eager_every: int = 10) -> int:
        """Wrong values in `calls` calls, one in `eager_every` outside the graph."""
        self.draw(0)
        replay = captured(self.call)
        for call in range(calls):
            self.draw(call)
            (self.call if call % eager_every == 0 else replay)()
        torch.cuda.synchronize()
        self.dispatcher.watch.check()
        return int(self.wrong)
