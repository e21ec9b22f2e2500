"""What is to be started for a plan, whoever starts it: how many ranks on how many nodes, the command, the environment.

Ranks are numbered node by node, so that a TP group, a run of neighbouring ranks, lies within a node wherever `tp`
divides the ranks of a node; anything else is refused.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from soloist.errors import ConfigurationError
from soloist.planner.environment import Variable, recommended
from soloist.planner.plan import Plan
from soloist.specs.layout import Layout
from soloist.specs.model import Spec
from soloist.specs.presets import checkpoint_of

MASTER_PORT = 29500
SERVER_PORT = 8000


class Start(Spec, frozen=True, kw_only=True):
    """`arguments` of the command `soloist`, equal on all ranks; `variables` with the reasons for them."""

    layout: Layout
    nodes: int
    ranks_per_node: int
    arguments: tuple[str, ...]
    variables: tuple[Variable, ...] = ()
    master_port: int = MASTER_PORT

    @property
    def ranks(self) -> int:
        return self.nodes * self.ranks_per_node

    @property
    def command(self) -> str:
        """As a shell reads it."""
        return shlex.join(("soloist", *self.arguments))


def start_of(plan: Plan, plan_file: str, model: str | None, arguments: Sequence[str] = (), mpi: bool = False) -> Start:
    """Serve the plan, or run other `arguments` of `soloist` on its ranks.

    Raises ConfigurationError where the layout does not fill equal nodes, or a TP group would lie on two.
    """
    nodes = plan.cluster.nodes(plan.layout.size)
    per_node, rest = divmod(plan.layout.size, nodes)
    if rest:
        remedy = f"its {plan.layout.size} ranks do not fill {nodes} equal nodes; plan for a multiple of the nodes"
        raise ConfigurationError.of("plan.layout", str(plan.layout), remedy)
    if split := split_group(plan.layout, per_node):
        remedy = f"the TP group of ranks {split[0]}–{split[-1]} would lie on two nodes of {per_node}: choose another tp"
        raise ConfigurationError.of("plan.layout", str(plan.layout), remedy)
    chosen = [*arguments] or ["serve", *_served(model or checkpoint_of(plan.model.name), plan.model.name)]
    if "--plan" not in chosen:
        chosen += ["--plan", plan_file]
    if per_node != min(plan.cluster.gpus_per_node, plan.layout.size):
        chosen += ["--set", f"gpus_per_node={per_node}"]
    variables = recommended(plan.cluster, plan.layout.size, mpi)
    return Start(
        layout=plan.layout,
        nodes=nodes,
        ranks_per_node=per_node,
        arguments=tuple(chosen),
        variables=tuple(variables),
    )


def _served(model: str | None, shape: str) -> tuple[str, ...]:
    """A shape without a checkpoint runs with random weights."""
    return (shape, "--random-weights", "1") if model is None else (model,)


def split_group(layout: Layout, ranks_per_node: int) -> tuple[int, ...]:
    """A TP group that does not lie within one node, () if there is none."""
    for rank in range(0, layout.size, layout.tp):
        group = layout.at(rank).tp_peers
        if len({member // ranks_per_node for member in group}) > 1:
            return group
    return ()
