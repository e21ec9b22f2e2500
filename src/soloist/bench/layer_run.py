"""One MoE layer of a load on this rank: experts, one-sided dispatcher, and its times with and without the exchange.

Shape legend: T tokens of a rank, D model width, F expert width, X expanded rows, S slots.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from soloist.bench.dispatchers import in_process, one_sided
from soloist.bench.load import Load
from soloist.bench.report import Ceilings
from soloist.bench.trace import Trace
from soloist.dispatch.base import ExpertBatch, SlotChoice
from soloist.dispatch.forms import Form
from soloist.dispatch.one_sided import OneSidedDispatcher, Ticket
from soloist.kernels.experts import ExpertTiles, choose_tiles, swiglu_experts
from soloist.probes.gpus import Bench, OneGpu, captured

LANES = 3  # a chunk being computed, one on its way there, one on its way home


@dataclass
class LayerRun:
    """The experts of a load, this rank's share of them, and a dispatcher for chunks of its tokens."""

    bench: OneGpu
    load: Load
    form: Form
    chunks: int = 1
    tiles: ExpertTiles | None = None

    def __post_init__(self) -> None:
        bench, load = self.bench, self.load
        self.x_TD, self.choice = load.inputs(bench.rank, bench.size, 0, bench.device)
        self.shape = load.shape(bench.size).fit(load.tokens // self.chunks)
        if isinstance(bench, Bench):
            self.dispatcher = one_sided(bench, self.shape, self.form, LANES if self.chunks > 1 else 1)
            self.others: list[OneSidedDispatcher] = []
        else:
            everybody = in_process(bench, self.shape, self.form)
            self.dispatcher = everybody.pop(bench.rank)
            self.others = everybody
        self.gate_up, self.down = self.weights(bench.rank)
        used = bench.size * load.tokens * load.top_k / load.experts / self.chunks
        self.tiling = self.tiles or choose_tiles(used, load.width // load.tp)

    def weights(self, rank: int) -> tuple[Tensor, Tensor]:
        """gate_up `[S, 2F, D]` and down `[S, D, F]` of a rank's experts, or of its shares of them."""
        load, device = self.load, self.bench.device
        generator = torch.Generator(device).manual_seed(31 + rank)
        slots, width = load.slots(self.bench.size), load.width // load.tp

        def draw(rows: int, columns: int) -> Tensor:
            made = torch.empty(slots, rows, columns, dtype=load.dtype, device=device)
            for slot in made:
                slot.normal_(generator=generator).mul_(columns**-0.5)
            return made

        return draw(2 * width, load.d_model), draw(load.d_model, width)

    def experts(self, batch: ExpertBatch, x_XD: Tensor | None = None) -> Tensor:
        return swiglu_experts(batch.rows_RD, batch.row_X, batch.offsets_S, self.gate_up, self.down, self.tiling, x_XD)

    def parts(self) -> list[tuple[Tensor, SlotChoice]]:
        """The tokens in chunks."""
        choice, size = self.choice, self.load.tokens // self.chunks
        spans = [slice(i * size, (i + 1) * size) for i in range(self.chunks)]
        return [(self.x_TD[s], SlotChoice(choice.group_TK[s], choice.slot_TK[s], choice.weight_TK[s])) for s in spans]

    def forward(self) -> list[Tensor]:
        """out_TD by chunks: while one is computed, the next travels there and the last travels home."""
        parts, going, out = self.parts(), [], []
        arriving = self.dispatcher.start_dispatch(*parts[0])
        for i in range(self.chunks):
            following = self.dispatcher.start_dispatch(*parts[i + 1]) if i + 1 < self.chunks else None
            batch, x_XD = (arriving.wait(), None) if self.tiling.gather else arriving.wait_expanded()
            going.append(self.dispatcher.start_combine_expanded(self.experts(batch, x_XD), batch))
            if i:
                out.append(going[i - 1].wait())
            arriving = following
        return [*out, going[-1].wait()]

    def without_exchange(self) -> Callable[[], None]:
        """The same rows through the same expansion, experts and weighted sums, nothing travelling."""
        batch = self.arrived()
        if not self.others:
            self.dispatcher.start_combine_expanded(self.experts(batch), batch).wait()

        def work() -> None:
            for _ in range(self.chunks):
                x_XD = None if self.tiling.gather else self.dispatcher.spread(batch)
                self.weigh(batch, self.experts(batch, x_XD))

        return work

    def arrived(self) -> ExpertBatch:
        """What everybody sends to this rank, to work on without an exchange."""
        arriving = self.dispatcher.start_dispatch(*self.parts()[0])
        for other in self.others:
            other.start_dispatch(*self.load.inputs(other.rank, self.bench.size, 0, self.bench.device))
        if self.others:
            self.bench.settle()  # they share the GPU, so nobody may wait on it for them
            for dispatcher in (self.dispatcher, *self.others):
                dispatcher.lanes[0].busy = False  # nothing will be combined
        return arriving.wait()

    def weigh(self, batch: ExpertBatch, y_XD: Tensor) -> None:
        """The weighted sums of a row's experts, which stay here."""
        assert isinstance(batch.ticket, Ticket)
        self.dispatcher._weigh(batch.ticket, y_XD, weigh=True, push=False)

    def check(self) -> None:
        """Asserts that the layer gives what the definition does."""
        out_TD = torch.cat(self.forward())
        self.bench.settle()
        self.dispatcher.watch.check()
        self.compare(out_TD, self.x_TD, self.choice)

    def compare(self, out_TD: Tensor, x_TD: Tensor, choice: SlotChoice, tokens: int = 48) -> None:
        """Asserts that the first tokens' outputs differ from fp32 by bf16 rounding alone."""
        out_TD = out_TD[:tokens].float()
        want_TD = torch.zeros_like(out_TD)
        for rank in range(self.bench.size):
            gate_up, down = self.weights(rank) if rank != self.bench.rank else (self.gate_up, self.down)
            for slot in range(len(down)):
                here_TK = (choice.group_TK[:tokens] == rank // self.load.tp) & (choice.slot_TK[:tokens] == slot)
                weight_T = (choice.weight_TK[:tokens] * here_TK).sum(1)
                chosen = weight_T.nonzero()[:, 0]
                gate, up = (x_TD[chosen].float() @ gate_up[slot].float().T).chunk(2, -1)
                want_TD[chosen] += weight_T[chosen, None] * ((F.silu(gate) * up) @ down[slot].float().T)
        error = float((out_TD - want_TD).norm() / want_TD.norm())
        assert error < 0.012, f"the layer's output differs by {error:.4f}"

    def floor(self, ceilings: Ceilings) -> tuple[float, str]:
        """See `floor`."""
        everybody = [choice for _, choice in self.load.everybody(self.bench.size, 0, self.bench.device)]
        return floor(self.load, self.bench.size, everybody, ceilings)

    def measure(self, calls: int, pause_s: float, trace: Trace, name: str) -> tuple[float, float]:
        """Seconds of the layer and of the layer without its exchange, both as graphs of `calls`.

        `pause_s` between repeats keeps a GPU from lowering its clocks under a load that only a benchmark has.
        """
        alone = self.without_exchange()
        alone()
        forward, bare = repeated(self.forward, calls), repeated(alone, calls)
        seconds = self.bench.seconds(forward, bare, repeats=15, pause_s=pause_s)
        trace.shot(name, lambda: (self.bench.enter(), forward()))
        return seconds[0] / calls, seconds[1] / calls


def floor(load: Load, ranks: int, choices: list[SlotChoice], ceilings: Ceilings) -> tuple[float, str]:
    """Seconds of the busiest rank for these tokens, with nothing for the exchange, and what they are spent on."""
    group = torch.cat([choice.group_TK.flatten() for choice in choices])
    slot = torch.cat([choice.slot_TK.flatten() for choice in choices])
    groups, slots = ranks // load.tp, load.slots(ranks)
    loads = torch.bincount(group * slots + slot, minlength=groups * slots).view(groups, slots)
    size = 3 * load.d_model * load.width // load.tp  # of a rank's share of an expert
    flops = int(loads.sum(1).max()) * 2 * size
    weights = int((loads > 0).sum(1).max()) * size * load.dtype.itemsize
    compute, memory = flops / ceilings.flops, weights / ceilings.memory
    bound = f"{flops / 1e12:.3f} TFLOP" if compute > memory else f"{weights / 1e9:.2f} GB of weights"
    return max(compute, memory), bound


def repeated(work: Callable[[], object], calls: int) -> Callable[[], None]:
    """`calls` of it in a graph."""

    def many() -> None:
        for _ in range(calls):
            work()

    return captured(many, warm_up=0)
