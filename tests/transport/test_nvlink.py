"""Collectives over windows. In Triton's interpreter the ranks run in turn: everybody sends, then everybody receives.

Shape legend: T tokens, D model width, C rows, v columns of one rank.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributed import FileStore

from soloist.errors import CommunicationError
from soloist.kernels.language import AVAILABLE, INTERPRETED
from soloist.models import layers
from soloist.models.layers import Added, TokenSplit, rms_norm
from soloist.timing import Stopwatch
from soloist.transport import nvlink
from soloist.transport.base import Transport
from soloist.transport.connect import local_world
from soloist.transport.nvlink import Channels, NvlinkTransport
from soloist.transport.symmetric import SymmetricGroup, Watch, windows_in_process
from tests.ranks import RankPool, run_threads

interpreted = pytest.mark.skipif(not (AVAILABLE and INTERPRETED), reason="needs Triton and TRITON_INTERPRET=1")


@pytest.fixture
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a program has several rows."""
    monkeypatch.setattr(nvlink, "PROGRAMS", 3)
    monkeypatch.setattr(nvlink, "ROOM", 256)
    monkeypatch.setattr(nvlink, "CHUNK", 8)


def world(size: int) -> list[NvlinkTransport]:
    windows, cpu = windows_in_process(size, Channels.size(size)), torch.device("cpu")
    for window in windows:  # nothing is read that was not sent: all bits set are a NaN
        window.view(0, (2 * nvlink.PROGRAMS * size * nvlink.ROOM,), torch.uint8).fill_(255)
    return [
        NvlinkTransport(beneath, Channels(window), Watch(window.rank, tuple(range(10, 10 + size)), cpu, 0.5))
        for beneath, window in zip(local_world(size), windows, strict=True)
    ]


def parts(size: int, *shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator).to(dtype) for _ in range(size)]


@interpreted
@pytest.mark.usefixtures("few_programs")
@pytest.mark.parametrize(("size", "dtype"), [(2, torch.float16), (2, torch.float32), (4, torch.float32)])
def test_sum_residual_and_norm(size: int, dtype: torch.dtype) -> None:
    """Calls of different sizes, so that programs have different counts of calls; the sums are equal in every bit."""
    members = world(size)
    weight_D = torch.rand(16)
    for call, tokens in enumerate((5, 1, 7, 2, 4)):
        given = parts(size, tokens, 16, seed=call, dtype=dtype)
        residual = parts(1, tokens, 16, seed=99, dtype=dtype)[0]
        settings = {"residual_TD": residual, "weight_D": weight_D.to(dtype), "eps": 1e-5}
        for member, part in zip(members, given, strict=True):
            member.start_sum(part, **settings, receive=False)
        total = sum((part.float() for part in given), torch.zeros(tokens, 16)).to(dtype) + residual
        for member, part in zip(members, given, strict=True):
            found, normed = member.start_sum(part, **settings, send=False)
            assert torch.equal(found, total)
            torch.testing.assert_close(normed, rms_norm(total, weight_D.to(dtype), 1e-5), rtol=2e-3, atol=1e-4)
            member.watch.check()


