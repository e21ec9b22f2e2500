"""The facts of one host that checks look at. Readers fill them (nvml, nvidia_smi, host); tests write them down."""

from __future__ import annotations

from soloist.specs.model import Spec


class GpuFacts(Spec, frozen=True, kw_only=True):
    """One GPU as its driver describes it. None: the driver does not say."""

    index: int
    name: str
    memory_bytes: int = 0
    memory_free_bytes: int = 0
    sm_clock_MHz: int | None = None
    sm_clock_max_MHz: int | None = None
    slowdowns: tuple[str, ...] = ()  # why the clock is held down now
    power_limit_W: float | None = None
    power_default_W: float | None = None
    temperature_C: int | None = None
    persistence: bool | None = None
    mig: bool | None = None
    uncorrected_errors: int | None = None  # of memory, since the driver was loaded
    pcie_width: int | None = None
    pcie_width_max: int | None = None
    nvlinks_up: int = 0
    nvlinks: int = 0


class Nic(Spec, frozen=True, kw_only=True):
    """One port that RDMA can use."""

    device: str  # mlx5_0
    port: int = 1
    state: str = ""  # ACTIVE, DOWN, INIT
    rate_Gbps: float = 0.0
    kind: str = ""  # InfiniBand or Ethernet (RoCE)
    peer_memory: bool | None = None  # a module lets it read GPU memory


class Interface(Spec, frozen=True, kw_only=True):
    """One network interface of the kernel."""

    name: str
    up: bool = True
    speed_Mbps: int | None = None


class Machine(Spec, frozen=True, kw_only=True):
    """One host. Sizes in bytes."""

    host: str = ""
    gpus: tuple[GpuFacts, ...] = ()
    driver: str = ""
    driver_cuda: tuple[int, int] | None = None  # the newest CUDA that the driver serves
    paths: dict[str, str] = {}  # "GPU0 GPU1" → NV18, PIX, PXB, PHB, NODE, SYS
    peers: dict[str, bool] = {}  # "0 1" → whether the first can address the memory of the second
    nics: tuple[Nic, ...] = ()
    interfaces: tuple[Interface, ...] = ()
    versions: dict[str, str] = {}  # soloist, python, torch, cuda, nccl, triton, mpi4py
    environment: dict[str, str] = {}
    cores: int = 1
    memory_bytes: int = 0
    memory_free_bytes: int = 0
    locked_bytes: int | None = None  # that a process may lock; None: any
    open_files: int | None = None
    shm_bytes: int | None = None  # free in /dev/shm
    ports_taken: tuple[int, ...] = ()  # of those that are wanted
