"""Several ranks in a test: threads over the `local` transport, or processes that live as long as the session.

    def exchange(transport, width):          # a function of a test file: its first argument is the rank's transport
        ...
        return anything that can be pickled

    def test_exchange(ranks):                # the fixture of tests/conftest.py
        results = ranks.run(4, "gloo", exchange, 256)  # or "local", "shared_memory", "nccl"

A function is found by its file and name, so it stands at the top level of its file (no lambda, no closure). If any rank
raises, dies or does not return in time, `run` raises RanksFailed with what each of them did.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import pickle
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from types import ModuleType
from typing import Any

import torch
from torch.distributed import FileStore, PrefixStore, Store

from soloist.transport.base import Transport
from soloist.transport.connect import connect, local_world

RETURN_S = 200.0  # for a rank to return, however busy the machine is
STOP_S = 30.0  # for a process that was killed or that died to be gone


@dataclass(frozen=True)
class Failure:
    """What one rank did instead of returning."""

    text: str


class RanksFailed(AssertionError):
    """`outcomes[rank]` is what the rank returned, or its `Failure`."""

    def __init__(self, outcomes: list[Any]) -> None:
        self.outcomes = outcomes
        failures = [(rank, outcome.text) for rank, outcome in enumerate(outcomes) if isinstance(outcome, Failure)]
        super().__init__("\n".join(f"rank {rank}: {text}" for rank, text in failures))


def run_threads(size: int, fn: Callable[..., Any], *args: Any, deadline_s: float = 60.0) -> list[Any]:
    """`fn(transport, *args)` in a thread for each rank of a local world; results by rank."""
    outcomes: list[Any] = [Failure("did not return in time")] * size

    def body(transport: Transport) -> None:
        torch.set_num_threads(1)
        outcomes[transport.rank] = _outcome(fn, transport, args)

    world = local_world(size, deadline_s)
    threads = [threading.Thread(target=body, args=(transport,), daemon=True) for transport in world]
    for thread in threads:
        thread.start()
    until = time.monotonic() + RETURN_S
    for thread in threads:
        thread.join(max(0.0, until - time.monotonic()))
    for transport in world:
        transport.close()
    return _checked(list(outcomes))


def _outcome(fn: Callable[..., Any], transport: Transport, args: tuple[Any, ...]) -> Any:
    """The result, or the failure with its traceback; then peers that wait learn at once from `close`.

    After a success the transport stays open: peers may still have to receive what this rank has sent.
    """
    try:
        return fn(transport, *args)
    except Exception:
        transport.close()
        return Failure(traceback.format_exc())


def _checked(outcomes: list[Any]) -> list[Any]:
    if any(isinstance(outcome, Failure) for outcome in outcomes):
        raise RanksFailed(outcomes)
    return outcomes


@dataclass(frozen=True)
class Seat:
    """What a process needs to join a world as one of its ranks."""

    kind: str
    rank: int
    size: int
    path: str
    deadline_s: float

    def join(self) -> Transport:
        device = torch.device("cuda", self.rank) if self.kind == "nccl" else torch.device("cpu")
        if device.type == "cuda":
            torch.cuda.set_device(device)
        store = FileStore(self.path, self.size)
        transport = connect(self.kind, self.rank, self.size, store, device, self.deadline_s)
        self._await_everyone(PrefixStore("joined", store))
        return transport

    def _await_everyone(self, joined: Store) -> None:
        """A rank that fails at once closes its connections: not while another is still making its own."""
        joined.set(str(self.rank), "")
        joined.wait([str(rank) for rank in range(self.size)], timedelta(seconds=self.deadline_s))


@dataclass
class Member:
    """A process of the pool, seen from the test."""

    process: Any
    pipe: Connection

    @classmethod
    def start(cls, index: int) -> Member:
        context = multiprocessing.get_context("forkserver")
        # Imports only: a forked child of a process that has run a multi-threaded torch operation can hang.
        context.set_forkserver_preload(["torch", "torch.distributed", "soloist.transport.connect"])
        ours, theirs = context.Pipe()
        process = context.Process(target=serve, args=(theirs,), name=f"rank {index}", daemon=True)
        process.start()
        theirs.close()
        return cls(process, ours)

    def stop(self) -> None:
        self.process.kill()
        self.process.join(STOP_S)
        self.pipe.close()


class RankPool:
    """Processes that form a new world, with a new store, for each `run`. Started when first needed, then reused."""

    def __init__(self) -> None:
        self._members: list[Member] = []

    def run(
        self,
        size: int,
        kind: str,
        fn: Callable[..., Any],
        *args: Any,
        deadline_s: float = 60.0,
        timeout_s: float = RETURN_S,
    ) -> list[Any]:
        """`fn(transport, *args)` on each of `size` ranks over transport `kind`; results by rank.

        `deadline_s` is the transport's. A rank that has not returned after `timeout_s` is killed, and so reported.
        """
        if kind == "local":
            return run_threads(size, fn, *args, deadline_s=deadline_s)
        while len(self._members) < size:
            self._members.append(Member.start(len(self._members)))
        with tempfile.TemporaryDirectory() as folder:
            seats = [Seat(kind, rank, size, f"{folder}/store", deadline_s) for rank in range(size)]
            self._order(seats, fn, args)
            outcomes = self._collect(size, time.monotonic() + timeout_s)
        self._members = [member for member in self._members if not member.pipe.closed]
        return _checked(outcomes)

    def _order(self, seats: list[Seat], fn: Callable[..., Any], args: tuple[Any, ...]) -> None:
        module = sys.modules[fn.__module__]
        origin = (module.__name__, module.__file__, fn.__qualname__)
        # Plain pickle: a pipe's own pickler would send tensors as handles to shared memory.
        payload = pickle.dumps(args)
        for member, seat in zip(self._members, seats, strict=False):
            member.pipe.send((seat, origin, payload))

    def _collect(self, size: int, until: float) -> list[Any]:
        outcomes: list[Any] = [Failure("did not return in time and was killed")] * size
        running = {member.pipe: rank for rank, member in enumerate(self._members[:size])}
        while running and (ready := wait(list(running), max(0.0, until - time.monotonic()))):
            for pipe in ready:
                rank = running.pop(pipe)
                outcomes[rank] = self._receive(self._members[rank])
        for rank in running.values():
            self._members[rank].stop()
        return outcomes

    def _receive(self, member: Member) -> Any:
        try:
            return pickle.loads(member.pipe.recv_bytes())
        except (EOFError, ConnectionResetError):
            member.process.join(STOP_S)
            code = member.process.exitcode
            member.stop()
            return Failure(f"the process died with exit code {code}")

    def close(self) -> None:
        for member in self._members:  # all at once: a process that has used a GPU takes its time to go
            member.process.kill()
        for member in self._members:
            member.stop()
        self._members.clear()


# -- in the process of a rank ------------------------------------------------------------------------------------------


def serve(pipe: Connection) -> None:
    """A rank's life: one world after another, until the test session ends."""
    assert "torch" in sys.modules, "the forkserver could not import torch"
    torch.set_num_threads(1)
    transport: Transport | None = None
    while True:
        try:
            seat, origin, payload = pipe.recv()
        except EOFError:
            return
        if transport is not None:
            transport.close()
        try:
            transport = seat.join()
            outcome = _outcome(_load(*origin), transport, pickle.loads(payload))
            pipe.send_bytes(pickle.dumps(outcome))
        except Exception:
            pipe.send_bytes(pickle.dumps(Failure(traceback.format_exc())))


def _load(module_name: str, path: str, function: str) -> Callable[..., Any]:
    """A function by file and name, under the module's name in the test session, so that its classes can be pickled."""
    module = sys.modules.get(module_name) or _module(module_name, path)
    found: Any = module
    for name in function.split("."):
        found = getattr(found, name)
    return found


def _module(name: str, path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec, f"cannot load {path}"
    assert spec.loader, f"cannot load {path}"
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
