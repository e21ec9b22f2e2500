"""What every transport has to do, as functions that run on each rank and assert there.

Shape legend: R rows, W elements of a row, P members (of a matrix [P, P]: from, to).

`tests/transport/test_conformance.py` runs them on CPUs. Under torchrun, mpirun or srun this file runs them itself, on
GPUs: `torchrun --nproc-per-node 2 -m tests.transport.conformance`; over MPI:
`SOLOIST_TRANSPORT=mpi mpirun -n 4 python -m tests.transport.conformance`.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributed import PrefixStore

from soloist.engine.meeting import Meeting, place_from
from soloist.errors import CommunicationError
from soloist.transport.base import Transport
from soloist.transport.connect import connect
from soloist.transport.mpi_options import MpiOptions

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.uint8, torch.int64)
SLOW_S = 0.2
LOST_S = 4.0  # the deadline where a peer is lost: longer than a busy machine keeps one that is not


def rows_of(seed: int, source: int, rows: int, width: int, dtype: torch.dtype) -> Tensor:
    """What member `source` sends: everybody can compute it."""
    return torch.from_numpy(np.random.default_rng((seed, source)).integers(0, 100, (rows, width))).to(dtype)


def normal(seed: int, source: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    values = torch.from_numpy(np.random.default_rng((seed, source)).standard_normal(tuple(shape)))
    return (values * 50).to(dtype)


def check_rows(t: Transport, counts_PP: list[list[int]], width: int, dtype: torch.dtype, known: bool = False) -> None:
    """One exchange against its definition in numpy."""
    pending = t.start_rows(*_rows_arguments(t, 0, counts_PP, width, dtype, known))
    _expect_rows(t, 0, counts_PP, width, dtype, pending.wait())


def _rows_arguments(t: Transport, seed: int, counts_PP: list[list[int]], width: int, dtype: torch.dtype, known: bool):
    sent = rows_of(seed, t.rank, sum(counts_PP[t.rank]), width, dtype).to(t.device)
    return sent, counts_PP[t.rank], [row[t.rank] for row in counts_PP] if known else None


def _expect_rows(t: Transport, seed: int, counts_PP: list[list[int]], width: int, dtype: torch.dtype, got) -> None:
    parts = []
    for source, counts in enumerate(counts_PP):
        start = sum(counts[: t.rank])
        parts.append(rows_of(seed, source, sum(counts), width, dtype)[start : start + counts[t.rank]])
    received, counts = got
    assert counts == [len(part) for part in parts]
    assert received.dtype == dtype
    assert torch.equal(received.cpu(), torch.cat(parts))


def random_counts(seed: int, size: int, most: int) -> list[list[int]]:
    return np.random.default_rng(seed).integers(0, most + 1, (size, size)).tolist()


def all_rows(t: Transport) -> None:
    """Uneven counts, nothing at all, all to one and all from one, in every dtype."""
    n = t.size
    cases = [
        random_counts(1, n, 5),
        [[0] * n for _ in range(n)],
        [[3] + [0] * (n - 1) for _ in range(n)],
        [[4] * n] + [[0] * n for _ in range(n - 1)],
    ]
    for dtype in DTYPES:
        for case, counts_PP in enumerate(cases):
            check_rows(t, counts_PP, 5, dtype, known=case % 2 == 0)


def large_rows(t: Transport) -> None:
    """Messages of several megabytes, of different size on every rank: in rounds, where there is a buffer."""
    counts_PP = [[100 * (source + 1) + target for target in range(t.size)] for source in range(t.size)]
    check_rows(t, counts_PP, 2000, torch.float32)


def consecutive_rows(t: Transport) -> None:
    """Many calls without barriers, ranks out of step."""
    delays = np.random.default_rng(t.rank).random(60) * 0.002
    for call, delay in enumerate(delays):
        time.sleep(delay)
        arguments = _rows_arguments(t, call, counts_PP := random_counts(call, t.size, 4), 3, torch.int64, False)
        _expect_rows(t, call, counts_PP, 3, torch.int64, t.all_to_all_rows(*arguments))


def overlapping_rows(t: Transport) -> None:
    """Several exchanges under way, awaited by every rank in an order of its own."""
    counts = [random_counts(call, t.size, 6) for call in range(4)]
    for reduction_between in (False, True):
        pending = [t.start_rows(*_rows_arguments(t, i, counts[i], 7, torch.float32, False)) for i in range(4)]
        if reduction_between:
            assert t.all_reduce(torch.ones(3, device=t.device)).tolist() == [t.size] * 3
        for i in ((2, 0, 3, 1), (3, 2, 1, 0))[t.rank % 2]:
            _expect_rows(t, i, counts[i], 7, torch.float32, pending[i].wait())


def reductions(t: Transport, exact: bool = True) -> None:
    """Sums against their definition: fp32 in order of rank, rounded once."""
    for seed, (dtype, count) in enumerate([(d, n) for d in (*DTYPES, torch.float64) for n in (0, 1, 37, 40_000)]):
        parts = [normal(seed, source, (count,), dtype) for source in range(t.size)]
        reduced = t.all_reduce(parts[t.rank].to(t.device))
        assert reduced.dtype == dtype
        _expect_sum(reduced, parts, exact)
    counts = [3, 0, 5, 1, 2, 4][: t.size]
    for seed, dtype in enumerate(DTYPES):
        parts = [normal(seed, source, (sum(counts), 6), dtype) for source in range(t.size)]
        scattered = t.reduce_scatter_rows(parts[t.rank].to(t.device), counts)
        start = sum(counts[: t.rank])
        _expect_sum(scattered, [part[start : start + counts[t.rank]] for part in parts], exact)


def _expect_sum(got: Tensor, parts: list[Tensor], exact: bool) -> None:
    """numpy's sum in a loop; numpy has no bfloat16, but each of its values is a float32."""
    dtype = parts[0].dtype
    wide = np.float32 if dtype in (torch.bfloat16, torch.float16, torch.float32) else parts[0].numpy().dtype
    total = np.zeros(parts[0].shape, wide)
    for part in parts:
        total = total + (part.float() if wide == np.float32 else part).numpy().astype(wide)
    expected = torch.from_numpy(total).to(dtype)
    if exact or not dtype.is_floating_point:
        assert torch.equal(got.cpu(), expected)
    else:
        torch.testing.assert_close(got.cpu(), expected, rtol=1e-2, atol=1.0)


