"""Made-up weights: the same model under every layout, of a sensible size everywhere."""

from __future__ import annotations

import pytest
import torch
from msgspec.structs import replace

from soloist.models.random_weights import RandomWeights
from soloist.specs.model import AttentionSpec, ExpertSpec, ModelSpec, RopeSpec, RouterSpec
from soloist.specs.parameters import Param, parameters

SPEC = ModelSpec(
    name="small",
    family="reference",
    layers=2,
    d_model=64,
    vocab=300,
    max_positions=128,
    attention=AttentionSpec(heads=4, kv_heads=2, head_dim=16, v_head_dim=16, scale=0.25, bias=True, sinks=True),
    rope=RopeSpec(width=16),
    experts=4,
    router=RouterSpec(top_k=2, correction_bias=True),
    expert=ExpertSpec(width=96),
)


def test_order_and_cuts_do_not_matter() -> None:
    one, other = (RandomWeights(SPEC, 7, torch.float32) for _ in range(2))
    whole = {param: one.read(param) for param, _ in parameters(SPEC)}
    for param, shape in reversed(list(parameters(SPEC))):
        spans = [(n // 3, n - n // 4) for n in shape]
        part = other.read(param, *spans)
        assert torch.equal(part, whole[param][tuple(slice(*span) for span in spans)])
        assert (part.is_contiguous(), tuple(whole[param].shape)) == (True, shape)


def test_every_weight_and_every_seed_differs() -> None:
    source, again = RandomWeights(SPEC, 7, torch.float32), RandomWeights(SPEC, 8, torch.float32)
    drawn = [source.read(Param("up", layer, expert)) for layer in range(2) for expert in range(4)]
    drawn += [source.read(Param("gate", 0, 0)), again.read(Param("up", 0, 0))]
    assert len({tuple(weight.flatten()[:4].tolist()) for weight in drawn}) == len(drawn)


def test_sizes() -> None:
    source = RandomWeights(SPEC, 0, torch.float32)
    assert torch.equal(source.read(Param("attn_norm", 0)), torch.ones(64))
    assert source.read(Param("up", 0, 0)).std().item() == pytest.approx(64**-0.5, rel=0.1)
    assert source.read(Param("down", 0, 0)).std().item() == pytest.approx((96 * 4) ** -0.5, rel=0.1)
    assert source.read(Param("embed")).std().item() == pytest.approx(1, rel=0.1)
    assert 0 < source.read(Param("sinks", 0)).abs().max() < 0.1
    tied = RandomWeights(replace(SPEC, tied=True), 0, torch.float32)
    assert tied.read(Param("embed")).std().item() == pytest.approx(64**-0.5, rel=0.1)


def test_dtypes() -> None:
    source, wide = RandomWeights(SPEC, 0, torch.bfloat16), RandomWeights(SPEC, 0, torch.float32)
    assert torch.equal(source.read(Param("q", 1)), wide.read(Param("q", 1)).bfloat16())
    assert source.read(Param("correction_bias", 1)).dtype == torch.float32
    assert source.bytes_read == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu() -> None:
    one, other = (RandomWeights(SPEC, 7, torch.bfloat16, "cuda") for _ in range(2))
    weight = one.read(Param("up", 1, 2))
    assert torch.equal(other.read(Param("up", 1, 2), (5, 20)), weight[5:20])
    assert weight.std().item() == pytest.approx(64**-0.5, rel=0.1)
