"""Rows that cross nodes under three placements: predicted from recorded routing, and measured on 16 processes.

    python examples/placement_traffic.py --tokens 8192 --nodes 2 4 8 --exchange flat joined hierarchical

Runs the shipped model on 16 ranks that are declared to be 2, 4 and 8 nodes, on the tokens of its recorded trace, with
experts lying linearly, by the greedy algorithm, and as solved. Three exchanges are measured:

    flat          ep16: one expert on each rank; a token goes once to each rank that holds one of its experts
    joined        ep2tp8, ep4tp4, ep8tp2: the ranks of a node share its experts; a token goes once to each node
    hierarchical  ep16 again; a token crosses to each node once and fans out there

Bytes are what the ranks say that they sent to ranks of other nodes, divided by the bytes of a row there and back.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from soloist.dispatch.rows import RowFormat
from soloist.engine.llm import LLM
from soloist.placement.layer import Target
from soloist.placement.placement import Placement
from soloist.placement.solve import solve
from soloist.placement.trace import RoutingTrace
from soloist.placement.traffic import measure
from soloist.scheduling.request import SamplingParams
from soloist.specs.layout import Layout
from soloist.specs.model import ModelSpec

MODEL = Path(__file__).parent.parent / "models" / "novels-moe-11m"
RANKS = 16
EXCHANGES = ("flat", "joined", "hierarchical")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192, help="of the trace's sample")
    parser.add_argument("--nodes", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--exchange", nargs="+", default=list(EXCHANGES), choices=list(EXCHANGES))
    parser.add_argument("--json", type=Path, help="append one line for each row of the table")
    arguments = parser.parse_args()
    trace = RoutingTrace.load(MODEL / "routing.trace")
    rows = [row for nodes in arguments.nodes for row in compare(trace, arguments.tokens, nodes, arguments.exchange)]
    print_table(rows)
    if arguments.json:
        with arguments.json.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


def compare(trace: RoutingTrace, tokens: int, nodes: int, exchanges: Sequence[str]) -> list[dict[str, object]]:
    """All placements and exchanges on that many nodes."""
    measured_trace, per_node = trace.keep(tokens), RANKS // nodes
    node_of_rank = [rank // per_node for rank in range(RANKS)]
    found = solve(trace, Target.of(trace.model.experts, node_of_rank))
    placements = {name: found.baselines[name][0] for name in ("linear", "greedy")} | {"solved": found.placement}
    rows = []
    for name, placement in placements.items():
        joined = join_nodes(placement, node_of_rank)
        for exchange in exchanges:
            layout, used, node_of_group = Layout(ep=RANKS), placement, node_of_rank
            if exchange == "joined":
                layout, used, node_of_group = Layout(ep=nodes, tp=per_node), joined, list(range(nodes))
            by_node = exchange == "hierarchical"
            predicted = measure(used, measured_trace, node_of_group).cross_node_rows(by_node)
            run = run_and_count(measured_trace, layout, used, per_node, by_node)
            scale = 1 / (tokens * trace.model.moe_layers)
            row = {"nodes": nodes, "exchange": exchange, "placement": name}
            rows.append(row | {"predicted": predicted * scale, "measured": run * scale, "rows off": run - predicted})
            print(json.dumps(rows[-1]), flush=True)
    return rows


def join_nodes(placement: Placement, node_of_group: list[int]) -> Placement:
    """The same placement with a node's groups joined to one."""
    nodes = range(max(node_of_group) + 1)
    slots = tuple(
        tuple(
            tuple(sorted({e for group, at in zip(layer, node_of_group, strict=True) if at == node for e in group}))
            for node in nodes
        )
        for layer in placement.slots
    )
    return Placement(experts=placement.experts, slots=slots)


def run_and_count(
    trace: RoutingTrace, layout: Layout, placement: Placement, gpus_per_node: int, by_node: bool
) -> float:
    """Rows that cross nodes, one way, while the model reads the trace's prompts."""
    prompts = trace.needed_sample.prompts()
    options = {"prefix_caching": False, "kv_tokens": 4096, "device": "cpu"}
    options |= {"exchange": "hierarchical"} if by_node else {"exchange": "flat", "transport": "shared_memory"}
    with LLM(MODEL, layout, placement, gpus_per_node=gpus_per_node, show_progress=False, **options) as llm:
        llm.figures()  # forget what the start took
        llm.generate(prompts, SamplingParams(max_tokens=1))
        sent = sum(
            count
            for rank, figures in llm.figures().items()
            for peer, count in figures.bytes_to.items()
            if rank // gpus_per_node != peer // gpus_per_node
        )
        return sent / there_and_back(llm.spec)


def there_and_back(spec: ModelSpec) -> int:
    """Bytes of a row that is dispatched and of its result, on CPUs."""
    return RowFormat(torch.float32, spec.d_model, spec.router.top_k).row_bytes + spec.d_model * torch.float32.itemsize


def print_table(rows: list[dict[str, object]]) -> None:
    table = Table(title="Rows that cross nodes, for each token and MoE layer", title_justify="left")
    for name in rows[0]:
        table.add_column(name, justify="left" if name in ("exchange", "placement") else "right")
    for row in rows:
        table.add_row(
            *(f"{value:.4f}" if name in ("predicted", "measured") else f"{value}" for name, value in row.items())
        )
    Console().print(table)


if __name__ == "__main__":
    main()
