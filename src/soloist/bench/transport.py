"""How long the ranks of this machine take to exchange small messages over a CPU transport.

Shape legend: R rows, W elements of a row, N elements.
"""

from __future__ import annotations

import multiprocessing
import queue
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed import FileStore

from soloist.errors import ClusterError, ConfigurationError
from soloist.timing import measure, median_of_slowest
from soloist.transport.base import Transport
from soloist.transport.connect import KINDS, connect

REPEATS = 200
PATIENCE_S = 60


def time_transport(kind: str, ranks: int, rows: int, width: int) -> dict[str, float]:
    """Seconds of each operation between `ranks` processes: the median over calls of the slowest rank.

    Raises ConfigurationError for a transport that does not serve CPUs, ClusterError where a rank gave no answer.
    """
    if KINDS.get(kind) != "cpu":
        raise ConfigurationError.of("--kind", kind, "choose shared_memory or gloo")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["soloist.engine.preload"])
    with tempfile.TemporaryDirectory() as folder:
        answers: Any = context.Queue()
        arguments = (kind, ranks, str(Path(folder) / "store"), rows, width, answers)
        processes = [context.Process(target=_rank, args=(rank, *arguments), daemon=True) for rank in range(ranks)]
        for process in processes:
            process.start()
        try:
            seconds = [answers.get(timeout=PATIENCE_S) for _ in processes]
        except queue.Empty:
            raise ClusterError(f"a rank of {ranks} gave no answer within {PATIENCE_S} s") from None
        finally:
            for process in processes:
                process.join(PATIENCE_S if sys.exc_info()[0] is None else 0)
                process.kill()
    return {name: median_of_slowest([one[name] for one in seconds]) for name in seconds[0]}


def _rank(rank: int, kind: str, ranks: int, store: str, rows: int, width: int, answers: Any) -> None:
    torch.set_num_threads(1)
    transport = connect(kind, rank, ranks, FileStore(store, ranks))
    found = {}
    for name, operation in operations(transport, rows, width).items():
        transport.barrier()
        found[name] = measure(operation, repeats=REPEATS, warm_up=20)
    answers.put(found)
    transport.barrier()
    transport.close()


def operations(transport: Transport, rows: int, width: int) -> dict[str, Callable[[], object]]:
    """What a step does: rows to every peer, a sum over all, waiting for all."""
    counts = [rows] * transport.size
    rows_RW, x_N = torch.randn(rows * transport.size, width), torch.randn(8 * 256)
    return {
        f"{rows} rows of {width} fp32 to every rank": lambda: transport.all_to_all_rows(rows_RW, counts),
        "all-reduce of 8 KB": lambda: transport.all_reduce(x_N.clone()),
        "barrier": transport.barrier,
    }
