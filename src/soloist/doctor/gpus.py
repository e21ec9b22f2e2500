"""Checks of each GPU, and of GPUs against each other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from soloist.doctor.finding import Finding, error, note, ok, warning
from soloist.doctor.machine import GpuFacts, Machine

HOT_C = 85
IN_USE = 0.05  # share of a GPU's memory that is taken before anything of ours runs
SMALL_PCIE = 8  # lanes


def check_gpus(machine: Machine) -> Iterator[Finding]:
    """Health of each GPU, and whether all are alike."""
    if not machine.gpus:
        yield note("gpus", "no NVIDIA GPU is visible", "models run on the CPU here", "on a GPU host: load its driver")
        return
    kinds = Counter(gpu.name for gpu in machine.gpus)
    if len(kinds) > 1:
        what = ", ".join(f"{count} × {name}" for name, count in kinds.items())
        yield warning(
            "gpus", f"GPUs differ: {what}", "every step waits for the slowest", "use one kind in a deployment"
        )
    troubles = [finding for gpu in machine.gpus for finding in _one(gpu)]
    yield from troubles
    if not troubles and len(kinds) == 1:
        (name, count), *_ = kinds.items()
        yield ok(
            "gpus", f"{count} × {name}, driver {machine.driver or 'unknown'}: clocks, power, memory as they should be"
        )


def _one(gpu: GpuFacts) -> Iterator[Finding]:
    who = f"GPU {gpu.index}"
    yield from _fitness(gpu, who)
    yield from _speed(gpu, who)


def _fitness(gpu: GpuFacts, who: str) -> Iterator[Finding]:
    """What keeps it from taking part at all."""
    if gpu.mig:
        yield error(
            "mig",
            f"{who} is cut into MIG instances",
            "instances reach no peers and share no NVLink",
            f"nvidia-smi -i {gpu.index} -mig 0, or leave it out by CUDA_VISIBLE_DEVICES",
        )
    if gpu.uncorrected_errors:
        yield error(
            "memory errors",
            f"{who} has {gpu.uncorrected_errors} uncorrected memory errors",
            "results may be wrong, and the driver ends programs that meet the next one",
            f"drain the host and nvidia-smi -i {gpu.index} --gpu-reset; if they come back, replace the GPU",
        )
    used = gpu.memory_bytes - gpu.memory_free_bytes
    if gpu.memory_bytes and used > IN_USE * gpu.memory_bytes:
        yield warning(
            "memory",
            f"{who} has {used / 1e9:.1f} of {gpu.memory_bytes / 1e9:.0f} GB in use already",
            "the plan counts on all of it",
            "end what runs there (nvidia-smi shows it), or plan with less",
        )


def _speed(gpu: GpuFacts, who: str) -> Iterator[Finding]:
    """What makes it slower than its kind, and with it all others."""
    if gpu.power_limit_W and gpu.power_default_W and gpu.power_limit_W < 0.99 * gpu.power_default_W:
        yield warning(
            "power limit",
            f"{who} is limited to {gpu.power_limit_W:.0f} W, by default {gpu.power_default_W:.0f} W",
            "long matrix products run at lower clocks, and all ranks wait for this one",
            f"nvidia-smi -i {gpu.index} -pl {gpu.power_default_W:.0f}",
        )
    if gpu.slowdowns:
        yield warning(
            "clocks",
            f"{who} is held down at {gpu.sm_clock_MHz} of {gpu.sm_clock_max_MHz} MHz: " + ", ".join(gpu.slowdowns),
            "all ranks wait for the slowest GPU",
            "look at cooling, power supply and what else runs there",
        )
    if gpu.temperature_C is not None and gpu.temperature_C >= HOT_C:
        yield warning("temperature", f"{who} has {gpu.temperature_C} °C", "its clocks will fall", "look at the cooling")
    if gpu.pcie_width and gpu.pcie_width_max and gpu.pcie_width < gpu.pcie_width_max:
        severity = error if gpu.pcie_width < SMALL_PCIE else warning
        yield severity(
            "PCIe",
            f"{who} runs on {gpu.pcie_width} of {gpu.pcie_width_max} PCIe lanes",
            "loading weights, and its NIC where that sits behind the same switch, are as much slower",
            "reseat the card or riser; see lspci -vv for LnkSta",
        )
    if gpu.persistence is False:
        yield note(
            "persistence",
            f"{who}: persistence mode is off",
            "the first use after a pause takes seconds longer",
            "nvidia-smi -pm 1",
        )
