"""Experts whose width all ranks share, for tokens that all ranks have: the layer with the sum of its partial results.

Shape legend: T tokens, D model width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from soloist.bench.layer_run import LayerRun, floor, repeated
from soloist.bench.report import Ceilings
from soloist.dispatch.local import LocalDispatcher, LocalIndex
from soloist.kernels.experts import ExpertTiles, choose_tiles, swiglu_experts

Sum = Callable[[Tensor], Tensor]  # over ranks


@dataclass
class SharedRun:
    """The tokens of rank 0 on every rank, as tensor-parallel attention leaves them, through the experts of `run`."""

    run: LayerRun
    tiles: ExpertTiles | None = None

    def __post_init__(self) -> None:
        bench, load = self.run.bench, self.run.load
        self.x_TD, self.choice = load.inputs(0, bench.size, 0, bench.device)
        slots = load.slots(bench.size)
        self.dispatcher = LocalDispatcher(slots, LocalIndex.of(load.tokens, load.top_k, slots, bench.device))
        self.tiling = self.tiles or choose_tiles(load.tokens * load.top_k / load.experts, load.width // load.tp)

    def floor(self, ceilings: Ceilings) -> tuple[float, str]:
        """See `layer_run.floor`."""
        return floor(self.run.load, self.run.bench.size, [self.choice], ceilings)

    def partial(self) -> Tensor:
        """out_TD before the sum over ranks."""
        arriving = self.dispatcher.start_dispatch(self.x_TD, self.choice)
        batch, x_XD = (arriving.wait(), None) if self.tiling.gather else arriving.wait_expanded()
        weights = self.run.gate_up, self.run.down
        y_XD = swiglu_experts(batch.rows_RD, batch.row_X, batch.offsets_S, *weights, self.tiling, x_XD)
        return self.dispatcher.start_combine_expanded(y_XD, batch).wait()

    def measure(self, ways: Mapping[str, Sum], calls: int, pause_s: float) -> Iterator[tuple[str, float]]:
        """Seconds of the layer by each way of summing, after a check against the definition, and without the sum."""
        for total in ways.values():
            self.run.compare(total(self.partial()), self.x_TD, self.choice)
        compared = {**ways, "tokens on all ranks, not summed": lambda out_TD: out_TD}
        works = [repeated(lambda total=total: total(self.partial()), calls) for total in compared.values()]
        seconds = self.run.bench.seconds(*works, repeats=15, pause_s=pause_s)
        yield from zip(compared, (each / calls for each in seconds), strict=True)
