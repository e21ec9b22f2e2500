"""The dispatcher of a single group of experts: nothing travels, the index is made on the device.

Shape legend: T tokens, D model width, K top-k, X expanded rows, S slots.

The rows are the tokens themselves. With TP inside the experts, every rank of the group has all tokens and the results
are partial sums.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from soloist.dispatch.base import Dispatcher, ExpertBatch, SlotChoice
from soloist.dispatch.forms import STREAMING, cut
from soloist.errors import CapacityError
from soloist.kernels.experts import PROGRAMS, expand_rows
from soloist.kernels.follow import early
from soloist.kernels.home import weigh_kernel
from soloist.kernels.index import make_index
from soloist.kernels.language import next_power

BLOCK = 2048  # elements of a row that a program of the weighted sum takes


@dataclass(frozen=True)
class LocalIndex:
    """The memory of an index. Layers that take turns share one.

    Zeroed once: entries behind the last offset are rows and places of the largest call, if not of a smaller one.
    """

    row_X: Tensor
    weight_X: Tensor
    place_TK: Tensor
    offsets_S: Tensor

    @classmethod
    def of(cls, tokens: int, top_k: int, slots: int, device: torch.device) -> LocalIndex:
        """For calls of at most `tokens` tokens."""

        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=device)

        expanded = tokens * min(top_k, slots)
        return cls(
            zeros(expanded, dtype=torch.int64),
            zeros(expanded, dtype=torch.float32),
            zeros(tokens, top_k),
            zeros(slots),
        )


@dataclass(frozen=True)
class LocalDispatcher(Dispatcher):
    """Dispatcher by Triton kernels within one rank; it never waits for the host and can be captured."""

    slots: int
    index: LocalIndex

    @property
    def limit(self) -> int:
        return len(self.index.place_TK)

    def with_slots(self, slots: int) -> LocalDispatcher:
        """For a layer in which this rank has so many slots, or fewer than the index was made for."""
        return LocalDispatcher(slots, self.index)

    def start_dispatch(self, x_TD: Tensor, choice: SlotChoice, where: str = "") -> Arriving:
        if len(x_TD) > len(self.index.place_TK):
            raise CapacityError(f"{len(x_TD)} tokens in a call, the index holds {len(self.index.place_TK)}")
        return Arriving(self, x_TD.contiguous(), choice)

    def make_index(self, x_TD: Tensor, choice: SlotChoice) -> ExpertBatch:
        """This rank's own tokens as the batch of its experts; the batch is views of the one index."""
        index, (tokens, top_k) = self.index, choice.slot_TK.shape
        expanded = tokens * min(top_k, self.slots)
        slots_TK, out = choice.slot_TK.contiguous(), (index.row_X, index.weight_X, index.place_TK, index.offsets_S)
        weight_TK, options = choice.weight_TK.contiguous(), early(x_TD.device)
        make_index(slots_TK, weight_TK, tokens, top_k, self.slots, out, options=options)
        ticket = Ticket(choice, index)
        return ExpertBatch(
            x_TD, index.row_X[:expanded], index.weight_X[:expanded], index.offsets_S[: self.slots], ticket, dense=False,
            slots_RK=slots_TK,
        )  # fmt: skip

    def start_combine(self, y_RD: Tensor, batch: ExpertBatch, where: str = "") -> Done:
        """The rows are the tokens' sums already."""
        return Done(y_RD)

    def start_combine_expanded(self, y_XD: Tensor, batch: ExpertBatch, where: str = "") -> Done:
        """The weighted sum of a token's experts, in fp32 and in order of slot."""
        ticket = batch.ticket
        assert isinstance(ticket, Ticket), "this batch came from another dispatcher"
        choice, (tokens, d_model) = ticket.choice, batch.rows_RD.shape
        top_k = choice.slot_TK.shape[1]
        out_TD = torch.empty(tokens, d_model, dtype=y_XD.dtype, device=y_XD.device)
        block, chunks, warps = cut(d_model, BLOCK, STREAMING)
        if tokens:
            weigh_kernel[(min(PROGRAMS, tokens * chunks),)](
                y_XD, choice.slot_TK, ticket.index.place_TK, ticket.index.weight_X, None, None, out_TD,
                tokens, tokens, 0, 1, 1, 0, 0,
                D=d_model, K=top_k, KP=next_power(top_k), MOST=min(top_k, self.slots), RANKS=1, BLOCK=block,
                CHUNKS=chunks, WEIGH=True, PUSH=False, SIGNAL=False, num_warps=warps, **early(y_XD.device),
            )  # fmt: skip
        return Done(out_TD)


@dataclass(frozen=True)
class Ticket:
    """What combine has to know of a dispatch."""

    choice: SlotChoice
    index: LocalIndex


@dataclass(frozen=True)
class Arriving:
    """Tokens that are there already; the index is made when they are taken."""

    dispatcher: LocalDispatcher
    x_TD: Tensor
    choice: SlotChoice

    @property
    def rows(self) -> int:
        return len(self.x_TD)

    def wait(self) -> ExpertBatch:
        return self.dispatcher.make_index(self.x_TD, self.choice)

    def wait_expanded(self) -> tuple[ExpertBatch, Tensor]:
        batch = self.wait()
        return batch, expand_rows(batch.rows_RD, batch.row_X, batch.offsets_S)[0]


@dataclass(frozen=True)
class Done:
    """Results that are there already."""

    out_TD: Tensor

    def wait(self) -> Tensor:
        return self.out_TD
