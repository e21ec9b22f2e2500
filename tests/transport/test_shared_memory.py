"""What is special about ranks that share memory: rounds, descriptors, news of a loss, machines that cannot."""

from __future__ import annotations

import gc
import os
import platform
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from torch.distributed import FileStore

from soloist.errors import CapacityError, ClusterError, CommunicationError, ConfigurationError
from soloist.transport import shared_segment
from soloist.transport.shared_memory import SharedMemoryTransport
from tests.ranks import RankPool
from tests.transport import conformance


def members(folder: Path, slab_bytes: int, deadlines_s: tuple[float, ...]) -> list[SharedMemoryTransport]:
    """A group whose members are all in this process."""
    found: dict[int, SharedMemoryTransport] = {}
    path, ranks = str(folder / "store"), range(len(deadlines_s))

    def join(rank: int) -> None:
        store = FileStore(path, len(ranks))
        found[rank] = SharedMemoryTransport(store, ranks, rank, deadlines_s[rank], slab_bytes)

    together([lambda rank=rank: join(rank) for rank in ranks])
    return [found[rank] for rank in ranks]


def together(calls: list[Callable[[], None]]) -> None:
    """All at the same time; the first error is raised here."""
    errors: list[BaseException] = []

    def guarded(call: Callable[[], None]) -> None:
        try:
            call()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


@pytest.mark.parametrize("slab_bytes", [16, 24, 4096])
def test_what_exceeds_a_slab_goes_in_rounds(tmp_path: Path, slab_bytes: int) -> None:
    group = members(tmp_path, slab_bytes, (20.0,) * 3)
    for check in (
        conformance.all_rows,
        conformance.overlapping_rows,
        conformance.gathers,
        conformance.consecutive_rows,
    ):
        together([lambda t=t, check=check: check(t) for t in group])
    for t in group:
        t.close()


def test_many_ranks(ranks: RankPool) -> None:
    ranks.run(16, "shared_memory", conformance.consecutive_rows)


def files_mapped() -> set[str]:
    """Of this process, in /dev/shm, where files outlive a crash."""
    return {line for line in Path("/proc/self/maps").read_text().splitlines() if "/dev/shm/" in line}


def descriptors() -> set[tuple[str, str]]:
    """Of this process, and what they lead to: others may close theirs meanwhile."""
    found = set[tuple[str, str]]()
    for link in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # that of the look itself
            found.add((link.name, os.readlink(link)))
    return found


def test_everything_is_given_back(tmp_path: Path) -> None:
    gc.collect()
    before, files = descriptors(), files_mapped()

    def one_life() -> None:
        first, second = members(tmp_path, 4096, (20.0, 20.0))
        together([lambda: conformance.messages(first), lambda: conformance.messages(second)])
        assert files_mapped() == files
        first.close()
        second.close()

    one_life()
    gc.collect()
    assert not descriptors() - before


def test_who_gives_up_on_a_peer_tells_those_who_wait_for_it(tmp_path: Path) -> None:
    first, _, third = members(tmp_path, 4096, (20.0, 20.0, 400.0))
    first._watch.deadline_s = 1.0  # once they have met
    blamed = {}

    def wait_for_peer(t: SharedMemoryTransport, peer: int) -> None:
        with pytest.raises(CommunicationError) as caught:
            t.recv((1,), torch.float32, peer)
        blamed[t.rank] = caught.value.peer, caught.value.reason

    together([lambda: wait_for_peer(first, 1), lambda: wait_for_peer(third, 0)])
    assert blamed[0] == (1, "no answer within 1 s")
    assert blamed[2] == (1, "rank 0 has given up on it")


def test_message_of_a_peer_that_has_closed_can_still_be_read(tmp_path: Path) -> None:
    first, second = members(tmp_path, 4096, (20.0, 20.0))
    for number in range(3):
        first.send(torch.tensor([number]), 1)
    assert second.recv((1,), torch.int64, 0).item() == 0
    first.close()
    assert [second.recv((1,), torch.int64, 0).item() for _ in range(2)] == [1, 2]
    with pytest.raises(CommunicationError, match="rank 0: has closed"):
        second.recv((1,), torch.int64, 0)


def test_first_message_of_a_peer_that_has_closed_is_its_loss(tmp_path: Path) -> None:
    first, second = members(tmp_path, 4096, (20.0, 20.0))
    first.send(torch.tensor([1]), 1)
    first.close()
    with pytest.raises(CommunicationError, match="rank 0: has closed"):
        second.recv((1,), torch.int64, 0)


def test_peer_that_does_not_join_is_named(tmp_path: Path) -> None:
    with pytest.raises(CommunicationError, match="no answer") as caught:
        SharedMemoryTransport(FileStore(str(tmp_path / "store"), 2), range(5, 7), 0, 0.3)
    assert (caught.value.rank, caught.value.peer) == (5, 6)


def test_memory_of_another_machine() -> None:
    with pytest.raises(ClusterError, match="use gloo"):
        shared_segment.open_memory(2**22 + 1, 3)


def test_memory_that_cannot_be_had() -> None:
    with pytest.raises(CapacityError, match="slab_bytes"):
        shared_segment.make_memory(1 << 62)


def test_machine_with_weaker_order_of_accesses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    with pytest.raises(ConfigurationError, match="aarch64"):
        SharedMemoryTransport(FileStore(str(tmp_path / "store"), 1), [0], 0)
