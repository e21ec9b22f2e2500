"""Flat against hierarchical exchange, linear against solved placement, over a real network between simulated nodes.

    sudo .venv/bin/python examples/network_exchange.py --shapes 2x8 4x4 --mbit 100 --out out/network

Nodes are network namespaces of this machine, joined by veth links at a rate that `tc` keeps; 16 ranks run the shipped
model in them, one expert each, on prompts from its recorded trace. Ranks of a node share memory, ranks of different
nodes reach each other over TCP alone. What crosses is read from the kernel's interface counters: bytes − 66 a packet
(Ethernet, IP, TCP), less what the same ranks send while they idle for as long. Beside it stands the planner's
prediction: rows of the trace that have to cross, times the bytes of a row there and back.

Needs root and iproute2; leaves no namespace behind. Writes a table, JSON lines and a picture.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from soloist.bench.namespaces import Network
from soloist.errors import SoloistError
from soloist.placement.layer import Target
from soloist.placement.placement import Placement
from soloist.placement.solve import solve
from soloist.placement.trace import RoutingTrace, Sample
from soloist.placement.traffic import measure

MODEL = Path(__file__).parent.parent / "models" / "novels-moe-11m"
RANKS, SEQUENCES, LENGTH = 16, 16, 256
IDLE_S, ANSWER_TOKENS, PORT = 2.0, 8, 29500
LONGEST_S = 240.0  # of one run
QUIET = {"TORCH_CPP_LOG_LEVEL": "ERROR"}  # torch's stores warn of namespaces without names
COLUMNS = {
    "shape": "shape",
    "exchange": "exchange",
    "placement": "placement",
    "overlap": "overlap",
    "rows": "rows/token",
    "predicted_MB": "predicted MB",
    "payload_MB": "payload MB",
    "error": "error",
    "raw_MB": "raw MB",
    "prefill_s": "prefill step s",
    "link_s": "link alone s",
    "decode_ms": "decode step ms",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["2x8", "4x4"], help="nodes x ranks of a node, 16 in all")
    parser.add_argument("--mbit", type=float, default=100.0, help="rate of each node's link")
    parser.add_argument("--exchange", nargs="+", default=["flat", "hierarchical"], help="that are compared")
    parser.add_argument("--overlap", nargs="+", default=["off"], help="off, on: whole steps, two halves that overlap")
    parser.add_argument("--delay-ms", type=float, default=0.0, help="of each packet, where the kernel has netem")
    parser.add_argument("--out", type=Path, default=Path("out/network"))
    parser.add_argument("--agent", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.agent is not None:
        return agent(arguments.agent)
    try:
        rows = [row for shape in arguments.shapes for row in compare(shape, arguments)]
    except SoloistError as error:
        sys.exit(f"error: {error}")
    print_table(rows, arguments.mbit)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "network.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    plot(rows, arguments.mbit, arguments.out / "network.png")
    return None


# -- the experiment -------------------------------------------------------------------------------------------------
def compare(shape: str, given: argparse.Namespace) -> list[dict[str, Any]]:
    """The exchanges, whole steps and halves, and both placements on one shape, in one network and with one set of
    agents."""
    nodes, each = (int(part) for part in shape.split("x"))
    assert nodes * each == RANKS, f"{shape}: one expert a rank takes {RANKS} ranks"
    trace = part_of_trace()
    node_of_rank = [rank // each for rank in range(RANKS)]
    found = solve(RoutingTrace.load(MODEL / "routing.trace"), Target.of(RANKS, node_of_rank))
    placements = {"linear": found.baselines["linear"][0], "solved": found.placement}
    rows, texts, mbit = [], set(), given.mbit
    with Network(nodes, mbit, given.delay_ms) as network, Agents(network, each) as agents:
        for exchange, (name, placement), overlap in itertools.product(
            given.exchange, placements.items(), given.overlap
        ):
            traffic = measure(placement, trace, node_of_rank)
            job = {"exchange": exchange, "overlap": overlap, "placement": placement.slots}
            run = agents.run({**job, "tokens": trace_prompts(trace)})
            crossing = traffic.cross_node_rows(exchange == "hierarchical")
            predicted = crossing * run["row_bytes"]
            row = {
                "shape": shape, "exchange": exchange, "placement": name, "overlap": overlap,
                "rows": traffic.per_token(exchange == "hierarchical"), "predicted_MB": predicted / 1e6,
                "payload_MB": run["payload"] / 1e6, "error": run["payload"] / predicted - 1,
                "raw_MB": run["raw"] / 1e6, "prefill_s": run["prefill_s"] / run["steps"],
                "link_s": fullest_link(traffic, exchange == "hierarchical", run) * 8e-6 / mbit / run["steps"],
                "decode_ms": 1e3 * run["decode_s"], "steps": run["steps"], "mbit": mbit, "explain": run["explain"],
            }  # fmt: skip
            rows.append(row)
            texts.add(json.dumps(run["answers"]))
            print(json.dumps(row), flush=True)
    print(f"{shape}: {'the same tokens from all runs' if len(texts) == 1 else f'{len(texts)} DIFFERENT ANSWERS'}")
    return rows


def part_of_trace() -> RoutingTrace:
    """The beginnings of some sequences, one for each rank."""
    trace = RoutingTrace.load(MODEL / "routing.trace")
    sample = trace.needed_sample
    taken = (sample.position_T < LENGTH) & (sample.sequence_T < SEQUENCES)
    arrays = {name: array[taken] for name, array in vars(sample).items() if name != "ids_LTK"}
    return RoutingTrace.of_sample(trace.model, Sample(ids_LTK=sample.ids_LTK[:, taken], **arrays))


def trace_prompts(trace: RoutingTrace) -> list[list[int]]:
    return trace.needed_sample.prompts()


def fullest_link(traffic: Any, hierarchical: bool, run: dict[str, Any]) -> float:
    """Bytes that the busiest node sends, tokens and results: what the link alone takes its time for."""
    rows_LNN = traffic.node_rows_LNN if hierarchical else traffic.flat_node_rows()
    rows_NN = rows_LNN.sum(axis=0)
    np.fill_diagonal(rows_NN, 0)
    return float((rows_NN.sum(axis=1) * run["out_bytes"] + rows_NN.sum(axis=0) * run["home_bytes"]).max())


# -- ranks in namespaces --------------------------------------------------------------------------------------------
class Agents:
    """One process in each node, which has imported torch and forks the node's ranks for every run."""

    def __init__(self, network: Network, each: int) -> None:
        self.network, self.each, self.port = network, each, PORT
        self.processes = [
            subprocess.Popen(
                node.command([sys.executable, __file__, "--agent", str(index)]),
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=QUIET | dict(os.environ),
            )
            for index, node in enumerate(network.nodes)
        ]  # fmt: skip

    def __enter__(self) -> Agents:
        return self

    def __exit__(self, *raised: object) -> None:
        for process in self.processes:
            process.kill()
            process.wait()

    def run(self, job: dict[str, Any]) -> dict[str, Any]:
        """Start a world, let it do the job, and return what rank 0 says."""
        self.port += 1
        common = {"each": self.each, "nodes": len(self.network.nodes), "prefix": self.network.prefix}
        meeting = {"head": self.network.nodes[0].address, "port": self.port}
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.write(json.dumps(job | common | meeting) + "\n")
            process.stdin.flush()
        answers = [json.loads(line) for line in map(_line, self.processes)]
        if "error" in answers[0]:
            raise SoloistError(f"rank 0: {answers[0]['error']}")
        return answers[0]


