"""From a store where ranks meet to the transport that they asked for."""

from __future__ import annotations

from datetime import timedelta

import torch
from torch.distributed import PrefixStore, Store

from soloist.errors import ConfigurationError
from soloist.transport.base import Transport
from soloist.transport.gloo import GlooTransport
from soloist.transport.local import LocalGroup, LocalTransport
from soloist.transport.mpi_options import MpiOptions
from soloist.transport.shared_memory import SharedMemoryTransport

KINDS = {"gloo": "cpu", "mpi": "", "nccl": "cuda", "shared_memory": "cpu"}  # and the only device they serve


def connect(
    kind: str,
    rank: int,
    size: int,
    store: Store,
    device: torch.device | str = "cpu",
    deadline_s: float = 60.0,
    host: str | None = None,
    mpi: MpiOptions | None = None,
) -> Transport:
    """The world's transport, called by all its ranks; every one of them must arrive within the deadline.

    `store`: a `FileStore` of ranks on one machine, a `TCPStore` otherwise; its keys are put below `kind`, so that one
    store serves one transport of each kind. For another world (another epoch) pass a `PrefixStore` with its number.
    MPI has its own way to meet and needs no store.
    host: where the others reach this rank, for transports over TCP.
    Raises ConfigurationError for an unknown kind or a device that it cannot serve, CommunicationError if a peer does
    not come.
    """
    ranks, own = range(size), PrefixStore(kind, store)
    device = torch.device(device)
    if device.type != (KINDS.get(kind) or device.type):
        raise ConfigurationError.of("transport", kind, f"moves tensors on {KINDS[kind]}, not on {device}")
    store.set_timeout(timedelta(seconds=deadline_s))
    if kind == "gloo":
        return GlooTransport(own, ranks, rank, deadline_s, host)
    if kind == "shared_memory":
        return SharedMemoryTransport(own, ranks, rank, deadline_s)
    if kind == "mpi":
        from soloist.transport.mpi import MpiTransport

        return MpiTransport.world(rank, size, device, deadline_s, mpi)
    if kind == "nccl":
        from soloist.transport.nccl import NcclTransport

        index = torch.cuda.current_device() if device.index is None else device.index
        return NcclTransport(own, ranks, rank, torch.device("cuda", index), deadline_s)
    raise ConfigurationError.of("transport", kind, f"choose one of {', '.join(KINDS)}")


def local_world(size: int, deadline_s: float = 60.0) -> list[Transport]:
    """Transports for `size` threads of this process."""
    group = LocalGroup(range(size))
    return [LocalTransport(group, rank, deadline_s) for rank in range(size)]
