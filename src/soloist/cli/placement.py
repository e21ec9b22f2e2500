"""`soloist placement …` and `soloist record`: which expert where, from the routing of real tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from soloist.cli.options import DeviceOption, DtypeOption, Model, TransportOption, to_write

Form = Annotated[str, typer.Option("--format", help="sglang, tensorrt or eplb.")]
Output = Annotated[Path, typer.Option("--output", "-o", callback=to_write, help="File to write.")]
GpusPerNode = Annotated[int, typer.Option(min=1, help="GPUs of a node.")]

app = typer.Typer(no_args_is_help=True, help="Which expert lies where: solve, look at, exchange with other engines.")


@app.command()
def solve(
    model: Model,
    layout: Annotated[str, typer.Option(help="ep16, ep64tp2, …")],
    output: Output = Path("placement.json"),
    trace: Annotated[Path | None, typer.Option(help="By default routing.trace in the model's folder.")] = None,
    gpus_per_node: GpusPerNode = 8,
    cluster: Annotated[str | None, typer.Option(help="Preset or YAML file, for nodes and link costs.")] = None,
    slots: Annotated[int | None, typer.Option(help="Of each group; more than experts need hold replicas.")] = None,
    exchange: Annotated[
        Literal["hierarchical", "flat"], typer.Option(help="One row a node, or one a group.")
    ] = "hierarchical",
    current: Annotated[Path | None, typer.Option(help="Placement in use, to start from.")] = None,
    nic: Annotated[float, typer.Option(help="Weight of the fullest NIC.")] = 1.0,
    load: Annotated[float, typer.Option(help="Weight of the fullest node.")] = 1.0,
    migration: Annotated[float, typer.Option(help="Weight of moving every slot.")] = 0.0,
    split_groups: Annotated[
        bool, typer.Option("--split-groups", help="Let a router group's experts lie on several nodes.")
    ] = False,
) -> None:
    """Find a placement for recorded routing, and compare it with linear, round-robin and greedy."""
    from soloist.placement.commands import run_solve
    from soloist.placement.layer import Weights

    weights = Weights(nic=nic, load=load, migration=migration)
    run_solve(model, layout, output, trace, gpus_per_node, cluster, slots, exchange, current, weights, split_groups)


@app.command()
def show(
    placement: Annotated[Path, typer.Argument(help="A placement file.")],
    trace: Annotated[Path | None, typer.Option(help="Also what it makes travel.")] = None,
    gpus_per_node: GpusPerNode = 8,
    tp: Annotated[int, typer.Option(min=1, help="GPUs of a group.")] = 1,
    layer: Annotated[int, typer.Option(help="The MoE layer to print.")] = 0,
) -> None:
    """Print what a placement holds."""
    from soloist.placement.commands import run_show

    run_show(placement, trace, gpus_per_node, tp, layer)


@app.command()
def export(
    placement: Annotated[Path, typer.Argument(help="A placement file.")], model: Model, form: Form, output: Output
) -> None:
    """Write a placement for another engine."""
    from soloist.placement.commands import run_export

    run_export(placement, model, form, output)


@app.command("import")
def import_(
    file: Annotated[Path, typer.Argument(help="Another engine's file.")],
    model: Model,
    form: Form,
    groups: Annotated[int, typer.Option(min=1, help="Ranks that share the experts.")],
    output: Output = Path("placement.json"),
) -> None:
    """Read another engine's placement."""
    from soloist.placement.commands import run_import

    run_import(file, model, form, groups, output)


@app.command("read-dumps")
def read_dumps(
    model: Model,
    dumps: Annotated[list[Path], typer.Argument(help="What SGLang's recorder dumped: .pt, .json or .npz.")],
    output: Output = Path("routing.trace"),
) -> None:
    """Make a trace of SGLang's expert distribution dumps."""
    from soloist.placement.commands import run_read_dumps

    run_read_dumps(model, dumps, output)


def record(
    model: Model,
    text: Annotated[list[Path], typer.Option(help="Text file, also .xz; may be given several times.")],
    output: Output = Path("routing.trace"),
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to run.")] = 32768,
    window: Annotated[int, typer.Option(min=1, help="Tokens of each prompt.")] = 512,
    sample: Annotated[int | None, typer.Option(min=0, help="Tokens whose choices are kept; by default all.")] = None,
    counts_only: Annotated[bool, typer.Option("--counts-only", help="Keep no choices at all.")] = False,
    layout: Annotated[str, typer.Option(help="How to cut the model while recording.")] = "ep1",
    device: DeviceOption = "auto",
    dtype: DtypeOption = None,
    transport: TransportOption = "auto",
) -> None:
    """Record which experts a model's tokens choose on a text."""
    from soloist.engine.recording import run_record

    options = {"device": device, "dtype": dtype, "transport": transport}
    run_record(model, text, output, tokens, window, sample, "counts" if counts_only else "ids", layout, **options)
