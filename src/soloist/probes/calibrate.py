"""`soloist calibrate`: everything that the planner's cost model wants to know of the machine at hand.

Every rank runs every probe, since in the engine all ranks work at once; rank 0 writes what it sees as JSON lines: first
the machine (a cluster of the planner, with the rates that were reached where no datasheet is known), then a line for
each point.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal, TextIO

import msgspec
import torch
import torch.distributed as dist
import typer
from torch.distributed import PrefixStore, TCPStore

from soloist.errors import ConfigurationError
from soloist.kernels.language import AVAILABLE
from soloist.kernels.norm import fused_norm
from soloist.probes import device as probe
from soloist.probes import exchange, kernels, links
from soloist.probes.gpus import Bench, captured, start_ranks
from soloist.probes.records import Record, commit, device_name
from soloist.probes.small import launches, small_kernels
from soloist.specs.cluster import ClusterSpec, GpuSpec, preset_gpus
from soloist.transport.base import Transport
from soloist.transport.connect import connect
from soloist.transport.nvlink import GATHER_BYTES, Channels, NvlinkTransport
from soloist.transport.symmetric import Watch

Only = Literal["", "kernels", "links"]  # of the points; "": all
RANKS_OF_A_CPU = 4  # at most, where nothing else is asked for
DEADLINE_S = 60.0
SIZES = {"cuda": [1 << e for e in (11, 14, 17, 20, 22, 24, 26, 28)], "cpu": [1 << e for e in (10, 14, 18, 22)]}
MESSAGES = {"cuda": [1 << e for e in (12, 16, 20, 24, 27)], "cpu": [1 << e for e in (10, 16, 22)]}
SUMMED = (1, 4, 16, 64, 128, 256)  # rows
DTYPES = {"cuda": torch.bfloat16, "cpu": torch.float32}


def calibrate(out: Path, ranks: int = 0, cpu: bool = False, only: Only = "") -> int:
    """Start the ranks and wait for them; the worst exit code. `ranks` 0: one for each GPU, or as the CPU has cores.

    Raises ConfigurationError where `out` cannot be written, and for more ranks than a machine can measure with.
    """
    gpus, cores = 0 if cpu else torch.cuda.device_count(), os.cpu_count() or 1
    if ranks > (most := gpus or RANKS_OF_A_CPU * cores):
        has = f"{gpus} GPUs" if gpus else f"{cores} cores"
        raise ConfigurationError.of("--ranks", ranks, f"this machine has {has}; give at most {most}")
    try:
        out.touch()
    except OSError as error:
        raise ConfigurationError.of("out", str(out), f"cannot be written: {error.strerror}") from error
    size = ranks or gpus or min(RANKS_OF_A_CPU, cores)
    options = ["--out", str(out), "--only", only, *(["--cpu"] if not gpus else [])]
    return start_ranks("soloist.probes.calibrate", options, size)


@dataclass(frozen=True)
class Machine:
    """This rank's part of it."""

    device: torch.device
    transport: Transport | None  # None: there is one rank
    bench: Bench | None  # on GPUs, where there are several

    @classmethod
    def join(cls, cpu: bool) -> Machine:
        """Reads RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT."""
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        device = torch.device("cpu") if cpu else torch.device("cuda", int(os.environ.get("LOCAL_RANK", rank)))
        if device.type == "cuda":
            torch.cuda.set_device(device)
        else:
            torch.set_num_threads(1)
        if size == 1:
            return cls(device, None, None)
        if device.type == "cuda":
            bench = Bench.join()
            store = PrefixStore("calibrate", dist.distributed_c10d._get_default_store())
            return cls(device, connect("nccl", rank, size, store, device, DEADLINE_S), bench)
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = TCPStore(address, port, size, rank == 0, timeout=timedelta(seconds=DEADLINE_S))
        return cls(device, connect("shared_memory", rank, size, store, "cpu", DEADLINE_S), None)

    @property
    def size(self) -> int:
        return self.transport.size if self.transport else 1

    def slowest(self, seconds: float) -> float:
        """Of all ranks."""
        return links.slowest(self.transport, [seconds]) if self.transport else seconds

    def lowest(self, rate: float) -> float:
        """Of all ranks."""
        return 1 / self.slowest(1 / rate)


