"""Experts that stay in fp8, in Triton's interpreter, against the same experts as numbers."""

from __future__ import annotations

import msgspec
import pytest
import torch
from torch import Tensor

from soloist.dispatch.base import ExpertBatch, SlotChoice
from soloist.dispatch.local import LocalDispatcher, LocalIndex
from soloist.kernels.grouped_gemm import BLOCK
from soloist.kernels.language import AVAILABLE, INTERPRETED
from soloist.kernels.quantise import FP8
from soloist.models.quantised import dequantise_fp8
from soloist.moe.experts import Experts
from soloist.moe.fp8_experts import ExpertsInFp8, load_experts
from soloist.moe.reader import Fp8Form
from soloist.planner.precision import Precision
from soloist.planner.weights import rank_weights
from soloist.specs.layout import Layout
from soloist.specs.model import ExpertSpec, ModelSpec, RouterSpec
from soloist.specs.parameters import Param
from tests.moe.weights import RandomSource, make_spec

pytestmark = pytest.mark.skipif(not (AVAILABLE and INTERPRETED), reason="needs Triton and TRITON_INTERPRET=1")

Span = tuple[int, int]
EXPERTS, TOKENS = 3, 5


class Fp8Source(RandomSource):
    """Quantised experts in memory. `read` gives what they stand for."""

    def __init__(self, spec: ModelSpec, form: Fp8Form) -> None:
        super().__init__(spec)
        self.form: Fp8Form = form
        generator = torch.Generator().manual_seed(1)
        self.stored: dict[Param, tuple[Tensor, Tensor]] = {}
        for param in [param for param in self.full if param.expert >= 0]:
            q_RC = (self.full[param] * 60).to(FP8)
            rows, columns = q_RC.shape
            size = (rows, 1) if form == "row" else (rows // BLOCK, columns // BLOCK)
            self.stored[param] = q_RC, torch.rand(size, generator=generator) / 60 + 0.005
            self.full[param] = dequantise_fp8(*self.stored[param])

    def fp8_form(self, param: Param) -> Fp8Form | None:
        return self.form if param in self.stored else None

    def read_fp8(self, param: Param, rows: Span | None = None, columns: Span | None = None) -> tuple[Tensor, Tensor]:
        q_RC, scale = self.stored[param]
        spans = [span or (0, n) for n, span in zip(q_RC.shape, (rows, columns), strict=True)]
        q_RC = q_RC[slice(*spans[0]), slice(*spans[1])]
        if self.form == "row":
            return q_RC, scale[slice(*spans[0]), 0]
        return q_RC, scale[tuple(slice(start // BLOCK, stop // BLOCK) for start, stop in spans)]


def spec_of(width: int = BLOCK) -> ModelSpec:
    return make_spec(ExpertSpec(width=width), RouterSpec(top_k=2), experts=EXPERTS, d_model=2 * BLOCK)


def arrived() -> tuple[LocalDispatcher, ExpertBatch]:
    generator = torch.Generator().manual_seed(2)
    slot_TK = torch.rand(TOKENS, EXPERTS, generator=generator).topk(2).indices
    choice = SlotChoice(torch.zeros_like(slot_TK), slot_TK, torch.rand(TOKENS, 2, generator=generator))
    dispatcher = LocalDispatcher(EXPERTS, LocalIndex.of(TOKENS, 2, EXPERTS, torch.device("cpu")))
    return dispatcher, dispatcher.dispatch(torch.randn(TOKENS, 2 * BLOCK, generator=generator), choice)


def assert_near(found_RD: Tensor, wanted_RD: Tensor) -> None:
    """Within what activations in e4m3 allow; the interpreter rounds them towards zero."""
    assert (found_RD - wanted_RD).norm() < 0.15 * wanted_RD.norm()


@pytest.mark.parametrize("form", ["row", "block"])
def test_they_compute_what_the_numbers_do(form: Fp8Form) -> None:
    spec, (dispatcher, batch) = spec_of(), arrived()
    source = Fp8Source(spec, form)
    experts = load_experts(spec, source, 0, range(EXPERTS), 0, 1, keep_fp8=True)
    assert isinstance(experts, ExpertsInFp8)
    assert experts.in_blocks == (form == "block")
    wanted_RD = Experts.load(spec, source, 0, range(EXPERTS)).forward(batch)
    assert_near(experts.forward(batch), wanted_RD)
    nobody = ExpertBatch(*(t[:0] for t in (batch.rows_RD, batch.row_X, batch.weight_X)), batch.offsets_S * 0, None)
    assert experts.forward(nobody).shape == (0, 2 * BLOCK)
    for rows in (1, 1000):
        tiles = experts.tiles(rows)
        assert tiles is not None
        assert experts.takes_rows(tiles)
        y_XD = experts.expanded(batch, tiles)
        assert_near(dispatcher.start_combine_expanded(y_XD, batch).wait(), wanted_RD)


@pytest.mark.parametrize("form", ["row", "block"])
def test_shares_add_up(form: Fp8Form) -> None:
    spec, (_, batch) = spec_of(2 * BLOCK), arrived()
    source = Fp8Source(spec, form)
    shares = [load_experts(spec, source, 0, range(EXPERTS), index, 2, keep_fp8=True) for index in range(2)]
    assert all(isinstance(experts, ExpertsInFp8) for experts in shares)
    total_RD = shares[0].forward(batch) + shares[1].forward(batch)
    assert_near(total_RD, Experts.load(spec, source, 0, range(EXPERTS)).forward(batch))


def test_where_the_kernels_do_not_serve_them_they_become_numbers() -> None:
    wide = spec_of(2 * BLOCK)
    for spec, source, tp, keep in (
        (wide, Fp8Source(wide, "block"), 1, False),  # not wanted
        (wide, Fp8Source(wide, "block"), 4, True),  # shares that cut blocks
        (spec_of(BLOCK), RandomSource(spec_of(BLOCK)), 1, True),  # not in fp8
    ):
        experts = load_experts(spec, source, 0, (2, 0), 0, tp, keep)
        assert type(experts) is Experts
        assert experts.down.dtype == torch.float32


@pytest.mark.parametrize("form", ["row", "block"])
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_they_hold_what_was_planned(form: Fp8Form, tp: int) -> None:
    """In fp8 with their scales, or as fp32 numbers where four shares cut blocks."""
    spec = msgspec.structs.replace(spec_of(4 * BLOCK if tp < 4 else 2 * BLOCK), fp8_experts=True)
    source, layout = Fp8Source(spec, form), Layout(tp=tp)
    for index in range(tp):
        experts = load_experts(spec, source, 0, range(EXPERTS), index, tp, keep_fp8=True)
        scales = (experts.gate_up_scale, experts.down_scale) if isinstance(experts, ExpertsInFp8) else ()
        held = sum(tensor.nbytes for tensor in (experts.gate_up, experts.down, *scales))
        planned = rank_weights(spec, layout.at(index), EXPERTS, Precision.of(spec, "float32"))["experts"]
        assert planned == pytest.approx(held, rel=0.02 if form == "row" else 1e-6)


def test_no_slots() -> None:
    spec, (_, batch) = spec_of(), arrived()
    experts = load_experts(spec, Fp8Source(spec, "block"), 0, (), 0, 1, keep_fp8=True)
    assert not experts.forward(batch).any()
    assert experts.tiles(1) is None
