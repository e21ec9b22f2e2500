"""What all ranks counted reaches the choice among replicas, at the same step on all of them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from soloist.engine.llm import LLM
from soloist.engine.options import EngineOptions
from soloist.engine.replica_loads import ReplicaLoads
from soloist.errors import ConfigurationError
from soloist.moe.router import SlotTable
from soloist.moe.stats import LayerLoad
from soloist.placement.placement import Placement
from soloist.placement.replicas import turns
from soloist.scheduling.request import SamplingParams
from soloist.transport.base import Transport
from tests.ranks import run_threads

NOVELS = Path(__file__).parents[2] / "models" / "novels-moe-11m"

# Expert 0 lies on groups 0 and 1, which hold 1 and 2 besides; tokens of group 2 have it on neither.
PLACEMENT = Placement(experts=4, slots=(((0, 1), (0, 2), (3,)),) * 2)


def rank(transport: Transport) -> list[list[int]]:
    """The turns of expert 0 by group, after each of five steps."""
    counts = iter([[8, 4, 0, 1 + transport.rank], [0, 0, 40, 0]])
    read = lambda: {5: LayerLoad(torch.tensor(next(counts)), 0)} if transport.rank < 2 else {}  # noqa: E731
    stats: Any = SimpleNamespace(experts=4, reader=lambda: SimpleNamespace(take=read))
    tables = {layer: SlotTable(PLACEMENT, index, 2) for index, layer in enumerate((5, 9))}
    world: Any = SimpleNamespace(experts=transport, tp=None, root=transport)
    loads = ReplicaLoads({k: SimpleNamespace(table=t) for k, t in tables.items()}, world, stats, every=2)  # type: ignore[misc]
    seen = []
    for _ in range(5):
        loads.next_step()
        seen.append(np.bincount(tables[5].group_EN[0].numpy(), minlength=3).tolist())
    assert torch.equal(tables[9].group_EN, SlotTable(PLACEMENT, 1, 2).group_EN)  # nothing was counted there
    return seen


def test_turns_follow_what_all_ranks_counted() -> None:
    first, second = np.array([16.0, 8, 0, 3]), np.array([8.0, 4, 80, 1.5])  # sums; the second with half of the first
    wanted = [
        np.bincount(turns(PLACEMENT, 0, 2, load_E=load_E)[0][0], minlength=3).tolist()
        for load_E in (None, None, first, first, second)
    ]
    assert wanted[0] != wanted[2] != wanted[4]
    assert run_threads(3, rank) == [wanted] * 3


def test_answers_stay_what_they_are() -> None:
    """Ranks that wait for each other's counts in between, with replicas, against one rank."""
    params, prompts = SamplingParams(max_tokens=6, temperature=0.0), ["It was a", "She said that"]
    placement = Placement(experts=16, slots=((tuple(range(10)), tuple(range(6, 16))),) * 6)
    fields = {"device": "cpu", "show_progress": False}
    with LLM(NOVELS, "ep2", placement, replicas_every=2, **fields) as llm:
        found = [output.outputs[0].tokens for output in llm.generate(prompts, params)]
    with LLM(NOVELS, "ep1", **fields) as alone:
        assert found == [output.outputs[0].tokens for output in alone.generate(prompts, params)]


@pytest.mark.parametrize("text", ["-1", "often"])
def test_a_wrong_number_of_steps_is_refused(text: str) -> None:
    with pytest.raises(ConfigurationError, match="replicas_every"):
        EngineOptions.of({"replicas_every": text})
