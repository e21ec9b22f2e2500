"""Where the ranks of one world meet, and what each of them is told. Does not care who started them."""

from __future__ import annotations

import os
import re
import socket
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from soloist.engine.options import EngineOptions
from soloist.errors import ClusterError, ConfigurationError
from soloist.placement.placement import Placement
from soloist.specs.layout import Layout
from soloist.specs.model import ModelSpec

if TYPE_CHECKING:
    from torch.distributed import Store

Result = TypeVar("Result")
FRONT_END = "front end"  # the name under which its address is announced


@dataclass(frozen=True)
class Job:
    """What all ranks have to agree on. `folder` holds weights, `tokenizer` is a file; None where there is none."""

    spec: ModelSpec
    layout: Layout
    placement: Placement
    options: EngineOptions
    folder: Path | None = None
    tokenizer: Path | None = None


@dataclass(frozen=True)
class Place:
    """One rank among those that somebody started."""

    rank: int
    size: int
    local_rank: int  # among the ranks of this host
    local_size: int

    @property
    def one_host(self) -> bool:
        return self.local_size == self.size


# rank, size, local rank, local size, as torchrun, Open MPI, MPICH and srun call them
_NAMES = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),
)


def place_from(environment: Mapping[str, str]) -> Place | None:
    """This process's rank as its launcher tells it, None if it was started alone.

    Raises ConfigurationError for a variable that is no number, or a rank outside its world.
    """
    for rank, size, local_rank, local_size in _NAMES:
        if rank in environment and size in environment:
            world = _number(environment, size)
            place = Place(
                _number(environment, rank),
                world,
                _number(environment, local_rank, 0 if world == 1 else None),
                _number(environment, local_size, 1 if world == 1 else 0),
            )
            if not 0 <= place.rank < place.size:
                raise ConfigurationError.of(rank, place.rank, f"must lie between 0 and {size} - 1 = {place.size - 1}")
            return place
    return None


def _number(environment: Mapping[str, str], key: str, default: int | None = None) -> int:
    text = environment.get(key, default)
    try:
        return int(str(text).split("(")[0])  # Slurm writes 8(x2) for twice eight
    except ValueError:
        raise ConfigurationError.of(key, text, "must be a number; the launcher of the ranks sets it") from None


@dataclass(frozen=True)
class Meeting:
    """How one rank finds the others. Ranks of one launcher meet in a folder, others at the address of rank 0."""

    place: Place
    store: Store
    folder: Path | None = None
    host: str = "127.0.0.1"  # where this process can be reached, if not through the folder

    @classmethod
    def in_folder(cls, folder: Path, place: Place) -> Meeting:
        """For ranks of this machine that share a temporary folder."""
        from torch.distributed import FileStore

        return cls(place, FileStore(str(folder / "store"), place.size), folder)

    @classmethod
    def at_master(cls, place: Place, deadline_s: float) -> Meeting:
        """For ranks that somebody else started, at MASTER_ADDR and MASTER_PORT (by default 127.0.0.1:29500).

        Raises ClusterError if rank 0 cannot be met there within `deadline_s`.
        """
        import torch.distributed  # noqa: F401  on a busy machine that takes its time, which is not the others' fault

        host, port = master_from(os.environ)
        try:
            store = bounded(lambda: _store_at(host, port, place, deadline_s), deadline_s)
            return cls(place, store, host=_own_address(host))
        except (RuntimeError, OSError, ValueError) as error:
            reason = f"rank {place.rank} of {place.size} cannot meet the others at {host}:{port} ({error})"
            remedy = "check MASTER_ADDR, MASTER_PORT, and that rank 0 was started"
            if place.rank == 0:
                remedy = "MASTER_ADDR has to be an address of this host, and MASTER_PORT free on it"
            raise ClusterError(f"{reason}: {remedy}") from error

    def address(self, name: str) -> str:
        """Where `name` may listen, as ZeroMQ writes it."""
        return f"ipc://{self.folder}/{name.replace(' ', '-')}" if self.folder else f"tcp://{self.host}:*"

    def announce(self, name: str, address: str) -> None:
        self.store.set(f"address of {name}", address)

    def find(self, name: str) -> str:
        """The address of `name`, waited for as long as the store's timeout. Raises ClusterError if it never comes."""
        try:
            return self.store.get(f"address of {name}").decode()
        except RuntimeError as error:
            raise ClusterError(f"rank {self.place.rank}: nobody announced the {name} in time ({error})") from error


def master_from(environment: Mapping[str, str]) -> tuple[str, int]:
    """Where rank 0 keeps the store: as told, else the first node of the Slurm step, else this machine."""
    nodes = environment.get("SLURM_STEP_NODELIST", "") if "SLURM_PROCID" in environment else ""
    host = environment.get("MASTER_ADDR") or first_host(nodes) or "127.0.0.1"
    port = _number(environment, "MASTER_PORT", 29500)
    if not 0 < port < 1 << 16:
        raise ConfigurationError.of("MASTER_PORT", port, "must lie between 1 and 65535")
    return host, port


def first_host(nodes: str) -> str:
    """`gpu007` of Slurm's `gpu[007-010,012]`."""
    found = re.match(r"([^,\[]*)(?:\[(\d+)[^\]]*\]([^,\[]*))?", nodes)
    return "".join(part or "" for part in found.groups()) if found else ""


def _store_at(host: str, port: int, place: Place, deadline_s: float) -> Store:
    """torchrun's agents keep the store themselves, also over restarts, each of which gets keys of its own."""
    from torch.distributed import PrefixStore, TCPStore

    hosted = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    keeper = place.rank == 0 and not hosted
    store = TCPStore(host, port, None, keeper, timedelta(seconds=deadline_s), wait_for_workers=False)
    return PrefixStore(f"soloist {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def bounded(call: Callable[[], Result], seconds: float) -> Result:
    """What it returns or raises; TimeoutError if that takes longer. A store may wait for ever for a silent host."""
    outcome: list[Result | BaseException] = []

    def body() -> None:
        try:
            outcome.append(call())
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=body, daemon=True)
    thread.start()
    thread.join(seconds)
    if not outcome:
        raise TimeoutError(f"no answer within {seconds:g} s")
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    return outcome[0]


def _own_address(master: str) -> str:
    """The address of this host in the network that `master` is in."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((master, 1))  # sends nothing: chooses the interface
        return probe.getsockname()[0]
