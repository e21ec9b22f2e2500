"""The shape that `soloist bench exchange` and `soloist bench layer` are asked for: by preset, by flags, or both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import typer

from soloist.errors import ConfigurationError
from soloist.specs.presets import preset

ROUTINGS = ("uniform", "skewed", "remote")
PRESETS = ("prefill", "decode", "wire", "forms", "vdev", "all", "none")  # tables of the exchange

ModelOption = Annotated[str | None, typer.Option("--model", help="A preset: its widths, experts and top-k.")]
TokensOption = Annotated[int | None, typer.Option("--tokens", help="Of each rank; 4096 where a shape is asked for.")]
WidthOption = Annotated[int | None, typer.Option("--d-model", help="Width of a token.")]
ExpertWidthOption = Annotated[int | None, typer.Option("--width", help="Width of an expert.")]
ExpertsOption = Annotated[int | None, typer.Option("--experts", help="Of all ranks together.")]
TopKOption = Annotated[int | None, typer.Option("--top-k", help="Experts of a token.")]
RoutingOption = Annotated[str | None, typer.Option("--routing", help="uniform, skewed, or remote (to the next rank).")]


@dataclass(frozen=True)
class Wanted:
    """The flags, None where not given. Flags go before what the preset says.

    Raises ConfigurationError for a routing that does not exist.
    """

    model: str | None = None
    tokens: int | None = None
    d_model: int | None = None
    width: int | None = None
    experts: int | None = None
    top_k: int | None = None
    routing: str | None = None

    def __post_init__(self) -> None:
        if self.routing not in (None, *ROUTINGS):
            raise ConfigurationError.of("--routing", self.routing, f"choose one of {', '.join(ROUTINGS)}")

    def __bool__(self) -> bool:
        """Whether a shape is asked for, and not the table that comes with the benchmark, in whatever routing."""
        return any(value is not None for key, value in vars(self).items() if key != "routing")

    def flags(self) -> list[str]:
        """As given on the command line."""
        given = {key: value for key, value in vars(self).items() if value is not None}
        return [word for key, value in given.items() for word in (f"--{key.replace('_', '-')}", str(value))]

    def sizes(self, ranks: int, with_experts: bool = False) -> dict[str, Any]:
        """Tokens of a rank, d_model, experts, top_k and routing, and the experts' width if asked for; checked.

        Raises ConfigurationError for what is missing, unknown, or does not go on `ranks` ranks.
        """
        sizes: dict[str, Any] = {"tokens": 4096, "routing": "uniform"}
        if self.model is not None:
            spec = preset(self.model)
            sizes |= {"d_model": spec.d_model, "width": spec.expert.width, "experts": spec.experts}
            sizes |= {"top_k": spec.router.top_k}
        sizes |= {key: value for key, value in vars(self).items() if value is not None and key != "model"}
        if not with_experts:
            sizes.pop("width", None)
        for key in ("tokens", "d_model", "experts", "top_k", *(["width"] if with_experts else [])):
            if sizes.get(key, 0) < 1:
                flag = f"--{key.replace('_', '-')}"
                raise ConfigurationError.of(flag, sizes.get(key), "must be at least 1; give it, or a --model preset")
        if sizes["experts"] % ranks:
            raise ConfigurationError.of("--experts", sizes["experts"], f"must be a multiple of the {ranks} ranks")
        if sizes["top_k"] > sizes["experts"] // (ranks if sizes["routing"] == "remote" else 1):
            raise ConfigurationError.of("--top-k", sizes["top_k"], "must not be more than the experts to choose from")
        return sizes
