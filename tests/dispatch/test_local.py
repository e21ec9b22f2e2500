"""The dispatcher that sends nothing, in Triton's interpreter, against the definition.

Shape legend: T tokens, X expanded rows.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from soloist.dispatch.local import LocalDispatcher, LocalIndex
from soloist.errors import CapacityError
from soloist.kernels.language import AVAILABLE, INTERPRETED
from tests.dispatch.cases import Case, Outcome, check, expected, typical

pytestmark = pytest.mark.skipif(not (AVAILABLE and INTERPRETED), reason="needs Triton and TRITON_INTERPRET=1")

CASE = typical(1, torch.float16, tokens=(7,), d_model=13, dead=3)


def dispatcher(case: Case, tokens: int) -> LocalDispatcher:
    slots = len(case.slots[0])
    return LocalDispatcher(slots, LocalIndex.of(tokens, case.top_k, slots, torch.device("cpu")))


def test_index_is_the_defined_one() -> None:
    batch = dispatcher(CASE, 9).dispatch(*CASE.inputs(0))
    used, live = int(batch.offsets_S[-1]), torch.tensor([0, 1, 3, 4, 6])
    rows_RD, row_X = batch.rows_RD[live], torch.searchsorted(live, batch.row_X[:used])
    # Nothing travels, so what comes home of a row is the row.
    out_TD = expected(CASE)[0].out_TD
    check([Outcome(rows_RD, row_X, batch.weight_X[:used], batch.offsets_S, out_TD)], CASE)


def test_weighted_sums_and_zeros_for_tokens_that_go_nowhere() -> None:
    """In one memory, a larger call before a smaller one."""
    local = dispatcher(CASE, 9)
    for case in (replace(CASE, tokens=(9,), seed=3), CASE, replace(CASE, tokens=(0,))):
        x_TD, choice = case.inputs(0)
        batch, x_XD = local.start_dispatch(x_TD, choice).wait_expanded()
        used = int(batch.offsets_S[-1])
        assert torch.equal(x_XD[:used], x_TD[batch.row_X[:used]])
        x_XD[used:] = torch.nan
        out_TD = local.start_combine_expanded(x_XD, batch).wait()
        weight_T = (choice.weight_TK * (choice.slot_TK >= 0)).sum(1, keepdim=True)
        torch.testing.assert_close(out_TD, (x_TD.float() * weight_T).half())


def test_too_many_tokens_are_refused() -> None:
    with pytest.raises(CapacityError, match="7 tokens in a call, the index holds 6"):
        dispatcher(CASE, 6).dispatch(*CASE.inputs(0))
