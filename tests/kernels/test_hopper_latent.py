"""The text of the Hopper kernel for latent caches in a model of the machine: every order of events that a seed gives
leads to the same attention, of lengths, splits and heads that fill no tile.

Shape legend: N sequences, H heads, K cache rows, Q width of keys, S splits, V width of values.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from soloist.kernels import language
from tests.kernels.gluon_model import Descriptor, Machine, Pointer, stumbles
from tests.kernels.test_paged_attention_triton import Case as PagedCase
from tests.kernels.test_paged_attention_triton import close

SOURCE = (Path(language.__file__).parent / "hopper_latent.py").read_text()
KERNEL = SOURCE[SOURCE.index("R = gl.constexpr(64)") : SOURCE.index("def decode_latent")]
ROWS, WIDE = 4, 8  # heads of a program and keys of a tile, and columns of a piece: 64 and 256 on a GPU
VALUE, KEY = 2 * WIDE, 2 * WIDE + ROWS


@dataclass(frozen=True)
class Case:
    sequences: tuple[tuple[int, int], ...]  # tokens of the step, context
    heads: int = 3
    tiles: int = 1
    splits: int = 1
    page: int = ROWS
    seed: int = 0

    def run(self, kernel: str = KERNEL) -> None:
        """The kernel's results are the definition's; FaultError if the machine would stumble."""
        draw = np.random.default_rng(self.seed)
        starts = np.cumsum([0, *(tokens for tokens, _ in self.sequences)])
        lengths = np.array([context for _, context in self.sequences])
        q_THQ = draw.integers(-3, 4, (starts[-1], self.heads, KEY)).astype(np.float32) / 4
        blocks = int(max(-(-lengths // self.page), default=0)) + 1
        tables_NM = draw.permutation(len(lengths) * blocks).reshape(-1, blocks)
        cache_KQ = np.full((tables_NM.size * self.page, KEY), np.inf, np.float32)
        rows = [self._rows(table_M)[:length] for table_M, length in zip(tables_NM, lengths, strict=True)]
        for row_L in rows:
            cache_KQ[row_L] = draw.integers(-3, 4, (len(row_L), KEY)) / 4
        found = self._launch(kernel, q_THQ, cache_KQ, starts, lengths, tables_NM)
        for i, (tokens, length) in enumerate(self.sequences):
            if tokens == 1:
                wanted_HV = _attention(q_THQ[starts[i]], cache_KQ[rows[i]]) if length else 0.0
                found_HV = found[i if self.splits > 1 else starts[i]]
                np.testing.assert_allclose(found_HV, wanted_HV, rtol=1e-5, atol=1e-5)

    def _rows(self, table_M: np.ndarray) -> np.ndarray:
        return (table_M[:, None] * self.page + np.arange(self.page)).flatten()

    def _launch(
        self, kernel: str, q_THQ: np.ndarray, cache_KQ: np.ndarray, starts: np.ndarray, lengths: np.ndarray,
        tables_NM: np.ndarray,
    ) -> np.ndarray:  # fmt: skip
        """Of each token, or, merged from its splits, of each sequence."""
        sequences = rows = len(lengths)
        q, k = (
            [Descriptor(x.reshape(-1, KEY), (ROWS, columns)) for columns in (WIDE, ROWS)] for x in (q_THQ, cache_KQ)
        )
        tokens = (self.splits, rows) if self.splits > 1 else (1, len(q_THQ))
        sums, stats = (Pointer(np.full((*tokens, self.heads, width), np.nan, np.float32)) for width in (VALUE, 2))
        grid = self.tiles, sequences, self.splits
        for place in product(*map(range, grid)):
            names = Machine(place, grid, self.seed + sum(place)).names()
            exec(kernel, names)
            names.update(R=ROWS, B=ROWS, W=WIDE)
            names["latent_kernel"](
                *q, *k, sums, stats, Pointer(starts), Pointer(lengths), Pointer(tables_NM), 1.0, tables_NM.shape[1],
                self.splits, rows, self.heads, -(-self.heads // self.tiles), self.splits > 1, self.page,
            )  # fmt: skip
        if self.splits == 1:
            return sums.memory[0]
        top_SNH, sum_SNH = np.moveaxis(stats.memory, -1, 0)
        weight_SNH = np.exp2(top_SNH - top_SNH.max(0))
        total_NH = (weight_SNH * sum_SNH).sum(0)
        return (weight_SNH[..., None] * sums.memory).sum(0) / np.where(total_NH == 0, 1, total_NH)[..., None]


def _attention(q_HQ: np.ndarray, k_LQ: np.ndarray) -> np.ndarray:
    logit_HL = q_HQ @ k_LQ.T
    weight_HL = np.exp2(logit_HL - logit_HL.max(1, keepdims=True))
    return weight_HL @ k_LQ[:, :VALUE] / weight_HL.sum(1, keepdims=True)


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [3, 64, 100, 128])
@pytest.mark.parametrize(
    "case",
    [
        PagedCase([], chunks=((1, 1), (1, 64), (1, 130))),  # not split
        PagedCase([], chunks=((1, 3000), (1, 1), (1, 777), (1, 64), (1, 65))),
        PagedCase([], chunks=((1, 130), (5, 40), (1, 3))),
        PagedCase([], chunks=((1, 130), (1, 1000)), padding=(3, 2)),
    ],
)
def test_attention_on_a_gpu(case: PagedCase, heads: int) -> None:
    case = replace(case, kv_heads=[0] * heads, key=576, value=512, block=64, shared=True)
    assert close(*case.run())


CASES = st.builds(
    Case,
    sequences=st.lists(
        st.one_of(
            st.tuples(st.just(1), st.integers(0, 9 * ROWS + 1)), st.tuples(st.sampled_from((0, 2)), st.integers(0, 9))
        ),
        min_size=1,
        max_size=3,
    ).map(tuple),
    heads=st.integers(1, 2 * ROWS),
    tiles=st.just(2),
    splits=st.integers(1, 3),
    page=st.sampled_from((ROWS, 2 * ROWS)),
    seed=st.integers(0, 1 << 30),
)


@given(case=CASES)
@settings(max_examples=60)
def test_every_order_of_events_gives_the_attention(case: Case) -> None:
    case.run()


WRONG = {
    "one group ends a mixture": ("_barriers(1, 2).index(0)", "_barriers(1, 1).index(0)"),
    "weights in use are written over": (
        "wait(mixed, step & 1 ^ 1)\n        p_smem",
        "wait(mixed, 1)\n        p_smem",
    ),
    "factors in use are written over": ("factors.index(stage).store", "factors.index(0).store"),
    "mixing does not wait for factors": ("mbarrier.wait(ranked.index(stage), turn)", ""),
    "mixing does not wait for weights": ("mbarrier.wait(weighed, step & 1)\n        acc", "acc"),
    "a piece is fetched under its product": ("acc_RW = warpgroup_mma_wait(0, [acc_RW])\n        if", "if"),
    "the wrong half follows": ("row, HALF * W", "row, (1 - HALF) * W"),
    "phases of keys are not counted": ("step // 2 & 1\n    acc_RB", "0\n    acc_RB"),
    "what nobody waits for is fetched": (
        "if tile + 2 < last:\n            _fetch(k,",
        "if True:\n            _fetch(k,",
    ),
    "what was not seen is mixed": ("            _blank(seen, stage, k_smem)\n", ""),
    "what was not seen is weighed": ("gl.where(key < seen, logit_RB", "gl.where(key <= seen, logit_RB"),
}


@pytest.mark.parametrize("name", WRONG)
def test_the_model_finds(name: str) -> None:
    right, wrong = WRONG[name]
    assert KERNEL.count(right) == 1
    cases = (Case(((1, 26),), seed=seed) for seed in range(40))
    assert any(stumbles(case.run, KERNEL.replace(right, wrong)) for case in cases)