def _line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise SoloistError("an agent has ended; its messages stand above")
    return line


def agent(node: int) -> None:
    """Runs inside a namespace: one line of JSON in for each run, one out."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["soloist.engine.preload", "__main__"])
    for line in sys.stdin:
        job = json.loads(line)
        ours, theirs = context.Pipe(duplex=False)
        ranks = [
            context.Process(target=rank_of, args=(job, node, local, theirs), daemon=True)
            for local in range(job["each"])
        ]
        for process in ranks:
            process.start()
        until = time.monotonic() + LONGEST_S
        answer = {}
        if node == 0:
            answer = ours.recv() if ours.poll(LONGEST_S) else {"error": f"no answer within {LONGEST_S:g} s"}
        for process in ranks:
            process.join(max(0.1, until - time.monotonic()))
            process.kill()
        print(json.dumps(answer), flush=True)


def rank_of(job: dict[str, Any], node: int, local: int, answers: Any) -> None:
    """One rank's life, as any launcher would start it."""
    rank = node * job["each"] + local
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(RANKS), LOCAL_RANK=str(local), LOCAL_WORLD_SIZE=str(job["each"]),
        MASTER_ADDR=job["head"], MASTER_PORT=str(job["port"]),
    )  # fmt: skip
    try:
        answer = serve(job)
    except Exception as error:
        answer = {"error": f"{type(error).__name__}: {error}"}
    if rank == 0:
        answers.send(answer)


