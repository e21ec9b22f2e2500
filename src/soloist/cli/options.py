"""Options that several commands share, and the engine options made of them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from soloist.errors import ConfigurationError

if TYPE_CHECKING:
    from soloist.engine.options import EngineOptions

Model = Annotated[str, typer.Argument(help="Folder of a checkpoint, hub id, or name of a preset.")]
LayoutOption = Annotated[str, typer.Option("--layout", help="How to cut the model: ep16, tp8pp2, ep64tp2, attn8ep8, …")]
PlacementOption = Annotated[Path | None, typer.Option("--placement", help="File that says which expert lies where.")]
DeviceOption = Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")]
DtypeOption = Annotated[str | None, typer.Option("--dtype", help="float32, bfloat16 or float16.")]
TransportOption = Annotated[str, typer.Option("--transport", help="auto, shared_memory, gloo, nccl or mpi.")]
KvTokensOption = Annotated[int | None, typer.Option("--kv-tokens", help="KV cache of an attention group.")]
RandomWeightsOption = Annotated[int | None, typer.Option("--random-weights", metavar="SEED", help="Make weights up.")]
SetOption = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any other engine option.")]


def engine_options(
    device: str,
    dtype: str | None,
    transport: str,
    kv_tokens: int | None,
    random_weights: int | None,
    settings: list[str] | None,
) -> EngineOptions:
    """The options that the commands running a model share. Raises ConfigurationError."""
    from soloist.engine.options import EngineOptions

    given: dict[str, Any] = {"device": device, "dtype": dtype, "transport": transport}
    given |= {"kv_tokens": kv_tokens, "random_weights": random_weights}
    for setting in settings or []:
        key, equals, value = setting.partition("=")
        if not equals:
            raise ConfigurationError.of("--set", setting, "write KEY=VALUE")
        given[key.replace("-", "_")] = value
    return EngineOptions.of(given)
