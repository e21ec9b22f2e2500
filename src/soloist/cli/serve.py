"""`soloist serve`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from soloist.cli.options import (
    DeviceOption,
    DtypeOption,
    KvTokensOption,
    LayoutOption,
    Model,
    PlacementOption,
    RandomWeightsOption,
    SetOption,
    TransportOption,
    engine_options,
)


def serve(
    model: Model,
    layout: LayoutOption = "ep1",
    placement: PlacementOption = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8000,
    api_key: Annotated[
        list[str] | None, typer.Option(envvar="SOLOIST_API_KEY", help="Key that clients must give; several may be.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="What clients call the model; by default the folder's name.")] = None,
    chat_template: Annotated[Path | None, typer.Option(help="Jinja file instead of the checkpoint's own.")] = None,
    max_waiting: Annotated[int, typer.Option(help="Requests without a first token; more are told to wait.")] = 1024,
    request_timeout: Annotated[float, typer.Option(help="Seconds for an answer.")] = 600.0,
    max_body_mb: Annotated[float, typer.Option(help="Largest request, in MB.")] = 8.0,
    drain: Annotated[float, typer.Option(help="Seconds for accepted requests after SIGTERM.")] = 60.0,
    tls_cert: Annotated[Path | None, typer.Option(help="Certificate: serve https.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Its private key.")] = None,
    tls_client_ca: Annotated[Path | None, typer.Option(help="Authorities that must have signed clients.")] = None,
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error.")] = "info",
    device: DeviceOption = "auto",
    dtype: DtypeOption = None,
    transport: TransportOption = "auto",
    kv_tokens: KvTokensOption = None,
    random_weights: RandomWeightsOption = None,
    details: Annotated[bool, typer.Option(help="Count experts and time phases, for metrics and dashboard.")] = True,
    settings: SetOption = None,
) -> None:
    """Serve a model to clients of OpenAI's API, with metrics and a dashboard."""
    from soloist.engine.llm import LLM
    from soloist.server.app import Limits
    from soloist.server.run import Listening, serve
    from soloist.server.served import Served

    limits = Limits(max_waiting, request_timeout, int(max_body_mb * 1e6))
    listening = Listening(host, port, tuple(api_key or ()), drain, tls_cert, tls_key, tls_client_ca)
    watched = [f"count_experts={details}", f"measure={details}"]
    options = engine_options(device, dtype, transport, kv_tokens, random_weights, [*watched, *(settings or [])])
    with LLM(model, layout, placement, options, chat_template=chat_template) as llm:
        serve(Served.of(llm, name or Path(model).name), limits, listening, log_level)


def top(
    url: Annotated[str, typer.Argument(help="Of a running server.")] = "http://127.0.0.1:8000",
    api_key: Annotated[str | None, typer.Option(envvar="SOLOIST_API_KEY", help="Key to give.")] = None,
    once: Annotated[bool, typer.Option("--once", help="Print it once and end.")] = False,
) -> None:
    """Watch a server in the terminal; its /dashboard shows the same in a browser."""
    from rich.console import Console

    from soloist.server.top import watch

    watch(url, api_key, once, Console())
