"""All dispatchers over all transports deliver the same bits."""

from __future__ import annotations

import pytest
from torch.distributed import PrefixStore

from soloist.transport.base import Transport
from soloist.transport.gloo import GlooTransport
from soloist.transport.shared_memory import SharedMemoryTransport
from tests.dispatch.conformance import all_dispatchers
from tests.mpirun import mpirun, needs_mpirun
from tests.ranks import RankPool

ALL = ["ragged", "padded", "hierarchical", "hierarchical, in chunks"]


@pytest.mark.parametrize("kind", ["local", "shared_memory", "gloo"])
def test_over_one_transport(ranks: RankPool, kind: str) -> None:
    assert ranks.run(4, kind, all_dispatchers) == [ALL] * 4


def shared(t: Transport, members: list[int]) -> Transport:
    assert isinstance(t, GlooTransport)
    store = PrefixStore(f"node of {members[0]}", t._store)
    return SharedMemoryTransport(store, members, members.index(t.rank), t.deadline_s)


def over_both(t: Transport) -> list[str]:
    return all_dispatchers(t, shared)


def test_over_gloo_between_nodes_and_shared_memory_inside(ranks: RankPool) -> None:
    assert ranks.run(4, "gloo", over_both) == [ALL] * 4


@needs_mpirun
def test_over_mpi() -> None:
    run = mpirun(4, "-m", "tests.dispatch.conformance", SOLOIST_TRANSPORT="mpi")
    told = [line for line in run.stdout.splitlines() if line.endswith("passed")]
    assert told == [f"mpi, 4 ranks: {name} passed" for name in ALL], run.stderr
