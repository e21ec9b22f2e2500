"""`soloist plan`, `simulate`, `scenarios`, `validate`: what a deployment will do. `calibrate` alone needs torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from soloist.cli.options import only_with, to_draw, to_write
from soloist.errors import CheckpointError, ClusterError, ConfigurationError

if TYPE_CHECKING:
    from soloist.specs.model import ModelSpec

ClusterOption = Annotated[str, typer.Option("--cluster", help="A preset (`soloist cluster` lists them), or a file.")]
LoadOption = Annotated[str, typer.Option("--load", help="prompt=1000,output=200,rate=50,skew=0.8")]
CalibrationOption = Annotated[Path | None, typer.Option(help="Constants measured on your machine.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def plan(
    context: typer.Context,
    model: Annotated[str | None, typer.Argument(help="Folder, hub id or preset.")] = None,
    cluster: ClusterOption = "h100-ib",
    gpus: Annotated[int, typer.Option(max=131072, help="How many of its GPUs.")] = 8,
    load: LoadOption = "prompt=1000,output=200",
    slo: Annotated[str, typer.Option(help="What must hold: ttft=500ms,tpot=50ms")] = "",
    precision: Annotated[str, typer.Option(help="bf16, fp16, fp32, fp8 or fp4; by default the model's own.")] = "",
    baseline: Annotated[str, typer.Option(help="A layout to state the ratio to: tp8pp2.")] = "",
    rejected: Annotated[bool, typer.Option("--rejected", help="List every layout that was turned down.")] = False,
    explain: Annotated[bool, typer.Option("--explain", help="Say how tokens cross nodes, and why.")] = False,
    engine: Annotated[
        str, typer.Option(help="Whose fixed costs to assume: soloist, vllm, sglang, tensorrt.")
    ] = "soloist",
    nvlink_sums: Annotated[bool, typer.Option(help="Soloist's own small sums; without, NCCL's.")] = True,
    routing: Annotated[Path | None, typer.Option(help="A routing trace of the model, instead of even routing.")] = None,
    mixed_graphs: Annotated[
        str, typer.Option(help="Of Soloist: tokens of the prefill steps in graphs: auto, off, or like 256,8192.")
    ] = "auto",
    out: Annotated[Path | None, typer.Option(callback=to_write, help="Write the best layout as a plan file.")] = None,
    from_command: Annotated[
        str, typer.Option("--from", help="A command of vllm serve, SGLang or trtllm-serve to improve.")
    ] = "",
    calibration: CalibrationOption = None,
) -> None:
    """Which layout, how fast, how much memory, what is the bottleneck: a search over every layout."""
    from soloist.planner.commands import run_advise, run_plan
    from soloist.planner.score import Options

    wanted = f"{load},{slo}" if slo else load
    if from_command:
        only_with(context, "--from", {"model", "cluster", "load", "slo", "from_command", "calibration"})
        raise typer.Exit(run_advise(from_command, cluster, wanted, _spec(model) if model else None, calibration))
    if model is None:
        raise ConfigurationError.of("MODEL", None, "name one, or give --from 'vllm serve …'")
    raise typer.Exit(
        run_plan(
            _spec(model),
            cluster,
            gpus,
            wanted,
            precision,
            baseline,
            calibration,
            system=engine,
            out=out,
            options=Options(nvlink_sums=nvlink_sums, mixed_graphs=mixed_graphs),
            rejected=rejected,
            explain=explain,
            routing=routing,
        )  # fmt: skip
    )


def simulate(
    context: typer.Context,
    plan: Annotated[Path | None, typer.Argument(help="A plan file; or give --model, --cluster and --layout.")] = None,
    model: Annotated[str | None, typer.Option(help="Folder, hub id or preset.")] = None,
    cluster: Annotated[str | None, typer.Option(help="A preset (`soloist cluster` lists them), or a file.")] = None,
    layout: Annotated[str, typer.Option(help="ep16, tp8pp2, …")] = "",
    load: Annotated[
        str,
        typer.Option(
            help="By default the plan's, else prompt=1000,output=200; with rate=10 where it states neither rate nor "
            "sequences. Of a trace its own times and lengths."
        ),
    ] = "",
    requests: Annotated[int, typer.Option(help="How many.")] = 1000,
    trace: Annotated[
        Path | None, typer.Option(help="Arrivals and lengths: Azure CSV, ShareGPT JSON, JSON lines.")
    ] = None,
    lose: Annotated[list[str] | None, typer.Option(help="A loss: gpu=3,at=60s,recovery=5s or node=1,at=120s.")] = None,
    drift: Annotated[str, typer.Option(help="Of the hot experts: drift=60,rebalance=120,move=0.05")] = "",
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same run.")] = 0,
    precision: Annotated[str, typer.Option(help="bf16, fp16, fp32, fp8 or fp4; by default the model's own.")] = "",
    mixed_graphs: Annotated[str, typer.Option(help="As of `soloist plan`; by default what the plan says.")] = "",
    as_json: JsonOption = False,
    perfetto: Annotated[Path | None, typer.Option(callback=to_write, help="Write a trace for ui.perfetto.dev.")] = None,
    plot: Annotated[Path | None, typer.Option(callback=to_draw, help="Write a picture.")] = None,
    out: Annotated[Path | None, typer.Option(callback=to_write, help="Write the result as JSON.")] = None,
    calibration: CalibrationOption = None,
) -> None:
    """Requests through a deployment in virtual time, by the engine's own scheduler."""
    from soloist.simulator.commands import run_simulate
    from soloist.specs.cluster import cluster as cluster_named

    if plan:
        described = {"model", "cluster", "layout", "precision"}
        only_with(context, "a plan file", {param.name or "" for param in context.command.params} - described)
    raise typer.Exit(
        run_simulate(
            plan,
            _spec(model) if model else None,
            cluster_named(cluster) if cluster else None,
            layout,
            load,
            requests,
            seed,
            precision,
            trace,
            lose or (),
            drift,
            as_json,
            perfetto,
            plot,
            out,
            calibration,
            mixed_graphs,
        )  # fmt: skip
    )


