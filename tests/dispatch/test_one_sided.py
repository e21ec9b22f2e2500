"""One-sided exchange in Triton's interpreter, against the definition in cases.py. The ranks run in turn.

Shape legend: T tokens of a rank, D model width, R rows, X expanded rows.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from soloist.dispatch.base import SlotChoice
from soloist.dispatch.forms import COPY, LATENCY, PUSH, Form, choose_form
from soloist.dispatch.lane import ExchangeShape
from soloist.errors import CapacityError, CommunicationError
from soloist.kernels.language import AVAILABLE, INTERPRETED
from tests.dispatch.cases import check, typical
from tests.dispatch.in_turn import dense, exchange, poison, shape_of, small, world

pytestmark = pytest.mark.skipif(not (AVAILABLE and INTERPRETED), reason="needs Triton and TRITON_INTERPRET=1")

FORMS = [LATENCY, replace(PUSH, stages=2), replace(PUSH, pieces=2), COPY, replace(COPY, pull=False, pieces=3)]


@pytest.mark.parametrize(
    "form", FORMS, ids=lambda form: f"{form.name}-{'pull' if form.pull else 'copied'}-{form.pieces}"
)
def test_equal_to_the_definition(form: Form) -> None:
    case = typical(3, torch.float16, node_of_group=(0, 0, 0), d_model=13, tokens=(3, 0, 5), dead=3)
    check(exchange(world(shape_of(case), form), case), case)


def test_forms_take_turns_on_one_lane_and_nothing_old_leaks() -> None:
    case = typical(2, node_of_group=(0, 0), tokens=(4, 3))
    dispatchers = world(shape_of(case), LATENCY)
    for call, form in enumerate([LATENCY, replace(PUSH, pieces=3), LATENCY, COPY]):
        now = replace(case, seed=call, tokens=((3, 2), (0, 4), (0, 0), (1, 3))[call])
        for dispatcher in dispatchers:
            poison(dispatcher)
        shaped = [d.fit(max(case.tokens), small(form)) for d in dispatchers]
        check(exchange(shaped, now), now)


def test_several_dispatches_are_open_at_once() -> None:
    case = typical(2, node_of_group=(0, 0), tokens=(4, 3))
    dispatchers = world(shape_of(case), LATENCY, lanes=2)
    inputs = [case.inputs(rank) for rank in range(2)]
    first = [d.start_dispatch(x, choice) for d, (x, choice) in zip(dispatchers, inputs, strict=True)]
    second = [d.start_dispatch(-x, choice) for d, (x, choice) in zip(dispatchers, inputs, strict=True)]
    for before, after in zip([p.wait() for p in first], [p.wait() for p in second], strict=True):
        rows, _ = dense(before)
        assert torch.equal(before.rows_RD[rows], -after.rows_RD[rows])
    with pytest.raises(AssertionError, match="more lanes"):
        dispatchers[0].start_dispatch(*inputs[0])


def test_the_lane_of_a_call_does_not_depend_on_how_many_came_before() -> None:
    """In a step of several layers one rank may replay a graph, which makes no calls, and another one run it without."""
    case = typical(2, node_of_group=(0, 0), tokens=(4, 3))
    dispatchers = world(shape_of(case), LATENCY, lanes=2)
    for _ in range(3):
        check(exchange(dispatchers, case), case)
        unused = dispatchers[0].lanes[1]
        assert not unused.calls.any()


@pytest.mark.parametrize("form", [LATENCY, COPY, replace(PUSH, pieces=2), replace(COPY, pieces=2)], ids=str)
def test_expanded_rows_and_weighted_sums(form: Form) -> None:
    case = typical(2, node_of_group=(0, 0), tokens=(4, 3))
    dispatchers = world(shape_of(case), form)
    inputs = [case.inputs(rank) for rank in range(2)]
    arriving = [d.start_dispatch(x, choice) for d, (x, choice) in zip(dispatchers, inputs, strict=True)]
    batches = [pending.wait_expanded() for pending in arriving]
    sent_RD = torch.cat([torch.nn.functional.pad(x, (0, 0, 0, max(case.tokens) - len(x))) for x, _ in inputs])
    for batch, x_XD in batches:
        used = int(batch.offsets_S[-1])
        assert torch.equal(x_XD[:used], sent_RD[batch.row_X[:used]])
    back = [d.start_combine_expanded(x_XD, batch) for d, (batch, x_XD) in zip(dispatchers, batches, strict=True)]
    for (x_TD, choice), pending in zip(inputs, back, strict=True):
        torch.testing.assert_close(pending.wait(), x_TD * choice.weight_TK.sum(1, keepdim=True))


@pytest.mark.parametrize("form", [LATENCY, replace(PUSH, pieces=2)], ids=lambda form: form.name)
def test_results_of_one_call_go_home_while_rows_of_another_arrive(form: Form) -> None:
    """Twice over: each lane is used again as soon as its results are home."""
    case = typical(2, node_of_group=(0, 0), tokens=(4, 3))
    dispatchers = world(shape_of(case), form, lanes=2)
    for factors in ((1.0, -2.0), (3.0, 0.5)):
        inputs = [case.inputs(rank) for rank in range(2)]
        arriving = [
            [d.start_dispatch(x * factor, choice) for d, (x, choice) in zip(dispatchers, inputs, strict=True)]
            for factor in factors
        ]
        returning = []
        for call in arriving:
            batches = [pending.wait_expanded() for pending in call]
            returning.append(
                [d.start_combine_expanded(x_XD, batch) for d, (batch, x_XD) in zip(dispatchers, batches, strict=True)]
            )
        for factor, call in zip(factors, returning, strict=True):
            for (x_TD, choice), pending in zip(inputs, call, strict=True):
                torch.testing.assert_close(pending.wait(), x_TD * factor * choice.weight_TK.sum(1, keepdim=True))


def test_ranks_of_a_group_get_the_same_rows_and_their_parts_are_added() -> None:
    shape = ExchangeShape(ranks=4, tp=2, slots=2, top_k=2, d_model=8, capacity=3, dtype=torch.float32)
    dispatchers = world(shape, LATENCY)
    generator = torch.Generator().manual_seed(1)
    inputs = []
    for _ in range(4):
        ids_TK = torch.rand(3, 4, generator=generator).topk(2).indices
        inputs.append((torch.randn(3, 8, generator=generator), SlotChoice(ids_TK // 2, ids_TK % 2, torch.ones(3, 2))))
    arriving = [d.start_dispatch(x, choice) for d, (x, choice) in zip(dispatchers, inputs, strict=True)]
    batches = [pending.wait() for pending in arriving]
    for group in (0, 1):
        one, other = batches[2 * group], batches[2 * group + 1]
        rows, _ = dense(one)
        assert torch.equal(rows, dense(other)[0])
        assert torch.equal(one.rows_RD[rows], other.rows_RD[rows])
        # Member 0 of every group first: ranks 0, 2, then 1, 3.
        by_order = torch.cat([inputs[rank][0] for rank in (0, 2, 1, 3)])
        assert torch.equal(one.rows_RD[rows], by_order[rows])
    parts = [(batch.rows_RD * (rank + 1), batch) for rank, batch in enumerate(batches)]
    back = [d.start_combine(y, batch) for d, (y, batch) in zip(dispatchers, parts, strict=True)]
    for (x_TD, choice), pending in zip(inputs, back, strict=True):
        share = sum((choice.group_TK == group).any(1, keepdim=True) * (4 * group + 3) for group in (0, 1))
        torch.testing.assert_close(pending.wait(), x_TD * share)


def test_fp8_rows_travel_with_their_scales() -> None:
    case = typical(2, node_of_group=(0, 0), d_model=16, tokens=(4, 3))
    for form in (LATENCY, PUSH, COPY):
        dispatchers = world(shape_of(case, fp8=True), form)
        inputs = [case.inputs(rank) for rank in range(2)]
        arriving = [d.start_dispatch(x, choice) for d, (x, choice) in zip(dispatchers, inputs, strict=True)]
        sent_RD = torch.cat([torch.nn.functional.pad(x, (0, 0, 0, max(case.tokens) - len(x))) for x, _ in inputs])
        for dispatcher, pending in zip(dispatchers, arriving, strict=True):
            batch = pending.wait()
            rows, _ = dense(batch)
            got = batch.rows_RD[rows].float() * dispatcher.lanes[0].scale_R(dispatcher.shape)[rows, None]
            # e4m3 has three bits behind the point, of which the interpreter rounds the last towards zero.
            assert (got - sent_RD[rows]).norm() < 0.1 * sent_RD[rows].norm()


def test_a_peer_that_does_not_send_is_named() -> None:
    case = typical(2, node_of_group=(0, 0), tokens=(4, 3))
    alone = world(shape_of(case), LATENCY)[0]
    arriving = alone.start_dispatch(*case.inputs(0), "layer 3")
    alone.watch.check()
    arriving.wait()
    with pytest.raises(CommunicationError, match=r"rank 10: rank 11: .* \(in layer 3, dispatch\)"):
        alone.watch.check()


@pytest.mark.parametrize("expanded", [False, True])
@pytest.mark.parametrize("form", [LATENCY, PUSH, COPY], ids=lambda form: form.name)
def test_one_that_does_not_send_results_home_is_named_with_layer_and_phase(form: Form, expanded: bool) -> None:
    case = typical(2, node_of_group=(0, 0), tokens=(4, 3))
    dispatchers = world(shape_of(case), form)
    arriving = [d.start_dispatch(*case.inputs(rank), "layer 3") for rank, d in enumerate(dispatchers)]
    batch, x_XD = arriving[0].wait_expanded() if expanded else (arriving[0].wait(), None)
    alone = dispatchers[0]
    back = (
        alone.start_combine(alone.room(batch), batch, "layer 3")
        if x_XD is None
        else alone.start_combine_expanded(x_XD, batch, "layer 3")
    )
    alone.watch.check()
    back.wait()
    with pytest.raises(CommunicationError, match=r"rank 10: rank 11: .* \(in layer 3, combine\)"):
        alone.watch.check()


def test_who_is_late_because_of_another_is_not_accused() -> None:
    """Rank 12 never sends. Rank 11 waits for it, too, so its results come home later than rank 10 looks for them."""
    case = typical(3, node_of_group=(0, 0, 0), tokens=(4, 3, 2))
    here, late, _ = world(shape_of(case), LATENCY)
    pending = here.start_dispatch(*case.inputs(0), "layer 3")
    late.start_dispatch(*case.inputs(1), "layer 3")
    batch = pending.wait()
    here.start_combine(torch.zeros_like(batch.rows_RD), batch, "layer 3").wait()
    with pytest.raises(CommunicationError, match=r"rank 10: rank 12: .* \(in layer 3, dispatch\)"):
        here.watch.check()


def test_a_peer_is_named_where_no_place_was_given() -> None:
    watch = world(shape_of(typical(2, node_of_group=(0, 0))), LATENCY)[0].watch
    watch.report[1] = watch.number("")
    with pytest.raises(CommunicationError, match="rank 10: rank 11: no answer within 0.5 s$"):
        watch.check()


def test_too_many_tokens_are_refused() -> None:
    case = typical(2, node_of_group=(0, 0), tokens=(4, 3))
    with pytest.raises(CapacityError, match="rounds"):
        world(shape_of(case), LATENCY)[0].fit(max(case.tokens) + 1)


def test_form_follows_size_and_spread() -> None:
    shape = ExchangeShape(ranks=2, tp=1, slots=8, top_k=8, d_model=2048, capacity=2048, dtype=torch.bfloat16)
    assert choose_form(shape).name == "latency"
    assert choose_form(replace(shape, dtype=torch.float32)).name == "copy"
    assert choose_form(replace(shape, capacity=4096)).name == "copy"
    assert choose_form(replace(shape, capacity=4096, top_k=1)).name == "push"


def test_a_limit_of_sms_is_kept_by_every_form() -> None:
    case = typical(2, node_of_group=(0, 0), tokens=(4, 3))
    one = world(shape_of(case), LATENCY)[0]
    limited = replace(one, sms=20).fit(2)
    assert (limited.form.name, limited.form.programs) == ("latency", 20)
    large = replace(shape_of(case), capacity=4096, d_model=4096)
    assert [choose_form(replace(large, top_k=k), sms=32).programs for k in (1, 8)] == [32, 32]
    assert choose_form(large, sms=10**6).programs == PUSH.programs
