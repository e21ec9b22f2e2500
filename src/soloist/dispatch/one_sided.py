"""Dispatch and combine by kernels that write and read the peers' memory: no host synchronisation, capturable.

Shape legend: T tokens of this rank, D model width, K top-k, R rows, X expanded rows.

`rows_RD` has a row for every token that any rank could send (kernels/push.py): those that came are named by `row_X`,
the others hold anything.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from soloist.dispatch.base import Dispatcher, ExpertBatch, SlotChoice
from soloist.dispatch.forms import STREAMING, Form, SideStream, choose_form, cut
from soloist.dispatch.lane import ExchangeShape, Lane
from soloist.dispatch.rows import phase
from soloist.kernels.experts import PROGRAMS
from soloist.kernels.flags import PHASES, await_kernel, signal_kernel
from soloist.kernels.follow import early
from soloist.kernels.home import home_kernel, weigh_kernel
from soloist.kernels.index import make_index, spread_kernel
from soloist.kernels.language import next_power
from soloist.kernels.push import SPAN, push_kernel
from soloist.transport.symmetric import Watch

# What belongs to the experts: no limit for the exchange.
SPREAD_PROGRAMS, SPREAD_BLOCK = 1 << 20, 2048


@dataclass(frozen=True)
class Ticket:
    """What combine has to know of a dispatch."""

    lane: Lane
    shape: ExchangeShape
    choice: SlotChoice
    number: int  # for the watch: where in the program kernels wait

    @property
    def tokens(self) -> int:
        return len(self.choice.group_TK)


@dataclass(frozen=True)
class OneSidedDispatcher(Dispatcher):
    """Dispatcher over the windows of one NVLink domain; the groups lie on one node.

    A call takes the first lane that no other call holds, so as many as there are lanes may be under way at once. Which
    one that is depends on these alone, not on the calls that came before: a rank that replays a graph makes none, and
    its peers may run the same step without one. All ranks use the same shape and form. `fit` gives the same dispatcher
    for smaller calls. `sms`: the most that a kernel of a chosen form takes which only moves or sums tokens; 0: any.
    """

    shape: ExchangeShape
    lanes: tuple[Lane, ...]
    watch: Watch
    form: Form
    side: SideStream
    sms: int = 0

    @classmethod
    def of(
        cls, shape: ExchangeShape, lanes: tuple[Lane, ...], watch: Watch, form: Form | None = None, sms: int = 0
    ) -> OneSidedDispatcher:
        return cls(shape, lanes, watch, form or choose_form(shape, sms), SideStream(lanes[0].window.device), sms)

    def fit(self, tokens: int, form: Form | None = None) -> OneSidedDispatcher:
        """For calls of at most `tokens` tokens a rank; agreed by all ranks."""
        shape = self.shape.fit(tokens)
        return replace(self, shape=shape, form=form or choose_form(shape, self.sms))

    def with_slots(self, slots: int) -> OneSidedDispatcher:
        """For a layer in which this rank's group has as many slots or fewer; the lanes are the same."""
        assert slots <= self.shape.slots
        return replace(self, shape=replace(self.shape, slots=slots))

    @property
    def rank(self) -> int:
        return self.watch.rank

    @property
    def limit(self) -> int:
        return self.shape.capacity

    # -- dispatch -----------------------------------------------------------------------------------------------
    def start_dispatch(self, x_TD: Tensor, choice: SlotChoice, where: str = "") -> Arriving:
        self.watch.check()
        lane = next((lane for lane in self.lanes if not lane.busy), None)
        assert lane is not None, "combine an earlier dispatch first, or give the dispatcher more lanes"
        shape = self.shape.fit(max(self.shape.capacity, len(x_TD)))  # raises where there are too many tokens
        number = self.watch.number(phase(where, "dispatch"))
        ticket, x_TD = Ticket(lane, shape, choice, number), x_TD.contiguous()
        lane.busy = True
        if self.form.name == "latency":
            self._push(ticket, x_TD, "all", choices=True)
            return Arriving(self, ticket)
        with self.side.fork():
            self._send_rows(ticket, x_TD)
        self._push(ticket, x_TD, "none", choices=True)
        return Arriving(self, ticket, self.side.mark(), x_TD)

    def _send_rows(self, ticket: Ticket, x_TD: Tensor) -> None:
        """Piece by piece, so that the first ones can be expanded while the last ones travel."""
        for piece in range(self.form.pieces):
            span = self._piece(ticket, piece)
            if self.form.name == "push":
                self._push(ticket, x_TD, "all", choices=False, span=span)
            else:
                self._copy_rows(ticket, x_TD, span)

    def _piece(self, ticket: Ticket, piece: int) -> slice:
        """Those of `capacity` tokens that travel in this piece."""
        step = -(-ticket.shape.capacity // self.form.pieces)
        return slice(min(piece * step, ticket.shape.capacity), min((piece + 1) * step, ticket.shape.capacity))

    def _copy_rows(self, ticket: Ticket, x_TD: Tensor, span: slice) -> None:
        """Whole blocks by copy engine, also what goes nowhere."""
        lane, shape, first = ticket.lane, ticket.shape, self._own_rows(ticket).start
        if shape.fp8:
            self._push(ticket, x_TD, "stage", choices=False, span=span)
        here = slice(first + span.start, first + min(span.stop, ticket.tokens))
        if here.start < here.stop:
            rows_RD = lane.rows_RD(shape)[here] if shape.fp8 else x_TD[span]
            for step in range(1, shape.ranks):
                peer = (self.rank + step) % shape.ranks
                lane.rows_RD(shape, peer)[here].copy_(rows_RD)
                if shape.fp8:
                    lane.scale_R(shape, peer)[here].copy_(lane.scale_R(shape)[here])
        self._signal(lane, "rows")

    def _own_rows(self, ticket: Ticket) -> slice:
        """Where this rank's tokens lie among the rows, here and with every peer."""
        first = ticket.shape.order(self.rank) * ticket.shape.capacity
        return slice(first, first + ticket.tokens)

    def _push(self, ticket: Ticket, x_TD: Tensor, rows: str, choices: bool, span: slice = slice(None)) -> None:
        """`span`: those of the tokens that are meant."""
        lane, shape, choice = ticket.lane, ticket.shape, ticket.choice
        start, stop, _ = span.indices(shape.capacity)
        x_TD, group_TK = x_TD[start:stop], choice.group_TK[start:stop]
        block, chunks, warps = self.form.chunks(shape.d_model, whole=shape.fp8)
        at, room = lane.at, stop - start
        units = -(-room * shape.top_k // SPAN) if rows == "none" else room * chunks
        push_kernel[(max(1, min(self.form.programs, units)),)](
            x_TD, group_TK, choice.slot_TK, choice.weight_TK, lane.window.bases, lane.calls,
            len(x_TD), room, shape.order(self.rank) * shape.capacity + start, self.rank, shape.tp,
            at.rows, at.scales, at.slots, at.weights, at.flags,
            D=shape.d_model, K=shape.top_k, KP=next_power(shape.top_k), RANKS=shape.ranks, BLOCK=block, CHUNKS=chunks,
            CHOICES=choices, ROWS=rows, QUANTISE=shape.fp8, SIGNAL=rows not in ("own", "stage"),
            PIECES=self.form.pieces, STAGES=self.form.stages, num_warps=2 if rows == "none" else warps,
            **self._early(),
        )  # fmt: skip

    def _receive(self, ticket: Ticket) -> ExpertBatch:
        """The index, which needs the choices alone."""
        lane, shape = ticket.lane, ticket.shape
        out = lane.row_X, lane.weight_X, lane.place_RK, lane.offsets_S
        waits, options = (lane.flags, lane.calls, *self._watching(ticket)), self._early()
        make_index(
            lane.slots_RK, lane.weights_RK, shape.rows, shape.top_k, shape.slots, out, waits, shape.ranks, options
        )
        expanded = shape.rows * shape.most
        return ExpertBatch(
            lane.rows_RD(shape),
            lane.row_X[:expanded],
            lane.weight_X[:expanded],
            lane.offsets_S[: shape.slots],
            ticket,
            dense=False,
            slots_RK=lane.slots_RK[: shape.rows],
        )

    def _receive_rows(self, ticket: Ticket, sent: torch.Event | None) -> None:
        self.side.join(sent)
        self._await(ticket, "rows")

    def spread(self, batch: ExpertBatch) -> Tensor:
        """x_XD of a batch whose rows are all there, in the model's dtype."""
        ticket = batch.ticket
        assert isinstance(ticket, Ticket), "this batch came from another dispatcher"
        x_XD = self._expanded(ticket)
        for piece in range(self.form.pieces):
            self._spread_piece(ticket, piece, own=True, x_XD=x_XD)
        return x_XD

    def _expanded(self, ticket: Ticket) -> Tensor:
        shape = ticket.shape
        return torch.empty(shape.rows * shape.most, shape.d_model, dtype=shape.dtype, device=ticket.lane.row_X.device)

    def _spread_own(self, ticket: Ticket, x_TD: Tensor, x_XD: Tensor) -> None:
        """This rank's tokens to where they stand among the expanded rows."""
        first = self._own_rows(ticket).start
        self._spread(ticket, x_TD, None, x_XD, first, first, len(x_TD), len(x_TD), self.shape.ranks)

    def _spread_piece(self, ticket: Ticket, piece: int, own: bool, x_XD: Tensor) -> None:
        """The same with a piece of what the ranks sent, `own` tokens included or not."""
        lane, shape, span = ticket.lane, ticket.shape, self._piece(ticket, piece)
        scale_R = lane.scale_R(shape) if shape.fp8 else None
        size, skip = span.stop - span.start, shape.ranks if own else shape.order(self.rank)
        sources = shape.ranks if own else shape.ranks - 1
        self._spread(ticket, lane.rows_RD(shape), scale_R, x_XD, 0, span.start, size * sources, size, skip)

    def _spread(
        self, ticket: Ticket, rows: Tensor, scale_R: Tensor | None, x_XD: Tensor, base: int, first: int, count: int,
        span: int, skip: int,
    ) -> None:  # fmt: skip
        """`count` rows, `span` of each source but the one of order `skip`, from each one's row `first`.

        Row r of the batch is row `r - base` of `rows`.
        """
        lane, shape = ticket.lane, ticket.shape
        block, chunks, warps = cut(shape.d_model, SPREAD_BLOCK, STREAMING)
        if count:
            spread_kernel[(min(SPREAD_PROGRAMS, count * chunks),)](
                rows, scale_R, lane.slots_RK, lane.place_RK, x_XD, base, first, count, span, shape.capacity, skip,
                D=shape.d_model, K=shape.top_k, KP=next_power(shape.top_k), MOST=shape.most, BLOCK=block, CHUNKS=chunks,
                SCALED=scale_R is not None, num_warps=warps,
            )  # fmt: skip

    # -- combine ------------------------------------------------------------------------------------------------
    def start_combine(self, y_RD: Tensor, batch: ExpertBatch, where: str = "") -> Returning:
        """`y_RD` may lie in `room(batch)`; otherwise it is copied there, or sent from where it is."""
        return self._start_combine(y_RD.contiguous(), batch, where, expanded=False)

    def start_combine_expanded(self, y_XD: Tensor, batch: ExpertBatch, where: str = "") -> Returning:
        """The same from the experts' results: their weighted sum, in fp32 and in order of slot, goes straight home."""
        return self._start_combine(y_XD.contiguous(), batch, where, expanded=True)

    def room(self, batch: ExpertBatch) -> Tensor:
        """y_RD: where the experts may write their rows to spare a copy."""
        ticket = batch.ticket
        assert isinstance(ticket, Ticket), "this batch came from another dispatcher"
        return ticket.lane.y_RD(ticket.shape)

    def _start_combine(self, y: Tensor, batch: ExpertBatch, where: str, expanded: bool) -> Returning:
        ticket = batch.ticket
        assert isinstance(ticket, Ticket), "this batch came from another dispatcher"
        ticket = replace(ticket, number=self.watch.number(phase(where, "combine")))
        if expanded or self.form.name == "latency":
            if len(self.lanes) == 1 or self.form.name == "latency":
                self._weigh(ticket, y, weigh=expanded, push=True)
                return Returning(self, ticket, pulled=False)
            with self.side.fork():
                self._weigh(ticket, y, weigh=expanded, push=True)
            return Returning(self, ticket, False, self.side.mark(), y)
        room = self.room(batch)
        if y.data_ptr() != room.data_ptr():
            room.copy_(y)
        with self.side.fork():
            if not self.form.pull:
                self._copy_home(ticket, room)
            self._signal(ticket.lane, "home")
        return Returning(self, ticket, self.form.pull, self.side.mark())

    def _weigh(self, ticket: Ticket, y: Tensor, weigh: bool, push: bool) -> None:
        lane, shape = ticket.lane, ticket.shape
        block, chunks, warps = cut(shape.d_model, self.form.weigh_block, self.form.weigh_warp)
        most = self.sms if self.sms and not weigh else PROGRAMS  # a weighted sum is the experts'
        weigh_kernel[(max(1, min(most, shape.rows * chunks)),)](
            y, lane.slots_RK, lane.place_RK, lane.weight_X, lane.window.bases, lane.calls, lane.y_RD(shape),
            shape.rows, shape.capacity, self.rank, shape.groups, shape.tp, lane.at.home, lane.at.flags,
            D=shape.d_model, K=shape.top_k, KP=next_power(shape.top_k), MOST=shape.most, RANKS=shape.ranks, BLOCK=block,
            CHUNKS=chunks, WEIGH=weigh, PUSH=push, SIGNAL=push, num_warps=warps, **self._early(),
        )  # fmt: skip

    def _copy_home(self, ticket: Ticket, y_RD: Tensor) -> None:
        lane, shape = ticket.lane, ticket.shape
        here = slice(self.rank * shape.capacity, (self.rank + 1) * shape.capacity)
        for step in range(shape.ranks):
            peer = (self.rank + 1 + step) % shape.ranks
            first = shape.order(peer) * shape.capacity
            lane.home_RD(shape, peer)[here].copy_(y_RD[first : first + shape.capacity])

    def _sum(self, ticket: Ticket, pulled: bool, sent: torch.Event | None) -> Tensor:
        lane, shape = ticket.lane, ticket.shape
        out_TD = torch.empty(ticket.tokens, shape.d_model, dtype=shape.dtype, device=lane.window.device)
        in_pieces = pulled or self.form.name == "latency"
        block, chunks, warps = self.form.chunks(shape.d_model) if in_pieces else cut(shape.d_model, 2048, STREAMING)
        self.side.join(sent)
        home_kernel[(max(1, min(self.form.programs, ticket.tokens * chunks)),)](
            out_TD, ticket.choice.group_TK, lane.window.bases, lane.flags, lane.calls, *self._watching(ticket),
            ticket.tokens, shape.capacity, shape.order(self.rank) * shape.capacity, self.rank,
            lane.at.y if pulled else lane.at.home,
            D=shape.d_model, K=shape.top_k, KP=next_power(shape.top_k), GROUPS=shape.groups, TP=shape.tp,
            RANKS=shape.ranks, BLOCK=block, CHUNKS=chunks, PULL=pulled, STAGES=self.form.stages, num_warps=warps,
            **self._early(),
        )  # fmt: skip
        lane.busy = False
        return out_TD

    def _early(self) -> dict[str, bool]:
        """In the larger forms other streams need the SMs."""
        return early(self.lanes[0].window.device) if self.form.name == "latency" else {}

    # -- flags --------------------------------------------------------------------------------------------------
    def _watching(self, ticket: Ticket) -> tuple[Tensor, Tensor, int, int]:
        return self.watch.failed, self.watch.report, ticket.number, self.watch.timeout_ns

    def _signal(self, lane: Lane, phase: str) -> None:
        signal_kernel[(1,)](
            lane.window.bases, lane.calls, lane.at.flags, self.rank,
            PHASE=PHASES.index(phase), RANKS=self.shape.ranks, num_warps=1,
        )  # fmt: skip

    def _await(self, ticket: Ticket, phase: str, behind: int = 0) -> None:
        """Until everybody has done this phase, but for the last `behind` pieces of it."""
        lane = ticket.lane
        await_kernel[(1,)](
            lane.flags, lane.calls, *self._watching(ticket),
            PHASE=PHASES.index(phase), RANKS=self.shape.ranks, behind=behind, num_warps=1,
        )  # fmt: skip


@dataclass(frozen=True)
class Arriving:
    """A dispatch under way. `x_TD`: this rank's own tokens, where they are still to be put among the rows."""

    dispatcher: OneSidedDispatcher
    ticket: Ticket
    sent: torch.Event | None = None
    x_TD: Tensor | None = None

    @property
    def rows(self) -> int:
        return self.ticket.shape.rows

    def wait(self) -> ExpertBatch:
        dispatcher, ticket = self.dispatcher, self.ticket
        batch = dispatcher._receive(ticket)
        if self.x_TD is not None:
            if dispatcher.form.name == "copy" and not ticket.shape.fp8:
                dispatcher._push(ticket, self.x_TD, "own", choices=False)
            dispatcher._receive_rows(ticket, self.sent)
        return batch

    def wait_expanded(self) -> tuple[ExpertBatch, Tensor]:
        """The batch and x_XD in the model's dtype: own rows are expanded while the others are still travelling.

        `rows_RD` is not to be used: in the copy form own rows do not stand in it.
        """
        dispatcher, ticket = self.dispatcher, self.ticket
        batch = dispatcher._receive(ticket)
        if self.x_TD is None:
            return batch, dispatcher.spread(batch)
        x_XD, fp8 = dispatcher._expanded(ticket), ticket.shape.fp8
        if not fp8:
            dispatcher._spread_own(ticket, self.x_TD, x_XD)
        for piece in range(dispatcher.form.pieces):
            dispatcher._await(ticket, "rows", behind=dispatcher.form.pieces - 1 - piece)
            dispatcher._spread_piece(ticket, piece, own=fp8, x_XD=x_XD)
        dispatcher.side.join(self.sent)
        return batch, x_XD


@dataclass(frozen=True)
class Returning:
    """A combine under way. `y`: what the side stream still reads."""

    dispatcher: OneSidedDispatcher
    ticket: Ticket
    pulled: bool
    sent: torch.Event | None = None
    y: Tensor | None = None

    def wait(self) -> Tensor:
        return self.dispatcher._sum(self.ticket, self.pulled, self.sent)
