"""One process a GPU for probes and benchmarks, and times of GPU work that all ranks begin together."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import ClassVar

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore

from soloist.errors import ClusterError
from soloist.kernels.flags import LINE_BYTES, await_kernel, signal_kernel
from soloist.timing import median_of_slowest
from soloist.transport.symmetric import SymmetricGroup, Watch, Window, windows_in_process

_HEAD_START = 3_000_000  # clocks that the GPU sleeps while the host queues what is timed
_WAKING_BYTES = 32 << 20  # sent four times: some 0.35 ms


@dataclass
class WindowBarrier:
    """Ranks wait for each other through their windows, on the current stream; it costs the host nothing."""

    window: Window
    calls: torch.Tensor
    watch: Watch

    BYTES: ClassVar[int] = 1 << 16  # of a window

    @classmethod
    def of(cls, window: Window, watch: Watch) -> WindowBarrier:
        return cls(window, torch.zeros(LINE_BYTES // 8, dtype=torch.int64, device=window.device), watch)

    def __call__(self) -> None:
        self.calls[0] += 1
        window, watch, size = self.window, self.watch, self.window.ranks
        signal_kernel[(1,)](window.bases, self.calls, 0, window.rank, PHASE=0, RANKS=size, num_warps=1)
        flags = window.view(0, (self.BYTES // 8,), torch.int64)
        number = watch.number("the benchmark's barrier")
        await_kernel[(1,)](
            flags, self.calls, watch.failed, watch.report, number, watch.timeout_ns, PHASE=0, RANKS=size, num_warps=1
        )


@dataclass
class OneGpu:
    """This GPU, and the times of work on it. Alone, it stands for rank `rank` of `size`."""

    rank: int
    size: int
    device: torch.device
    watch: Watch
    at_windows: WindowBarrier | None = None
    _meet: Callable[[], None] | None = None  # the barrier as a graph

    @classmethod
    def alone(cls, size: int) -> OneGpu:
        """The current GPU in the place of the first of `size` ranks, of which the others are not there."""
        device = _own_gpu()
        return cls(0, size, device, Watch(0, tuple(range(size)), device, 20.0))

    @classmethod
    def together(cls, size: int, deadline_s: float = 20.0) -> list[OneGpu]:
        """All of `size` ranks on the current GPU, each to work on a stream of its own."""
        device = _own_gpu()
        watches = [Watch(rank, tuple(range(size)), device, deadline_s) for rank in range(size)]
        windows = windows_in_process(size, WindowBarrier.BYTES, device)
        return [
            cls(w.rank, size, device, w, WindowBarrier.of(window, w))
            for window, w in zip(windows, watches, strict=True)
        ]

    def barrier(self) -> None:
        """On the current stream: what follows begins on all ranks together."""
        if self.at_windows is not None:
            self.at_windows()

    def wake(self) -> None:
        """Bring the link out of the sleep that a pause sends it into."""

    def settle(self) -> None:
        """Returns when all that was given to the GPU is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def gathered(self, own: list[list[float]]) -> list[list[list[float]]]:
        """Every rank's."""
        return [own]

    def seconds(
        self, *parts: Callable[[], object], repeats: int = 20, warm_up: int = 3, pause_s: float = 0.0
    ) -> list[float]:
        """For each of `parts`, run one after the other, the median over repeats of the slowest rank.

        Before each part all ranks meet on the GPU, `pause_s` after the last part ended. A sleep at the start lets the
        host run ahead of it.
        """
        marks: list[list[tuple[torch.cuda.Event, torch.cuda.Event]]] = []
        self._meet = self._meet or (captured(self.barrier) if self.at_windows else self.barrier)
        for _ in range(warm_up + repeats):
            torch.cuda._sleep(_HEAD_START)
            marks.append([self._timed(part, pause_s) for part in parts])
        torch.cuda.synchronize()
        self.watch.check()
        own = [[1e-3 * a.elapsed_time(b) for a, b in spans] for spans in marks[warm_up:]]
        everybody = self.gathered(own)
        return [median_of_slowest([[spans[i] for spans in rank] for rank in everybody]) for i in range(len(parts))]

    def enter(self) -> None:
        """All ranks do together what follows, the link awake; only after `seconds`."""
        assert self._meet is not None
        self._head_start()
        self._meet()

    def _head_start(self) -> None:
        torch.cuda._sleep(_HEAD_START)
        self.wake()

    def _timed(self, part: Callable[[], object], pause_s: float) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        if pause_s:
            torch.cuda.synchronize()
            time.sleep(pause_s)
            self._head_start()
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        assert self._meet is not None
        self._meet()
        start.record()
        part()
        stop.record()
        return start, stop


