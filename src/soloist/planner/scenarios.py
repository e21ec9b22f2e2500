"""The reference deployments: every reading of each, scored like any other plan, its claims held against it.

A *case* is one scenario with one model reading and one layout. Claims are judged in `claims.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import msgspec

from soloist.errors import ConfigurationError
from soloist.planner import bounds
from soloist.planner.calibration import Calibration
from soloist.planner.kernels import Kernels
from soloist.planner.layer import Deployment
from soloist.planner.precision import Precision
from soloist.planner.runtime import Runtime
from soloist.planner.score import USABLE, Options, Score, Scorer
from soloist.planner.tables import PUBLISHED
from soloist.specs.cluster import ClusterSpec, cluster
from soloist.specs.files import read_yaml
from soloist.specs.layout import Layout
from soloist.specs.model import Spec
from soloist.specs.presets import preset
from soloist.specs.workload import Load

CHUNK_TOKENS = 8192
DEFAULT_BATCH = 32.0  # sequences an attention group, where a scenario states no load


class Scenario(Spec, frozen=True, kw_only=True):
    """A described deployment. `baseline`: the layout its gains are measured against, on the same cluster."""

    name: str
    about: str
    models: tuple[str, ...]
    cluster: str
    layouts: tuple[str, ...]
    load: str
    claims: dict[str, float]
    baseline: str = ""
    tokens_per_forward: int = 0


class _Document(Spec, frozen=True):
    scenarios: list[Scenario]


class Case:
    """One reading of a scenario: model, layout, and what the cost model says of them."""

    def __init__(self, scenario: Scenario, model: str, layout: str, calibration: Calibration) -> None:
        self.scenario, self.model_name, self.layout_text = scenario, model, layout
        self.calibration = calibration
        spec = preset(model)
        self.deployment = Deployment(model=spec, layout=Layout.parse(layout), precision=Precision.of(spec))
        self.load = Load.parse(scenario.load)
        if not self.load.decodes:
            raise ConfigurationError.of(
                f"{scenario.name}.load.output", self.load.output, "claims are of decoding: from 2"
            )
        self.cluster: ClusterSpec = cluster(scenario.cluster)
        self.kernels = Kernels(self.cluster, calibration)
        self.runtime = Runtime.named("soloist", calibration)

    @property
    def gpus(self) -> int:
        return self.deployment.layout.size

    @property
    def groups(self) -> int:
        return self.deployment.layout.dp * self.deployment.layout.attention_groups

    @property
    def options(self) -> Options:
        chunk = (self.scenario.tokens_per_forward or CHUNK_TOKENS * self.groups) // self.groups
        return Options(chunk_tokens=max(1, chunk))

    @cached_property
    def batch(self) -> float:
        """Sequences of an attention group, at least one; where no load is stated, up to 32 as memory allows."""
        wanted = self.scenario.tokens_per_forward or self.load.sequences
        if wanted:
            return max(1.0, wanted / self.groups)
        return max(1.0, min(DEFAULT_BATCH, self._scorer.most_sequences(self.deployment, self.options) // 1))

    @cached_property
    def score(self) -> Score:
        return self._scorer.score(self.deployment, self.options, self.batch)

    @cached_property
    def _scorer(self) -> Scorer:
        return Scorer(self.kernels, self.runtime, self.load)

    @cached_property
    def baseline(self) -> Case | None:
        """The same model in the baseline's layout."""
        text = self.scenario.baseline
        return Case(self.scenario, self.model_name, text, self.calibration) if text else None

    @cached_property
    def prefill_bound(self) -> float:
        """Most prompt tokens/s."""
        return bounds.prefill_rate(self.deployment, self.kernels, self.load.prompt / 2)

    @cached_property
    def tpot_bound(self) -> float:
        """Least seconds of a decode step."""
        return bounds.decode_seconds(self.deployment, self.kernels, self.batch, self.load.context)

    @property
    def decode_rate(self) -> float:
        """Output tokens/s while decoding, prefill not counted."""
        return self.batch * self.groups / self.score.decode.seconds.value

    @property
    def has_room(self) -> bool:
        """Whether the fullest GPU holds it."""
        return sum(self.score.memory.values()) <= USABLE * 1e9 * self.cluster.gpu.memory_GB


def load_scenarios(path: str | Path | None = None) -> list[Scenario]:
    """The reference scenarios, or a file of the same form. Raises ConfigurationError, naming file and key."""
    path = Path(path or PUBLISHED / "scenarios.yaml")
    try:
        return msgspec.convert(read_yaml(path, "scenarios"), _Document).scenarios
    except msgspec.ValidationError as error:
        form = f"write scenarios: a list of entries with {', '.join(Scenario.__struct_fields__)}"
        raise ConfigurationError.of("scenarios", str(path), f"is no file of scenarios ({error}); {form}") from error


def cases(scenarios: list[Scenario], calibration: Calibration) -> Iterator[Case]:
    """Every reading of every scenario."""
    for scenario in scenarios:
        for layout in scenario.layouts:
            for model in scenario.models:
                yield Case(scenario, model, layout, calibration)
