"""Dispatchers between two GPUs: the padded one over NCCL in a graph, and the one-sided one over NVLink, against ragged.

Shape legend: T tokens of a rank, D model width, F expert width, K top-k, E experts, R rows.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributed import FileStore

from soloist.dispatch.base import Dispatcher, SlotChoice, Topology
from soloist.dispatch.forms import COPY, LATENCY, PUSH, Form
from soloist.dispatch.lane import ExchangeShape, Lane, WindowPlan
from soloist.dispatch.one_sided import OneSidedDispatcher
from soloist.dispatch.padded import PaddedDispatcher
from soloist.dispatch.ragged import RaggedDispatcher
from soloist.errors import CommunicationError
from soloist.kernels.experts import choose_tiles, swiglu_experts
from soloist.transport.base import Transport
from soloist.transport.symmetric import SymmetricGroup, Watch
from tests.ranks import RankPool

pytestmark = pytest.mark.multigpu

TOKENS, D_MODEL, WIDTH, TOP_K, SLOTS = 40, 256, 256, 4, 8


def inputs(transport: Transport, call: int, dtype: torch.dtype, groups: int) -> tuple[Tensor, SlotChoice]:
    """Uniform; to group 0 alone; some tokens nowhere; no tokens at all on one rank (all of them dead)."""
    generator = torch.Generator(transport.device).manual_seed(10 * call + transport.rank)
    x_TD = torch.randn(TOKENS, D_MODEL, generator=generator, device=transport.device).to(dtype)
    liked_TE = torch.randn(TOKENS, groups * SLOTS, generator=generator, device=transport.device)
    if call % 4 == 1:
        liked_TE[:, :SLOTS] += 100.0
    ids_TK = liked_TE.topk(TOP_K).indices
    group_TK, slot_TK = ids_TK // SLOTS, ids_TK % SLOTS
    dead = slice(0, None, 3) if call % 4 == 2 else slice(0, TOKENS if call % 4 == 3 and transport.rank else 0)
    group_TK[dead], slot_TK[dead] = -1, -1
    return x_TD, SlotChoice(group_TK, slot_TK, torch.rand(TOKENS, TOP_K, generator=generator, device=transport.device))


def through(dispatcher: Dispatcher, x_TD: Tensor, choice: SlotChoice, rank: int) -> Tensor:
    """Experts that answer x / 2 + the number of their rank."""
    batch = dispatcher.dispatch(x_TD, choice, "layer 3")
    return dispatcher.combine(batch.rows_RD * 0.5 + rank, batch, "layer 3")


def captured(work: Callable[[], Tensor]) -> Callable[[], Tensor]:
    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        out_TD = work()

    def replay() -> Tensor:
        graph.replay()
        return out_TD

    return replay


def differences(transport: Transport, dispatcher: Dispatcher, dtype: torch.dtype, calls: int = 8) -> int:
    """Values in which a captured dispatcher and the ragged one differ, over calls with changing routing."""
    reference = RaggedDispatcher(transport, Topology((0, 0)), SLOTS)
    x_TD, choice = inputs(transport, 0, dtype, 2)
    replay = captured(lambda: through(dispatcher, x_TD, choice, transport.rank))
    wrong = 0
    for call in range(calls):
        new_TD, new = inputs(transport, call, dtype, 2)
        for into, given in zip((x_TD, *vars(choice).values()), (new_TD, *vars(new).values()), strict=True):
            into.copy_(given)
        wrong += int((replay() != through(reference, x_TD, choice, transport.rank)).sum())
    return wrong


def padded(transport: Transport, dtype: torch.dtype) -> list[int]:
    """In one round and in three."""
    found = []
    for rounds in (1, 3):
        dispatcher = PaddedDispatcher(transport, Topology((0, 0)), SLOTS, -(-TOKENS // rounds), rounds)
        found.append(differences(transport, dispatcher, dtype))
    return found


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_padded_in_a_graph_is_ragged(ranks: RankPool, dtype: torch.dtype) -> None:
    assert ranks.run(2, "nccl", padded, dtype) == [[0, 0], [0, 0]]


def over_nvlink(
    transport: Transport, folder: str, dtype: torch.dtype, tp: int = 1, deadline_s: float = 5.0
) -> OneSidedDispatcher:
    group = SymmetricGroup(FileStore(f"{folder}/windows", 2), transport.rank, 2, transport.device)
    shape = ExchangeShape(2, tp, SLOTS, TOP_K, D_MODEL, TOKENS, dtype)
    watch = Watch(transport.rank, (0, 1), transport.device, deadline_s)
    return OneSidedDispatcher.of(shape, (Lane(group.window(WindowPlan(shape).size), shape),), watch, LATENCY)


FORMS = (LATENCY, replace(PUSH, pieces=3), replace(COPY, pieces=2))


def one_sided(transport: Transport, folder: str, dtype: torch.dtype) -> list[int]:
    """By form, all in the same memory."""
    dispatcher = over_nvlink(transport, folder, dtype)
    found = [differences(transport, replace(dispatcher, form=form), dtype) for form in FORMS]
    dispatcher.watch.check()
    return found


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_one_sided_in_a_graph_is_ragged(ranks: RankPool, tmp_path: Path, dtype: torch.dtype) -> None:
    assert ranks.run(2, "nccl", one_sided, str(tmp_path), dtype) == [[0, 0, 0], [0, 0, 0]]


def shared_experts(transport: Transport, folder: str) -> list[float]:
    """ep1tp2: both ranks hold half of every expert's width. By form, the error against whole experts in fp32."""
    dtype, device, half = torch.bfloat16, transport.device, WIDTH // 2
    generator = torch.Generator(device).manual_seed(1)
    gate, up = torch.randn(2, SLOTS, WIDTH, D_MODEL, generator=generator, device=device) / 16
    down = torch.randn(SLOTS, D_MODEL, WIDTH, generator=generator, device=device) / 16
    gate, up, down = gate.to(dtype), up.to(dtype), down.to(dtype)
    mine = slice(transport.rank * half, (transport.rank + 1) * half)
    gate_up, own_down = torch.cat([gate[:, mine], up[:, mine]], 1), down[..., mine].contiguous()
    whole, tiles = over_nvlink(transport, folder, dtype, tp=2), choose_tiles(TOKENS * 2 * TOP_K / SLOTS, half)
    x_TD, choice = inputs(transport, 2, dtype, 1)

    def layer(form: Form) -> Tensor:
        dispatcher = replace(whole, form=form)
        arriving = dispatcher.start_dispatch(x_TD, choice, "layer 3")
        batch, x_XD = (arriving.wait(), None) if tiles.gather else arriving.wait_expanded()
        y_XD = swiglu_experts(batch.rows_RD, batch.row_X, batch.offsets_S, gate_up, own_down, tiles, x_XD)
        return dispatcher.start_combine_expanded(y_XD, batch, "layer 3").wait()

    want_TD = torch.zeros(TOKENS, D_MODEL, device=device)
    for slot in range(SLOTS):
        hidden_TF = torch.nn.functional.silu(x_TD.float() @ gate[slot].float().T) * (x_TD.float() @ up[slot].float().T)
        weight_T1 = (choice.weight_TK * (choice.slot_TK == slot)).sum(1, keepdim=True)
        want_TD += weight_T1 * (hidden_TF @ down[slot].float().T)
    outs = [captured(partial(layer, form))() for form in FORMS]
    torch.cuda.synchronize()
    whole.watch.check()
    return [float((out_TD.float() - want_TD).norm() / want_TD.norm()) for out_TD in outs]


