"""Memory that the ranks of one machine share, and how they wait for each other in it.

Shape legend: N members, L lanes.

The memory is an anonymous file (`memfd`): it has no name that a crash could leave behind and is not bound by the size
of /dev/shm; pages are taken when they are first written. Member 0 makes it, the others open it through /proc.

Order of memory accesses. A writer fills its slab and its header, then raises its flag; a reader sees the flag, then
reads. An aligned 8-byte store is one store, x86 shows the stores of one core to the others in program order and does
not reorder loads, and the interpreter's calls keep the compiler from doing so. Other machines would need a release
store for the flag and an acquire load in the wait, which Python cannot say, so they are refused.
"""

from __future__ import annotations

import mmap
import os
import platform
import select
import sys
import time
import uuid
from collections.abc import Sequence
from math import prod

import numpy as np
from torch.distributed import Store

from soloist.errors import CapacityError, ClusterError, ConfigurationError

LANES = 2  # exchanges that may be under way; the next one finds its lane read, so no second handshake is needed
RING = 4  # point-to-point messages that may be under way for each pair
PAGE = 4096
CLOSED = -1  # `left_N`: 0 while a member is there, this when it has closed, 1 + world rank of the peer it gave up on
YIELD_S = 100e-6  # of a wait in which the core is offered to others; then sleeps, so that waiting costs them nothing
SLEEP_S = (20e-6, 1e-3)  # shortest and longest sleep; between them a share of the time waited so far
SLEEP_SHARE = 0.02
CHECK_S = 0.02  # how often a wait looks whether the peers are still there


def has_shared_memory() -> bool:
    """Whether this machine has the order of memory accesses and the calls needed."""
    return (sys.platform, platform.machine()) == ("linux", "x86_64")


def require_machine() -> None:
    """Raises ConfigurationError where `has_shared_memory` says no."""
    if not has_shared_memory():
        found = (sys.platform, platform.machine())
        raise ConfigurationError.of("transport", "shared_memory", f"needs Linux on x86-64, not {found}; use gloo")


class Segment:
    """The shared arrays of one group. All counts and flags are int64 and start at 0."""

    def __init__(self, size: int, slab_bytes: int, memory: mmap.mmap) -> None:
        words = np.frombuffer(memory, np.int64, _flag_words(size))
        shapes = _flag_shapes(size)
        cuts = np.cumsum([prod(shape) for shape in shapes])[:-1]
        arrays = [part.reshape(shape) for part, shape in zip(np.split(words, cuts), shapes, strict=True)]
        self.pid_N, self.left_N, self.token = arrays[:3]
        self.published_LN, self.read_LN, self.heads_LN3N = arrays[3:6]
        self.sent_NN, self.taken_NN, self.letters_NN = arrays[6:]
        self.slab_bytes = slab_bytes
        self._slabs = memoryview(memory)[_flag_bytes(size) :]

    def slabs(self, lane: int) -> memoryview:
        """The slabs of all members, one behind the other. A memoryview copies slices in half of numpy's time."""
        lane_bytes = len(self._slabs) // LANES
        return self._slabs[lane * lane_bytes : (lane + 1) * lane_bytes]


def _flag_shapes(size: int) -> tuple[tuple[int, ...], ...]:
    lanes, pairs = (LANES, size), (size, size)
    return (size,), (size,), (2,), lanes, lanes, (LANES, size, 3, size), pairs, pairs, (*pairs, RING, 3)


def _flag_words(size: int) -> int:
    return sum(prod(shape) for shape in _flag_shapes(size))


