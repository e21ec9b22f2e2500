"""GPUs as the driver's library describes them (nvidia-ml-py)."""

from __future__ import annotations

from collections.abc import Callable
from itertools import permutations
from typing import Any

from soloist.doctor.machine import GpuFacts

SLOWDOWNS = {0x4: "power cap", 0x8: "hardware slowdown", 0x20: "thermal, by software", 0x40: "thermal, by hardware",
             0x80: "power brake"}  # fmt: skip


def read() -> tuple[tuple[GpuFacts, ...], str, tuple[int, int] | None, dict[str, bool]] | None:
    """GPUs, driver, the newest CUDA that it serves, and who can address whose memory; None without NVML."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
    cuda = _ask(pynvml, pynvml.nvmlSystemGetCudaDriverVersion)
    version = (cuda // 1000, cuda % 1000 // 10) if cuda else None
    peers = {
        f"{a} {b}": status == pynvml.NVML_P2P_STATUS_OK
        for a, b in permutations(range(len(handles)), 2)
        if (status := _ask(pynvml, pynvml.nvmlDeviceGetP2PStatus, handles[a], handles[b], 0)) is not None
    }
    gpus = tuple(_facts(pynvml, i, handle) for i, handle in enumerate(handles))
    return gpus, str(_ask(pynvml, pynvml.nvmlSystemGetDriverVersion) or ""), version, peers


def _ask(nvml: Any, function: Callable[..., Any], *arguments: Any) -> Any:
    """None where this GPU or driver does not answer that."""
    try:
        return function(*arguments)
    except nvml.NVMLError:
        return None


def _facts(nvml: Any, index: int, handle: Any) -> GpuFacts:
    def ask(name: str, *arguments: Any) -> Any:
        function = getattr(nvml, name, None)
        return _ask(nvml, function, handle, *arguments) if function else None

    memory, links, mig = ask("nvmlDeviceGetMemoryInfo"), _nvlinks(ask), ask("nvmlDeviceGetMigMode")
    return GpuFacts(
        index=index,
        name=str(ask("nvmlDeviceGetName") or "GPU"),
        memory_bytes=memory.total if memory else 0,
        memory_free_bytes=memory.free if memory else 0,
        sm_clock_MHz=ask("nvmlDeviceGetClockInfo", nvml.NVML_CLOCK_SM),
        sm_clock_max_MHz=ask("nvmlDeviceGetMaxClockInfo", nvml.NVML_CLOCK_SM),
        slowdowns=slowdowns(ask("nvmlDeviceGetCurrentClocksThrottleReasons") or 0),
        power_limit_W=_watts(ask("nvmlDeviceGetPowerManagementLimit")),
        power_default_W=_watts(ask("nvmlDeviceGetPowerManagementDefaultLimit")),
        temperature_C=ask("nvmlDeviceGetTemperature", nvml.NVML_TEMPERATURE_GPU),
        persistence=_flag(ask("nvmlDeviceGetPersistenceMode")),
        mig=_flag(mig[0]) if mig else None,
        uncorrected_errors=ask(
            "nvmlDeviceGetTotalEccErrors", nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC
        ),
        pcie_width=ask("nvmlDeviceGetCurrPcieLinkWidth"),
        pcie_width_max=ask("nvmlDeviceGetMaxPcieLinkWidth"),
        nvlinks_up=sum(links),
        nvlinks=len(links),
    )


def _nvlinks(ask: Callable[..., Any], most: int = 18) -> list[bool]:
    states = [ask("nvmlDeviceGetNvLinkState", link) for link in range(most)]
    return [bool(state) for state in states if state is not None]


def slowdowns(bits: int) -> tuple[str, ...]:
    """The reasons of a mask that mean less speed than could be; idle and set clocks do not."""
    return tuple(name for bit, name in SLOWDOWNS.items() if bits & bit)


def _watts(milliwatts: int | None) -> float | None:
    return None if milliwatts is None else milliwatts / 1e3


def _flag(value: int | None) -> bool | None:
    return None if value is None else bool(value)
