"""Who is to blame, among ranks that somebody else started.

A rank that gives up on another ends, and looks lost itself to those who wait for it. So before its connections break
it writes down whom it has given up on; whoever misses it reads that, and asks on. Transports do the same within one
group of ranks; this is for what one group's failure does to the others.
"""

from __future__ import annotations

import time
from contextlib import suppress
from typing import Any

from soloist.engine.meeting import Meeting, bounded
from soloist.engine.pulse import LOST
from soloist.errors import CommunicationError

STORE_S = 1.0  # for the store's answer: its host may have vanished
GRACE_S = 2.0  # for a rank that waits itself to give up
LOOK_S = 0.05


def tell(meeting: Meeting, error: CommunicationError) -> None:
    """Whom this rank has given up on. Called before its connections break."""
    if meeting.folder is None and error.peer is not None:
        with suppress(RuntimeError, TimeoutError):
            store: Any = meeting.store  # a TCPStore, or a part of one
            bounded(lambda: store.clone().set(_gave_up(error.rank), str(error.peer)), STORE_S)


def cause(meeting: Meeting, error: Exception) -> Exception:
    """`error`, or one that names the rank whose loss made its culprit end."""
    if meeting.folder is not None or not isinstance(error, CommunicationError) or error.peer is None:
        return error
    path = [error.rank, error.peer]
    with suppress(RuntimeError, TimeoutError):
        bounded(lambda: _follow(meeting.store, path), GRACE_S + STORE_S)
    *others, culprit = path
    if len(path) == 2 or culprit in others:  # it gave up on nobody, or some gave up on each other
        return error
    return CommunicationError(error.rank, culprit, error.where, f"rank {others[-1]} has given up on it")


def _follow(shared: Any, path: list[int]) -> None:
    """Append whom the last one has given up on, and so on, or who the pulse says is lost."""
    store, end = shared.clone(), time.monotonic() + GRACE_S
    while path[-1] not in path[:-1]:
        if store.check([_gave_up(path[-1])]):
            path.append(int(store.get(_gave_up(path[-1]))))
        elif store.check([LOST]):
            lost = int(store.get(LOST).split()[0])
            path += [lost] if lost != path[-1] else []
            return
        elif time.monotonic() > end:
            return
        else:
            time.sleep(LOOK_S)


def _gave_up(rank: int) -> str:
    return f"gave up {rank}"
