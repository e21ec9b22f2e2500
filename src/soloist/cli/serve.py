"""`soloist serve`."""

from __future__ import annotations

from contextlib import ExitStack, closing
from pathlib import Path
from typing import Annotated, Literal

import typer

from soloist.cli.options import (
    DeviceOption,
    DtypeOption,
    KvTokensOption,
    LayoutOption,
    PlacementOption,
    PlanOption,
    RandomWeightsOption,
    SetOption,
    TransportOption,
    deployment,
    engine_options,
    read_plan,
)

MAX_WAITING = 1024  # requests without a first token, where no plan says better


def serve(
    model: Annotated[str | None, typer.Argument(help="Folder of a checkpoint, hub id, or name of a preset.")] = None,
    layout: LayoutOption = None,
    placement: PlacementOption = None,
    plan: PlanOption = None,
    slo: Annotated[
        str, typer.Option(help="What clients were promised: ttft=500ms,tpot=50ms. By default the plan's.")
    ] = "",
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on.")] = 8000,
    api_key: Annotated[
        list[str] | None, typer.Option(envvar="SOLOIST_API_KEY", help="Key that clients must give; several may be.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="What clients call the model; by default the folder's name.")] = None,
    chat_template: Annotated[Path | None, typer.Option(help="Jinja file instead of the checkpoint's own.")] = None,
    max_waiting: Annotated[
        int | None,
        typer.Option(
            min=1, help="Requests without a first token; more are told to wait. Default: the plan's, or 1024."
        ),
    ] = None,
    request_timeout: Annotated[float, typer.Option(min=0.1, help="Seconds for an answer.")] = 600.0,
    max_body_mb: Annotated[float, typer.Option(min=0.001, help="Largest request, in MB.")] = 8.0,
    drain: Annotated[float, typer.Option(min=0, help="Seconds for accepted requests after SIGTERM.")] = 60.0,
    tls_cert: Annotated[Path | None, typer.Option(help="Certificate: serve https.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Its private key.")] = None,
    tls_client_ca: Annotated[Path | None, typer.Option(help="Authorities that must have signed clients.")] = None,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(help="Of web pages whose scripts may call this server, like https://chat.example.org; * for all."),
    ] = None,
    log_level: Annotated[Literal["debug", "info", "warning", "error"], typer.Option(help="Of the log.")] = "info",
    device: DeviceOption = "auto",
    dtype: DtypeOption = None,
    transport: TransportOption = "auto",
    kv_tokens: KvTokensOption = None,
    random_weights: RandomWeightsOption = None,
    details: Annotated[bool, typer.Option(help="Count experts and time phases, for metrics and dashboard.")] = True,
    settings: SetOption = None,
) -> None:
    """Serve a model to clients of OpenAI's API, with metrics and a dashboard."""
    from soloist.engine.launch import has_front_end
    from soloist.engine.llm import LLM
    from soloist.server.app import Limits
    from soloist.server.run import Listening, serve
    from soloist.server.served import Served
    from soloist.server.slo import Slo, admitted

    made = read_plan(plan, layout)
    promised = Slo.parse(slo) if slo else Slo.of(made.load) if made else Slo()
    most = max_waiting or (admitted(made, promised) if made else None) or MAX_WAITING
    limits = Limits(most, request_timeout, int(max_body_mb * 1e6))
    listening = Listening(
        host, port, tuple(api_key or ()), drain, tls_cert, tls_key, tls_client_ca, tuple(cors_origin or ())
    )
    watched = [f"count_experts={details}", f"measure={details}"]
    options = engine_options(device, dtype, transport, kv_tokens, random_weights, [*watched, *(settings or [])], made)
    model, cut, held = deployment(model, layout, placement, made, options)
    with ExitStack() as stack:
        port_taken = stack.enter_context(closing(listening.bind())) if has_front_end() else None
        llm = stack.enter_context(LLM(model, cut, held, options, chat_template=chat_template))
        assert port_taken is not None, "other ranks than the first end with LLM"
        served = Served.of(llm, name or Path(model).name, promised, made)
        serve(served, limits, listening, port_taken, log_level)


def top(
    url: Annotated[str, typer.Argument(help="Of a running server.")] = "http://127.0.0.1:8000",
    api_key: Annotated[str | None, typer.Option(envvar="SOLOIST_API_KEY", help="Key to give.")] = None,
    once: Annotated[bool, typer.Option("--once", help="Print it once and end.")] = False,
) -> None:
    """Watch a server in the terminal; its /dashboard shows the same in a browser."""
    from rich.console import Console

    from soloist.server.top import watch

    watch(url, api_key, once, Console())