def scenarios(
    file: Annotated[Path | None, typer.Argument(help="Own scenarios instead of the reference ones.")] = None,
    html: Annotated[Path | None, typer.Option(callback=to_write, help="Write a report with EP sweeps.")] = None,
    as_json: JsonOption = False,
    calibration: CalibrationOption = None,
) -> None:
    """The reference deployments: claim, physical bound and prediction side by side, with a verdict."""
    from soloist.planner.checks import run_scenarios

    raise typer.Exit(run_scenarios(html, as_json, file, calibration))


def validate(
    data: Annotated[Path | None, typer.Option(help="Folder of CSV files instead of the published tables.")] = None,
    as_json: JsonOption = False,
    cross: Annotated[bool, typer.Option("--cross", help="Also leave each fitted row out in turn.")] = False,
    plot: Annotated[Path | None, typer.Option(callback=to_draw, help="Write a picture.")] = None,
    calibration: CalibrationOption = None,
) -> None:
    """Predictions against published measurements: the error of every row and table."""
    from soloist.planner.checks import run_validate

    raise typer.Exit(run_validate(data, as_json, cross, plot, calibration))


def export(
    plan: Annotated[Path, typer.Argument(help="A plan file.")],
    engine: Annotated[str, typer.Option("--for", help="soloist, vllm, sglang, tensorrt or eplb.")] = "soloist",
    folder: Annotated[Path, typer.Option(help="Where the placement's file goes.")] = Path("."),
) -> None:
    """A plan for another engine: its command, the placement's file, the environment, and what cannot be said there."""
    import os

    from soloist.planner.export import export as lines_of
    from soloist.planner.plan import Plan

    for line in lines_of(Plan.load_file(plan), engine, folder, os.environ):
        typer.echo(line)


