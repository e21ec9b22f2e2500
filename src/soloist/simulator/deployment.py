"""From a deployment and a load to a finished simulation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from msgspec.structs import replace

from soloist.errors import CapacityError
from soloist.placement.balance import balance
from soloist.placement.placement import Placement
from soloist.planner.calibration import Calibration
from soloist.planner.kernels import Kernels, library_of
from soloist.planner.layer import Deployment
from soloist.planner.memory import KV_BLOCK
from soloist.planner.plan import Plan, placement_of
from soloist.planner.precision import Precision
from soloist.planner.runtime import Runtime
from soloist.planner.score import Options, Scorer
from soloist.scheduling.config import SchedulerConfig
from soloist.simulator.arrivals import Arrivals, arrivals
from soloist.simulator.losses import Loss
from soloist.simulator.planned import PlannedCost
from soloist.simulator.report import Result, result_of
from soloist.simulator.routing import Drift, Routing
from soloist.simulator.simulation import Observer, Simulation
from soloist.simulator.traces import read_trace
from soloist.specs.cluster import ClusterSpec
from soloist.specs.layout import Layout
from soloist.specs.model import ModelSpec, Spec
from soloist.specs.workload import Load


class Setup(Spec, frozen=True, kw_only=True):
    """A deployment to simulate: what runs where, on what, and how much a group takes into a step."""

    deployment: Deployment
    cluster: ClusterSpec
    placement: Placement | None = None  # None: neighbouring experts together
    options: Options = Options()
    max_sequences: int = 256  # of a batch
    calibration: Calibration | None = None  # over the published one
    library: str = ""  # whose exchange kernels; the system's own by default
    system: str = "soloist"  # whose fixed costs and overlap
    load: Load = Load()  # that the plan was made for

    @classmethod
    def of_plan(cls, path: str | Path) -> Setup:
        """What a plan file describes. Raises ConfigurationError where it is none."""
        plan = Plan.load_file(path)
        slots = max(len(group) for groups in plan.placement.slots for group in groups)
        once = -(-plan.model.experts // plan.layout.ep)
        deployment = Deployment(
            model=plan.model, layout=plan.layout, precision=plan.precision, slots=slots if slots > once else 0
        )
        most = max(256, -(-int(plan.batch) // plan.layout.pp))
        return cls(
            deployment=deployment, cluster=plan.cluster, placement=plan.placement, options=plan.options,
            max_sequences=most, load=plan.load, system=plan.system,
        )  # fmt: skip

    @classmethod
    def of(cls, model: ModelSpec, cluster: ClusterSpec, layout: Layout | str, precision: str = "") -> Setup:
        """A model on a layout with the usual options."""
        parsed = Layout.parse(layout) if isinstance(layout, str) else layout
        dtypes = Precision.named(precision) if precision else Precision.of(model)
        cluster.nodes(parsed.size)
        return cls(deployment=Deployment(model=model, layout=parsed, precision=dtypes), cluster=cluster)

    def scorer(self, load: Load) -> Scorer:
        """The planner's view of this deployment under a load."""
        published = Calibration.published()
        used = self.calibration.over(published) if self.calibration else published
        library = self.library or library_of(self.system, used)
        kernels = Kernels(self.cluster, used, library, self.options.nvlink_sums)
        return Scorer(kernels, Runtime.named(self.system, used), load)


def simulate(
    setup: Setup,
    load: Load,
    requests: int = 1000,
    seed: int = 0,
    trace: str | Path | None = None,
    losses: Sequence[Loss] = (),
    drift: Drift | None = None,
    observe: Observer | None = None,
) -> tuple[Result, Simulation]:
    """Run a load through a deployment. With `trace`, its requests (all of them for `requests` = 0) are used instead.

    Raises ConfigurationError for what cannot be meant, CapacityError where not one sequence fits into a GPU's memory or
    every request is refused.
    """
    wanted = read_trace(trace, load, requests, seed) if trace else arrivals(load, requests, seed)
    deployment, layout = setup.deployment, setup.deployment.layout
    scorer = setup.scorer(load)
    cost = PlannedCost(scorer.step_model(replace(deployment, skew=0.0), setup.options))
    run = Simulation(
        layout,
        sizes_of(setup, load, wanted, scorer),
        cost,
        wanted,
        losses=losses,
        routing=routing_of(setup, drift or Drift(skew=load.skew), seed),
        observe=observe,
    ).run()
    if not len(run.steps):
        why = next(iter(run.ledger.refused.values()), "")
        raise CapacityError(f"load: none of {len(wanted)} requests can be served: {why}")
    result = result_of(run, load.ttft_s, load.tpot_s)
    return replace(result, band=cost.band, origins=dict(cost.origins)), run


def sizes_of(setup: Setup, load: Load, requests: Arrivals, scorer: Scorer) -> SchedulerConfig:
    """The scheduler's sizes: the KV cache that is left beside weights and buffers."""
    d, layout = setup.deployment, setup.deployment.layout
    most = scorer.most_sequences(d, setup.options)
    blocks = int(most * -(-load.longest // KV_BLOCK))
    if blocks < 1:
        raise CapacityError(f"layout = {layout}: {d.model.name} leaves no memory for KV cache; use more GPUs")
    return SchedulerConfig(
        blocks=blocks,
        block_size=KV_BLOCK,
        max_batch_tokens=setup.options.chunk_tokens,
        max_sequences=setup.max_sequences,
        max_positions=min(d.model.max_positions, requests.longest + 1),
        prefix_caching=load.prefix > 0,
        in_flight=setup.options.micro_batches or layout.pp,
    )


def routing_of(setup: Setup, drift: Drift, seed: int) -> Routing | None:
    """Skewed routing over the expert groups, balanced as the runtime does; None where all of them get equal shares."""
    if setup.deployment.layout.ep == 1 or not drift.skew:
        return None
    placement = setup.placement or placement_of(setup.deployment)
    return Routing(drift, placement, lambda current, load_LE: balance(current, load_LE).placement, seed)