def cluster_of(machine: Machine, link: float) -> ClusterSpec:
    """A preset GPU where its name and memory say so; otherwise one whose peaks are what was reached here."""
    device, size = machine.device, machine.size
    gpu = _preset(device) or _measured(machine)
    return ClusterSpec(
        name=f"{size}x{gpu.name}", gpu=gpu, gpus_per_node=size, nvlink_GBps=gpu.nvlink_GBps or link / 1e9,
        max_gpus=size, source=f"soloist calibrate on {device_name(device)}",
    )  # fmt: skip


def _preset(device: torch.device) -> GpuSpec | None:
    if device.type != "cuda":
        return None
    name, memory = torch.cuda.get_device_name(device), probe.memory_bytes(device) / 1e9
    near = [spec for key, spec in preset_gpus().items() if key.split("-")[0] in name.replace("-", " ").split()]
    return next((spec for spec in near if abs(spec.memory_GB - memory) < 0.2 * spec.memory_GB), None)


def _measured(machine: Machine) -> GpuSpec:
    device = machine.device
    tflops = {
        name: round(machine.lowest(probe.arithmetic_rate(device, dtype)) / 1e12, 6)
        for dtype, name in kernels.NAMES.items()
        if name != "fp16"
    }
    sms = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    return GpuSpec(
        name=device_name(device).split()[-1] if device.type == "cuda" else "cpu", tflops=tflops,
        memory_GB=round(probe.memory_bytes(device) / 1e9 / (machine.size if device.type == "cpu" else 1), 2),
        memory_TBps=round(machine.lowest(probe.streaming_rate(device)) / 1e12, 6), sms=sms,
        l2_MB=40.0 if device.type == "cuda" else 1.0,
    )  # fmt: skip


def records(machine: Machine, cluster: ClusterSpec, only: Only = "") -> Iterator[Record]:
    """All points, the slowest rank's of each."""
    if only != "links":
        yield from _alone(machine, cluster)
    if only != "kernels" and machine.transport:
        yield from _together(machine, machine.transport, cluster.name)


def _alone(machine: Machine, cluster: ClusterSpec) -> Iterator[Record]:
    """What each rank does by itself."""
    device, dtype, gpu = machine.device, DTYPES[machine.device.type], cluster.gpu.name
    every = (
        kernels.streams(device, gpu), kernels.matmuls(device, dtype, gpu), kernels.attentions(device, dtype, gpu),
        kernels.experts(device, dtype, gpu), small_kernels(device, dtype, gpu),
        exchange.local(device, cluster.name, dtype),
        *([launches(device, dtype, gpu)] if device.type == "cuda" else []),  # a CPU's kernels are calls
    )  # fmt: skip
    for found in every:
        yield from (Record(one.what, one.shape, machine.slowest(one.seconds)) for one in found)


def _together(machine: Machine, transport: Transport, fabric: str) -> Iterator[Record]:
    """What ranks do with each other."""
    dtype = DTYPES[machine.device.type]
    if machine.bench:
        yield from _sums(machine.bench, transport, fabric, dtype)
        yield from exchange.one_sided(machine.bench, fabric, dtype)
    else:
        yield from exchange.over_transport(transport, fabric, dtype)
    yield from _collectives(machine, transport, fabric)


def _collectives(machine: Machine, transport: Transport, fabric: str) -> Iterator[Record]:
    kind = machine.device.type
    library = "nccl" if kind == "cuda" else "shared_memory"
    common = {"library": library, "fabric": fabric, "gpus": transport.size}
    for name in links.COLLECTIVES:
        for size in SIZES[kind]:
            work = links.collective(name, transport, size)
            if machine.bench:
                work()
                (taken,) = machine.bench.seconds(captured(work), repeats=10, warm_up=2)
            else:
                taken = links.timed(transport, work)
            yield Record("collectives", {**common, "collective": name, "bytes": size}, taken)
    for size in MESSAGES[kind]:
        taken = links.send_seconds(transport, size, 0, 1)
        yield Record("collectives", {**common, "collective": "send_recv", "bytes": size}, taken)