def serve(job: dict[str, Any]) -> dict[str, Any]:
    """What rank 0 measures; the others leave with SystemExit inside the constructor."""
    import torch

    from soloist.dispatch.rows import RowFormat
    from soloist.engine.llm import LLM
    from soloist.scheduling.request import SamplingParams

    slots = tuple(tuple(map(tuple, layer)) for layer in job["placement"])
    network = Network(job["nodes"], prefix=job["prefix"])
    prompts, first = job["tokens"], SamplingParams(max_tokens=1, temperature=0.0)
    options = {"exchange": job["exchange"], "overlap": job["overlap"], "gpus_per_node": job["each"]}
    options |= {"prefix_caching": False, "kv_tokens": 2048}
    placement = Placement(experts=RANKS, slots=slots)
    with LLM(MODEL, f"ep{RANKS}", placement, device="cpu", show_progress=False, **options) as llm:
        answered = llm.generate([prompt[:32] for prompt in prompts], SamplingParams(max_tokens=2, temperature=0.0))
        start, steps = time.monotonic(), llm.figures()[0].steps
        answered = llm.generate(
            [prompt[:32] for prompt in prompts], SamplingParams(max_tokens=ANSWER_TOKENS, temperature=0.0)
        )
        decode_s = (time.monotonic() - start) / llm.figures()[0].steps
        idle = network.counters()
        time.sleep(IDLE_S)
        before, start = network.counters(), time.monotonic()
        read = llm.generate(prompts, first)
        seconds, after = time.monotonic() - start, network.counters()
        figures = llm.figures()[0]
        steps = figures.steps
        row = RowFormat(torch.float32, llm.spec.d_model, llm.spec.router.top_k)
        home_bytes = 4 * llm.spec.d_model
    sent = [now.since(then) for now, then in zip(after, before, strict=True)]
    idled = [now.since(then) for now, then in zip(before, idle, strict=True)]
    return {
        "payload": sum(c.payload for c in sent) - sum(c.payload for c in idled) * seconds / IDLE_S,
        "raw": sum(c.bytes for c in sent), "prefill_s": seconds, "steps": steps, "decode_s": decode_s,
        "row_bytes": row.row_bytes + home_bytes, "out_bytes": row.row_bytes, "home_bytes": home_bytes,
        "answers": [output.outputs[0].tokens for output in [*answered, *read]], "explain": figures.exchange,
    }  # fmt: skip


# -- what comes of it -----------------------------------------------------------------------------------------------
def print_table(rows: list[dict[str, Any]], mbit: float) -> None:
    table = Table(title=f"Exchange between nodes at {mbit:g} Mbit/s", title_justify="left")
    for title in COLUMNS.values():
        table.add_column(title, justify="left" if title in ("shape", "exchange", "placement", "overlap") else "right")
    for row in rows:
        values = (row[key] for key in COLUMNS)
        table.add_row(*(f"{v:+.2%}" if k == "error" else f"{v:.3f}" if isinstance(v, float) else str(v)
                        for k, v in zip(COLUMNS, values, strict=True)))  # fmt: skip
    Console(width=150).print(table)


def plot(rows: list[dict[str, Any]], mbit: float, path: Path) -> None:
    """Payload predicted and counted, and a step's time with what the link alone would take."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names = [
        f"{row['shape']}\n{row['exchange'].replace('hierarchical', 'by node')}\n{row['placement']}"
        + ("\nhalves" if row["overlap"] == "on" else "")
        for row in rows
    ]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for axes, title, bars in (
        (left, "Payload between nodes, MB", ("payload_MB", "predicted_MB")),
        (right, f"A prefill step at {mbit:g} Mbit/s, s", ("prefill_s", "link_s")),
    ):
        place = np.arange(len(rows))
        axes.bar(place, [row[bars[0]] for row in rows], color="#4878a8", label="measured")
        axes.plot(place, [row[bars[1]] for row in rows], "_", color="black", markersize=24, label="predicted" if axes is left else "the link alone")  # fmt: skip  # noqa: E501
        axes.set_xticks(place, names, fontsize=7)
        axes.set_title(title)
        axes.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()
