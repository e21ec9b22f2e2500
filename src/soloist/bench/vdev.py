"""PyTorch's own all-to-all over symmetric memory, `all_to_all_vdev`, as a yardstick: the rows of a dispatch.

It needs the NVSHMEM backend, which a process chooses before it allocates anything symmetric: so it has its own ranks.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from soloist.bench.load import Load
from soloist.bench.report import Ceilings, Point, commit
from soloist.bench.shapes import Wanted
from soloist.dispatch.rows import Departures
from soloist.timing import median_of_slowest

LOAD = Load(4096, 7168, 8, 64)


def measure(load: Load, rank: int, size: int, device: torch.device, repeats: int = 20) -> Point:
    """Joins the world and measures; called by every rank. Raises RuntimeError where the backend does not run."""
    symmetric: Any = importlib.import_module("torch.distributed._symmetric_memory")
    if not symmetric.is_nvshmem_available():
        raise RuntimeError("this build of PyTorch has no NVSHMEM")
    symmetric.set_backend("NVSHMEM")
    group = dist.distributed_c10d._get_default_group().group_name
    x_TD, choice = load.inputs(rank, size, 0, device)
    leaving = Departures.of(choice, size)
    most = load.tokens * size
    sent_RD = symmetric.empty(most, load.d_model, dtype=load.dtype, device=device)
    got_RD = symmetric.empty(most, load.d_model, dtype=load.dtype, device=device)
    counts_G = symmetric.empty(size, dtype=torch.int64, device=device)
    came_2G = symmetric.empty(2, size, dtype=torch.int64, device=device)
    for held in (sent_RD, got_RD, counts_G, came_2G):
        symmetric.rendezvous(held, group)
    sent_RD[: len(leaving.token_R)] = x_TD[leaving.token_R]
    counts_G.copy_(torch.tensor(leaving.counts))

    def exchange() -> None:
        torch.ops.symm_mem.all_to_all_vdev(sent_RD, got_RD, counts_G, came_2G, group)

    own = []
    for _ in range(repeats + 3):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        dist.barrier()
        torch.cuda._sleep(1_000_000)
        start.record()
        exchange()
        stop.record()
        torch.cuda.synchronize()
        own.append(1e-3 * start.elapsed_time(stop))
    mine = got_RD[int(came_2G[1, rank]) :][: leaving.counts[rank]]
    first = sum(leaving.counts[:rank])
    assert torch.equal(mine, sent_RD[first : first + leaving.counts[rank]]), "rows"
    everybody: list[Any] = [None] * size
    dist.all_gather_object(everybody, (own[3:], sum(leaving.counts) - leaving.counts[rank]))
    seconds = median_of_slowest([times for times, _ in everybody])
    away = max(count for _, count in everybody) * load.d_model * load.dtype.itemsize
    ceilings = Ceilings()
    bound = f"{away / 1e6:.1f} MB at {ceilings.link / 1e9:.0f} GB/s"
    machine = f"{size} x {torch.cuda.get_device_name(device)}"
    shape = load.named
    return Point("yardstick", "torch all_to_all_vdev", shape, seconds, away / ceilings.link, bound, machine, commit())


def measure_vdev(wanted: Wanted) -> Iterator[Point]:
    """Joins the world and times `all_to_all_vdev` where it runs; called by every rank."""
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", rank)))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    try:
        load = Load(**wanted.sizes(size)) if wanted else replace(LOAD, routing=wanted.routing or LOAD.routing)
        yield measure(load, rank, size, device)
    except RuntimeError as error:
        if rank == 0:
            print(f"torch all_to_all_vdev does not run here: {error}", flush=True)
