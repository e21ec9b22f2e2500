"""Tokens cross declared nodes: the answers of one node, the rows that the planner predicts, and what is refused."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from soloist.dispatch.rows import RowFormat
from soloist.engine.console import print_exchange
from soloist.engine.crossing import Crossings
from soloist.engine.llm import LLM
from soloist.engine.options import EngineOptions
from soloist.errors import ClusterError, ConfigurationError
from soloist.placement.placement import Placement
from soloist.placement.trace import RoutingTrace
from soloist.placement.traffic import measure
from soloist.scheduling.request import SamplingParams
from soloist.specs.layout import Layout

FIRST = SamplingParams(max_tokens=1, temperature=0.0)
NOVELS = Path(__file__).parents[2] / "models" / "novels-moe-11m"


def crossing(layout: str, gpus_per_node: int, device: str) -> tuple[int, int, list[list[int]]]:
    """Bytes that crossed nodes while the trace's prompts were read, those predicted, and the next tokens."""
    trace = RoutingTrace.load(NOVELS / "routing.trace").keep(300)
    prompts = trace.needed_sample.prompts()
    fields = {"device": device, "dtype": "float32", "gpus_per_node": gpus_per_node, "exchange_chunks": 2}
    fields |= {"kv_tokens": 2048, "prefix_caching": False, "exchange": "hierarchical", "show_progress": False}
    with LLM(NOVELS, layout, **fields) as llm:
        llm.figures()
        found = llm.generate(prompts, FIRST)
        figures, spec, groups = llm.figures(), llm.spec, llm.layout.ep
    row = RowFormat(torch.float32, spec.d_model, spec.router.top_k).row_bytes + 4 * spec.d_model
    node_of_group = [group // gpus_per_node for group in range(groups)]
    rows = measure(Placement.linear(spec, groups), trace, node_of_group).cross_node_rows(hierarchical=True)
    crossed = sum(
        sent
        for rank in figures
        for peer, sent in figures[rank].bytes_to.items()
        if peer // gpus_per_node != rank // gpus_per_node
    )
    return crossed, rows * row, [output.outputs[0].tokens for output in found]


def test_rows_that_cross_are_those_predicted_and_the_text_is_the_same() -> None:
    """Four ranks on two nodes of one machine, with gloo between the nodes and shared memory inside."""
    crossed, predicted, found = crossing("ep4", 2, "cpu")
    assert crossed == predicted
    prompts = RoutingTrace.load(NOVELS / "routing.trace").keep(300).needed_sample.prompts()
    with LLM(NOVELS, "ep1", device="cpu", show_progress=False) as alone:
        assert found == [output.outputs[0].tokens for output in alone.generate(prompts, FIRST)]


@pytest.mark.multigpu
def test_two_gpus_posing_as_two_nodes_send_what_is_predicted() -> None:
    """The rail is NCCL. A router's near tie may turn on a GPU, hence the margin."""
    crossed, predicted, _ = crossing("ep2", 1, "cuda")
    assert abs(crossed - predicted) < 0.001 * predicted


@pytest.mark.multigpu
def test_captured_steps_across_nodes_give_the_text_of_one_gpu() -> None:
    """Two GPUs posing as two nodes: equal splits over NCCL, in graphs."""
    params, fields = SamplingParams(max_tokens=12, temperature=0.0), {"device": "cuda", "dtype": "float32"}
    with LLM(NOVELS, "ep1", show_progress=False, **fields) as alone:
        wanted = alone.generate(["It was a", "She said"], params)
    fields |= {"gpus_per_node": 1, "exchange": "hierarchical", "exchange_captured": True, "max_sequences": 16}
    with LLM(NOVELS, "ep2", show_progress=False, **fields) as llm:
        found = llm.generate(["It was a", "She said"], params)
    assert [f.outputs[0].tokens for f in found] == [w.outputs[0].tokens for w in wanted]


def test_links_are_measured_and_the_choice_is_told() -> None:
    with LLM(NOVELS, "ep2", device="cpu", gpus_per_node=1, transport="gloo", show_progress=False) as llm:
        llm.generate("It was", SamplingParams(max_tokens=3))
        told = llm.figures()[0].exchange
    assert told[0].startswith("links (measured): across nodes ")
    assert all(" a rank: flat" in line for line in told[1:])  # a node of one rank: nothing to fan out to


@pytest.mark.parametrize(
    ("layout", "fields", "told"),
    [
        ("ep1", {}, "one expert group"),
        ("ep4", {}, "4 ranks are one node of gpus_per_node = 8"),
        ("ep4", {"gpus_per_node": 2, "exchange": "flat"}, "flat, as exchange says"),
        ("ep2tp2", {"gpus_per_node": 1}, "gpus_per_node = 1 cut expert groups of tp = 2"),
        ("ep4", {"gpus_per_node": 2}, "share its memory"),
    ],
)
def test_why_there_was_nothing_to_choose(layout: str, fields: dict[str, object], told: str) -> None:
    world: Any = SimpleNamespace(rails=None, seat=SimpleNamespace(layout=Layout.parse(layout)))
    spec: Any = None
    (line,) = Crossings(spec, world, EngineOptions.of(fields), torch.float32).explain()
    assert told in line


def test_chunks_can_be_set(capfd: pytest.CaptureFixture[str]) -> None:
    """Everything settled by options: nothing is measured, and that is what is told."""
    fields = {"gpus_per_node": 1, "exchange": "hierarchical", "exchange_chunks": 3, "show_progress": False}
    with LLM(NOVELS, "ep2", device="cpu", **fields) as llm:
        llm.generate("It was", SamplingParams(max_tokens=2))
        print_exchange(llm)
    assert capfd.readouterr().err.strip() == "by node in 3 chunks, as exchange and exchange_chunks say"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"exchange": "tree"}, "exchange"),
        ({"exchange_chunks": "0"}, "exchange_chunks"),
        ({"exchange_buffer_MB": "0"}, "exchange_buffer_MB"),
        ({"exchange_sms": "-1"}, "exchange_sms"),
        ({"network_link": "fast"}, "network_link"),
    ],
)
def test_wrong_options_are_named(fields: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        EngineOptions.of(fields)


@pytest.mark.parametrize(
    ("layout", "fields", "message"),
    [
        ("ep2", {"transport": "shared_memory", "gpus_per_node": 1}, "joins the ranks of one node"),
        ("ep2tp2", {"gpus_per_node": 1}, "cuts expert groups of tp = 2"),
    ],
)
def test_what_cannot_go_by_node_is_refused(layout: str, fields: dict[str, object], message: str) -> None:
    with pytest.raises((ConfigurationError, ClusterError), match=message):
        LLM(NOVELS, layout, device="cpu", exchange="hierarchical", show_progress=False, **fields)
