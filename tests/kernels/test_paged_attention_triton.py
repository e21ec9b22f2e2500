"""Paged attention in Triton against the definition in fp32: interpreted on the CPU, compiled where there is a GPU.

Whatever no table names, and what lies behind the end of a sequence, is NaN.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from soloist.kernels import paged_attention_triton
from soloist.kernels.attention import attention_of
from soloist.kernels.language import AVAILABLE, INTERPRETED
from soloist.kernels.paged_attention import PagedBatch, paged_attention
from soloist.kernels.paged_attention_triton import HeadTiles, Tiling, TritonPagedAttention, Widths, splits_of, tiling

needs_triton = pytest.mark.skipif(
    not AVAILABLE or not (INTERPRETED or torch.cuda.is_available()),
    reason="needs Triton and TRITON_INTERPRET=1 or CUDA",
)
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
SMALL = Tiling(16, 16, 4, 2)
MIXED = [(1, 40), (9, 9), (1, 1), (3, 33)]  # tokens of the step, context


@dataclass(frozen=True)
class Case:
    kv_heads: list[int]  # of each query head
    key: int = 16
    value: int = 16
    chunks: tuple[tuple[int, int], ...] = tuple(MIXED)
    block: int = 16
    window: int | None = None
    sinks: bool = False
    shared: bool = False
    dtype: torch.dtype = torch.float32 if INTERPRETED else torch.bfloat16
    padding: tuple[int, int] = (0, 0)  # tokens and sequences of a captured mixed step that nobody has

    def tables(self, generator: torch.Generator) -> torch.Tensor:
        """Every block once, in any order, behind three that no sequence has."""
        needed = [-(-context // self.block) for _, context in self.chunks]
        free = (3 + torch.randperm(sum(needed), generator=generator)).split(needed)
        return torch.nn.utils.rnn.pad_sequence(list(free), batch_first=True)

    def run(self, choose=tiling) -> tuple[torch.Tensor, torch.Tensor]:
        """What the kernels make of it, and the definition in fp32."""
        generator = torch.Generator().manual_seed(0)
        starts = [0, *torch.tensor([tokens for tokens, _ in self.chunks]).cumsum(0).tolist()]
        batch = PagedBatch.of(starts, [c for _, c in self.chunks], self.tables(generator).to(DEVICE), self.block)
        slots = (3 + sum(-(-context // self.block) for _, context in self.chunks)) * self.block
        count, heads = max(self.kv_heads) + 1, len(self.kv_heads)

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator).to(self.dtype).to(DEVICE)

        keys, used = (
            draw(slots, count, self.key),
            torch.cat([batch.slots([i], batch.lengths[i])[0] for i in range(len(self.chunks))]),
        )
        values = keys[..., : self.value] if self.shared else draw(slots, count, self.value)
        unused = torch.ones(slots, dtype=torch.bool, device=DEVICE).index_fill_(0, used.long(), False)
        keys[unused], values[unused] = torch.nan, torch.nan
        kv_head_H = torch.tensor(self.kv_heads, device=DEVICE)
        sinks_H = draw(heads).float() if self.sinks else None
        q_THQ = draw(starts[-1], heads, self.key)
        q_UHQ, held = torch.cat([q_THQ, q_THQ.new_zeros(self.padding[0], heads, self.key)]), batch
        if any(self.padding):
            held = self.captured(batch)
        found = TritonPagedAttention(kv_head_H, 0.3, self.window, sinks_H, choose)(q_UHQ, keys, values, held)
        found = found[: len(q_THQ)]
        wide = q_THQ.float(), keys.float(), values.float()
        return found, paged_attention(*wide, batch, kv_head_H, 0.3, self.window, sinks_H)

    def captured(self, batch: PagedBatch) -> PagedBatch:
        """As engine/graphs.py has it: bounds for the host; on the device sequences without tokens behind the last."""
        (tokens, sequences), live, pad = self.padding, len(self.chunks), torch.nn.functional.pad
        tables_NM, end = pad(batch.tables_NM, (0, 0, 0, sequences)), batch.query_starts[-1]
        return PagedBatch(
            [*range(live + sequences), end + tokens], [tables_NM.shape[1] * self.block] * (live + sequences), tables_NM,
            self.block, pad(batch.starts_N, (0, sequences), value=end), pad(batch.lengths_N, (0, sequences), value=1),
        )  # fmt: skip


CASES = {
    "grouped": Case([0, 0, 1, 1]),
    "uneven groups": Case([0, 1, 1, 1, 2]),
    "one query head a KV head": Case([0, 1]),
    "sinks": Case([0, 0, 1, 1], sinks=True),
    "window": Case([0, 0], window=11, sinks=True),
    "widths padded": Case([0, 0], key=33, value=20),
    "key of two parts": Case([0, 0], key=96, value=64),
    "latent": Case([0] * 17, key=80, value=64, shared=True),
    "small blocks": Case([0, 0], block=3),
    "half precision": Case([0, 0], dtype=torch.float16),
}
WAYS = {
    "whole": SMALL,
    "split": replace(SMALL, per_sm=1000),
    "columns divided": replace(SMALL, apart=True),
    "in bulk": replace(SMALL, bulk=True, per_sm=1000),
}


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """NaN never is."""
    tolerance = {torch.float32: 4e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[found.dtype]
    return bool((found.float() - expected).norm() / expected.norm() < tolerance)


@needs_triton
@pytest.mark.parametrize("name", CASES)
def test_cases(name: str) -> None:
    assert close(*CASES[name].run(lambda *_: SMALL))


@needs_triton
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["sinks", "latent"])
def test_ways_to_cut(name: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paged_attention_triton, "FEWEST_KEYS", 16)
    case = replace(CASES[name], chunks=((1, 50), (3, 40)))
    assert close(*case.run(lambda *_: WAYS[way]))


@needs_triton
@pytest.mark.parametrize(
    ("key", "value", "shared", "group"), [(64, 64, False, 4), (128, 128, False, 7), (576, 512, True, 3)]
)
def test_own_choice_of_tiles(key: int, value: int, shared: bool, group: int) -> None:
    assert close(*Case([0] * group, key, value, ((1, 50), (3, 20)), shared=shared).run())


@needs_triton
@pytest.mark.parametrize("splits", [2, 3, 9, 17])
def test_merges_of_few_and_many_splits(splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paged_attention_triton, "FEWEST_KEYS", 16)
    assert close(*Case([0, 0], key=48, value=40, chunks=((1, 16 * splits),)).run(lambda *_: WAYS["split"]))


@needs_triton
def test_a_latent_cache_in_blocks_of_a_tile() -> None:
    assert close(*Case([0] * 17, 576, 512, ((1, 300),), block=64, shared=True).run())


@needs_triton
@pytest.mark.parametrize("way", WAYS)
def test_a_mixed_step_with_padding(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paged_attention_triton, "FEWEST_KEYS", 16)
    case = Case([0, 0, 1, 1], chunks=((1, 50), (5, 40), (1, 3)), padding=(23, 9))
    assert close(*case.run(lambda *_: WAYS[way]))


@needs_triton
def test_a_sequence_without_context_gives_zeros() -> None:
    """As in a graph that is replayed for fewer sequences than it was captured for."""
    batch = PagedBatch.of([0, 1, 2], [0, 3], torch.zeros(2, 2, dtype=torch.int32, device=DEVICE), 16)
    kv_head_H, dtype = torch.zeros(2, dtype=torch.int64, device=DEVICE), Case.dtype
    q, cache = torch.randn(2, 2, 16, device=DEVICE).to(dtype), torch.randn(16, 1, 16, device=DEVICE).to(dtype)
    out = TritonPagedAttention(kv_head_H, 1.0)(q, cache, cache, batch)
    assert not out[0].any()
    assert out[1].isfinite().all()


@pytest.mark.gpu
def test_a_captured_step_follows_lengths_and_tables() -> None:
    case = replace(CASES["grouped"], chunks=((1, 50), (1, 700), (1, 3000)), key=64, value=64, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    tables = case.tables(generator).to(DEVICE)
    batch = PagedBatch.of([0, 1, 2, 3], [50, 700, 3000], tables, case.block)
    q, k, v = (torch.randn(n, h, 64, device=DEVICE).bfloat16() for n, h in ((3, 4), (4000, 2), (4000, 2)))
    kv_head_H = torch.tensor(case.kv_heads, device=DEVICE)
    layer = TritonPagedAttention(kv_head_H, 0.1)
    layer(q, k, v, batch)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = layer(q, k, v, batch)
    other = PagedBatch.of([0, 1, 2, 3], [3000, 1, 333], tables.flip(0), case.block)
    batch.lengths_N.copy_(other.lengths_N)
    batch.tables_NM.copy_(other.tables_NM)
    graph.replay()
    assert close(out, paged_attention(q.float(), k.float(), v.float(), other, kv_head_H, 0.1))


def test_the_definition_serves_what_the_kernels_do_not() -> None:
    kv_head_H = torch.zeros(2, dtype=torch.int64)
    assert not isinstance(attention_of(kv_head_H, 1.0, None, None, torch.float32, 16, 16), TritonPagedAttention)


@given(key=st.integers(1, 640), value=st.integers(1, 512), shared=st.booleans())
def test_widths_cover_keys_and_values(key: int, value: int, shared: bool) -> None:
    w = Widths.of(key, min(value, key), shared)
    for part in (w.first, w.values, w.rest or 16):
        assert part >= 16
        assert part & (part - 1) == 0
    assert w.first + w.rest >= key
    assert w.rest == 0 or w.first < key
    assert w.values >= w.value
    assert not w.shared or w.values == w.first


@given(groups=st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(any), rows=st.sampled_from([4, 16]))
def test_head_tiles_hold_every_head_once_beside_its_own_kind(groups: list[int], rows: int) -> None:
    kv_heads = [kv for kv, size in enumerate(groups) for _ in range(size)]
    tiles = HeadTiles(kv_heads, rows, torch.device("cpu"))
    assert tiles.heads <= rows
    heads = [[h for h in row if h >= 0] for row in tiles.index_CG.tolist()]
    assert sorted(sum(heads, [])) == list(range(len(kv_heads)))
    assert all(kv_heads[h] == tile // tiles.each for tile, row in enumerate(heads) for h in row)


@given(
    programs=st.integers(1, 5000), most=st.integers(1, 128), processors=st.integers(1, 200), per_sm=st.integers(1, 4)
)
def test_splits_fill_the_gpu_evenly(programs: int, most: int, processors: int, per_sm: int) -> None:
    n = splits_of(programs, range(1, most + 1), processors, per_sm)
    assert 1 <= n <= most
    rounds = -(-programs * n // processors)
    if rounds < per_sm:
        assert n == most
    elif n < most:  # no other number would end this much sooner
        assert programs * n / (processors * rounds) > 0.9 * max(
            programs * m / (processors * -(-programs * m // processors))
            for m in range(1, most + 1)
            if -(-programs * m // processors) >= per_sm
        )
