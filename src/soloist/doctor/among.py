"""Several hosts at once: facts of every rank gathered at rank 0, their clocks compared, and what has to be equal."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import msgspec

from soloist.doctor.finding import Finding, ok, warning
from soloist.doctor.machine import Machine
from soloist.engine.meeting import Meeting
from soloist.errors import ClusterError

MOST_SKEW_S = 0.5
EQUAL = ("soloist", "python", "torch", "cuda", "nccl", "triton")


class Visit(msgspec.Struct, frozen=True):
    """One rank's host, and how far its clock is ahead of rank 0's, give or take."""

    machine: Machine
    ahead_s: float = 0.0
    uncertain_s: float = 0.0


def gather(meeting: Meeting, machine: Machine, deadline_s: float) -> list[Visit]:
    """Called by all ranks. Rank 0 gets everybody's, in order of rank; the others an empty list.

    Raises ClusterError: at rank 0 it names the first rank that does not come, on the others whom they waited for.
    """
    store, place = meeting.store, meeting.place
    store.set_timeout(timedelta(seconds=deadline_s))
    if place.rank:
        with _bounded(f"rank 0 did not turn to rank {place.rank}", deadline_s):
            _pay(store, place.rank, machine)
        return []
    visits = [Visit(machine)]
    for rank in range(1, place.size):
        with _bounded(f"rank {rank} of {place.size} did not come", deadline_s):
            visits.append(_receive(store, rank))
    return visits


@contextmanager
def _bounded(failure: str, deadline_s: float) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # the store's, when it has waited too long
        raise ClusterError(f"{failure} within {deadline_s:g} s") from error


def _pay(store: Any, rank: int, machine: Machine) -> None:
    """This rank's visit to rank 0, whose clock it asks when its turn has come."""
    store.get(f"clock turn {rank}")
    before = time.time()
    store.set(f"clock asked {rank}", "")
    told = float(store.get(f"clock told {rank}"))
    after = time.time()
    visit = Visit(machine, (before + after) / 2 - told, (after - before) / 2)
    store.set(f"visit {rank}", msgspec.json.encode(visit).decode())


def _receive(store: Any, rank: int) -> Visit:
    """Another rank's visit, at rank 0."""
    store.set(f"clock turn {rank}", "")
    store.get(f"clock asked {rank}")
    store.set(f"clock told {rank}", repr(time.time()))
    return msgspec.json.decode(store.get(f"visit {rank}"), type=Visit)


def hosts_of(visits: Sequence[Visit]) -> list[Machine]:
    """Each host once."""
    return list({visit.machine.host: visit.machine for visit in reversed(visits)}.values())[::-1]


def check_among(visits: Sequence[Visit]) -> Iterator[Finding]:
    """Clocks, versions and GPUs of ranks against rank 0's."""
    findings = [*_clocks(visits), *_versions(visits), *_gpus(visits)]
    yield from findings
    if not findings:
        skew = max((abs(visit.ahead_s) for visit in visits), default=0.0)
        yield ok(
            "hosts", f"{len(hosts_of(visits))} hosts, {len(visits)} ranks: same versions, clocks within {skew:.3f} s"
        )


def _clocks(visits: Sequence[Visit]) -> Iterator[Finding]:
    for rank, visit in enumerate(visits):
        if abs(visit.ahead_s) - visit.uncertain_s > MOST_SKEW_S:
            way = "ahead of" if visit.ahead_s > 0 else "behind"
            yield warning(
                "clock",
                f"rank {rank} on {visit.machine.host} is {abs(visit.ahead_s):.1f} s {way} rank 0",
                "logs and traces of several hosts cannot be put in order, and certificates may seem invalid",
                "run chrony or ntpd on every host (chronyc tracking)",
            )


def _versions(visits: Sequence[Visit]) -> Iterator[Finding]:
    for name in EQUAL:
        own = visits[0].machine.versions.get(name, "none")
        for rank, visit in enumerate(visits):
            found = visit.machine.versions.get(name, "none")
            if found != own:
                yield warning(
                    "versions",
                    f"{name} {found} on {visit.machine.host} (rank {rank}), {own} on rank 0",
                    "ranks of different versions are refused when they meet, or hang in NCCL",
                    "install the same environment on every host",
                )
                break


def _gpus(visits: Sequence[Visit]) -> Iterator[Finding]:
    counts = {machine.host: len(machine.gpus) for machine in hosts_of(visits)}
    if len(set(counts.values())) > 1:
        what = ", ".join(f"{host} {count}" for host, count in counts.items())
        yield warning(
            "gpus", f"hosts have different numbers of GPUs: {what}", "plans count on equal nodes", "check them"
        )
