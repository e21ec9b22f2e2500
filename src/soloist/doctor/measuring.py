"""One rank that measures for the doctor; started once for each GPU of this host, or by the user's launcher.

`python -m soloist.doctor.measuring FILE`: rank 0 writes what was found there.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import msgspec
import torch

from soloist.doctor.measured import Measured, measure
from soloist.engine.meeting import Meeting, place_from
from soloist.errors import ClusterError
from soloist.probes.gpus import start_ranks
from soloist.transport.connect import connect

START_S = 60.0
LIMIT_S = 300.0


def measure_here() -> Measured:
    """On all GPUs of this host, a process each; on one, or on the CPU, in this process."""
    gpus = torch.cuda.device_count()
    if gpus < 2:
        return measure(torch.device("cuda", 0), "GPU 0") if gpus else measure(torch.device("cpu"), "CPU")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # the ranks': torch warns of single messages over NCCL
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "measured.json")
        if start_ranks("soloist.doctor.measuring", [str(file)], gpus, LIMIT_S):
            raise ClusterError(f"measuring on {gpus} GPUs failed; the lines above say why")
        return msgspec.json.decode(file.read_bytes(), type=Measured)


def measure_among(meeting: Meeting) -> Measured:
    """By all ranks that meet there."""
    place = meeting.place
    on_gpu = torch.cuda.device_count() > place.local_rank
    device = torch.device("cuda", place.local_rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // max(1, place.local_size)))
    kind = "nccl" if on_gpu else "gloo"
    transport = connect(kind, place.rank, place.size, meeting.store, device, START_S, meeting.host)
    try:
        return measure(device, "GPU" if on_gpu else "CPU", transport)
    finally:
        transport.close()


def main(file: str) -> None:
    place = place_from(os.environ)
    assert place is not None, "started by start_ranks"
    found = measure_among(Meeting.at_master(place, START_S))
    if place.rank == 0:
        Path(file).write_bytes(msgspec.json.encode(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
