"""What the command line shows of placements: `soloist placement solve | show | export | import | trace`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from soloist.errors import ConfigurationError
from soloist.placement.balance import imbalance
from soloist.placement.formats import Notices, export_placement, import_placement
from soloist.placement.layer import Exchange, Target, Weights
from soloist.placement.placement import Placement
from soloist.placement.sglang import read_sglang_dumps
from soloist.placement.solve import Solution, solve
from soloist.placement.trace import Array, RoutingTrace
from soloist.placement.traffic import measure
from soloist.specs.cluster import cluster as cluster_named
from soloist.specs.layout import Layout
from soloist.specs.model import DTYPE_BYTES
from soloist.specs.named import shape_of

Named = dict[str, tuple[Placement, Array | None]]


def run_solve(
    model: str,
    layout: str,
    output: Path,
    trace: Path | None = None,
    gpus_per_node: int = 8,
    cluster: str | None = None,
    slots: int | None = None,
    exchange: Exchange = "hierarchical",
    current: Path | None = None,
    weights: Weights | None = None,
    split_groups: bool = False,
) -> None:
    """Solve a placement, write it, and compare it with the baselines.

    trace: by default `routing.trace` in the model's folder. cluster: a preset or file, instead of `gpus_per_node`.
    slots: of each group; None: as many as there are experts. current: a placement to start from. split_groups: experts
    of one router group may lie on several nodes.
    """
    spec, cut = shape_of(model), Layout.parse(layout)
    recorded = RoutingTrace.load(trace or Path(model).expanduser() / "routing.trace")
    recorded.check(spec)
    machine = cluster_named(cluster) if cluster else None
    node_of_group = nodes(cut, machine.gpus_per_node if machine else gpus_per_node)
    matrices = None
    if machine:
        gpus = np.arange(cut.ep) * cut.tp  # the first of each group
        every = (machine.bandwidth_matrix(cut.stage_ranks), machine.latency_matrix(cut.stage_ranks))
        matrices = (every[0][np.ix_(gpus, gpus)], every[1][np.ix_(gpus, gpus)])
    held = Placement.load(current) if current else None
    if held:
        held.check(spec, cut)
    target = Target.of(spec.experts, node_of_group, slots, exchange)
    row_bytes = spec.d_model * DTYPE_BYTES[spec.dtype]
    router_groups = 1 if split_groups else spec.router.groups
    found = solve(recorded, target, weights, matrices, row_bytes, held, router_groups=router_groups)
    found.placement.check(spec, cut)
    found.placement.save(output)
    console = Console()
    console.print(table(_named(found), recorded, node_of_group))
    console.print(summary(found, target))
    console.print(f"Written to {output}", highlight=False, soft_wrap=True)


def run_show(placement: Path, trace: Path | None = None, gpus_per_node: int = 8, tp: int = 1, layer: int = 0) -> None:
    """What a placement holds, one layer of it, and with a trace what it makes travel."""
    shown, console = Placement.load(placement), Console()
    counts = [sum(map(len, slots)) for slots in shown.slots]
    console.print(
        f"{len(counts)} MoE layers of {shown.experts} experts on {shown.groups} groups, "
        f"{min(counts)} to {max(counts)} slots a layer"
    )
    if not 0 <= layer < len(counts):
        raise ConfigurationError.of("layer", layer, f"the placement has MoE layers 0 to {len(counts) - 1}")
    held = Table(title=f"MoE layer {layer}", title_justify="left")
    held.add_column("group", justify="right")
    held.add_column("experts")
    for group, experts in enumerate(shown.slots[layer]):
        held.add_row(str(group), ", ".join(map(str, experts)))
    console.print(held)
    if trace:
        node_of_group = nodes(Layout(ep=shown.groups, tp=tp), gpus_per_node)
        console.print(table({placement.name: (shown, None)}, RoutingTrace.load(trace), node_of_group))


def run_export(placement: Path, model: str, form: str, output: Path) -> None:
    """Write a placement as another engine's file."""
    _say(export_placement(Placement.load(placement), shape_of(model), form, output), output)


def run_import(file: Path, model: str, form: str, groups: int, output: Path) -> None:
    """Write another engine's file as a placement."""
    placement, notices = import_placement(shape_of(model), groups, form, file)
    placement.save(output)
    _say(notices, output)


def run_read_dumps(model: str, dumps: Sequence[Path], output: Path) -> None:
    """Write what SGLang's recorder dumped as a trace."""
    trace = read_sglang_dumps(shape_of(model), dumps)
    trace.save(output)
    notices = [f"{trace.tokens} tokens of {trace.model}"]
    if trace.sample is None:
        notices.append("these dumps hold counts only: a placement solved from them evens out load, not traffic")
    _say(notices, output)


def nodes(layout: Layout, gpus_per_node: int) -> list[int]:
    """The node of each expert group of a stage that begins a node."""
    return [group * layout.tp // gpus_per_node for group in range(layout.ep)]


def table(placements: Named, trace: RoutingTrace, node_of_group: Sequence[int]) -> Table:
    """Placements side by side: rows that cross nodes, by the trace's tokens, and how even it all is."""
    title = f"{trace.model.name}, {max(node_of_group) + 1} nodes, for each token and layer"
    shown = Table(title=title, title_justify="left")
    names = ["placement", "objective", "rows, once per node", "rows, once per group", "fullest NIC", "fullest group"]
    for name in names:
        first = name == "placement"
        shown.add_column(name, justify="left" if first else "right", no_wrap=first)
    for name, (placement, value_L) in placements.items():
        value = "" if value_L is None else f"{value_L.mean():.4f}"
        shown.add_row(name, value, *_figures(placement, trace, node_of_group))
    return shown


def summary(found: Solution, target: Target) -> str:
    """What the search did, and how far its result may be from the best."""
    part = "node" if target.exchange == "hierarchical" else "group"
    text = f"{found.swaps} swaps on rows that a token sends once to each {part}"
    text += f"; lower bound {found.bound_L.mean():.4f} (gap {found.gap:.1%})"
    if found.keeps_groups:
        text += "; every router group lies whole on one node"
    return text


def _named(found: Solution) -> Named:
    return {**found.baselines, "solved": (found.placement, found.value_L)}


def _figures(placement: Placement, trace: RoutingTrace, node_of_group: Sequence[int]) -> list[str]:
    if trace.sample is None:
        return ["", "", "", f"{imbalance(placement, trace.counts_LE):.3f}"]
    traffic = measure(placement, trace, node_of_group)
    rows = [f"{traffic.per_token(hierarchical):.4f}" for hierarchical in (True, False)]
    return [*rows, f"{traffic.fullest_nic(True):.3f}", f"{traffic.fullest_group():.3f}"]


def _say(notices: Notices, output: Path) -> None:
    console = Console()
    console.print(f"Written to {output}", highlight=False, soft_wrap=True)
    for notice in notices:
        console.print(f"· {notice}", highlight=False, soft_wrap=True)  # may hold a command to copy
