"""The local experts against a dense loop over them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from soloist.dispatch.base import ExpertBatch
from soloist.dispatch.rows import expert_major
from soloist.errors import ConfigurationError
from soloist.kernels.reference import grouped_linear, grouped_linear_loop
from soloist.moe.experts import Experts
from soloist.specs.model import ExpertSpec, RouterSpec
from tests.moe.weights import RandomSource, dense_layer, make_spec

KINDS = {
    "swiglu": ExpertSpec(width=24),
    "swiglu, gelu, biases": ExpertSpec(width=24, activation="gelu", bias=True),
    "swiglu, odd": ExpertSpec(width=23),
    "mlp": ExpertSpec(kind="mlp", width=24, activation="relu"),
    "mlp, odd, biases": ExpertSpec(kind="mlp", width=21, activation="gelu", bias=True),
    "gpt-oss": ExpertSpec(kind="clamped_swiglu", width=24, bias=True, limit=0.5),
}
HELD = (4, 1, 3)  # experts in the slots of this group


def local_batch(expert_ids_RK: Tensor, weights_RK: Tensor, rows_RD: Tensor, held: tuple[int, ...]) -> ExpertBatch:
    """The batch of a group that holds some of the experts which its rows chose."""
    slot_RK = torch.full_like(expert_ids_RK, -1, dtype=torch.int32)
    for slot, expert in enumerate(held):
        slot_RK[expert_ids_RK == expert] = slot
    row_X, weight_X, offsets_S = expert_major(slot_RK, weights_RK, len(held))
    used = int(offsets_S[-1]) if held else 0
    return ExpertBatch(rows_RD, row_X[:used], weight_X[:used], offsets_S, None)


def random_rows(experts: int, d_model: int, rows: int = 19, top_k: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    ids_RK = torch.rand(rows, experts, generator=generator).topk(top_k).indices
    return torch.randn(rows, d_model, generator=generator), ids_RK, torch.rand(rows, top_k, generator=generator)


def held_part(ids_RK: Tensor, weights_RK: Tensor, held: tuple[int, ...] = HELD) -> Tensor:
    """The weights, 0 for experts that this group does not hold."""
    return weights_RK * torch.isin(ids_RK, torch.tensor(held))


def test_what_stands_behind_the_last_offset_is_never_read() -> None:
    """As kernels leave the index of a batch behind a larger one."""
    spec = make_spec(KINDS["gpt-oss"], RouterSpec(top_k=3), d_model=16)
    rows_RD, ids_RK, weights_RK = random_rows(spec.experts, 16)
    experts = Experts.load(spec, RandomSource(spec), 0, HELD)
    batch = local_batch(ids_RK, weights_RK, rows_RD, HELD)
    row_X, weight_X = torch.cat([batch.row_X, torch.tensor([4000])]), torch.cat([batch.weight_X, torch.ones(1)])
    behind = ExpertBatch(rows_RD, row_X, weight_X, batch.offsets_S, None, dense=False)
    assert torch.equal(experts.forward(behind), experts.forward(batch))


@pytest.mark.parametrize("d_model", [16, 15])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_a_dense_loop(kind: str, d_model: int) -> None:
    spec = make_spec(KINDS[kind], RouterSpec(top_k=3), d_model=d_model)
    source = RandomSource(spec)
    rows_RD, ids_RK, weights_RK = random_rows(spec.experts, d_model)
    experts = Experts.load(spec, source, 0, HELD)
    y_RD = experts.forward(local_batch(ids_RK, weights_RK, rows_RD, HELD))
    expected = dense_layer(spec, source, rows_RD, ids_RK, held_part(ids_RK, weights_RK))
    torch.testing.assert_close(y_RD.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tp", [2, 5])
def test_shares_add_up(kind: str, tp: int) -> None:
    spec = make_spec(KINDS[kind], RouterSpec(top_k=3))
    source = RandomSource(spec)
    rows_RD, ids_RK, weights_RK = random_rows(spec.experts, spec.d_model)
    batch = local_batch(ids_RK, weights_RK, rows_RD, HELD)
    total = sum(Experts.load(spec, source, 0, HELD, index, tp).forward(batch) for index in range(tp))
    expected = dense_layer(spec, source, rows_RD, ids_RK, held_part(ids_RK, weights_RK))
    torch.testing.assert_close(total.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_within_its_rounding(dtype: torch.dtype) -> None:
    spec = make_spec(ExpertSpec(width=32), RouterSpec(top_k=3))
    source = RandomSource(spec, dtype)
    rows_RD, ids_RK, weights_RK = random_rows(spec.experts, spec.d_model)
    y_RD = Experts.load(spec, source, 0, HELD).forward(local_batch(ids_RK, weights_RK, rows_RD.to(dtype), HELD))
    expected = dense_layer(spec, source, rows_RD.to(dtype), ids_RK, held_part(ids_RK, weights_RK))
    assert y_RD.dtype == dtype
    torch.testing.assert_close(y_RD.double(), expected, rtol=5e-2, atol=5e-2)


def test_the_form_follows_the_strides() -> None:
    for width, dtype, form in (
        (24, torch.float32, grouped_linear),
        (23, torch.float32, grouped_linear_loop),
        (12, torch.bfloat16, grouped_linear_loop),
        (16, torch.bfloat16, grouped_linear),
    ):
        spec = make_spec(ExpertSpec(width=width), RouterSpec(top_k=3))
        for held in (HELD, ()):  # a rank without slots decides as the others do
            experts = Experts.load(spec, RandomSource(spec, dtype), 0, held)
            assert experts.grouped_linear is form
            assert experts.capturable == (form is grouped_linear)


def test_no_slots_and_no_rows() -> None:
    spec = make_spec(ExpertSpec(width=24), RouterSpec(top_k=3))
    source = RandomSource(spec)
    rows_RD, ids_RK, weights_RK = random_rows(spec.experts, spec.d_model, rows=0)
    for held in ((), HELD):
        y_RD = Experts.load(spec, source, 0, held).forward(local_batch(ids_RK, weights_RK, rows_RD, held))
        assert y_RD.shape == (0, spec.d_model)


@pytest.mark.parametrize("has_tail", [False, True])
@pytest.mark.parametrize("width", [24, 23])
def test_a_single_slot_reads_the_rows_where_they_lie(width: int, has_tail: bool) -> None:
    """Rows as a dispatcher leaves them, part of a wider message; unused entries behind the last offset."""
    spec = make_spec(ExpertSpec(width=width), RouterSpec(top_k=3))
    source = RandomSource(spec)
    rows_RD, _, weights_RK = random_rows(spec.experts, spec.d_model + 4)
    rows_RD, slot_RK = rows_RD[:, : spec.d_model], torch.full(weights_RK.shape, -1, dtype=torch.int32)
    slot_RK[torch.arange(len(rows_RD)), torch.arange(len(rows_RD)) % 3] = 0
    row_X, weight_X, offsets_S = expert_major(slot_RK, weights_RK, 1)
    used = len(row_X) if has_tail else len(rows_RD)
    batch = ExpertBatch(rows_RD, row_X[:used], weight_X[:used], offsets_S, None)
    y_RD = Experts.load(spec, source, 0, (4,)).forward(batch)
    expected = dense_layer(spec, source, rows_RD, torch.full_like(slot_RK, 4), weights_RK * (slot_RK == 0))
    torch.testing.assert_close(y_RD.double(), expected, rtol=1e-5, atol=1e-5)


def test_slots_that_nobody_chose() -> None:
    spec = make_spec(ExpertSpec(width=24), RouterSpec(top_k=1))
    source = RandomSource(spec)
    rows_RD, weights_RK = torch.randn(5, spec.d_model), torch.rand(5, 1)
    ids_RK = torch.full((5, 1), 1)
    y_RD = Experts.load(spec, source, 0, HELD).forward(local_batch(ids_RK, weights_RK, rows_RD, HELD))
    torch.testing.assert_close(
        y_RD.double(), dense_layer(spec, source, rows_RD, ids_RK, weights_RK), rtol=1e-5, atol=1e-5
    )


def test_more_shares_than_width_is_refused() -> None:
    spec = make_spec(ExpertSpec(width=3), RouterSpec(top_k=1))
    with pytest.raises(ConfigurationError, match=r"layout.tp = 4.*lower"):
        Experts.load(spec, RandomSource(spec), 0, HELD, 0, 4)