def reductions_within_rounding(t: Transport) -> None:
    reductions(t, exact=False)


def gathers(t: Transport) -> None:
    for counts in ([2] * t.size, [3, 0, 1, 4, 2, 0][: t.size], [0] * t.size):
        for dtype in DTYPES:
            parts = [rows_of(1, source, count, 6, dtype) for source, count in enumerate(counts)]
            for known in (None, counts):
                gathered = t.all_gather_rows(parts[t.rank].to(t.device), known)
                assert torch.equal(gathered.cpu(), torch.cat(parts))


def shapes_of_rows(t: Transport) -> None:
    """Rows may have several dimensions."""
    mine = torch.full((t.size, 2, 3), float(t.rank), device=t.device)
    received, _ = t.all_to_all_rows(mine, [1] * t.size)
    assert received.shape == (t.size, 2, 3)
    assert received[:, 0, 0].tolist() == list(range(t.size))


def messages(t: Transport) -> None:
    """Two and more to every peer before anything is received; order and content; a size that changes; none."""
    peers = [peer for peer in range(t.size) if peer != t.rank]
    shapes = [(3,), (70_000,), (2, 5), (1,)]
    for nth in range(2):
        for peer in peers:
            t.send(normal(nth, t.rank, shapes[nth], torch.float32).to(t.device), peer)
    for nth in range(2):
        for peer in peers:
            got = t.recv(shapes[nth], torch.float32, peer)
            assert torch.equal(got.cpu(), normal(nth, peer, shapes[nth], torch.float32))
    for nth in range(2, 20):
        x = normal(nth, t.rank, shapes[nth % 4], torch.bfloat16).to(t.device)
        t.send(x, (t.rank + 1) % t.size)
        x.zero_()
        source = (t.rank - 1) % t.size
        got = t.recv(shapes[nth % 4], torch.bfloat16, source)
        assert torch.equal(got.cpu(), normal(nth, source, shapes[nth % 4], torch.bfloat16))
    t.send(torch.empty(0, 3, device=t.device), (t.rank + 1) % t.size)  # of an idle rank in a pipeline
    assert t.recv((0, 3), torch.float32, (t.rank - 1) % t.size).shape == (0, 3)


