"""One process a GPU for probes and benchmarks, and times of GPU work that all ranks begin together."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore

from soloist.errors import ClusterError
from soloist.kernels.flags import LINE_BYTES, await_kernel, signal_kernel
from soloist.timing import median_of_slowest
from soloist.transport.symmetric import SymmetricGroup, Watch, Window, windows_in_process

_FLAGS_BYTES = 1 << 16
_HEAD_START = 3_000_000  # clocks that the GPU sleeps while the host queues what is timed


@dataclass
class Bench:
    """This rank's GPU, the group of all, and a barrier that costs the host nothing."""

    rank: int
    size: int
    group: SymmetricGroup
    window: Window
    watch: Watch
    calls: torch.Tensor
    _meet: Callable[[], None] | None = None  # the barrier as a graph

    @classmethod
    def join(cls, deadline_s: float = 20.0) -> Bench:
        """Reads RANK, WORLD_SIZE and LOCAL_RANK."""
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", rank)))
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", timeout=timedelta(seconds=120), device_id=device)
        store = PrefixStore("symmetric", dist.distributed_c10d._get_default_store())
        group = SymmetricGroup(store, rank, size, device)
        window = group.window(_FLAGS_BYTES) if size > 1 else windows_in_process(1, _FLAGS_BYTES, device)[0]
        calls = torch.zeros(LINE_BYTES // 8, dtype=torch.int64, device=device)
        return cls(rank, size, group, window, Watch(rank, tuple(range(size)), device, deadline_s), calls)

    @property
    def device(self) -> torch.device:
        return self.group.device

    def barrier(self) -> None:
        """On the current stream: what follows begins on all ranks together."""
        self.calls[0] += 1
        signal_kernel[(1,)](self.window.bases, self.calls, 0, self.rank, PHASE=0, RANKS=self.size, num_warps=1)
        flags = self.window.view(0, (_FLAGS_BYTES // 8,), torch.int64)
        watch, number = self.watch, self.watch.number("the benchmark's barrier")
        await_kernel[(1,)](
            flags, self.calls, watch.failed, watch.report, number, watch.timeout_ns,
            PHASE=0, RANKS=self.size, num_warps=1,
        )  # fmt: skip

    def seconds(
        self, *parts: Callable[[], object], repeats: int = 20, warm_up: int = 3, pause_s: float = 0.0
    ) -> list[float]:
        """For each of `parts`, run one after the other, the median over repeats of the slowest rank.

        Before each part all ranks meet on the GPU, `pause_s` after the last part ended. A sleep at the start lets the
        host run ahead of it.
        """
        marks: list[list[tuple[torch.cuda.Event, torch.cuda.Event]]] = []
        self._meet = self._meet or captured(self.barrier)
        for _ in range(warm_up + repeats):
            torch.cuda._sleep(_HEAD_START)
            marks.append([self._timed(part, pause_s) for part in parts])
        torch.cuda.synchronize()
        self.watch.check()
        own = [[1e-3 * a.elapsed_time(b) for a, b in spans] for spans in marks[warm_up:]]
        everybody: list[list[list[float]]] = [[] for _ in range(self.size)]
        dist.all_gather_object(everybody, own)
        return [median_of_slowest([[spans[i] for spans in rank] for rank in everybody]) for i in range(len(parts))]

    def _timed(self, part: Callable[[], object], pause_s: float) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        if pause_s:
            torch.cuda.synchronize()
            time.sleep(pause_s)
            torch.cuda._sleep(_HEAD_START)
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self._meet()
        start.record()
        part()
        stop.record()
        return start, stop


def in_ranks(module: str, arguments: Sequence[str], limit_s: float = 600.0, least: int = 2) -> int:
    """Run `python -m module arguments` once for each GPU of this host; the worst exit code.

    Raises ClusterError where there are fewer than `least`.
    """
    if (size := torch.cuda.device_count()) < least:
        raise ClusterError(f"{module} needs {least} GPUs or more on this host; found {size}")
    return start_ranks(module, arguments, size, limit_s)


def start_ranks(module: str, arguments: Sequence[str], size: int, limit_s: float = 600.0) -> int:
    """Run `python -m module arguments` in `size` processes that meet on this host; the worst exit code.

    When one of them fails, or the time is over, the others are ended.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    world = os.environ | {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, "-m", module, *arguments]
    ranks = [subprocess.Popen(command, env=world | {"RANK": str(r), "LOCAL_RANK": str(r)}) for r in range(size)]
    until = time.monotonic() + limit_s
    try:
        while (codes := [rank.poll() for rank in ranks]).count(None) and not any(codes):
            if time.monotonic() > until:
                raise ClusterError(f"{module}: not done after {limit_s:.0f} s on {size} ranks")
            time.sleep(0.02)
        return max(abs(code or 0) for code in codes)
    finally:
        for rank in ranks:
            rank.kill()


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
