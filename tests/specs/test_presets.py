"""Models known by name."""

from __future__ import annotations

import math

import pytest

from soloist.errors import ConfigurationError
from soloist.specs.model import ModelSpec
from soloist.specs.parameters import parameters
from soloist.specs.presets import checkpoint_of, names, preset, released


def billions(spec: ModelSpec, experts_only: bool = False) -> float:
    return sum(math.prod(shape) for p, shape in parameters(spec) if p.expert >= 0 or not experts_only) / 1e9


# sizes as their authors state them, in 10⁹ parameters
@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("mixtral-8x7b", 46.7),
        ("mixtral-8x22b", 140.6),
        ("qwen3-30b-a3b", 30.5),
        ("qwen3-235b-a22b", 235.1),
        ("deepseek-v3", 671.0),
        ("gpt-oss-20b", 20.9),
        ("gpt-oss-120b", 116.8),
    ],
)
def test_published_sizes(name: str, size: float) -> None:
    assert round(billions(preset(name)), 1) == size
    assert preset(name).name == name


def test_reference_experts() -> None:
    """134 M parameters for an expert of two matrices, 201 M for SwiGLU: 51.5 · 10⁹ in all."""
    assert round(billions(preset("ref-16l"), experts_only=True), 1) == 51.5
    assert billions(preset("ref-16l-mlp"), experts_only=True) * 1e3 / 256 == pytest.approx(134.2, abs=0.1)
    wide = preset("ref-4l-mlp")
    assert (wide.attention.head_dim, wide.dtype, wide.expert.width) == (512, "float16", 32768)


def test_large_reference() -> None:
    latent, plain = preset("ref-61l"), preset("ref-61l-mha")
    assert (latent.attention.kind, plain.attention.kind) == ("mla", "gqa")
    assert plain.attention.kv_elements == 2 * 128 * 128
    assert (len(latent.moe_layers), latent.experts, latent.router.top_k, latent.shared_width) == (58, 256, 8, 2048)


def test_where_checkpoints_are() -> None:
    assert checkpoint_of("deepseek-v3") == "deepseek-ai/DeepSeek-V3"
    assert checkpoint_of("my-model") == "my-model"  # a folder's name
    assert [name for name in names() if checkpoint_of(name) is None] == ["ref-16l", "ref-4l", "ref-61l"]
    assert checkpoint_of("ref-16l-mlp@1") is checkpoint_of("deepseek-v3@4") is None


def test_releases_by_hub_id() -> None:
    assert released("Qwen/Qwen3-30B-A3B-Instruct-2507").name == "qwen3-30b-a3b"
    assert released("deepseek-ai/DeepSeek-R1-0528").name == "deepseek-v3"
    with pytest.raises(ConfigurationError, match="config.json"):
        released("someone/unheard-of")


def test_variants() -> None:
    assert preset("ref-16l").router.top_k == 2
    assert preset("ref-16l-top1").router.top_k == 1
    spec = preset("ref-16l-mlp-top1@1")
    assert (spec.expert.kind, spec.router.top_k, spec.layers, spec.name) == ("mlp", 1, 1, "ref-16l-mlp-top1@1")
    assert preset("gpt-oss-20b@3").attention.window_layers == (0, 2)
    assert preset("deepseek-v3@4").moe_layers == (3,)


@pytest.mark.parametrize("name", [*names(), "ref-16l-mlp", "ref-61l-mha"])
def test_every_preset_has_experts(name: str) -> None:
    assert preset(name).moe_layers


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("qwen3-30b", "near ones are qwen3-30b-a3b"),
        ("ref-16", "near ones are ref-16l"),
        ("?", "there are ref-16l, ref-4l"),
        ("ref-16l@0", "layers = 0: must lie between 1 and the model's 16"),
        ("ref-16l@17", "layers = 17"),
        ("deepseek-v3@3", "layers = 3: must lie between 4"),
        ("deepseek-v3-mlp", "-mlp belongs to ref-16l and ref-4l"),
        ("ref-16l-mha", "-mha belongs to ref-61l"),
        ("ref-16l-top17", "top_k = 17"),
    ],
)
def test_refused(name: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        preset(name)
