"""Damaged checkpoints: each kind of damage has its own error that names tensor and file, expected and found."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from soloist.errors import CheckpointError, ConfigurationError
from soloist.models.checkpoint import Checkpoint
from soloist.specs.hf import read_config
from soloist.specs.model import ModelSpec
from soloist.specs.parameters import Param, parameters
from soloist.specs.presets import preset
from tests.models.tiny import save_tiny

Q, UP = "model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.experts.3.up_proj.weight"
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    save_tiny("qwen3_moe", folder)
    return folder


@pytest.fixture(scope="module")
def sharded(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    save_tiny("qwen3_moe", folder, max_shard_size="60KB")
    return folder


def read_all(folder: Path, spec: ModelSpec, dtype: torch.dtype = torch.float32) -> None:
    source = Checkpoint(folder, spec, dtype)
    for param, _ in parameters(spec):
        source.read(param)


def changed(whole: Path, folder: Path, change: Callable[[dict[str, Tensor]], object]) -> ModelSpec:
    """A copy of the checkpoint whose tensors went through `change`."""
    tensors = load_file(whole / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    return read_config(whole)


DAMAGE: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "missing": (lambda t: t.pop(UP), rf"1 tensors missing: {UP} \(layer 1 expert 3 up\)"),
    "several missing": (
        lambda t: [t.pop(name) for name in list(t) if "experts" in name],
        r"36 tensors missing: .* and 31 more",
    ),
    "left over": (lambda t: t.update(extra=torch.ones(2)), r"1 tensors left over: extra"),
    "another layer": (
        lambda t: t.update({Q.replace("0", "2", 1): t[Q].clone()}),
        r"left over: model\.layers\.2\.self_attn\.q_proj\.weight",
    ),
    "wrong shape": (
        lambda t: t.update({UP: t[UP][:-1].clone()}),
        rf"{UP}: expected shape \(22, 48\), found \(21, 48\) in .*model\.safetensors",
    ),
    "transposed": (lambda t: t.update({UP: t[UP].t().contiguous()}), r"expected shape \(22, 48\), found \(48, 22\)"),
    "wrong dtype": (lambda t: t.update({Q: t[Q].int()}), rf"{Q}: expected dtype F64 or F32 .*, found I32 in"),
    "fp8 without scales": (lambda t: t.update({Q: t[Q].to(torch.float8_e4m3fn)}), rf"{Q}_scale_inv: is missing"),
    "two forms at once": (
        lambda t: t.update({"model.layers.0.mlp.experts.down_proj": torch.ones(6, 48, 22)}),
        r"left over: model\.layers\.0\.mlp\.experts\.down_proj",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_wrong_tensors_are_found_before_reading(whole: Path, tmp_path: Path, damage: str) -> None:
    change, message = DAMAGE[damage]
    spec = changed(whole, tmp_path, change)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint(tmp_path, spec, torch.float32)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite(whole: Path, tmp_path: Path, value: float) -> None:
    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors[UP][2, 5] = value

    spec = changed(whole, tmp_path, spoil)
    source = Checkpoint(tmp_path, spec, torch.float32)
    with pytest.raises(CheckpointError, match=rf"{UP}: expected finite numbers in .*safetensors, found 1 that are not"):
        source.read(Param("up", 1, 3))
    source.read(Param("up", 1, 3), (3, 22))
    source.read(Param("gate", 1, 3))


def test_values_beyond_the_engines_dtype(whole: Path, tmp_path: Path) -> None:
    spec = changed(whole, tmp_path, lambda t: t.update({Q: t[Q] * 1e6}))
    read_all(tmp_path, spec)
    with pytest.raises(CheckpointError, match=r"q_proj\.weight: expected finite numbers .* as float16"):
        read_all(tmp_path, spec, torch.float16)


@pytest.mark.parametrize("kept", [-1, -1000, 100, 8, 3, 0])
def test_truncated_files(whole: Path, tmp_path: Path, kept: int) -> None:
    data = (whole / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(data[:kept])
    found = len(data[:kept])
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: .* found {found}\b") as caught:
        Checkpoint(tmp_path, read_config(whole), torch.float32)
    assert kept >= 0 or f"expected {len(data)} bytes" in str(caught.value)


def test_a_longer_file(whole: Path, tmp_path: Path) -> None:
    data = (whole / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(data + b"more")
    with pytest.raises(CheckpointError, match=rf"expected {len(data)} bytes, found {len(data) + 4}"):
        Checkpoint(tmp_path, read_config(whole), torch.float32)


def test_a_missing_shard(sharded: Path, tmp_path: Path) -> None:
    shutil.copytree(sharded, tmp_path, dirs_exist_ok=True)
    lost = sorted(tmp_path.glob("*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(CheckpointError, match=rf"{lost.name}: is missing"):
        Checkpoint(tmp_path, read_config(sharded), torch.float32)


def test_a_tensor_in_two_shards(sharded: Path, tmp_path: Path) -> None:
    shutil.copytree(sharded, tmp_path, dirs_exist_ok=True)
    first, second, *_ = sorted(tmp_path.glob("*.safetensors"))
    name, value = next(iter(load_file(first).items()))
    save_file(load_file(second) | {name: value}, second)
    with pytest.raises(CheckpointError, match=rf"{name}: is in two files, .*{first.name} and .*{second.name}"):
        Checkpoint(tmp_path, read_config(sharded), torch.float32)


BAD_INDEX = {
    "not JSON": (lambda index: "{", r"index\.json: is not a JSON object"),
    "no map": (lambda index: json.dumps({"metadata": {}}), r"expected an object weight_map, found None"),
    "no names": (lambda index: json.dumps({"weight_map": {Q: 3}}), rf"expected a file name for {Q}, found 3"),
    "outside": (lambda index: json.dumps({"weight_map": {Q: "../a.safetensors"}}), r"found '\.\./a\.safetensors'"),
    "ghost": (
        lambda index: json.dumps({"weight_map": index | {"ghost": index[Q]}}),
        r"ghost is not in model-.*safetensors",
    ),
    "unlisted": (
        lambda index: json.dumps({"weight_map": {name: file for name, file in index.items() if name != Q}}),
        rf"does not list {Q}, which is in",
    ),
}


@pytest.mark.parametrize("kind", BAD_INDEX)
def test_bad_indices(sharded: Path, tmp_path: Path, kind: str) -> None:
    shutil.copytree(sharded, tmp_path, dirs_exist_ok=True)
    change, message = BAD_INDEX[kind]
    index = json.loads((sharded / INDEX).read_text())["weight_map"]
    (tmp_path / INDEX).write_text(change(index))
    with pytest.raises(CheckpointError, match=message):
        Checkpoint(tmp_path, read_config(sharded), torch.float32)


def test_a_folder_without_safetensors(whole: Path, tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"holds neither model\.safetensors nor"):
        Checkpoint(tmp_path, read_config(whole), torch.float32)


def test_reference_shapes_have_no_checkpoints(whole: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"family = 'reference': has no checkpoints"):
        Checkpoint(whole, preset("ref-16l"), torch.float32)
