"""Where the tokens of a step go on their way to the experts, and so which steps graphs can hold: one rule for planner
and engine.

stays    on its rank      one GPU, one expert group, or a stage that is one attention group whose ranks all have the
                          tokens: each does what its own experts have to do
inside   its node         kernels read and write the peers' memory; the host is asked nothing
across   to other nodes   the host asks the device for the counts of rows (dispatch/ragged.py, hierarchical.py)

A graph holds no step whose tokens go across: its kernels are started one by one.
"""

from __future__ import annotations

from typing import Literal

from soloist.specs.layout import Layout

Way = Literal["stays", "inside", "across"]


def way(layout: Layout, gpus_per_node: int, replicated: bool = False, repeats: bool = False) -> Way:
    """`replicated`: all ranks of an attention group have the step's tokens. `repeats`: experts have replicas, or some
    groups no expert, so that it takes more than the choice to know which group does the work."""
    shared = replicated and layout.attention_ranks > 1
    if layout.stage_ranks == 1 or (shared and layout.attention_groups == 1 and (layout.ep == 1 or not repeats)):
        return "stays"
    return "inside" if layout.stages_fit(gpus_per_node) else "across"