def crossovers(as_json: JsonOption = False) -> None:
    """Where one layout or setting overtakes another: measured by others, with sources, and predicted."""
    from soloist.planner.checks import run_crossovers

    raise typer.Exit(run_crossovers(as_json))


def cluster(
    name: Annotated[
        str | None, typer.Argument(help="A preset, a file, or the output of `nvidia-smi topo -m` or NCCL's XML.")
    ] = None,
    gpu: Annotated[str, typer.Option(help="The GPU that a topology does not name: H200.")] = "",
    nic: Annotated[float | None, typer.Option(help="GB/s of a NIC, where a topology does not say it: 50.")] = None,
    gpus: Annotated[int, typer.Option(min=0, max=512, help="How many to show; 0: a node, or two.")] = 0,
    out: Annotated[Path | None, typer.Option(callback=to_write, help="Write it as a cluster file.")] = None,
) -> None:
    """What the planner knows of a cluster: rates, and bandwidth and latency from GPU to GPU."""
    from soloist.planner import machines
    from soloist.planner.commands import console
    from soloist.specs.cluster import cluster as cluster_named

    show = console()
    if name is None:
        show.print(machines.presets())
        raise typer.Exit(0)
    spec = cluster_named(name, gpu, nic)
    count = gpus or min(spec.max_gpus or 16, 2 * spec.gpus_per_node if spec.nic_GBps else spec.gpus_per_node, 16)
    for line in machines.description(spec, count):
        show.print(line, highlight=False)
    for table in machines.matrices(spec, count):
        show.print(table)
    if out:
        machines.save_cluster(spec, out)
        show.print(f"Written to {out}; use it: soloist plan MODEL --cluster {out} …", highlight=False)


def calibrate(
    context: typer.Context,
    out: Annotated[Path, typer.Option(callback=to_write, help="File of JSON lines to write.")] = Path(
        "calibration.jsonl"
    ),
    ranks: Annotated[
        int, typer.Option(min=0, help="Processes; 0: one for each GPU, or for each of up to four cores.")
    ] = 0,
    cpu: Annotated[bool, typer.Option("--cpu", help="Leave GPUs alone.")] = False,
    only: Annotated[Literal["", "kernels", "links"], typer.Option(help="Measure only these.")] = "",
    logs: Annotated[
        list[Path] | None, typer.Option("--nccl-tests", help="Read this log of nccl-tests instead of measuring.")
    ] = None,
    cluster: Annotated[str, typer.Option(help="Whose links the logs are of.")] = "",
) -> None:
    """Measure this machine in about a minute, for `--calibration` and `--cluster` of the other commands."""
    from soloist.planner.checks import run_fit

    used = {"out", "logs", "cluster"} if logs else {"out", "ranks", "cpu", "only"}
    only_with(context, "--nccl-tests" if logs else "measuring this machine", used)
    if logs:
        from soloist.planner.machines import calibration_of_logs
        from soloist.specs.cluster import cluster as cluster_named

        if not cluster:
            raise ConfigurationError.of("--cluster", None, "name the cluster that the logs are of")
        for note in calibration_of_logs(logs, cluster_named(cluster), out):
            typer.echo(note, err=True)
        raise typer.Exit(run_fit(out))
    from soloist.probes.calibrate import calibrate as measure

    if status := measure(out, ranks, cpu, only):
        raise ClusterError(f"a rank of the probes ended with {status}; its error stands above")
    raise typer.Exit(run_fit(out))


def _spec(name: str) -> ModelSpec:
    """Of a folder, a hub id or a preset."""
    from soloist.specs.named import shape_of
    from soloist.specs.presets import released

    try:
        return shape_of(name)
    except CheckpointError as error:
        if Path(name).is_dir():
            raise
        try:
            preset = released(name).name
        except ConfigurationError:
            raise error from None
        raise CheckpointError(f"{error}; the preset {preset} has its shape, too") from error