def slow_receiver(t: Transport) -> None:
    """More messages than can be under way: the sender waits, nothing is lost or overwritten."""
    if t.rank == 0:
        for number in range(30):
            t.send(torch.full((2, 3), number, device=t.device), 1)
    if t.rank == 1:
        time.sleep(SLOW_S)
        for number in range(30):
            assert t.recv((2, 3), torch.int64, 0).flatten().tolist() == [number] * 6


def subgroups(t: Transport) -> None:
    """Halves that work at their own pace, twice the same members, and the whole between them."""
    half = range(t.rank % 2, t.size, 2)
    groups = [t.subgroup(half), t.subgroup(half)]
    for group in groups:
        assert group.ranks == tuple(half)
        assert group.ranks[group.rank] == t.rank
    for call in range(3 + 4 * (t.rank % 2)):
        for group in groups:
            check_rows(group, random_counts(call, group.size, 3), 4, torch.float32)
    assert t.all_reduce(torch.ones(1, device=t.device)).item() == t.size
    pair = groups[0].all_gather_rows(torch.tensor([[t.rank]], device=t.device))
    assert pair.flatten().tolist() == list(half)
    t.barrier()
    for group in groups:
        group.close()


def traffic(t: Transport) -> None:
    """What is counted, and that waiting for a slow peer is."""
    n, me, following = t.size, t.rank, (t.rank + 1) % t.size
    t.all_to_all_rows(torch.zeros(n * (n + 1) // 2, 4, device=t.device), list(range(1, n + 1)))
    assert t.traffic.bytes_to == [0 if peer == me else 16 * (peer + 1) for peer in range(n)]
    t.traffic.reset()
    t.all_reduce(torch.zeros(30, device=t.device))
    t.all_gather_rows(torch.zeros(5, 4, device=t.device))
    t.reduce_scatter_rows(torch.zeros(n * 2, 4, device=t.device), [2] * n)
    ring = 2 * 120 * (n - 1) // n + 80 * (n - 1) + 32 * (n - 1)
    assert t.traffic.bytes_to == [ring * (peer == following) for peer in range(n)]
    t.traffic.reset()
    t.send(torch.zeros(3, device=t.device), following)
    t.recv((3,), torch.float32, (me - 1) % n)
    assert t.traffic.bytes_to == [12 * (peer == following) for peer in range(n)]
    assert any(_waits_for_0(t, slow_s) for slow_s in (SLOW_S, 10 * SLOW_S, 50 * SLOW_S))


def _waits_for_0(t: Transport, slow_s: float) -> bool:
    """Whether all ranks counted most of it, which one that was itself late on a busy machine has not."""
    t.barrier()
    t.traffic.reset()
    if t.rank == 0:
        time.sleep(slow_s)
    t.barrier()
    assert t.traffic.bytes_to == [0] * t.size
    waited_s = t.traffic.waited_for_s[0] + t.traffic.waited_for_s[t.rank]  # NCCL does not tell whom
    counted = float(t.rank == 0 or waited_s > slow_s / 2)
    return t.all_reduce(torch.tensor([counted], device=t.device)).item() == t.size


def barriers(t: Transport) -> None:
    """Nobody leaves before the last one has come."""
    for late in range(t.size):
        t.barrier()
        if t.rank == late:
            time.sleep(SLOW_S)
        arrived = time.monotonic()  # one clock for all processes of a machine
        t.barrier()
        left = time.monotonic()
        times = t.all_gather_rows(torch.tensor([[arrived, left]], dtype=torch.float64, device=t.device))
        assert times[:, 1].min() >= times[:, 0].max()


def counts_of_exchanges(t: Transport) -> None:
    """Numbers for several exchanges at once; they are no payload."""
    t.traffic.reset()
    for width in (1, 3):
        counts_MC = torch.arange(t.size * width).view(t.size, width) + 1000 * t.rank
        received_MC = t.exchange_counts(counts_MC)
        wanted = [[1000 * source + t.rank * width + c for c in range(width)] for source in range(t.size)]
        assert received_MC.tolist() == wanted
    assert not any(t.traffic.bytes_to)


CHECKS: tuple[Callable[[Transport], None], ...] = (
    all_rows,
    counts_of_exchanges,
    large_rows,
    consecutive_rows,
    overlapping_rows,
    gathers,
    shapes_of_rows,
    messages,
    slow_receiver,
    subgroups,
    traffic,
    barriers,
)


# -- a peer that is lost -----------------------------------------------------------------------------------------------


def blame(t: Transport, call: Callable[[], object]) -> tuple[int, int | None, str]:
    """Who was named by whom, in which words."""
    with pytest.raises(CommunicationError) as caught:
        call()
    return caught.value.rank, caught.value.peer, str(caught.value)


def meet_and_wait_no_longer(t: Transport) -> None:
    """The short deadline holds when all have come, however long that took."""
    t.barrier()
    for bound in (t, getattr(t, "_watch", t)):  # shared memory has it in its watch
        bound.deadline_s = LOST_S


def one_stops(t: Transport, culprit: int) -> tuple[int, int | None, str] | None:
    """The culprit takes part once and then no more."""
    meet_and_wait_no_longer(t)
    if t.rank == culprit:
        return None
    rows = torch.zeros(t.size, 2, device=t.device)
    return blame(t, lambda: t.all_to_all_rows(rows, [1] * t.size, where="layer 3, dispatch"))


def one_closes(t: Transport, culprit: int) -> tuple[int, int | None, str] | None:
    t.barrier()
    if t.rank == culprit:
        t.close()
        t.close()
        return None
    return blame(t, lambda: t.all_reduce(torch.zeros(3, device=t.device), where="layer 1, attention"))


def one_dies(t: Transport, culprit: int) -> tuple[int, int | None, str]:
    t.barrier()
    if t.rank == culprit:
        os._exit(3)
    return blame(t, lambda: t.barrier(where="step 7"))


def one_never_sends(t: Transport, culprit: int) -> tuple[int, int | None, str] | None:
    meet_and_wait_no_longer(t)
    if t.rank == culprit:
        return None
    return blame(t, lambda: t.recv((2,), torch.float32, culprit, where="stage 1, input"))


def main(also: str = "") -> None:
    """Every check over NCCL, or over what SOLOIST_TRANSPORT names; `failures`: then who is named for a lost peer."""
    place = place_from(os.environ)
    assert place, "start me with torchrun, mpirun or srun"
    kind = os.environ.get("SOLOIST_TRANSPORT", "nccl")
    on_gpu = kind == "nccl" or os.environ.get("SOLOIST_DEVICE") == "cuda"
    device = torch.device("cuda", place.local_rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    store = Meeting.at_master(place, 60.0).store
    options = MpiOptions(**json.loads(os.environ.get("SOLOIST_MPI", "{}")))

    def join(name: str) -> Transport:
        return connect(kind, place.rank, place.size, PrefixStore(name, store), device, 30.0, mpi=options)

    t = join("checks")
    for check in (*CHECKS, reductions_within_rounding if kind == "nccl" else reductions):
        check(t)
        t.barrier()
        t.traffic.reset()
        if place.rank == 0:
            print(f"{kind}, {place.size} ranks: {check.__name__} passed", flush=True)
    t.close()
    for failure in (one_stops, one_closes, one_never_sends) if also == "failures" else ():
        t = join(failure.__name__)
        if told := failure(t, place.size - 1):
            print(f"{failure.__name__}: {told[2]}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
