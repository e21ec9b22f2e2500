"""GPUs that fail during a simulation.

The unit of loss is an attention group with its peers in all stages: without one of its GPUs it cannot work. The other
groups of the replica wait for `recovery_s`, do the steps under way again and take over its requests; its experts are
served by the others. A replica with a single attention group restarts as a whole instead.
"""

from __future__ import annotations

import re

import msgspec

from soloist.errors import ConfigurationError
from soloist.specs.layout import Layout
from soloist.specs.model import Spec


class Loss(Spec, frozen=True, kw_only=True):
    """`gpus` are ranks of the layout. Compact form: `gpu=3,at=10s,recovery=5s` or `node=1,at=10s`."""

    gpus: tuple[int, ...]
    at_s: float
    recovery_s: float = 10.0

    def __post_init__(self) -> None:
        for key in ("at_s", "recovery_s"):
            if not 0 <= getattr(self, key) < float("inf"):
                raise ConfigurationError.of(f"lose.{key}", getattr(self, key), "must be a number of seconds, 0 or more")
        if not self.gpus or min(self.gpus) < 0:
            raise ConfigurationError.of("lose.gpus", self.gpus, "must name at least one rank, none of them negative")

    @classmethod
    def parse(cls, text: str, gpus_per_node: int = 8) -> Loss:
        """Raises ConfigurationError naming what cannot be read."""
        fields: dict[str, str] = {}
        for part in filter(None, text.replace(" ", "").split(",")):
            key, sign, value = part.partition("=")
            if not sign or key not in ("gpu", "node", "at", "recovery") or key in fields:
                raise ConfigurationError.of("lose", part, "write gpu=3,at=10s,recovery=5s or node=1,at=10s")
            fields[key] = value
        if ("gpu" in fields) == ("node" in fields) or "at" not in fields:
            raise ConfigurationError.of("lose", text, "state one of gpu= and node=, and at=")
        which = fields.get("gpu") or fields["node"]
        if not which.isdecimal():
            raise ConfigurationError.of("lose", which, "gpu and node are numbers, the first being 0")
        first = int(which) if "gpu" in fields else int(which) * gpus_per_node
        count = 1 if "gpu" in fields else gpus_per_node
        times = {f"{key}_s": _seconds(f"lose.{key}", fields[key]) for key in ("at", "recovery") if key in fields}
        return cls(gpus=tuple(range(first, first + count)), **times)

    def groups(self, layout: Layout) -> dict[int, set[int]]:
        """Replica → attention groups that lose a GPU. Raises ConfigurationError for ranks that do not exist."""
        found: dict[int, set[int]] = {}
        for rank in self.gpus:
            if rank >= layout.size:
                raise ConfigurationError.of("lose.gpus", rank, f"layout {layout} has the ranks 0 to {layout.size - 1}")
            seat = layout.at(rank)
            found.setdefault(seat.replica, set()).add(seat.attention_group)
        return found

    def __str__(self) -> str:
        return msgspec.json.encode(self).decode()


def _seconds(key: str, text: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(ms|s)?", text)
    if not match:
        raise ConfigurationError.of(key, text, "must be a time such as 10s, 500ms or 2.5")
    return float(match[1]) * (1e-3 if match[2] == "ms" else 1.0)
