"""One-sided ranks that live in one process, on plain tensors, and run in turn in Triton's interpreter."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from soloist.dispatch.base import ExpertBatch
from soloist.dispatch.forms import Form
from soloist.dispatch.lane import ExchangeShape, Lane, WindowPlan
from soloist.dispatch.one_sided import OneSidedDispatcher
from soloist.transport.symmetric import Watch, windows_in_process
from tests.dispatch.cases import Case, Outcome


def small(form: Form) -> Form:
    """Several programs and chunks even for tiny rows."""
    return replace(form, programs=3, block=8, weigh_block=8)


def world(shape: ExchangeShape, form: Form, lanes: int = 1) -> list[OneSidedDispatcher]:
    windows = [windows_in_process(shape.ranks, WindowPlan(shape).size) for _ in range(lanes)]
    dispatchers = []
    for rank in range(shape.ranks):
        watch = Watch(rank, tuple(range(10, 10 + shape.ranks)), torch.device("cpu"), 0.5)
        own = tuple(Lane(of_rank[rank], shape) for of_rank in windows)
        dispatchers.append(OneSidedDispatcher.of(shape, own, watch, small(form)))
    return dispatchers


def shape_of(case: Case, **changes) -> ExchangeShape:
    slots = max(len(held) for held in case.slots)
    settings = {"ranks": case.groups, "tp": 1, "slots": slots, "top_k": case.top_k, "d_model": case.d_model}
    settings |= {"capacity": max(case.tokens), "dtype": case.dtype}
    return ExchangeShape(**(settings | changes))


def dense(batch: ExpertBatch) -> tuple[Tensor, Tensor]:
    """The rows that came, in order, and which of them each expanded row is."""
    named_X = batch.row_X[: int(batch.offsets_S[-1])]
    rows = named_X.unique()
    return rows, torch.searchsorted(rows, named_X)


def exchange(dispatchers: list[OneSidedDispatcher], case: Case) -> list[Outcome]:
    """All ranks' part of one call, in turn: everybody sends before anybody receives."""
    inputs = [case.inputs(rank) for rank in range(case.groups)]
    arriving = [d.start_dispatch(x, choice, "layer 0") for d, (x, choice) in zip(dispatchers, inputs, strict=True)]
    batches = [pending.wait() for pending in arriving]
    seen, returning = [], []
    for rank, (dispatcher, batch) in enumerate(zip(dispatchers, batches, strict=True)):
        rows, row_X = dense(batch)
        y_RD = torch.full_like(batch.rows_RD, float("nan"))
        y_RD[rows] = case.answers(rank, len(rows))
        slots = len(case.slots[rank])
        seen.append((batch.rows_RD[rows].clone(), row_X, batch.weight_X[: len(row_X)].clone(), batch.offsets_S[:slots]))
        returning.append(dispatcher.start_combine(y_RD, batch, "layer 0"))
    return [Outcome(*part, pending.wait()) for part, pending in zip(seen, returning, strict=True)]


def poison(dispatcher: OneSidedDispatcher) -> None:
    """Nothing that an earlier call left, nor what was never sent, may come through."""
    for lane in dispatcher.lanes:
        for held in (lane.rows_RD, lane.home_RD, lane.y_RD):
            held(dispatcher.shape).fill_(float("nan"))
