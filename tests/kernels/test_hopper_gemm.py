"""The Hopper kernel's text in a model of the machine: every order of events that a seed gives leads to the same sums.

Shape legend: X rows, S slots, D input width, N output width.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from soloist.kernels import language
from tests.kernels.gluon_model import Descriptor, Machine, Pointer, stumbles

SOURCE = (Path(language.__file__).parent / "hopper_gemm.py").read_text()
KERNEL = SOURCE[SOURCE.index("M = gl.constexpr(64)") : SOURCE.index("def grouped_gemm_hopper")]
ROWS, BK = 4, 4  # of a warpgroup, and columns of a step: 64 and 64 or 128 on a GPU


@dataclass(frozen=True)
class Case:
    counts: tuple[int, ...]  # rows of a slot
    gated: bool
    blocked: bool
    steps: int
    columns: int
    stages: int
    programs: int
    seed: int

    def run(self, kernel: str = KERNEL) -> None:
        """The kernel's results are the definition's; FaultError if the machine would stumble."""
        draw, slots, d = np.random.default_rng(self.seed), len(self.counts), self.steps * BK
        bn = BK // 2 if self.gated else BK
        n = bn * self.columns
        height = 2 * n if self.gated else n
        x_XD = draw.integers(-3, 4, (sum(self.counts), d)).astype(np.float32) / 8
        weight_SND = draw.integers(-3, 4, (slots, height, d)).astype(np.float32) / 8
        scale_XB = draw.integers(1, 4, (len(x_XD), self.steps)).astype(np.float32)
        scale_SN = draw.integers(1, 4, (slots * height // BK, self.steps)).astype(np.float32)
        offsets_S, out_XN = np.cumsum(self.counts), Pointer(np.full((len(x_XD), n), np.nan, np.float32))
        for program in range(self.programs):
            names = Machine((program,), (self.programs,), self.seed).names()
            exec(kernel, names)
            names["M"] = ROWS
            names["hopper_kernel"](
                Descriptor(x_XD, (2 * ROWS, BK)), Descriptor(weight_SND.reshape(-1, d), (bn, BK)),
                out_XN, Pointer(scale_XB), Pointer(scale_SN), Pointer(offsets_S),
                slots, 128, d, n, bn, BK, self.gated, self.blocked, self.stages,
            )  # fmt: skip
        if self.blocked:
            x_XD = x_XD * scale_XB.repeat(BK, 1)
            weight_SND = weight_SND * scale_SN.repeat(BK, 0).repeat(BK, 1).reshape(weight_SND.shape)
        wanted = [
            x_XD[start:end] @ weight_D.T
            for (start, end), weight_D in zip(pairwise([0, *offsets_S]), weight_SND, strict=True)
        ]
        wanted_XN = np.concatenate(wanted)
        if self.gated:
            gate, up = np.split(wanted_XN, 2, 1)
            wanted_XN = gate / (1 + np.exp(-gate)) * up
        np.testing.assert_allclose(out_XN.memory, wanted_XN, rtol=1e-5, atol=1e-5)


CASES = st.builds(
    Case,
    counts=st.lists(st.integers(0, 4 * ROWS + 1), min_size=1, max_size=4).map(tuple),
    gated=st.booleans(),
    blocked=st.booleans(),
    steps=st.sampled_from((2, 4)),
    columns=st.sampled_from((2, 4)),
    stages=st.integers(2, 4),
    programs=st.integers(1, 3),
    seed=st.integers(0, 1 << 30),
)


@given(case=CASES)
@settings(max_examples=40)
def test_every_order_of_events_gives_the_sums(case: Case) -> None:
    case.run()


WRONG = {
    "one arrival frees a stage": ("init(empty.index(stage), count=2)", "init(empty.index(stage), count=1)"),
    "loading waits for the wrong phase": ("(step // STAGES & 1) ^ 1)", "step // STAGES & 1)"),
    "computing does not count phases": ("step // STAGES & 1)\n    x, w", "0)\n    x, w"),
    "a stage is freed under its product": ("acc = warpgroup_mma_wait(1, [acc])\n        mbarrier", "mbarrier"),
    "a product is used too early": ("two = warpgroup_mma_wait(0", "two = warpgroup_mma_wait(1"),
    "half of the bytes are waited for": ("expect(arrival, BYTES)", "expect(arrival, BYTES // 2)"),
    "a part without rows frees no stage": ("range(step, step + STEPS)", "range(step, step)"),
}


@pytest.mark.parametrize("name", WRONG)
def test_the_model_finds(name: str) -> None:
    right, wrong = WRONG[name]
    assert KERNEL.count(right) == 1
    cases = (Case((9, 0, 3), False, blocked, 4, 2, 3, 1, seed) for seed in range(40) for blocked in (False, True))
    assert any(stumbles(case.run, KERNEL.replace(right, wrong)) for case in cases)
