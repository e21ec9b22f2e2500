"""Logits of every family under every layout against transformers, in fp32 on the CPU.

Prompts are prefilled in uneven chunks, then 16 tokens of a fixed continuation are decoded one by one through the paged
cache; each position's logits must lie within 1e-4 of one plain forward pass of the reference.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from soloist.engine.options import EngineOptions
from soloist.engine.runner import Runner
from soloist.engine.world import World
from soloist.models.checkpoint import Checkpoint
from soloist.placement.placement import Placement
from soloist.scheduling.request import Chunk, StepBatch
from soloist.specs.hf import read_config
from soloist.specs.layout import Layout
from soloist.specs.model import ModelSpec
from soloist.transport.base import Transport
from tests.models.tiny import FAMILIES, ODD, save_tiny
from tests.ranks import run_threads

PROMPTS, DECODED, BLOCK = (11, 5, 1), 16, 4
FEW_LAYOUTS = ("ep1", "ep2", "ep3", "ep4", "tp2", "pp2", "tp2pp2", "ep2tp2")
LARGE_LAYOUTS = ("ep16", "tp8pp2", "attn8ep8", "pp4ep4", "ep4tp2", "attn4ep2tp2", "attn2ep4", "dp2ep2")


@dataclass(frozen=True)
class Case:
    """One tiny checkpoint, its sequences and the logits that transformers gives at each of their positions."""

    folder: Path
    spec: ModelSpec
    sequences: list[list[int]]
    expected: list[torch.Tensor]


@pytest.fixture(scope="module", params=[*FAMILIES, *ODD])
def family_case(request, tmp_path_factory) -> Case:
    family, odd = ODD.get(request.param, (request.param, {}))
    return make_case(family, tmp_path_factory.mktemp(family), **odd)


@pytest.fixture(scope="module")
def large_case(tmp_path_factory) -> Case:
    odd = {"num_hidden_layers": 4, "num_experts": 16, "num_experts_per_tok": 3}
    return make_case("qwen3_moe", tmp_path_factory.mktemp("large"), **odd)


def make_case(family: str, folder: Path, **odd) -> Case:
    model = save_tiny(family, folder, **odd).float().eval()
    spec = read_config(folder)
    generator = torch.Generator().manual_seed(1)
    sequences = [torch.randint(1, spec.vocab, (n + DECODED,), generator=generator).tolist() for n in PROMPTS]
    with torch.inference_mode():
        expected = [model(torch.tensor([sequence])).logits[0].float() for sequence in sequences]
    return Case(folder, spec, sequences, expected)


def steps(case: Case, index: int) -> list[Chunk]:
    """The chunks of a sequence: its prompt in two uneven parts, then one token at a time."""
    tokens, prompt = case.sequences[index], PROMPTS[index]
    cuts = [0, prompt // 3, prompt, *range(prompt + 1, prompt + DECODED + 1)]
    blocks = tuple(range(index * 8, index * 8 + 8))
    return [
        Chunk(index, tuple(tokens[start:stop]), start, blocks, samples=True, scores_prompt=True)
        for start, stop in zip(cuts[:-1], cuts[1:], strict=True)
        if stop > start
    ]


def run_rank(transport: Transport, case: Case, layout: Layout, placement: Placement, options: EngineOptions) -> dict:
    """One rank's part; returns the logits of its attention group's sequences where it samples."""
    torch.set_num_threads(1)
    source = Checkpoint(case.folder, case.spec, torch.float32, torch.device("cpu"))
    world = World.build(transport, layout, gpus_per_node=4)
    seat = world.seat
    runner = Runner(case.spec, layout, placement, world, source, options)
    runner.allocate(len(PROMPTS) * 8)
    groups = layout.attention_groups * layout.dp
    own = [
        i for i in range(len(PROMPTS)) if i % groups == seat.replica * layout.attention_groups + seat.attention_group
    ]
    plans = {i: steps(case, i) for i in range(len(PROMPTS))}
    found: dict[int, list[torch.Tensor]] = {i: [] for i in own}
    for step in range(DECODED + 2):
        peak = max(sum(len(p[step].tokens) for p in plans.values() if step < len(p)), 1)
        decodes = all(len(p[step].tokens) == 1 for p in plans.values() if step < len(p))
        chunks = tuple(plans[i][step] for i in own if step < len(plans[i]))
        logits = runner.logits(StepBatch(step, chunks, peak, decodes))
        if logits is not None:
            for chunk, part in zip(chunks, logits.split([len(c.tokens) for c in chunks]), strict=True):
                found[chunk.sequence].append(part.clone())
    world.close()
    return {i: torch.cat(parts) for i, parts in found.items()} if seat.sampler == seat.rank else {}


def check(case: Case, layout: Layout, placement: Placement | None = None, **options) -> None:
    placement = placement or Placement.linear(case.spec, layout.ep)
    settings = EngineOptions(block_size=BLOCK, deadline_s=60, **options)
    results = run_threads(layout.size, lambda t: run_rank(t, case, layout, placement, settings))
    merged = {i: logits for result in results for i, logits in result.items()}
    assert sorted(merged) == list(range(len(PROMPTS)))
    for i, expected in enumerate(case.expected):
        worst = (merged[i] - expected).abs().max().item()
        assert worst <= 1e-4, f"{layout}, sequence {i}: logits differ by {worst}"


@pytest.mark.parametrize("layout", FEW_LAYOUTS)
def test_every_family(family_case: Case, layout: str) -> None:
    check(family_case, Layout.parse(layout))


@pytest.mark.parametrize("replicate_below", [0, 64])
@pytest.mark.parametrize("layout", ["ep1", "ep2", "tp2pp2"])
def test_every_family_in_steps_of_fixed_shape(family_case: Case, layout: str, replicate_below: int) -> None:
    """Four rows for three sequences, or eight: what stands in the others must not matter."""
    check(family_case, Layout.parse(layout), replicate_below=replicate_below, cuda_graphs="4,8")


@pytest.mark.parametrize("layout", ["tp2", "ep2tp2"])
def test_every_family_with_tokens_sharded(family_case: Case, layout: str) -> None:
    check(family_case, Layout.parse(layout), replicate_below=0)


def test_every_family_with_replicas_and_an_empty_rank(family_case: Case) -> None:
    """Random slots on four ranks: rank 1 holds none, some experts have replicas."""
    generator = torch.Generator().manual_seed(3)
    layers = []
    for _ in family_case.spec.moe_layers:
        slots: list[list[int]] = [[], [], [], []]
        for expert in torch.randperm(family_case.spec.experts, generator=generator).tolist():
            for group in {0, 2, 3} if expert % 3 == 0 else {(0, 2, 3)[expert % 3]}:
                slots[group].append(expert)
        layers.append(tuple(tuple(group) for group in slots))
    check(family_case, Layout(ep=4), Placement(experts=family_case.spec.experts, slots=tuple(layers)))


@pytest.mark.parametrize("replicate_below", [0, 64])
@pytest.mark.parametrize("layout", LARGE_LAYOUTS)
def test_large_layouts(large_case: Case, layout: str, replicate_below: int) -> None:
    check(large_case, Layout.parse(layout), replicate_below=replicate_below)
