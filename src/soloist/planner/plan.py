"""A plan: which layout, which placement, how it is driven, and what it was predicted to do, as one JSON file.

`plan` writes it; simulator, engine, bench and doctor read it.
"""

from __future__ import annotations

from pathlib import Path

from soloist.errors import ConfigurationError
from soloist.placement.placement import Placement
from soloist.planner.estimate import Estimate, Origin
from soloist.planner.halves import Halves
from soloist.planner.kernels import OWN_LIBRARY
from soloist.planner.layer import Deployment
from soloist.planner.precision import Precision
from soloist.planner.score import Options, Score
from soloist.specs.cluster import ClusterSpec
from soloist.specs.files import read_record, write_record
from soloist.specs.layout import Layout
from soloist.specs.model import ModelSpec, Spec
from soloist.specs.workload import Load


class Figure(Spec, frozen=True, kw_only=True):
    """A predicted number with its unit, error band (share) and origin."""

    value: float
    unit: str
    band: float
    origin: Origin

    @classmethod
    def of(cls, estimate: Estimate, unit: str, factor: float = 1.0) -> Figure:
        return cls(value=estimate.value * factor, unit=unit, band=estimate.band, origin=estimate.origin)


class Plan(Spec, frozen=True, kw_only=True):
    """`batch`: sequences in flight an attention group; `halves`: the steps that overlap as two of them; `predicted` and
    `parts` as computed when it was written, for the fixed costs and overlap of `system`.
    """

    model: ModelSpec
    cluster: ClusterSpec
    layout: Layout
    load: Load
    precision: Precision
    options: Options
    batch: float
    halves: Halves = Halves()
    placement: Placement
    memory_bytes: dict[str, float]
    predicted: dict[str, Figure]
    parts: dict[str, Figure]
    calibration: str
    system: str = OWN_LIBRARY
    format: str = "soloist-plan/1"

    def __post_init__(self) -> None:
        if self.format != "soloist-plan/1":
            raise ConfigurationError.of("format", self.format, "this version reads soloist-plan/1")
        self.placement.check(self.model, self.layout)

    @property
    def overlap(self) -> Halves:
        """What our own engine takes of `halves`: those that pay in another one may not pay in it."""
        return self.halves if self.system == OWN_LIBRARY else Halves()

    def save(self, path: str | Path) -> None:
        write_record(path, self)

    @classmethod
    def load_file(cls, path: str | Path) -> Plan:
        """Raises ConfigurationError for a file that is not a plan, or whose placement does not fit its layout."""
        return read_record(path, cls, "plan")


def plan_of(
    score: Score,
    cluster: ClusterSpec,
    load: Load,
    calibration: str,
    system: str = OWN_LIBRARY,
    halves: Halves | None = None,
) -> Plan:
    """The plan of a deployment that was scored as run by `system`, with no `halves` unless they are given."""
    d = score.deployment
    return Plan(
        model=d.model,
        cluster=cluster,
        layout=d.layout,
        load=load,
        precision=d.precision,
        options=score.options,
        batch=score.batch,
        halves=halves or Halves(),
        placement=placement_of(d),
        memory_bytes={name: round(size) for name, size in score.memory.items()},
        predicted=figures(score),
        parts={name: Figure.of(part, "ms", 1e3) for name, part in score.work.parts.items()},
        calibration=calibration,
        system=system,
    )


def figures(score: Score) -> dict[str, Figure]:
    """The numbers that a user looks at; no TPOT where nothing is decoded."""
    tpot = {"tpot": Figure.of(score.tpot, "ms", 1e3)} if score.decodes else {}
    return tpot | {
        "ttft": Figure.of(score.ttft, "ms", 1e3),
        "output": Figure.of(score.output_rate, "tok/s"),
        "output per GPU": Figure.of(score.output_rate.times(1 / score.gpus), "tok/s/GPU"),
        "prefill": Figure.of(score.input_rate, "tok/s"),
        "prefill per GPU": Figure.of(score.input_rate.times(1 / score.gpus), "tok/s/GPU"),
    }


def placement_of(d: Deployment) -> Placement:
    """Neighbouring experts together; slots beyond one for each expert repeat the experts in turn.

    Without a routing trace no expert is hotter than another; a solved placement takes this one's place.
    """
    if not d.replicas:
        return Placement.linear(d.model, d.layout.ep)
    e, held = d.model.experts, min(d.held, d.model.experts)
    layer = tuple(tuple((group * held + slot) % e for slot in range(held)) for group in range(d.layout.ep))
    return Placement(experts=e, slots=(layer,) * len(d.model.moe_layers))
