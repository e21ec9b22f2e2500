"""How MPI is used. Imports neither torch nor mpi4py; docs/multi-node.md explains when to change what."""

from __future__ import annotations

from typing import Literal

from soloist.errors import ConfigurationError
from soloist.specs.model import Spec


class MpiOptions(Spec, frozen=True, kw_only=True):
    """Written `--set mpi.progress=library` on the command line.

    thread_level: who may call MPI. `funneled`: the thread that initialised it; `serialized`: any thread, one at a time,
        which Soloist sees to with a lock; `multiple`: several at once, for programs that call MPI themselves beside it.
    progress: who moves messages while a rank computes. `thread`: a thread of Soloist's that tests unfinished messages
        now and then; `library`: MPICH's own progress thread, which spins on a core of its own.
    message_bytes: longest MPI message; what is larger goes in several.
    gpu_aware: whether the library takes addresses of GPU memory. `auto` asks it; `no` goes through pinned host memory.
    """

    thread_level: Literal["funneled", "serialized", "multiple"] = "serialized"
    progress: Literal["thread", "library"] = "thread"
    message_bytes: int = 16 << 20
    gpu_aware: Literal["auto", "yes", "no"] = "auto"

    def __post_init__(self) -> None:
        if not 0 < self.message_bytes < 1 << 31:
            raise ConfigurationError.of("mpi.message_bytes", self.message_bytes, "must lie between 1 and 2^31 - 1")
        if self.thread_level == "funneled" and self.progress == "thread":
            remedy = "excludes mpi.progress = thread, a second thread that calls MPI; set mpi.progress=library"
            raise ConfigurationError.of("mpi.thread_level", self.thread_level, remedy)
