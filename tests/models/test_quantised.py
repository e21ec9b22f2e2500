"""fp8 and MXFP4 weights: values against transformers' own dequantisation, rectangles against the whole, bytes read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from soloist.errors import CheckpointError
from soloist.models.checkpoint import Checkpoint
from soloist.models.quantised import dequantise_fp8, dequantise_mxfp4
from soloist.specs.hf import read_config
from soloist.specs.model import ModelSpec
from soloist.specs.parameters import Param
from tests.models.tiny import save_tiny

EXPERT = "model.layers.1.mlp.experts."
WIDE = {"hidden_size": 192, "moe_intermediate_size": 144, "num_hidden_layers": 2, "n_routed_experts": 6}


def random_mxfp4(shape: tuple[int, ...], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    blocks = torch.randint(0, 256, (*shape[:-1], shape[-1] // 32, 16), generator=generator, dtype=torch.uint8)
    return blocks, torch.randint(118, 131, blocks.shape[:-1], generator=generator, dtype=torch.uint8)


def random_fp8(rows: int, columns: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    weight = (torch.randn(rows, columns, generator=generator) * 60).to(torch.float8_e4m3fn)
    return weight, torch.rand(-(-rows // 128), -(-columns // 128), generator=generator) / 500 + 1e-3


def test_mxfp4_values_are_those_of_transformers() -> None:
    blocks, scales = random_mxfp4((3, 10, 96), torch.Generator().manual_seed(0))
    expected = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32).transpose(1, 2)
    assert torch.equal(torch.stack([dequantise_mxfp4(b, s) for b, s in zip(blocks, scales, strict=True)]), expected)


def test_every_mxfp4_nibble() -> None:
    blocks = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16)
    values = dequantise_mxfp4(blocks, torch.full((1, 16), 128, dtype=torch.uint8)).reshape(256, 2)
    e2m1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    table = 2 * torch.cat([e2m1, -e2m1])
    assert torch.equal(values[:, 0], table.repeat(16))
    assert torch.equal(values[:, 1], table.repeat_interleave(16))


def test_an_mxfp4_scale_that_is_no_number() -> None:
    values = dequantise_mxfp4(torch.ones(1, 2, 16, dtype=torch.uint8), torch.tensor([[255, 127]], dtype=torch.uint8))
    assert values[0, :32].isnan().all()
    assert values[0, 32:].isfinite().all()


def test_fp8_values_are_those_of_transformers() -> None:
    weight, scale = random_fp8(256, 384, torch.Generator().manual_seed(0))
    expected = Fp8Dequantize(None)._dequantize_one(weight, scale, torch.float32)
    assert torch.equal(dequantise_fp8(weight, scale), expected)


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory) -> tuple[Path, ModelSpec]:
    """A tiny gpt-oss in its released form."""
    folder = tmp_path_factory.mktemp("mxfp4")
    save_tiny("gpt_oss", folder, hidden_size=96, intermediate_size=64, head_dim=16)
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(1)
    for name in [name for name in tensors if name.endswith("_proj") and "experts" in name]:
        experts, inside, outside = tensors.pop(name).shape
        tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = random_mxfp4((experts, outside, inside), generator)
    save_file(tensors, folder / "model.safetensors")
    return folder, read_config(folder)


@pytest.fixture(scope="module")
def deepseek(tmp_path_factory) -> tuple[Path, ModelSpec]:
    """A tiny DeepSeek-V3 in its released form, with blocks that its matrices do not fill."""
    folder = tmp_path_factory.mktemp("fp8")
    save_tiny("deepseek_v3", folder, **WIDE)
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(1)
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        tensors[name], tensors[name + "_scale_inv"] = random_fp8(*tensors[name].shape, generator)
    save_file(tensors, folder / "model.safetensors")
    return folder, read_config(folder)


def test_gpt_oss_as_released(gpt_oss: tuple[Path, ModelSpec]) -> None:
    folder, spec = gpt_oss
    tensors = load_file(folder / "model.safetensors")
    source = Checkpoint(folder, spec, torch.float32)
    for stack, names in (("gate_up_proj", ("gate", "up")), ("down_proj", ("down",))):
        blocks, scales = (tensors[f"{EXPERT}{stack}_{part}"] for part in ("blocks", "scales"))
        memory = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)  # [E, in, out]
        for expert in range(spec.experts):
            for i, name in enumerate(names):
                assert torch.equal(source.read(Param(name, 1, expert)), memory[expert].t()[i :: len(names)])


def test_deepseek_as_released(deepseek: tuple[Path, ModelSpec]) -> None:
    folder, spec = deepseek
    tensors = load_file(folder / "model.safetensors")
    source = Checkpoint(folder, spec, torch.float32)
    for param, name in (
        (Param("gate", 1, 2), f"{EXPERT}2.gate_proj"),
        (Param("q_b", 0), "model.layers.0.self_attn.q_b_proj"),
    ):
        weight, scale = tensors[name + ".weight"].float(), tensors[name + ".weight_scale_inv"]
        wide = scale.repeat_interleave(128, 0)[: len(weight)].repeat_interleave(128, 1)[:, : weight.shape[1]]
        assert torch.equal(source.read(param), weight * wide)


@pytest.fixture(scope="module")
def by_row(tmp_path_factory) -> tuple[Path, ModelSpec]:
    """A tiny Qwen3-MoE in fp8 with a scale for each row, as compressed-tensors keeps it."""
    folder = tmp_path_factory.mktemp("by_row")
    save_tiny("qwen3_moe", folder)
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(1)
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        tensors[name] = (tensors[name] * 60).to(torch.float8_e4m3fn)
        tensors[name + "_scale"] = torch.rand(len(tensors[name]), 1, generator=generator).bfloat16() / 60
    save_file(tensors, folder / "model.safetensors")
    return folder, read_config(folder)


def test_rows_with_a_scale_each(by_row: tuple[Path, ModelSpec]) -> None:
    folder, spec = by_row
    tensors, source = load_file(folder / "model.safetensors"), Checkpoint(folder, spec, torch.float32)
    name, param = f"{EXPERT}2.down_proj.weight", Param("down", 1, 2)
    weight, scale = tensors[name], tensors[name + "_scale"].float()
    assert torch.equal(source.read(param), weight.float() * scale)
    found, scales = source.read_fp8(param, rows=(3, 9), columns=(2, 7))
    assert torch.equal(found.float(), weight[3:9, 2:7].float())
    assert torch.equal(scales, scale[3:9, 0])
    assert source.fp8_form(param) == "row"
    assert source.fp8_form(Param("router", 1)) is None


def test_blocks_as_they_are_stored(deepseek: tuple[Path, ModelSpec]) -> None:
    folder, spec = deepseek
    source, param = Checkpoint(folder, spec, torch.float32), Param("up", 1, 3)
    weight, scale = source.read_fp8(param, rows=(0, 128))
    assert source.fp8_form(param) == "block"
    assert scale.shape == (1, 2)
    assert torch.equal(dequantise_fp8(weight, scale), source.read(param, rows=(0, 128)))


@pytest.mark.parametrize("form", ["gpt_oss", "deepseek", "by_row"])
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_rectangles_off_the_blocks(request: pytest.FixtureRequest, form: str, data: st.DataObject) -> None:
    folder, spec = request.getfixturevalue(form)
    source = Checkpoint(folder, spec, torch.bfloat16)
    param = Param(data.draw(st.sampled_from(["gate", "up", "down"])), 1, data.draw(st.integers(0, 5)))
    whole = source.read(param)
    spans = [tuple(sorted(data.draw(st.tuples(st.integers(0, n), st.integers(0, n))))) for n in whole.shape]
    assert torch.equal(source.read(param, *spans), whole[tuple(slice(*span) for span in spans)])


def test_bytes_are_those_of_the_quantised_form(gpt_oss, deepseek) -> None:
    source = Checkpoint(*gpt_oss, torch.float32)
    for name in ("gate", "up"):
        source.read(Param(name, 0, 1), (3, 8), (30, 66))
    assert source.bytes_read == 2 * 5 * 3 * 17  # three groups of 16 bytes and a scale, for five rows of each
    source = Checkpoint(*deepseek, torch.float32)
    source.read(Param("up", 1, 0), (100, 140), (3, 120))
    assert source.bytes_read == 40 * 117 + 2 * 1 * 4


def test_a_quarter_of_gpt_oss_is_a_quarter_of_its_bytes(gpt_oss) -> None:
    source = Checkpoint(*gpt_oss, torch.bfloat16)
    for name in ("gate", "up", "down"):
        source.read(Param(name, 0, 0))
    assert source.bytes_read == 3 * 64 * 96 // 2 + 3 * 64 * 96 // 32


@pytest.mark.parametrize(
    ("suffix", "message"),
    [
        ("gate_up_proj_scales", r"gate_up_proj_scales: is missing"),
        ("gate_up_proj_blocks", r"tensors missing: .*gate_up_proj"),
    ],
)
def test_mxfp4_without_its_other_half(gpt_oss, tmp_path: Path, suffix: str, message: str) -> None:
    folder, spec = gpt_oss
    tensors = load_file(folder / "model.safetensors")
    del tensors[EXPERT + suffix]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        Checkpoint(tmp_path, spec, torch.float32)


def test_scales_of_a_wrong_shape(deepseek, tmp_path: Path) -> None:
    folder, spec = deepseek
    name = f"{EXPERT}0.up_proj.weight_scale_inv"
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {name: torch.ones(1, 2)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"{name}: expected shape \(2, 2\), found \(1, 2\)"):
        Checkpoint(tmp_path, spec, torch.float32)


def test_a_quantised_value_that_is_not_finite(deepseek, tmp_path: Path) -> None:
    folder, spec = deepseek
    name = f"{EXPERT}0.up_proj.weight"
    tensors = load_file(folder / "model.safetensors")
    tensors[name].view(torch.uint8)[3, 4] = 0x7F  # e4m3fn's NaN
    save_file(tensors, tmp_path / "model.safetensors")
    source = Checkpoint(tmp_path, spec, torch.float32)
    for read in (source.read, source.read_fp8):
        with pytest.raises(CheckpointError, match=rf"{name}: expected finite numbers .* found 1 "):
            read(Param("up", 1, 0))