def _flag_bytes(size: int) -> int:
    return -(-8 * _flag_words(size) // PAGE) * PAGE


def join_segment(store: Store, rank: int, size: int, slab_bytes: int) -> tuple[Segment, int | None]:
    """Make or open the group's segment; member 0 also gets the descriptor, to be closed when all have opened it."""
    if rank == 0:
        fd, memory = make_memory(_flag_bytes(size) + LANES * size * slab_bytes)
        segment = Segment(size, slab_bytes, memory)
        segment.token[:] = np.frombuffer(uuid.uuid4().bytes, np.int64)
        store.set("segment", f"{os.getpid()} {fd} {segment.token.tobytes().hex()}")
    else:
        pid, number, token = store.get("segment").decode().split()
        segment, fd = Segment(size, slab_bytes, open_memory(int(pid), int(number))), None
        if segment.token.tobytes().hex() != token:
            raise _elsewhere(int(pid))
    segment.pid_N[rank] = os.getpid()
    return segment, fd


def make_memory(size: int) -> tuple[int, mmap.mmap]:
    """A new anonymous file of zeros: a descriptor for others to open, and the mapping."""
    fd = os.memfd_create("soloist")
    try:
        os.ftruncate(fd, size)
        return fd, mmap.mmap(fd, 0)
    except OSError as error:
        os.close(fd)
        raise CapacityError(f"{size} bytes of shared memory: {error.strerror}; lower slab_bytes or use gloo") from error


def open_memory(pid: int, fd: int) -> mmap.mmap:
    """Map what another process of this machine and user made."""
    try:
        opened = os.open(f"/proc/{pid}/fd/{fd}", os.O_RDWR)
        try:
            return mmap.mmap(opened, 0)
        finally:
            os.close(opened)
    except (OSError, ValueError) as error:
        raise _elsewhere(pid) from error


def _elsewhere(pid: int) -> ClusterError:
    return ClusterError(
        f"transport = 'shared_memory': cannot open the memory of process {pid}: the ranks must run on one machine, "
        "in one PID namespace, as one user; use gloo otherwise"
    )


class Watch:
    """Waits for flags of peers, and tells when one of them will never raise its own."""

    def __init__(self, segment: Segment, ranks: Sequence[int], deadline_s: float) -> None:
        self.segment, self.ranks, self.deadline_s = segment, ranks, deadline_s
        self.last = 0  # member that the last wait ended with
        self._pidfds: list[int] = []
        self._ended: dict[int, select.poll] = {}

    def until(self, flags: np.ndarray, target: int, peers: Sequence[int]) -> tuple[int, str] | None:
        """Wait until all flags have reached the target; `flags[i]` belongs to member `peers[i]`.

        Returns None, or the world rank of the peer that is lost and why.
        """
        start = time.perf_counter()
        waited = checked = 0.0
        while (least := min(raised := flags.tolist())) < target:
            self.last = peers[raised.index(least)]
            if waited < YIELD_S:
                os.sched_yield()
            else:
                time.sleep(min(max(SLEEP_S[0], waited * SLEEP_SHARE), SLEEP_S[1]))
            waited = time.perf_counter() - start
            if waited > checked + CHECK_S:
                checked = waited
                if lost := self._lost(flags, target, peers, waited):
                    return lost
        return None

    def _lost(self, flags: np.ndarray, target: int, peers: Sequence[int], waited_s: float) -> tuple[int, str] | None:
        """The most telling finding about the peers that lag."""
        findings = [self._finding(peer) for peer in peers]
        # Only now the flags: a peer may have raised its own just before it left.
        lagging = [(peer, found) for flag, peer, found in zip(flags, peers, findings, strict=True) if flag < target]
        if told := [found for _, found in lagging if found]:
            _, culprit, reason = min(told)
            return culprit, reason
        if lagging and waited_s > self.deadline_s:
            first, *others = [self.ranks[peer] for peer, _ in lagging]
            return first, f"no answer within {self.deadline_s:g} s" + (f", nor from ranks {others}" if others else "")
        return None

    def has_left(self, peer: int) -> bool:
        """Whether it has closed, given up or ended."""
        return self._finding(peer) is not None

    def _finding(self, peer: int) -> tuple[int, int, str] | None:
        """Weight (less says more), world rank and what is wrong with it."""
        left = int(self.segment.left_N[peer])
        if self._has_ended(peer):
            return 0, self.ranks[peer], "its process has ended"
        if left > 0:
            return 1, left - 1, f"rank {self.ranks[peer]} has given up on it"
        return (2, self.ranks[peer], "has closed") if left else None

    def _has_ended(self, peer: int) -> bool:
        """A process descriptor becomes readable when the process ends, even if nobody has reaped it."""
        pid = int(self.segment.pid_N[peer])  # 0 until the peer has joined
        if pid and peer not in self._ended:
            try:
                fd = os.pidfd_open(pid)
            except ProcessLookupError:
                return True
            self._pidfds.append(fd)
            self._ended[peer] = select.poll()
            self._ended[peer].register(fd, select.POLLIN)
        return bool(pid and self._ended[peer].poll(0))

    def close(self) -> None:
        self._ended.clear()
        while self._pidfds:
            os.close(self._pidfds.pop())