def _sums(bench: Bench, beneath: Transport, fabric: str, dtype: torch.dtype) -> Iterator[Record]:
    """Of an attention group in decode, by kernels over the peers' memory: sums, and gathers of logits.

    A sum makes the norm behind it, too. It counts for what it takes beyond that norm alone, which `small` holds.
    """
    if not AVAILABLE:
        return
    watch = Watch(bench.rank, tuple(range(bench.size)), bench.device, deadline_s=20.0)
    own = NvlinkTransport(beneath, Channels(bench.group.window(Channels.size(bench.size))), watch)
    columns = {"library": "soloist", "fabric": fabric, "gpus": bench.size}
    for rows, width in product(SUMMED, (2048, 4096)):
        part_TD, residual_TD = torch.zeros(2, rows, width, device=bench.device, dtype=dtype)
        weight_D = torch.ones(width, device=bench.device, dtype=dtype)
        if not own.serves(part_TD):
            continue
        arguments = (part_TD, residual_TD, weight_D, 1e-6)
        summed = _each(bench, lambda given=arguments: own.all_reduce_norm(*given))
        normed = _each(bench, lambda given=arguments: fused_norm(*given))
        watch.check()
        shape = {**columns, "collective": "all_reduce", "bytes": part_TD.nbytes}
        yield Record("collectives", shape, max(1e-7, summed - normed))
    for rows, width in product(SUMMED, (16384, 65536)):
        part_Cv = torch.zeros(rows, width, device=bench.device, dtype=dtype)
        if part_Cv.nbytes * (bench.size - 1) > GATHER_BYTES:
            continue
        taken = _each(bench, lambda part_Cv=part_Cv: own.gather_columns(part_Cv, [part_Cv.shape[1]] * bench.size))
        watch.check()
        yield Record("collectives", {**columns, "collective": "gather", "bytes": part_Cv.nbytes}, taken)


def _each(bench: Bench, work: Callable[[], object]) -> float:
    """Seconds of one of several calls in a graph."""
    calls = 10

    def several() -> None:
        for _ in range(calls):
            work()

    work()
    bench.barrier()
    (taken,) = bench.seconds(captured(several, 0), repeats=10, warm_up=2)
    return taken / calls


def write(machine: Machine, file: TextIO, only: Only = "") -> None:
    """The machine, then its points as they come, to rank 0's file; the time of each kind to its standard error."""
    link = 0.0
    if machine.transport:
        pairs = links.pair_rates(machine.transport)
        link = min(rate for i, row in enumerate(pairs) for j, rate in enumerate(row) if i != j)
    cluster = cluster_of(machine, link)
    common: dict[str, Any] = {"machine": f"{machine.size} x {device_name(machine.device)}", "commit": commit()}
    common["source"] = "soloist calibrate"
    first = {"what": "machine", "cluster": msgspec.to_builtins(cluster), "torch": torch.__version__, **common}
    print(json.dumps(first, separators=(",", ":")), file=file)
    spent: dict[str, float] = {}
    before = time.monotonic()
    for record in records(machine, cluster, only):
        print(record.line(**common), file=file, flush=True)
        spent[record.what] = spent.get(record.what, 0.0) + time.monotonic() - before
        before = time.monotonic()
    if file.name != os.devnull:
        print("  ".join(f"{what} {taken:.1f} s" for what, taken in spent.items()), file=sys.stderr)


def main(
    out: Annotated[Path, typer.Option(help="file of JSON lines")],
    cpu: Annotated[bool, typer.Option(help="leave GPUs alone")] = False,
    only: Annotated[Only, typer.Option(help="kernels or links")] = "",
) -> None:
    """One rank; started by `calibrate`, or once a rank by torchrun and the like."""
    machine = Machine.join(cpu)
    with open(out if os.environ["RANK"] == "0" else os.devnull, "w") as file:
        write(machine, file, only)
    if machine.transport:
        machine.transport.barrier("calibrate, end")
        machine.transport.close()


if __name__ == "__main__":
    typer.run(main)
