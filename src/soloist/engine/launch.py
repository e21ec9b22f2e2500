"""Starting ranks: as processes of this machine, or by joining ranks that somebody else started. Imports no torch."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
import types
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from soloist.engine.host import host_bytes
from soloist.engine.lifelines import Lifeline, Lifelines
from soloist.engine.meeting import FRONT_END, Job, Meeting, Place, bounded, place_from
from soloist.engine.pulse import Pulse, end_process
from soloist.engine.roll_call import READ_S, passport_of, roll_call
from soloist.errors import ClusterError, ConfigurationError
from soloist.frontend.sockets import Hub, let_last_words_out
from soloist.frontend.wire import ToFrontEnd

RANK_BYTES = 150e6  # that a process with torch does not share with the others, at the least


class Ranks(Protocol):
    """Ranks that serve a front end in this process."""

    hub: Hub[ToFrontEnd]

    def ended(self) -> dict[int, str]:
        """Ranks that are gone, and how they went."""
        ...

    def close(self, patience_s: float) -> None:
        """Wait so long for them to end as the front end has asked them, then see to it. Idempotent."""
        ...


def launch(job: Job, make_executor: Callable[..., Any] | None = None) -> Ranks:
    """The ranks of a job, on their way up.

    Under torchrun, mpirun or srun this process is one of them. Rank 0 then has the front end and goes on; the others
    serve in here and leave the program with SystemExit when rank 0 has closed.
    """
    place = place_from(os.environ)
    if place is None:
        return LocalRanks(job, make_executor)
    if place.size != job.layout.size:
        remedy = f"layout {job.layout} needs {job.layout.size} ranks; start as many, or choose another layout"
        raise ConfigurationError.of("WORLD_SIZE", place.size, remedy)
    meeting = meet(job, place)
    if place.rank == 0:
        return JoinedRanks(job, meeting, make_executor)
    pulse = Pulse(meeting.store, place.rank, place.size, job.options.deadline_s, end_process(place.rank))
    lifeline = Lifeline(meeting)
    error = _run_rank(job, meeting, make_executor)
    pulse.close()
    lifeline.close()
    if error:
        raise error
    raise SystemExit(0)


def has_front_end() -> bool:
    """Whether this process answers requests: it was started alone, or is rank 0 of those that a launcher started."""
    place = place_from(os.environ)
    return place is None or place.rank == 0


def meet(job: Job, place: Place) -> Meeting:
    """All ranks, once each and of one mind; ClusterError, which names the culprit, within the deadline of the start."""
    passport = passport_of(job, place)
    end = time.monotonic() + job.options.start_deadline_s
    meeting = Meeting.at_master(place, job.options.start_deadline_s)
    import soloist.engine.rank  # noqa: F401  takes its time on a busy machine; after the roll call others wait for it

    try:
        left_s = end - time.monotonic()
        bounded(lambda: roll_call(meeting.store, place, passport, left_s), left_s + 2 * READ_S)
    except (RuntimeError, TimeoutError) as error:
        raise ClusterError(f"rank {place.rank}: rank 0: its store does not answer any more ({error})") from error
    return meeting


# -- ranks of this machine ------------------------------------------------------------------------------------------
class LocalRanks:
    """One process for each rank, forked from a server that has imported torch."""

    def __init__(self, job: Job, make_executor: Callable[..., Any] | None = None) -> None:
        _check_memory(job)
        self.folder = Path(tempfile.mkdtemp(prefix="soloist-"))
        weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)
        self.processes: list[Any] = []
        self.hub: Hub[ToFrontEnd] = Hub(f"ipc://{self.folder}/front-end", ToFrontEnd)
        try:
            self._start(job, make_executor)
        except BaseException:
            self.hub.close()
            self.close()
            raise

    def _start(self, job: Job, make_executor: Callable[..., Any] | None) -> None:
        size = job.layout.size
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["soloist.engine.preload"])
        with _without_main():
            for rank in range(size):
                mission = _Mission(job, Place(rank, size, rank, size), self.folder, self.hub.address, make_executor)
                process = context.Process(target=_local_rank, args=(mission,), name=f"soloist rank {rank}", daemon=True)
                process.start()
                self.processes.append(process)

    def ended(self) -> dict[int, str]:
        codes = {rank: process.exitcode for rank, process in enumerate(self.processes)}
        return {rank: _how(code) for rank, code in codes.items() if code is not None}

    def close(self, patience_s: float = 0.0) -> None:
        end = time.monotonic() + patience_s
        for process in self.processes:
            process.join(max(0.0, end - time.monotonic()))
        for process in self.processes:
            process.kill()
            process.join()
        shutil.rmtree(self.folder, ignore_errors=True)


def _check_memory(job: Job) -> None:
    """Raise ConfigurationError for more ranks than this machine can hold, however small the model."""
    if job.layout.size * RANK_BYTES > (held := host_bytes()):
        remedy = (
            f"{job.layout.size} processes of {RANK_BYTES / 1e9:g} GB or more do not fit into this machine's "
            f"{held / 1e9:.0f} GB: use fewer ranks, or start them on several machines (soloist launch)"
        )
        raise ConfigurationError.of("layout", str(job.layout), remedy)


@dataclass(frozen=True)
class _Mission:
    """What a forked rank is given."""

    job: Job
    place: Place
    folder: Path
    front_end: str
    make_executor: Callable[..., Any] | None


def _local_rank(mission: _Mission) -> None:
    """The life of a forked rank. Ctrl-C is for the parent, which ends its ranks in order."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_die_with_parent, args=(mission.folder,), daemon=True).start()
    meeting = Meeting.in_folder(mission.folder, mission.place)
    meeting.announce(FRONT_END, mission.front_end)
    error = _run_rank(mission.job, meeting, mission.make_executor)
    let_last_words_out()  # a forked process ends without waiting for ZeroMQ's thread
    sys.exit(1 if error else 0)


def _die_with_parent(folder: Path) -> None:
    """A rank has nobody to serve once the front end's process is gone, however it went."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)


@contextmanager
def _without_main() -> Iterator[None]:
    """multiprocessing runs the user's script once more in every child; ranks have no use for it."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _how(code: int) -> str:
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


# -- ranks that somebody else started -------------------------------------------------------------------------------
class JoinedRanks:
    """This process's own rank, 0, as a thread. Whoever started the others ends them if they are lost."""

    def __init__(self, job: Job, meeting: Meeting, make_executor: Callable[..., Any] | None = None) -> None:
        self.meeting, self.lost = meeting, dict[int, str]()
        self.pulse = Pulse(meeting.store, 0, meeting.place.size, job.options.deadline_s, self.lost.__setitem__)
        self.lifelines = Lifelines(meeting, self.pulse.tell)
        self.hub: Hub[ToFrontEnd] = Hub(meeting.address(FRONT_END), ToFrontEnd)
        meeting.announce(FRONT_END, self.hub.address)
        self.thread = threading.Thread(target=_run_rank, args=(job, meeting, make_executor), name="rank 0", daemon=True)
        self.thread.start()

    def ended(self) -> dict[int, str]:
        return self.lost if self.thread.is_alive() else {**self.lost, 0: "ended"}  # whoever was lost before it, first

    def close(self, patience_s: float = 0.0) -> None:
        self.thread.join(patience_s)
        self.pulse.close(patience_s)
        self.lifelines.close()


def _run_rank(job: Job, meeting: Meeting, make_executor: Callable[..., Any] | None) -> Exception | None:
    from soloist.engine.rank import run_rank

    return run_rank(job, meeting, make_executor)
