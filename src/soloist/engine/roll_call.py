"""Before ranks that somebody else started work together: are all there, once each, and do they agree?

Every rank writes a passport into the store: versions, layout, options, and digests of model, placement and checkpoint.
Rank 0 waits for all of them, compares, and writes a verdict that all ranks read; an unfavourable one ends every rank
with the same words, which name who is missing or differs, and in what.
"""

from __future__ import annotations

import hashlib
import json
import platform
import socket
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

import soloist
from soloist.errors import ClusterError

if TYPE_CHECKING:
    from torch.distributed import Store

    from soloist.engine.meeting import Job, Place

LOOK_S = 0.05  # between looks at the store
READ_S = 3.0  # for the others to read the verdict before rank 0, which keeps the store, may end
TWICE = "came twice"  # the key under which a rank says so
MOST_NAMED = 16  # ranks named one by one
REMEDIES = {
    "soloist": "install the same version on every node",
    "torch": "install the same version on every node",
    "python": "use the same Python on every node",
    "checkpoint": "copy the same files to every node, or read them from a shared file system",
}
AGREE = "start every rank with the same command and plan"

Passport = dict[str, str]


def passport_of(job: Job, place: Place) -> Passport:
    """What has to be equal on all ranks, by name."""
    from torch import __version__ as torch_version

    options = msgspec.structs.asdict(job.options)
    return {
        "soloist": soloist.__version__,
        "torch": str(torch_version).partition("+")[0],
        "python": ".".join(platform.python_version_tuple()[:2]),
        "number of ranks": str(place.size),
        "layout": str(job.layout),
        "model": f"{job.spec.name} {_digest(msgspec.json.encode(job.spec))}",
        "placement": _digest(msgspec.json.encode(job.placement)),
        "checkpoint": checkpoint_digest(job.folder) if job.folder and job.options.random_weights is None else "none",
        **{f"option {key}": str(value) for key, value in options.items()},
    }


def checkpoint_digest(folder: Path) -> str:
    """Of names, sizes and headers of the weight files; the weights themselves are not read."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            length = file.read(8)
            digest.update(f"{path.name} {path.stat().st_size}".encode() + length)
            digest.update(file.read(min(int.from_bytes(length, "little"), 1 << 26)))
    return digest.hexdigest()[:12]


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:12]


def roll_call(store: Store, place: Place, passport: Passport, deadline_s: float) -> None:
    """Returns when all ranks are there and agree; otherwise every rank raises ClusterError with the same words.

    A rank that comes a second time when the others have already gone on is turned away alone.
    """
    end = time.monotonic() + deadline_s
    arrivals = store.add(f"arrivals of {place.rank}", 1)
    store.set(f"host {place.rank} {arrivals}", socket.gethostname())
    if arrivals > 1:
        store.set(TWICE, str(place.rank))
    else:
        store.set(f"passport {place.rank}", json.dumps(passport))
    if place.rank == 0 and arrivals == 1:
        verdict = _judge(store, place.size, deadline_s)
        store.set("verdict", verdict)
        _wait_for(store, _readers(store, place.size), time.monotonic() + READ_S)
    else:
        if _wait_for(store, ["verdict"], end + READ_S):
            raise ClusterError(f"rank {place.rank}: rank 0 came to no verdict within {deadline_s:g} s: see its own log")
        verdict = store.get("verdict").decode() or (_came_twice(store, place.rank) if arrivals > 1 else "")
        store.set(f"verdict read {place.rank} {arrivals}", "")
    if verdict:
        raise ClusterError(f"rank {place.rank}: {verdict}")


def await_everybody(store: Store, place: Place, deadline_s: float, stage: str) -> None:
    """Returns when all ranks have called it for this stage of the start, once each.

    Raises ClusterError, which names those that did not come in time, or says that the store is gone.
    """
    try:
        store.set(f"{stage} {place.rank}", "")
        if store.add(stage, 1) == place.size:
            store.set(f"{stage} all", "")
        if _wait_for(store, [f"{stage} all"], time.monotonic() + deadline_s):
            missing = [rank for rank in range(place.size) if not store.check([f"{stage} {rank}"])]
            raise ClusterError(f"rank {place.rank}: {_named(missing)} had not {stage} within {deadline_s:.3g} s")
    except RuntimeError as error:
        raise ClusterError(f"rank {place.rank}: rank 0: its store does not answer any more ({error})") from error


def _judge(store: Store, size: int, deadline_s: float) -> str:
    """Who came twice stands in the place of somebody who will not come."""
    keys = [f"passport {rank}" for rank in range(size)]
    missing = _wait_for(store, keys, time.monotonic() + deadline_s, unless=TWICE)
    if store.check([TWICE]):
        return _came_twice(store, int(store.get(TWICE)))
    if missing:
        ranks = [int(key.split()[1]) for key in missing]
        return (
            f"{_named(ranks)} of {size} did not come within {deadline_s:.3g} s: "
            "see whether they were started, their own logs, and their MASTER_ADDR and MASTER_PORT"
        )
    return disagreement([json.loads(store.get(f"passport {rank}")) for rank in range(size)])


def _readers(store: Store, size: int) -> list[str]:
    """The keys that all who came set when they have read the verdict; rank 0, who wrote it, does not."""
    came = [(rank, nth + 1) for rank in range(size) for nth in range(store.add(f"arrivals of {rank}", 0))]
    return [f"verdict read {rank} {nth}" for rank, nth in came if (rank, nth) != (0, 1)]


def _came_twice(store: Store, rank: int) -> str:
    hosts = [store.get(f"host {rank} {nth}").decode() for nth in (1, 2)]
    return (
        f"{_named([rank])} came twice, from {' and '.join(hosts)}: give every node its own node rank, and every "
        "job its own MASTER_PORT"
    )


def disagreement(passports: list[Passport]) -> str:
    """Who differs from most, or from rank 0 where it is a tie, and in what; "" where all agree."""
    found = dict[str, list[str]]()  # by remedy
    for name in passports[0]:
        values = [passport.get(name, "unknown") for passport in passports]
        usual = _usual(values)
        for value in dict.fromkeys(values):
            if value != usual:
                ranks = [rank for rank, other in enumerate(values) if other == value]
                told = f"{name} = {value} on {_named(ranks)}, {usual} on the others"
                found.setdefault(REMEDIES.get(name, AGREE), []).append(told)
    return "; ".join(f"{', '.join(told)}: {remedy}" for remedy, told in found.items())


def _usual(values: list[str]) -> str:
    counts: Mapping[str, int] = Counter(values)
    return max(values, key=lambda value: counts[value])  # the first of them: rank 0's in a tie


def _named(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:MOST_NAMED])) + (" …" if len(ranks) > MOST_NAMED else "")
    return f"rank {shown}" if len(ranks) == 1 else f"ranks {shown}"


def _wait_for(store: Any, keys: list[str], end: float, unless: str = "") -> list[str]:
    """The keys that nobody has set by then, or when `unless` is set."""
    while keys:
        keys = [key for key in keys if not store.check([key])]
        if not keys or time.monotonic() > end or (unless and store.check([unless])):
            break
        time.sleep(LOOK_S)
    return keys
