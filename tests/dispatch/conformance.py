"""Every dispatcher over one transport, against the definition, bit for bit.

`tests/dispatch/test_conformance.py` runs this on threads, shared memory, gloo, and gloo between nodes of shared memory.
Under a launcher this file runs itself over what SOLOIST_TRANSPORT names: `mpirun -n 4 python -m tests.dispatch.conformance`.
"""  # noqa: E501

from __future__ import annotations

import os
from collections.abc import Callable

import torch

from soloist.dispatch.base import Dispatcher
from soloist.dispatch.hierarchical import HierarchicalDispatcher, Rails
from soloist.dispatch.padded import PaddedDispatcher
from soloist.dispatch.ragged import RaggedDispatcher
from soloist.engine.meeting import Meeting, place_from
from soloist.transport.base import Transport
from soloist.transport.connect import connect
from tests.dispatch.cases import Case, Outcome, expected, typical

Inside = Callable[[Transport, list[int]], Transport]  # a transport of this node's members


def subgroup(t: Transport, members: list[int]) -> Transport:
    return t.subgroup(members)


def dispatchers(t: Transport, case: Case, inside: Inside = subgroup) -> dict[str, Dispatcher]:
    """All that work over transports, for the group of this rank. `inside` makes the node's transport."""
    slots, rails = len(case.slots[t.rank]), Rails(case.topology, t.rank)
    rail, node = t.subgroup(rails.rail), inside(t, rails.node)
    return {
        "ragged": RaggedDispatcher(t, case.topology, slots),
        "padded": PaddedDispatcher(t, case.topology, slots, capacity=5, rounds=3),
        "hierarchical": HierarchicalDispatcher(rail, node, rails, slots),
        "hierarchical, in chunks": HierarchicalDispatcher(rail, node, rails, slots, chunks=3),
    }


def all_dispatchers(t: Transport, inside: Inside = subgroup) -> list[str]:
    """Names of the dispatchers that gave this rank exactly what it must get; raises for the first that did not."""
    case = typical(t.size, torch.bfloat16)
    wanted, passed = expected(case)[t.rank], []
    for name, dispatcher in dispatchers(t, case, inside).items():
        found = outcome(dispatcher, case, t.rank)
        for field, value in vars(wanted).items():
            assert torch.equal(getattr(found, field), value), f"{name}, rank {t.rank}, {field}"
        passed.append(name)
    return passed


def outcome(dispatcher: Dispatcher, case: Case, group: int) -> Outcome:
    """What a rank saw of the rows that came; the others are poisoned."""
    batch = dispatcher.dispatch(*case.inputs(group), "layer 0")
    used = int(batch.offsets_S[-1]) if len(batch.offsets_S) else 0
    came = batch.row_X[:used].unique()
    y_RD = torch.full_like(batch.rows_RD, float("nan"))
    y_RD[came] = case.answers(group, len(came))
    out_TD = dispatcher.combine(y_RD, batch, "layer 0")
    row_X = torch.searchsorted(came, batch.row_X[:used])
    return Outcome(batch.rows_RD[came].clone(), row_X, batch.weight_X[:used], batch.offsets_S, out_TD)


def main() -> None:
    place = place_from(os.environ)
    assert place, "start me with torchrun, mpirun or srun"
    kind, store = os.environ["SOLOIST_TRANSPORT"], Meeting.at_master(place, 60.0).store
    t = connect(kind, place.rank, place.size, store, torch.device("cpu"), 30.0)
    passed = all_dispatchers(t)
    t.barrier()  # which a rank that failed never reaches
    if place.rank == 0:
        for name in passed:
            print(f"{kind}, {place.size} ranks: {name} passed", flush=True)
    t.close()


if __name__ == "__main__":
    main()
