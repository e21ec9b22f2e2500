"""Rectangles of a file's tensors: what safetensors reads, from several threads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from soloist.errors import CheckpointError
from soloist.models import reading
from soloist.models.reading import FileReader
from soloist.models.shards import SINGLE, Shards

SHAPES = {"vector": (37,), "matrix": (24, 40), "stack": (3, 10, 16), "blocks": (4, 6, 8)}


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in SHAPES.items()}
    save_file(tensors, folder / SINGLE)
    return Shards(folder), tensors


@st.composite
def rectangles(draw) -> tuple[str, tuple]:
    name = draw(st.sampled_from(sorted(SHAPES)))
    parts = []
    for axis, size in enumerate(SHAPES[name]):
        start = draw(st.integers(0, size))
        is_index = name == "stack" and axis == 0 and start < size
        if name == "blocks" and axis == 2:
            break
        parts.append(start if is_index else slice(start, draw(st.integers(start, size))))
    return name, tuple(parts)


@settings(max_examples=150, deadline=None)
@given(rectangles(), st.sampled_from([1, 7, 64, 8 << 20]))
def test_every_rectangle(shards, rectangle: tuple[str, tuple], block: int) -> None:
    files, tensors = shards
    name, parts = rectangle
    before, reading.BLOCK = reading.BLOCK, block
    try:
        found = files.read(name, *parts)
    finally:
        reading.BLOCK = before
    assert found.shape == tensors[name][parts].shape
    assert torch.equal(found, tensors[name][parts])


def test_from_several_threads(shards) -> None:
    files, tensors = shards
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda i: files.read("stack", i % 3, slice(0, 10), slice(0, 16)).clone(), range(40)):
            assert any(torch.equal(found, part) for part in tensors["stack"])


def test_a_file_that_has_become_shorter(tmp_path) -> None:
    (tmp_path / "short").write_bytes(b"1234")
    with pytest.raises(CheckpointError, match="ends before byte 6"):
        FileReader().read(tmp_path / "short", 2, 4)