def test_experts_shared_by_two_gpus(ranks: RankPool, tmp_path: Path) -> None:
    for errors in ranks.run(2, "nccl", shared_experts, str(tmp_path)):
        assert max(errors) < 0.01


def stops_in_between(transport: Transport, folder: str, deadline_s: float) -> tuple[str, float]:
    """Rank 1 leaves after its dispatch. What rank 0 says, and after how long; and its GPU goes on."""
    dispatcher = over_nvlink(transport, folder, torch.bfloat16, deadline_s=deadline_s)
    given = inputs(transport, 0, torch.bfloat16, 2)
    through(dispatcher, *given, transport.rank)
    torch.cuda.synchronize()
    batch = dispatcher.dispatch(*given, "layer 4")
    if transport.rank == 1:
        torch.cuda.synchronize()
        return "", 0.0
    begin = time.monotonic()
    dispatcher.combine(batch.rows_RD, batch, "layer 4")
    torch.cuda.synchronize()
    waited_s = time.monotonic() - begin
    try:
        dispatcher.watch.check()
    except CommunicationError as error:
        return f"{error}; {float(torch.ones(3, device=transport.device).sum())}", waited_s
    return "", waited_s


def test_a_rank_that_stops_is_named_within_the_deadline(ranks: RankPool, tmp_path: Path) -> None:
    (text, waited_s), _ = ranks.run(2, "nccl", stops_in_between, str(tmp_path), 0.5)
    assert text.startswith("rank 0: rank 1: no answer within 0.5 s")
    assert "(in layer 4, combine)" in text
    assert text.endswith("; 3.0")
    assert 0.4 < waited_s < 1.5
