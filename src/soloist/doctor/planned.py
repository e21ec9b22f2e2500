"""Checks of the machine against a plan."""

from __future__ import annotations

from collections.abc import Iterator

from soloist.doctor.finding import Finding, error, ok, warning
from soloist.doctor.machine import Machine
from soloist.launchers.start import split_group
from soloist.planner.plan import Plan
from soloist.specs.cluster import preset_gpus
from soloist.specs.layout import Layout

NAMES = {  # as drivers write them, most telling first → preset
    "GB200": "GB200",
    "B200": "B200",
    "H200": "H200",
    "H800": "H800",
    "H20": "H20",
    "A100-SXM4-80GB": "A100-80GB",
    "A100 80GB": "A100-80GB",
    "H100 80GB HBM3": "H100-80GB",
}


def preset_of(name: str) -> str:
    """The preset GPU of a driver's name for it, "" if there is none. H100 PCIe and NVL are other GPUs than the SXM5."""
    return next((preset for part, preset in NAMES.items() if part in name), "")


def check_plan(machine: Machine, plan: Plan) -> Iterator[Finding]:
    """Whether this host is one of those that the plan was made for."""
    findings = [*_gpus(machine, plan), *_memory(machine, plan), *_mapping(plan.layout, plan.cluster.gpus_per_node)]
    yield from findings
    if not findings:
        nodes = plan.cluster.nodes(plan.layout.size)
        yield ok(
            "plan", f"{plan.model.name} on {plan.layout}: {plan.layout.size} GPUs in {nodes} node(s), as found here"
        )


def _gpus(machine: Machine, plan: Plan) -> Iterator[Finding]:
    needed = min(plan.layout.size, plan.cluster.gpus_per_node)
    if len(machine.gpus) < needed:
        yield error(
            "plan",
            f"{len(machine.gpus)} GPUs, the plan puts {needed} ranks on a node",
            "ranks without a GPU do not start",
            "plan for this host, or start it where the GPUs are",
        )
    planned = plan.cluster.gpu.name
    for name in dict.fromkeys(gpu.name for gpu in machine.gpus):
        found = preset_of(name)
        if planned in preset_gpus() and found != planned:
            yield warning(
                "plan",
                f"this is {name}, the plan is for {planned}",
                "its predictions do not hold here",
                "soloist plan --cluster with a file that describes this GPU",
            )


def _memory(machine: Machine, plan: Plan) -> Iterator[Finding]:
    wanted = sum(plan.memory_bytes.values())
    for gpu in machine.gpus[: plan.cluster.gpus_per_node]:
        if wanted > gpu.memory_free_bytes:
            largest = max(plan.memory_bytes, key=lambda part: plan.memory_bytes[part])
            yield error(
                "plan",
                f"GPU {gpu.index} has {gpu.memory_free_bytes / 1e9:.1f} GB free, the plan needs "
                f"{wanted / 1e9:.1f} GB ({largest}: {plan.memory_bytes[largest] / 1e9:.1f})",
                "the ranks will run out of memory",
                "end what uses it, or plan for less memory",
            )


def _mapping(layout: Layout, gpus_per_node: int) -> Iterator[Finding]:
    split = split_group(layout, gpus_per_node)
    if split:
        yield error(
            "plan",
            f"the TP group of ranks {split[0]}–{split[-1]} lies on two nodes of {gpus_per_node} GPUs",
            "its all-reduces cross the network in every layer",
            "choose a tp that divides the GPUs of a node",
        )
