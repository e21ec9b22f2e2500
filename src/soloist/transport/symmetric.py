"""Memory that every rank of an NVLink domain can address, and the record of peers that did not answer.

It is no `Transport`: kernels and copy engines move the rows. In a test the ranks live in one process, their windows are
plain tensors, and the kernels run in Triton's interpreter.
"""

from __future__ import annotations

import importlib
import itertools
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributed import Store

from soloist.errors import CommunicationError

_group_numbers = itertools.count()  # PyTorch keeps groups by name for the life of the process


@dataclass(frozen=True)
class Window:
    """The same number of bytes on every rank, all of them mapped here."""

    rank: int
    bases: Tensor  # int64 [ranks], on the device: the address of each rank's bytes
    bytes_of: tuple[Tensor, ...]  # uint8, by rank
    handle: object = None  # keeps the mapping alive

    @property
    def ranks(self) -> int:
        return len(self.bytes_of)

    @property
    def device(self) -> torch.device:
        return self.bases.device

    def view(self, at: int, shape: tuple[int, ...], dtype: torch.dtype, rank: int | None = None) -> Tensor:
        """A tensor at byte `at` of a rank's bytes; this rank's where none is named."""
        size = torch.Size(shape).numel() * dtype.itemsize
        held = self.bytes_of[self.rank if rank is None else rank]
        return held[at : at + size].view(dtype).view(shape)


@dataclass
class SymmetricGroup:
    """Ranks whose GPUs reach each other over NVLink. `store` is theirs alone and serves one group.

    Uses PyTorch's symmetric memory with its CUDA backend. Windows must be opened outside CUDA graph capture.
    """

    store: Store
    rank: int
    size: int
    device: torch.device
    name: str = field(default_factory=lambda: f"soloist-{next(_group_numbers)}")

    def __post_init__(self) -> None:
        c10d: Any = importlib.import_module("torch._C._distributed_c10d")

        # Symmetric memory finds ranks and store by the name of a process group; none of its collectives is used.
        self._named = c10d.ProcessGroup(self.store, self.rank, self.size)
        c10d._register_process_group(self.name, self._named)
        self._backend = c10d._SymmetricMemory

    def window(self, size: int) -> Window:
        """Collective: `size` bytes on every rank, zeroed."""
        own = self._backend.empty_strided_p2p((size,), (1,), torch.uint8, self.device, self.name)
        own.zero_()
        handle = self._backend.rendezvous(own, self.name)
        torch.cuda.synchronize(self.device)
        handle.barrier()
        bases = torch.tensor(handle.buffer_ptrs, dtype=torch.int64, device=self.device)
        assert handle.buffer_ptrs[self.rank] == own.data_ptr()
        views = (handle.get_buffer(rank, (size,), torch.uint8) for rank in range(self.size))
        return Window(self.rank, bases, tuple(views), (own, handle))


def windows_in_process(ranks: int, size: int, device: torch.device | str = "cpu") -> list[Window]:
    """The windows of ranks that live in this process, on one device, and run in turn."""
    held = tuple(torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(ranks))
    bases = torch.tensor([bytes_.data_ptr() for bytes_ in held], dtype=torch.int64, device=device)
    return [Window(rank, bases, held) for rank in range(ranks)]


class Watch:
    """Which peers kept a kernel waiting too long, and in what.

    `failed` lies on the device: after the first late peer no kernel waits any more, or reports. `report` is host memory
    that the kernels write: for each rank the number of what was waited for. Looking at it costs no synchronisation.
    """

    def __init__(self, rank: int, ranks: tuple[int, ...], device: torch.device, deadline_s: float) -> None:
        self.rank, self.ranks, self.deadline_s = rank, ranks, deadline_s
        self.failed = torch.zeros(1, dtype=torch.int32, device=device)
        self.report = torch.zeros(len(ranks), dtype=torch.int64, pin_memory=device.type == "cuda")
        self._subjects: list[str] = []

    @property
    def timeout_ns(self) -> int:
        return int(self.deadline_s * 1e9)

    def number(self, where: str) -> int:
        """What kernels write to `report` when a peer is late in `where`: from 1 on, since 0 stands for nobody."""
        if where not in self._subjects:
            self._subjects.append(where)
        return self._subjects.index(where) + 1

    def check(self) -> None:
        """Raises CommunicationError if a kernel gave up on a peer. Then the windows are not to be used any more."""
        for index, number in enumerate(self.report.tolist()):
            if number:
                reason = f"no answer within {self.deadline_s:g} s"
                raise CommunicationError(self.ranks[self.rank], self.ranks[index], self._subjects[number - 1], reason)