@interpreted
@pytest.mark.usefixtures("few_programs")
def test_a_decoder_sums_adds_and_norms_in_one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `TokenSplit` makes of partial sums over such a group is what the plain functions make of them."""
    first, second = world(2)
    given, (x_TD, weight_D) = parts(2, 5, 16), (torch.randn(5, 16), torch.rand(16))
    split = TokenSplit(first, 5, replicated=True, watch=Stopwatch(), peak=5)
    second.start_sum(given[1], receive=False)
    monkeypatch.setattr(layers, "add_norm", None)  # in no other way
    total_TD, normed_TD = split.add_norm(x_TD, Added(given[0], partial=True, where="layer 0"), weight_D, 1e-5)
    assert torch.equal(total_TD, x_TD + (given[0] + given[1]))
    torch.testing.assert_close(normed_TD, rms_norm(total_TD, weight_D, 1e-5))


@interpreted
@pytest.mark.usefixtures("few_programs")
def test_plain_sum_of_any_shape() -> None:
    members = world(2)
    given = parts(2, 2, 3, 4)
    for member, part in zip(members, given, strict=True):
        member.start_sum(part, receive=False)
    for member, part in zip(members, given, strict=True):
        assert torch.equal(member.start_sum(part, send=False)[0], given[0] + given[1])


@interpreted
@pytest.mark.usefixtures("few_programs")
@pytest.mark.parametrize("rows", [1, 17])
def test_columns_side_by_side(rows: int) -> None:
    members, widths = world(3), (19, 18, 18)
    given = [torch.randn(rows, width).half() for width in widths]
    out = [torch.full((rows, 55), torch.nan) for _ in members]
    slices = members[0].rounds(given[0], widths)
    assert len(slices) == (1 if rows == 1 else 2)
    for part in slices:
        for member, mine, into in zip(members, given, out, strict=True):
            member.start_gather(mine[part], into[part], widths, receive=False)
        for member, mine, into in zip(members, given, out, strict=True):
            member.start_gather(mine[part], into[part], widths, send=False)
    assert all(torch.equal(found, torch.cat(given, 1).float()) for found in out)


@interpreted
@pytest.mark.usefixtures("few_programs")
def test_large_and_odd_sums_are_left_to_the_transport_beneath() -> None:
    member = world(2)[0]
    assert member.serves(torch.zeros(3, 16))
    assert not member.serves(torch.zeros(3, 15))  # rows that are no multiples of 16 bytes
    assert not member.serves(torch.zeros(100, 16))  # more than the channels hold
    assert not member.serves(torch.zeros(3, 16, dtype=torch.int64))


def gathered(transport: Transport) -> Tensor:
    """Columns of three rows, as many as this rank's number and one."""
    part_Cv = torch.arange(3 * (transport.rank + 1)).view(3, -1).float() + 100 * transport.rank
    out_CV = torch.full((3, 6), torch.nan)
    found_CV = transport.gather_columns(part_Cv, [1, 2, 3], out_CV=out_CV)
    assert torch.equal(out_CV, found_CV)
    assert torch.equal(transport.gather_columns(part_Cv.T.contiguous().T, [1, 2, 3]), found_CV)
    assert transport.gather_columns(part_Cv[:0], [1, 2, 3]).shape == (0, 6)
    return found_CV


def test_columns_by_the_transport_beneath() -> None:
    expected = torch.cat([torch.arange(3 * (p + 1)).view(3, -1).float() + 100 * p for p in range(3)], 1)
    assert all(torch.equal(found, expected) for found in run_threads(3, gathered))


@interpreted
@pytest.mark.usefixtures("few_programs")
def test_a_peer_that_does_not_send_is_named() -> None:
    alone = world(2)[0]
    alone.start_sum(torch.zeros(1, 16), "layer 3, attention")
    with pytest.raises(CommunicationError, match=r"rank 10: rank 11: .* \(in layer 3, attention\)"):
        alone.watch.check()


REPLAYS = 50


def on_gpus(beneath: Transport, store: str) -> None:
    """Sums and gathers of this rank and its peers against NCCL's, called one by one and in a graph."""
    size, rank, device = beneath.size, beneath.rank, beneath.device
    group = SymmetricGroup(FileStore(store, size), rank, size, device)
    watch = Watch(rank, beneath.ranks, device, 5.0)
    member = NvlinkTransport(beneath, Channels(group.window(Channels.size(size))), watch)
    generator = torch.Generator(device).manual_seed(rank)

    def drawn(*shape: int) -> Tensor:
        # Small whole numbers: their sums are exact in bf16, whatever the order.
        return torch.randint(-9, 10, shape, generator=generator, device=device).bfloat16()

    def agree(given_TD: Tensor, part_Cv: Tensor, widths: list[int], found_TD: Tensor, found_CV: Tensor) -> None:
        torch.cuda.synchronize()
        watch.check()
        assert torch.equal(found_TD, beneath.all_reduce(given_TD.clone()))
        assert torch.equal(found_CV, beneath.gather_columns(part_Cv, widths))

    for tokens in (1, 5, 256, 128, 131, 2):
        widths = [9001 - index for index in range(size)]
        given_TD, part_Cv = drawn(tokens, 4096), drawn(tokens, widths[rank])
        assert member.serves(given_TD)
        agree(given_TD, part_Cv, widths, member.all_reduce(given_TD), member.gather_columns(part_Cv, widths))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            found_TD, found_CV = member.all_reduce(given_TD), member.gather_columns(part_Cv, widths)
        for replay in range(REPLAYS):
            given_TD.copy_(drawn(*given_TD.shape))
            part_Cv.copy_(drawn(*part_Cv.shape))
            graph.replay()
            if replay % 10 == 9:
                agree(given_TD, part_Cv, widths, found_TD, found_CV)


@pytest.mark.multigpu
def test_gpus_agree_with_nccl_one_by_one_and_in_a_graph(ranks: RankPool, tmp_path: Path) -> None:
    ranks.run(2, "nccl", on_gpus, str(tmp_path / "store"))