@dataclass
class Bench(OneGpu):
    """This rank's GPU and the group of all."""

    group: SymmetricGroup = field(kw_only=True)
    awake: Window = field(kw_only=True)  # for nothing else than to be sent

    @classmethod
    def join(cls, deadline_s: float = 20.0) -> Bench:
        """Reads RANK, WORLD_SIZE and LOCAL_RANK."""
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", rank)))
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", timeout=timedelta(seconds=120), device_id=device)
        store = PrefixStore("symmetric", dist.distributed_c10d._get_default_store())
        group = SymmetricGroup(store, rank, size, device)
        watch = Watch(rank, tuple(range(size)), device, deadline_s)
        window, awake = (
            group.window(held) if size > 1 else windows_in_process(1, held, device)[0]
            for held in (WindowBarrier.BYTES, _WAKING_BYTES)
        )  # fmt: skip
        return cls(rank, size, device, watch, WindowBarrier.of(window, watch), group=group, awake=awake)

    def wake(self) -> None:
        own, peer = (self.awake.bytes_of[rank % self.size] for rank in (self.rank, self.rank + 1))
        for _ in range(4):
            peer.copy_(own)

    def gathered(self, own: list[list[float]]) -> list[list[list[float]]]:
        everybody: list[list[list[float]]] = [[] for _ in range(self.size)]
        dist.all_gather_object(everybody, own)
        return everybody


def _own_gpu() -> torch.device:
    if not torch.cuda.is_available():
        raise ClusterError("this benchmark needs a GPU on this host; found none")
    return torch.device("cuda", torch.cuda.current_device())


def gpus_here() -> int:
    """CUDA devices of this host that this process sees."""
    return torch.cuda.device_count()


def in_ranks(module: str, arguments: Sequence[str], least: int = 2) -> int:
    """Run `python -m module arguments` once for each GPU of this host; the worst exit code.

    Raises ClusterError where there are fewer than `least`.
    """
    if (size := gpus_here()) < least:
        raise ClusterError(f"this benchmark needs {least} GPUs or more on this host; found {size}")
    return start_ranks(module, arguments, size)


def start_ranks(module: str, arguments: Sequence[str], size: int, limit_s: float = 600.0) -> int:
    """Run `python -m module arguments` in `size` processes that meet on this host; the worst exit code.

    When one of them fails, or the time is over, the others are ended.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    world = os.environ | {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, "-m", module, *arguments]
    ranks: list[subprocess.Popen[bytes]] = []
    until = time.monotonic() + limit_s
    try:
        for rank in map(str, range(size)):
            ranks.append(subprocess.Popen(command, env=world | {"RANK": rank, "LOCAL_RANK": rank}))
        while (codes := [rank.poll() for rank in ranks]).count(None) and not any(codes):
            if time.monotonic() > until:
                raise ClusterError(f"{module}: not done after {limit_s:.0f} s on {size} ranks")
            time.sleep(0.02)
        return max(abs(code or 0) for code in codes)
    finally:
        for process in ranks:
            process.kill()
            process.wait()


def captured(work: Callable[[], object], warm_up: int = 2) -> Callable[[], None]:
    """`work` as a CUDA graph, after eager calls of it; every rank captures the same."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(warm_up):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        work()
    return graph.replay
